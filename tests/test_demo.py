"""The demo: what it writes, a second call repeats nothing, an interrupted one goes on, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from apportion.cli import main
from apportion.language import TextSource, collect
from apportion.recipes import demo as recipe
from apportion.recipes.demo import METHODS, Demo
from apportion.training import Trainer

SENTENCES = ["the cat sat on the old mat", "a dog ran over the hill by the sea", "she read a book about the sun"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Demo:
    folder = tmp_path_factory.mktemp("demo")
    order = torch.randint(len(SENTENCES), (1500,), generator=torch.Generator().manual_seed(0))
    (folder / "text.txt").write_text(" ".join(SENTENCES[i] for i in order.tolist()))
    return Demo(
        model=str(tiny_model_dir),
        out=folder / "out",
        text=TextSource(folder / "text.txt"),
        tokens=8000,
        k=4,
        d_sae=64,
        batch_tokens=256,
        context_tokens=32,
        eval_tokens=400,
        ce_tokens=64,
    )


def figures(demo: Demo) -> dict[str, Any]:
    return json.loads((demo.out / "report.json").read_text())


def test_the_demo_and_a_second_call(demo: Demo) -> None:
    report = demo.run()
    found = figures(demo)
    assert found["k"] == 4 and list(found["methods"]) == list(METHODS) and found["hookpoint"] == "model.layers.1"
    for method in found["methods"].values():
        assert {"fvu", "l0", "dead", "delta_ce"} <= method.keys() and method["tokens"] <= 400
        assert method["training"]["tokens"] > 5000 and method["training"]["tokens"] % 256 == 0
    assert 0 < found["baselines"]["pca"]["fvu"] < 1 and found["baselines"]["pca"]["components"] == 4
    assert (demo.out / "report.html").read_text() == report.page
    assert not (demo.out / "stories.jsonl").exists(), "it was given a text"

    written = {p: p.stat().st_mtime_ns for p in (demo.out / "runs").rglob("*") if p.is_file()}
    assert len(written) >= 3 * 4
    demo.run()
    assert {p: p.stat().st_mtime_ns for p in (demo.out / "runs").rglob("*") if p.is_file()} == written
    assert figures(demo) == found


def test_a_demo_that_was_stopped_while_it_collected_collects_the_rest(
    demo: Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, calls = collect.run_contexts, 0

    def interrupted(*args: Any, **settings: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt
        return run(*args, **settings)

    other = dataclasses.replace(demo, out=tmp_path / "out")
    monkeypatch.setattr(collect, "run_contexts", interrupted)
    with pytest.raises(KeyboardInterrupt):
        other.run()
    manifest = json.loads((tmp_path / "out" / "acts" / "manifest.json").read_text())
    assert manifest["ended"] == "interrupted" and 0 < manifest["rows"] < 8000
    with pytest.raises(ZeroDivisionError):  # far enough
        monkeypatch.setattr(Trainer, "step", lambda *a: 1 / 0)
        other.run()
    manifest = json.loads((tmp_path / "out" / "acts" / "manifest.json").read_text())
    assert (manifest["ended"], manifest["rows"]) == ("complete", 8000)


@pytest.mark.slow
def test_an_interrupted_demo_goes_on(demo: Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = dataclasses.replace(demo, out=tmp_path / "stopped")
    steps, step = [], Trainer.step

    def interrupted(self: Trainer, batch: Any) -> Any:
        steps.append(1)
        if len(steps) == 40:
            signal_now()
        return step(self, batch)

    def signal_now() -> None:
        import signal

        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Trainer, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    monkeypatch.undo()
    assert (stopped.out / "runs" / "topk" / "config.json").exists(), "finished before"
    assert not (stopped.out / "runs" / "mutual_choice" / "config.json").exists()
    assert not (stopped.out / "report.html").exists()
    stopped.run()
    demo.run()
    for name, method in figures(stopped)["methods"].items():
        whole = figures(demo)["methods"][name]
        assert method["fvu"] == pytest.approx(whole["fvu"], rel=1e-6) and method["l0"] == whole["l0"]


def test_other_settings_and_other_folders_are_refused(demo: Demo, tmp_path: Path) -> None:
    demo.run()
    with pytest.raises(ValueError, match="k = 4, now it is 3"):
        dataclasses.replace(demo, k=3).run()
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds no demo"):
        dataclasses.replace(demo, out=tmp_path).run()
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(ValueError, match="k must lie"):
        dataclasses.replace(demo, out=tmp_path / "new", k=65).run()
    assert not (tmp_path / "new").exists(), "refused before anything was written"


def test_a_text_that_is_too_short_leaves_nothing_behind(demo: Demo, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text(" ".join(SENTENCES * 20))
    short = dataclasses.replace(demo, out=tmp_path / "out", text=TextSource(tmp_path / "short.txt"))
    with pytest.raises(ValueError, match="too few for training"):
        short.run()
    assert not short.out.exists()


def test_only_what_the_demo_wrote_is_removed(demo: Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody puts a file into the folder while the demo collects."""
    (tmp_path / "short.txt").write_text(" ".join(SENTENCES * 20))
    short = dataclasses.replace(demo, out=tmp_path / "out", text=TextSource(tmp_path / "short.txt"))
    collect = recipe.collect

    def collecting(*args, **kwargs):
        (short.out / "notes.txt").write_text("mine")
        (short.out / "stories.jsonl").write_text("mine too: the demo was given a text")
        return collect(*args, **kwargs)

    monkeypatch.setattr(recipe, "collect", collecting)
    with pytest.raises(ValueError, match="too few for training"):
        short.run()
    assert sorted(p.name for p in short.out.iterdir()) == ["notes.txt", "stories.jsonl"]


@pytest.mark.slow
def test_the_embedded_model_offline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The README's first command, on a hundredth of the tokens."""
    out = tmp_path / "apportion-demo"
    assert main(["demo", "--out", str(out), "--tokens", "30k", "--d-sae", "256"]) == 0
    assert str(out / "report.html") in capsys.readouterr().out
    found = json.loads((out / "report.json").read_text())
    assert found["model"]["name_or_path"] == "embedded" and found["k"] == 16
    assert (out / "stories.jsonl").exists()
    for method in found["methods"].values():
        assert 0 < method["fvu"] < found["baselines"]["pca"]["fvu"]
        assert method["l0"] == pytest.approx(16, rel=0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "no-such-folder/model"], "no-such-folder"),
        (["--text", "missing.txt"], "missing.txt"),
        (["--hookpoint", "model.layers.99"], "model.layers.99"),
        (["--tokens", "5k"], "too few"),
        (["--k", "0"], "k must lie"),
        (["--hookpoint", "model.layers.*"], "the demo takes one"),
    ],
)
def test_mistakes_leave_nothing_behind(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["demo", "--out", str(out), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()

"""`apportion sweep`: which runs it makes, that each is that of `apportion train`, and what it leaves."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from apportion.cli import main, parse
from apportion.cli.sources import goes_with, stream_of
from apportion.cli.sweep import Sweep, variants
from apportion.training import Trainer

SMALL = ["--d-sae", "64", "--batch-tokens", "64", "--tokens", "640"]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((900, 16)).astype(np.float32))
    return tmp_path / "x.npy"


def sweep(rows: Path, out: Path, *words: str) -> int:
    return main(["sweep", str(rows), "--sae", "topk,mutual_choice", "--k", "4,8", *SMALL, "--out", str(out), *words])


def test_which_runs() -> None:
    found = variants(["acts", "--sae=topk,mutual_choice", "--k", "4", "--lr", "1e-3, 3e-3", "--hookpoint", "a,b"])
    assert list(found) == ["topk-lr1e-3", "topk-lr3e-3", "mutual_choice-lr1e-3", "mutual_choice-lr3e-3"]
    assert found["topk-lr3e-3"] == ["acts", "--k", "4", "--hookpoint", "a,b", "--sae=topk", "--lr=3e-3"]
    with pytest.raises(ValueError, match="use train"):
        variants(["acts", "--k", "4", "--resume"])
    with pytest.raises(ValueError, match="names no value"):
        variants(["acts", "--k", ","])
    with pytest.raises(ValueError, match="called k4"):
        variants(["acts", "--k", "4,4"])
    assert list(variants(["--resume", "acts,1", "--lr", "../a,b"])) == ["lr.._a", "lrb"]


def test_each_run_is_that_of_train(rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep(rows, tmp_path / "runs", "--seed", "0,1", "--data-seed", "0", "--screen", "None") == 0
    names = [f"{sae}-k{k}-seed{seed}" for sae in ("topk", "mutual_choice") for k in (4, 8) for seed in (0, 1)]
    index = json.loads((tmp_path / "runs" / "sweep.json").read_text())["runs"]
    assert list(index) == names and all(0 < run["fvu"] < 2 and run["trained_tokens"] == 640 for run in index.values())
    said = capsys.readouterr().out
    assert all(name in said for name in names) and "apportion report" in said
    for name in ("topk-k8-seed1", "mutual_choice-k4-seed0"):
        sae, k, seed = name.replace("seed", "").replace("k4", "4").replace("k8", "8").rsplit("-", 2)
        words = ["train", str(rows), "--sae", sae, "--k", k, "--seed", seed, "--data-seed", "0", "--screen", "None"]
        assert main([*words, *SMALL, "--out", str(tmp_path / "alone")]) == 0
        for file in ("model.safetensors", "config.json", "run.json"):
            assert (tmp_path / "alone" / file).read_bytes() == (tmp_path / "runs" / name / file).read_bytes(), file
        (tmp_path / "alone").rename(tmp_path / f"alone-{name}")


def test_mistakes_are_said_before_anything_is_made(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mistakes = {
        ("--sae", "topk,nosuch"): "nosuch",
        ("--resume",): "no sweep to resume",
        ("--batch-tokens", "64,10k"): "rows",
    }
    for words, said in mistakes.items():
        assert sweep(rows, tmp_path / "runs", *words) == 2, words
        assert said in capsys.readouterr().err
    assert not list((tmp_path / "runs").glob("*/config.json"))


def test_a_second_run_and_resume(rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep(rows, tmp_path / "runs") == 0
    capsys.readouterr()
    assert sweep(rows, tmp_path / "runs") == 2
    assert "already holds a sweep" in capsys.readouterr().err
    before = (tmp_path / "runs" / "sweep.json").read_text()
    assert sweep(rows, tmp_path / "runs", "--resume") == 0
    assert (
        json.loads(before)["runs"].keys() == json.loads((tmp_path / "runs" / "sweep.json").read_text())["runs"].keys()
    )


def test_one_that_fails_is_named(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer.step

    def failing(self: Trainer, batch: object) -> object:
        if self.sae.name == "topk" and self.sae.k == 8:
            raise ValueError("out of luck")
        return step(self, batch)

    monkeypatch.setattr(Trainer, "step", failing)
    assert sweep(rows, tmp_path / "runs") == 2
    assert "topk-k8 failed: out of luck" in capsys.readouterr().out
    index = json.loads((tmp_path / "runs" / "sweep.json").read_text())["runs"]
    assert index["topk-k8"]["error"] == "out of luck" and "fvu" in index["mutual_choice-k8"]


def test_runs_that_do_not_fit_into_memory_are_made_one_after_the_other(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("apportion.cli.sweep.free_bytes", lambda: 1.0)
    passes: list[list[str]] = []
    train = Sweep._train

    def noted(self: Sweep, sources: dict[str, object]) -> object:
        passes.append(list(sources))
        return train(self, sources)

    monkeypatch.setattr(Sweep, "_train", noted)
    assert sweep(rows, tmp_path / "runs") == 0
    assert len(passes) == 4 and all(len(names) == 1 for names in passes)


def test_runs_that_read_otherwise_are_on_streams_of_their_own() -> None:
    words = ["embedded", "--hookpoint", "model.layers.1", "--tokens", "10k", "--out", "runs"]
    for option, values in (("--context-tokens", "64,128"), ("--norm-outlier", "5,10"), ("--seed", "0,1")):
        runs = parse(["sweep", *words, option, values]).runs.values()
        assert len({goes_with(train) for train in runs}) == len({stream_of(train) for train in runs}) == 2
    runs = parse(["sweep", *words, "--k", "4,8"]).runs.values()
    assert len({stream_of(train) for train in runs}) == 1
    runs = parse(["sweep", *words, "--batch-tokens", "512,1k"]).runs.values()
    assert len({stream_of(train) for train in runs}) == 2 and len({goes_with(train) for train in runs}) == 1

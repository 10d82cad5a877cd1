"""Whole numbers beyond what torch takes, and run folders whose records were damaged: one line, exit code 2."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from trials import trials

import apportion as ap
from apportion.cli import main
from apportion.recipes.experiment import same_run
from apportion.rows import ArraySource

SAE = ["train", "{acts}", "--k", "4", "--d-sae", "64", "--batch-tokens", "256", "--lr", "3e-3", "--out", "{out}"]


@pytest.fixture(scope="module")
def acts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache") / "acts"
    words = ["collect", "embedded", "--hookpoint", "model.layers.1", "--tokens", "4k", "--context-tokens", "32"]
    assert main([*words, "--out", str(folder)]) == 0
    return folder


def run(words: list[str], acts: Path, out: Path) -> int:
    try:
        return main([word.format(acts=acts, out=out) for word in words])
    except SystemExit as refused_by_the_parser:
        return int(refused_by_the_parser.code or 0)


OPTIONS = ["seed", "d-sae", "k-aux", "batch-tokens", "tokens", "log-every-steps", "dead-window-tokens", "k"]
NUMBERS = [str(2**63), str(2**64), "1e30", str(-(2**63) - 1), "9" * 5000, "1e999999999"]


@pytest.mark.fault("numbers beyond 64 bits")
@pytest.mark.parametrize("number", trials(NUMBERS, 3))
@pytest.mark.parametrize("option", trials(OPTIONS, 4))
def test_options_beyond_64_bits(option: str, number: str, acts: Path, tmp_path: Path, capsys) -> None:
    assert run([*SAE, f"--{option}={number}"], acts, tmp_path / "run") == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said and "Unexpected" not in said and said
    assert not (tmp_path / "run").exists()


@pytest.mark.fault("numbers beyond 64 bits")
@pytest.mark.parametrize("number", trials(["1e17", "1e18", str(2**63 - 1), "-1", "0"], 2))
@pytest.mark.parametrize("option", trials([o for o in OPTIONS if o not in ("k", "tokens")], 3))
def test_options_within_64_bits(option: str, number: str, acts: Path, tmp_path: Path, capsys) -> None:
    """They mean something, or one line says why they do not."""
    code = run([*SAE, "--tokens", "1k", f"--{option}={number}"], acts, tmp_path / "run")
    said = capsys.readouterr().err
    assert code in (0, 2, 3) and "Traceback" not in said and "Unexpected" not in said
    assert (tmp_path / "run" / "config.json").exists() == (code != 2), said


@pytest.mark.parametrize("number", [2**63, -(2**63) - 1])
def test_settings_in_python(number: int) -> None:
    with pytest.raises(ValueError, match=f"seed = {number} does not fit into 64 bits"):
        ap.create("topk", d_in=4, d_sae=8, k=2, seed=number)
    with pytest.raises(ValueError, match="log_every_steps"):
        ap.TrainConfig(log_every_steps=2**63)
    assert ap.create("topk", d_in=4, d_sae=8, k=2, seed=-1).config.seed == -1


def remove(*path: str):
    def change(content: dict) -> None:
        for name in path[:-1]:
            content = content[name]
        del content[path[-1]]

    return change


def put(value, *path: str):
    def change(content: dict) -> None:
        for name in path[:-1]:
            content = content[name]
        content[path[-1]] = value

    return change


RECORDS = {
    **{f"run.json without {name}": ("run.json", remove(name)) for name in ("sae", "train", "source")},
    **{f"run.json with {n} a list": ("run.json", put([1], n)) for n in ("sae", "train", "source", "objective")},
    "run.json without a name": ("run.json", remove("sae", "name")),
    "run.json with settings a number": ("run.json", put(3, "sae", "settings")),
    **{f"trainer.json without {n}": ("trainer.json", remove(n)) for n in ("steps", "tokens", "seconds", "source")},
    "trainer.json with steps as text": ("trainer.json", put("ten", "steps")),
    "trainer.json with steps true": ("trainer.json", put(True, "steps")),
    "trainer.json with a source of nothing": ("trainer.json", put({}, "source")),
    "trainer.json without a row": ("trainer.json", remove("source", "row")),
}  # fmt: skip


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.raises(KeyboardInterrupt):
        trainer().fit(Stops(rows()), folder, progress=False)
    return folder


def rows() -> torch.Tensor:
    return torch.randn(500, 8, generator=torch.Generator().manual_seed(0))


def trainer() -> ap.Trainer:
    sae = ap.create("topk", d_in=8, d_sae=32, k=4, seed=0)
    return ap.Trainer(sae, ap.TrainConfig(batch_tokens=50, total_tokens=400, checkpoint_every_tokens=100))


class Stops(ArraySource):
    def batches(self, batch_tokens: int):
        for i, batch in enumerate(super().batches(batch_tokens)):
            if i == 5:
                raise KeyboardInterrupt
            yield batch


@pytest.mark.fault("damaged run folders")
@pytest.mark.parametrize("name", trials(list(RECORDS), 8))
def test_a_record_that_lacks_something_is_named(name: str, stopped: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(stopped, tmp_path / "run"))
    file, change = RECORDS[name]
    for record in folder.rglob(file):  # of both checkpoints, as an older version wrote them, without checksums
        content = json.loads(record.read_text())
        content.pop("crc32", None)
        change(content)
        record.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"damaged|belongs to a source") as refused:
        trainer().fit(rows(), folder, resume=True, progress=False)
    assert str(folder) in str(refused.value) or "belongs to a source" in str(refused.value)
    assert "Unexpected" not in str(refused.value)
    if file == "run.json":
        with pytest.raises(ValueError, match="is damaged"):
            same_run(folder, trainer().sae, trainer().config, ArraySource(rows()))


@pytest.mark.fault("damaged run folders")
def test_the_undamaged_one_goes_on(stopped: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(stopped, tmp_path / "run"))
    t = trainer()
    t.fit(rows(), folder, resume=True, progress=False)
    assert t.steps == 8

"""`apportion train --training-objective`: typed options, whole runs on a tiny model, and mistakes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from apportion import SAES, load
from apportion.cli import main
from apportion.cli.train import TrainBase
from apportion.objectives import OBJECTIVES
from apportion.training import TrainConfig

SENTENCE = "the cat sat on the mat and looked at the dog by the old house and the sea was calm and the sun was warm "


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "corpus.txt"
    file.write_text(SENTENCE * 200)
    return file


def train(model: Path, text: Path, out: Path, *more: str) -> int:
    options = ["--hookpoint", "model.layers.0", "--text", str(text), "--tokens", "2048", "--context-tokens", "32"]
    options += ["--sae", "topk", "--k", "4", "--d-sae", "48", "--batch-tokens", "256", "--out", str(out)]
    return main(["train", str(model), *options, *more])


@pytest.mark.parametrize("objective", ["e2e", "e2e_ds"])
def test_training_through_the_model(objective: str, tiny_model_dir: Path, text: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    chosen = ["--training-objective", objective]
    assert train(tiny_model_dir, text, run, *chosen, "--output-weight", "0.7", "--loss", "ce") == 0
    about = load(run).info["training"]["objective"]
    assert about["output_weight"] == 0.7 and about["loss"] == "ce" and about["hookpoint"] == "model.layers.0"
    assert about["downstream_weight"] == OBJECTIVES[objective].config.downstream_weight
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["tokens"] == 2048 and "ce" in line and ("downstream" in line) == (objective == "e2e_ds")
    assert main(["eval", str(run), "--model", str(tiny_model_dir), "--text", str(text), "--tokens", "512"]) == 0


def test_saes_side_by_side(
    tiny_model_dir: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert train(tiny_model_dir, text, run, "--training-objective", "mutual", "--num-saes", "3", "--weight", "0.2") == 0
    saes = [load(run / f"sae-{i}") for i in range(3)]
    assert [sae.config.seed for sae in saes] == [0, 1, 2]
    assert saes[2].info["training"]["objective"]["weight"] == 0.2
    assert f"apportion eval {run / 'sae-0'}" in capsys.readouterr().out


def test_help_shows_the_options_of_the_objective(capsys: pytest.CaptureFixture[str]) -> None:
    shown = {}
    for name in OBJECTIVES:
        with pytest.raises(SystemExit):
            main(["train", "--training-objective", name, "--help"])
        shown[name] = capsys.readouterr().out
    assert "--output-weight" in shown["e2e"] and "--num-saes" not in shown["e2e"]
    assert "--num-saes" in shown["mutual"] and "--output-weight" not in shown["mutual"]
    assert not any(option in shown["local"] for option in ("--num-saes", "--output-weight", "--matching"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--training-objective", "e2e", "--batch-tokens", "200"], "multiple of --context-tokens (32), got 200"),
        (["--training-objective", "end-to-end"], "Known are: local, e2e"),
        (["--training-objective", "e2e", "--output-weight", "-1"], "must not be negative"),
        (["--training-objective", "mutual", "--num-saes", "1"], "--num-saes must be at least 2, got 1"),
        (["--training-objective", "mutual", "--weight", "-1"], "must not be negative"),
    ],
)
def test_mistakes(
    more: list[str], message: str, tiny_model_dir: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tiny_model_dir, text, tmp_path / "run", *more) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("apportion: ") and message in error
    assert not (tmp_path / "run").exists()


def test_a_cache_has_no_model_to_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    assert main(["train", str(tmp_path), "--out", str(tmp_path / "run"), "--training-objective", "e2e"]) == 2
    assert "give a model, not a cache" in capsys.readouterr().err


def test_options_of_objectives_do_not_collide_with_others() -> None:
    for name, config in ((name, entry.config) for name, entry in OBJECTIVES.items()):
        if config is None:
            continue
        options = {f.name for f in dataclasses.fields(config)} | {"num_saes"}
        others = {f.name for f in (*dataclasses.fields(TrainBase), *dataclasses.fields(TrainConfig))}
        for entry in SAES.values():
            assert not options & (others | entry.settings().keys()), name

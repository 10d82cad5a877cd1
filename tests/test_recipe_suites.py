"""The command that measures a suite as JumpReLU SAEs and at other lengths of contexts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import apportion as ap
from apportion.cli import main
from apportion.evals.language_model import evaluate_model
from apportion.language import load_model, read_contexts
from apportion.recipes.suites import Suites
from apportion.rows.filter import trained_filter

WORDS = "the cat sat on the mat and the dog lay by the old house at the sea and looked at a red book about ships "


@pytest.fixture(scope="module")
def suite(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("suites")
    (folder / "text.txt").write_text(WORDS * 90)
    (folder / "valid.txt").write_text(" ".join(reversed((WORDS * 120).split())))
    words = ["--text", str(folder / "text.txt"), "--hookpoints", "model.layers.1", "--sites", "residual,transcoder"]
    words += ["--d-sae", "64", "--k", "4", "--batch-tokens", "128", "--tokens", "1024", "--context-tokens", "16"]
    assert main(["suite", str(tiny_model_dir), *words, "--sae", "topk", "--out", str(folder / "suite")]) == 0
    return folder


def test_each_is_measured_at_each_length_and_is_done_once(suite: Path, tmp_path: Path, tiny_model_dir: Path) -> None:
    (page := tmp_path / "page.md").write_text("before\n<!-- suites -->\n<!-- /suites -->\nafter\n")
    given = {"suite": suite / "suite", "text": suite / "valid.txt", "lengths": (16, 32), "docs": page}
    recipe = Suites(**given, out=tmp_path / "out", tokens=320, calibration_tokens=640)  # type: ignore[arg-type]
    recipe.run()
    runs = {run["name"]: run for run in json.loads((tmp_path / "out" / "results.json").read_text())["runs"]}
    found = runs["layer01-residual"]["figures"]
    assert {*found} == {"16", "32"} and {*found["16"]} == {"as_trained", "jumprelu"}
    assert {*runs["layer01-transcoder"]["figures"]["32"]} == {"as_trained"}
    model, tokenizer = load_model(tiny_model_dir)
    sae = ap.load(suite / "suite" / "layer01-residual")
    contexts = read_contexts(tokenizer, suite / "valid.txt", tokens=320, context_tokens=32)
    token_filter = trained_filter(sae.source, sae.hookpoint)
    assert token_filter is not None and sae.hookpoint is not None
    own, entropies = evaluate_model({"it": sae}, model, contexts, token_filter, hookpoint=sae.hookpoint, progress=False)
    assert found["32"]["as_trained"]["fvu"] == pytest.approx(own["it"].result()["fvu"], rel=1e-6)
    assert found["32"]["as_trained"]["delta_ce"] == pytest.approx(entropies.of("it")["delta_ce"], abs=1e-6)
    assert found["16"]["as_trained"]["fvu"] != found["32"]["as_trained"]["fvu"]
    made = ap.load(tmp_path / "out" / "jumprelu" / "layer01-residual")
    assert made.name == "jumprelu" and torch.equal(made.W_dec, sae.W_dec)
    assert abs(found["16"]["jumprelu"]["l0"] - 4) < 0.6, "calibrated on other text"
    text = page.read_text()
    assert text.startswith("before\n") and "| residual | as trained | 4.00 |" in text and "| transcoder |" in text
    written = {file: file.stat().st_mtime_ns for file in (tmp_path / "out" / "runs").iterdir()}
    recipe.run()
    assert written == {file: file.stat().st_mtime_ns for file in (tmp_path / "out" / "runs").iterdir()}
    assert page.read_text() == text
    Suites(**given | {"lengths": (16,)}, out=tmp_path / "out", tokens=160, calibration_tokens=640).run()  # type: ignore[arg-type]
    assert " 160 tokens" in page.read_text() and "FVU, 32" not in page.read_text()


def test_mistakes(suite: Path, tmp_path: Path) -> None:
    given = {"suite": suite / "suite", "text": suite / "valid.txt", "lengths": (16,), "out": tmp_path / "out"}
    with pytest.raises(ValueError, match="no text beyond --tokens 9000 to calibrate on"):
        Suites(**given, tokens=9000).run()  # type: ignore[arg-type]
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "sweep.json").write_text('{"runs": {"a": {"unfinished": true}}}')
    with pytest.raises(ValueError, match="has no finished run"):
        Suites(**given | {"suite": tmp_path / "none"}).run()  # type: ignore[arg-type]

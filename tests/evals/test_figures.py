"""A figure is defined once: a measure of somebody else's is one class and one line, and shows everywhere."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

import apportion as ap
from apportion.cli import main
from apportion.evals import (
    EVALS,
    Evaluator,
    Found,
    Measure,
    Measurement,
    add_evaluator,
    add_measure,
    evaluate_rows,
    evaluator,
    recovery,
)
from apportion.evals.figures import FIGURES, Figure, add_figures, columns_of
from apportion.evals.geometry import geometry
from apportion.evals.measure import MEASURES
from apportion.evals.report import make_report
from apportion.evals.table import print_table
from apportion.interop.card import model_card
from apportion.rows import ArrayStore
from apportion.synthetic import GroundTruthConfig, GroundTruthSource

X = torch.randn(400, 8, generator=torch.Generator().manual_seed(0))


class Shrinkage(Measure):
    """Are reconstructions too small?"""

    figures = (Figure("shrinkage", "shrinkage", ".3f", "norm of x_hat by norm of x, a mean over tokens", "higher"),)

    def __init__(self, sae):
        super().__init__(sae)
        self.ratios = []

    def add(self, seen):
        ratios = seen.y_hat[seen.mask].norm(dim=1) / seen.y[seen.mask].norm(dim=1)
        self.ratios.append(ratios.cpu())

    def result(self, activations):
        return {"shrinkage": torch.cat(self.ratios).mean().item()}


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Measure]]:
    figures, measures = dict(FIGURES), dict(MEASURES)
    yield add_measure(Shrinkage)
    for table, before in ((FIGURES, figures), (MEASURES, measures)):
        table.clear()
        table.update(before)


def sae() -> ap.SAE:
    made = ap.create("topk", d_in=8, d_sae=16, k=2, seed=0)
    made.fit_input(X)
    return made.eval()


def test_a_measure_shows_everywhere(toy):
    result = evaluate_rows({"mine": sae()}, X, progress=False)["mine"].result()
    wanted = (sae()(X).norm(dim=1) / X.norm(dim=1)).mean().item()
    assert result["shrinkage"] == pytest.approx(wanted, rel=1e-5)
    out = io.StringIO()
    print_table({"mine": result}, Console(file=out, width=300))
    assert "shrinkage" in out.getvalue().splitlines()[0] and f"{wanted:.3f}" in out.getvalue()
    assert "shrinkage: norm of x_hat by norm of x" in out.getvalue()
    page = make_report({"mine": sae()}, X, progress=False)
    assert page.figures["methods"]["mine"]["shrinkage"] == pytest.approx(wanted, rel=1e-5)
    assert f">{wanted:.3f}</td>" in page.page.replace("\n", "") and "norm of x_hat by norm of x" in page.page
    card = model_card(sae(), "me/mine", "", result, [], None, None)
    assert f"| shrinkage | {wanted:.3f} | norm of x_hat by norm of x, a mean over tokens |" in card


def test_a_key_means_one_thing(toy):
    add_figures(*Shrinkage.figures)
    with pytest.raises(ValueError, match=r"a figure 'fvu' already \(FVU\)"):
        add_figures(Figure("fvu", "mine", ".2f", "something else"))


def test_the_order_of_measures_changes_nothing():
    """Each is on its own: measured alone, figures are the same."""
    together = evaluate_rows({"a": sae()}, X, progress=False)["a"].result()
    alone = Measurement(sae())
    alone.measures = alone.measures[::-1]
    alone.add(X, torch.ones(len(X), dtype=torch.bool))
    assert set(alone.result()) == set(together)
    assert alone.result()["fvu"] == together["fvu"] and alone.result()["l0_quantiles"] == together["l0_quantiles"]


def test_columns_are_the_figures_that_results_have():
    shown = columns_of([{"l0": 1.0, "fvu": None, "dead": None, "k": 3, "ce_clean": 1.0, "name": "x"}, {"fvu": 0.5}])
    assert [figure.key for figure in shown] == ["k", "fvu", "l0"]
    assert FIGURES["fvu"].written(None, "?") == "?" and FIGURES["dead"].written(0.5) == "50.00%"


class Loudness(Evaluator):
    """The largest code, of a store."""

    name = "loudness"
    figures = (Figure("loudest", "loudest", ".2f", "the largest code"),)

    def run(self, subject):
        codes = subject.sae.eval().encode(subject.store.batch(subject.indices).x)
        yield Found("loudest", codes.values.max().item(), codes.tokens, "eval mode")


@pytest.fixture
def loudness(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    figures, evals = dict(FIGURES), dict(EVALS)
    add_evaluator(Loudness)
    yield
    for table, before in ((FIGURES, figures), (EVALS, evals)):
        table.clear()
        table.update(before)


def test_an_evaluator_is_one_class_and_one_line(loudness, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    wanted = sae().encode(X).values.max().item()
    found = ap.evaluate(sae(), X, evals=["loudness", "geometry"])
    assert found["loudest"] == wanted and found["fvu"] == ap.evaluate(sae(), X)["fvu"]
    assert found["duplicated"] == geometry(sae().W_dec, 1).duplicated and found["between"] is None
    np.save(tmp_path / "x.npy", X.numpy())
    sae().save(tmp_path / "sae")
    said = ["eval", str(tmp_path / "sae"), "--acts", str(tmp_path / "x.npy"), "--on", "loudness, geometry"]
    assert main([*said, "--json", str(tmp_path / "found.json")]) == 0
    assert json.loads((tmp_path / "found.json").read_text())["loudest"] == pytest.approx(wanted)
    assert "loudest" in capsys.readouterr().out.splitlines()[0]
    assert main([*said[:-1], "loudnes"]) == 2
    assert "There is no evaluator 'loudnes'; did you mean loudness" in capsys.readouterr().err


def test_what_an_evaluator_needs_is_asked_for_before_anything_is_run(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Measurement, "add", lambda *_, **__: pytest.fail("something was run"))
    for name, needed in (("recovery", "labels"), ("language_model", "model")):
        with pytest.raises(ValueError, match=f"The evaluator {name} needs {needed}"):
            ap.evaluate(sae(), X, evals=[name])


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("volume", 1.0, "yields 'volume', which nobody has defined"),
        ("loudest", "very", "yields 'loudest' = 'very', and a figure is a number or None"),
        ("fvu", 0.5, "yields 'fvu', which is known already and has another value"),
    ],
)
def test_an_evaluator_yields_figures_only(loudness, monkeypatch: pytest.MonkeyPatch, key, value, said):
    monkeypatch.setattr(Loudness, "run", lambda self, subject: iter([Found(key, value, 1, "eval mode")]))
    with pytest.raises(ValueError, match=said):
        ap.evaluate(sae(), X, evals=["loudness"])


def test_the_command_line_keeps_what_is_known(loudness, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys):
    """An evaluator cannot put another FVU in place of ours."""
    monkeypatch.setattr(Loudness, "run", lambda self, subject: iter([Found("fvu", 0.0, 1, "eval mode")]))
    np.save(tmp_path / "x.npy", X.numpy())
    sae().save(tmp_path / "sae")
    assert main(["eval", str(tmp_path / "sae"), "--acts", str(tmp_path / "x.npy"), "--on", "loudness"]) == 2
    assert "yields 'fvu', which is known already" in capsys.readouterr().err


def test_figures_are_plain_numbers(loudness, monkeypatch: pytest.MonkeyPatch):
    """Whatever an evaluator computes with."""
    for given, wanted in ((torch.tensor(2.5), 2.5), (np.float32(2.5), 2.5), (float("nan"), None)):
        found = [Found("loudest", given, 1, "eval mode")]
        monkeypatch.setattr(Loudness, "run", lambda self, subject, found=found: iter(found))
        value = ap.evaluate(sae(), X, evals=["loudness"])["loudest"]
        assert value == wanted and not isinstance(value, torch.Tensor | np.generic)


def test_a_name_is_given_once(loudness, toy):
    add_evaluator(Loudness)
    add_measure(Shrinkage)
    with pytest.raises(ValueError, match="There is an evaluator 'loudness' already"):
        add_evaluator(type("Louder", (Loudness,), {}))
    with pytest.raises(ValueError, match="There is a measure 'Shrinkage' already"):
        add_measure(type("Shrinkage", (Measure,), {"__module__": "elsewhere"}))


def test_a_package_whose_evaluator_does_not_load_is_named(monkeypatch: pytest.MonkeyPatch):
    broken = [EntryPoint("odd", "nobody.here:Odd", "apportion.evals")]
    monkeypatch.setattr(evaluator, "entry_points", lambda group: broken)
    evaluator.load_others.cache_clear()
    with pytest.raises(ValueError, match=r"'odd' \(nobody\.here:Odd\) cannot be loaded: No module named 'nobody'"):
        ap.evaluate(sae(), X, evals=["geometry"])


def test_of_equal_rows_there_is_nothing_to_explain():
    for rows in (X[:1], X[:1].expand(30, 8)):
        assert ap.evaluate(sae(), rows)["fvu"] is None
        with pytest.raises(ValueError, match="rows are equal"):
            make_report({"mine": sae()}, rows, progress=False)


def test_a_target_of_another_width_is_refused():
    made = ap.create("transcoder", d_in=8, d_out=6, d_sae=16, k=2)
    made.fit_input(X, X[:, :6])
    assert ap.evaluate(made, ArrayStore(X, target=X[:, :6]))["fvu"] < 1.5
    with pytest.raises(ValueError, match=r"transcoder predicts rows \[6\], got targets \[7\]"):
        ap.evaluate(made, ArrayStore(X, target=X[:, :7]))


def test_recovery_as_an_evaluator_is_recovery():
    source = GroundTruthSource(GroundTruthConfig(num_features=64, d_in=16), seed=0)
    made = ap.create("topk", d_in=16, d_sae=64, k=4, seed=0)
    made.fit_input(source.sample(500).x)
    found = ap.evaluate(made, source.store(400), evals=["recovery"])
    plain = recovery(made, *source.truth(400), source.directions)
    assert {key: found[key] for key in ("mcc", "f1", "l0_true")} == {
        key: plain[key] for key in ("mcc", "f1", "l0_true")
    }
    assert found["fvu"] == pytest.approx(plain["fvu"]) and found["l0"] == plain["l0"]

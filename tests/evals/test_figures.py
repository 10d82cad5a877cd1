"""A figure is defined once: a measure of somebody else's is one class and one line, and shows everywhere."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
import torch
from rich.console import Console

import apportion as ap
from apportion.evals import Measure, Measurement, add_measure, evaluate_rows
from apportion.evals.figures import FIGURES, Figure, add_figures, columns_of
from apportion.evals.measure import MEASURES
from apportion.evals.report import make_report
from apportion.evals.table import print_table
from apportion.interop.card import model_card

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
    shown = columns_of([{"l0": 1.0, "fvu": None, "k": 3, "ce_clean": 1.0, "name": "x"}])
    assert [figure.key for figure in shown] == ["k", "fvu", "l0"]
    assert FIGURES["fvu"].written(None, "?") == "?" and FIGURES["dead"].written(0.5) == "50.00%"

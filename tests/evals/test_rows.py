"""Measurements on rows: filtered and unfiltered figures, and what is left out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import apportion as ap
from apportion.about import Language, TextRecord
from apportion.evals import Measurement
from apportion.evals.rows import recalibrate, unseen_rows
from apportion.rows import ActivationStore, ArrayStore, CacheSource, TokenFilter
from apportion.rows.writer import StoreWriter


def trained_like() -> ap.SAE:
    sae = ap.create("mutual_choice", d_in=8, d_sae=64, k=3, seed=0)
    sae.calibrate(torch.randn(5000, 8, generator=torch.Generator().manual_seed(1)))
    return sae


def test_an_outlier_row_counts_in_the_unfiltered_figure_only() -> None:
    x = torch.randn(3000, 8, generator=torch.Generator().manual_seed(2))
    x[7] = 1e4
    mask = torch.ones(3000, dtype=torch.bool)
    mask[7] = False
    measurement = Measurement(trained_like())
    for part, keep in zip(x.split(700), mask.split(700), strict=True):
        measurement.add(part, keep)
    result = measurement.result()
    with torch.no_grad():
        kept = x[mask]
        x_hat = measurement.sae.eval()(kept)
        fvu = ((kept - x_hat).square().sum() / (kept - kept.mean(0)).square().sum()).item()
    assert result["fvu"] == pytest.approx(fvu, rel=1e-5)
    assert abs(result["fvu_unfiltered"] - fvu) > 0.01
    assert result["tokens"] == 2999 and result["filtered_share"] == pytest.approx(1 / 3000)
    assert result["l0"] == pytest.approx(3, rel=0.05)
    assert len(measurement.l0_of_tokens()) == 2999


def test_a_constant_l0_has_no_correlation_and_json_says_null() -> None:
    sae = ap.create("topk", d_in=8, d_sae=64, k=3, seed=0)
    measurement = Measurement(sae)
    measurement.add(torch.randn(200, 8) + 9, torch.ones(200, dtype=torch.bool))
    result = measurement.result()
    assert result["l0_distance_correlation"] is None and result["l0_difficulty_correlation"] is None
    assert json.loads(json.dumps(result, allow_nan=False))["l0"] == 3


def test_measuring_leaves_the_mode_of_the_sae_alone() -> None:
    sae = trained_like().train()
    measurement = Measurement(sae)
    measurement.add(torch.randn(50, 8), torch.ones(50, dtype=torch.bool))
    assert sae.training


TEXT = TextRecord(where="/a/corpus.txt", files=1, bytes=400)


@pytest.fixture
def store(tmp_path: Path) -> ActivationStore:
    """100 rows in contexts of 4."""
    ids = torch.arange(100)
    with StoreWriter(tmp_path / "acts", {"a": 8}, dtype="float32", token_filter=TokenFilter(), special_ids=()) as out:
        out.add({"a": torch.randn(100, 8)}, ids, ids % 4, ids // 4)
        out.finish(Language(text=TEXT, context_tokens=4, contexts=25).to_json())
    return ActivationStore(tmp_path / "acts")


@pytest.mark.parametrize(
    ("changed", "lm", "rows"),
    [
        ({}, {}, 4),
        ({}, {"tokens_sha256": None}, 4),
        ({"rows": 96}, {"tokens_sha256": None}, None),
        ({}, {"tokens_sha256": None, "contexts": None}, None),
        ({}, {"tokens_sha256": None, "text": TextRecord(where="b.txt")}, 100),
        ({"held_out_share": None}, {}, None),
        ({}, {"tokens_sha256": "of other contexts"}, None),
        ({}, {"tokens_sha256": "other", "text": TextRecord(where="/moved/corpus.txt", files=1, bytes=400)}, None),
        ({}, {"tokens_sha256": "other", "text": TextRecord(where="/a/corpus.txt", files=1, bytes=401)}, 100),
        ({}, {"tokens_sha256": "other", "text": TextRecord()}, 100),
    ],
)
def test_rows_that_an_sae_has_not_seen(changed: dict, lm: dict, rows: int | None, store: ActivationStore) -> None:
    """Of the cache it was trained on (older runs know it by its size) those held out, of another text all; None: that
    is not known."""
    sae, about = trained_like(), CacheSource(store).describe()
    sae.source = replace(about, language=replace(about.lm, **lm), **changed)
    if rows is None:
        with pytest.raises(ValueError, match="what it has seen of them is not known"):
            unseen_rows(store, sae, "acts")
    else:
        assert len(unseen_rows(store, sae, "acts")[0]) == rows


def test_thresholds_are_set_on_rows_that_take_part():
    """Loud rows that take no part would push the thresholds up."""
    x = torch.randn(1000, 8, generator=torch.Generator().manual_seed(0))
    x[::2] *= 30
    sae = ap.create("mutual_choice", d_in=8, d_sae=32, k=3, seed=0)
    sae.fit_input(x[1::2])
    store = ArrayStore(x, mask=torch.arange(1000) % 2 == 1)
    assert recalibrate(sae, store, torch.arange(1000)) == pytest.approx(3, rel=0.01)
    assert sae.eval().encode(x[1::2]).nnz == pytest.approx(3 * 500, rel=0.01)

"""Measurements on rows: filtered and unfiltered figures, and what is left out."""

from __future__ import annotations

import json

import pytest
import torch

import apportion as ap
from apportion.evals import Measurement


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

"""Closed forms: permuted, rotated and doubled dictionaries."""

from __future__ import annotations

import pytest
import torch

import apportion as ap
from apportion.evals.similarity import similarity, within_similarity


def with_rows(rows: torch.Tensor) -> ap.SAE:
    sae = ap.create("topk", d_in=rows.shape[1], d_sae=len(rows), k=1)
    with torch.no_grad():
        sae.get_parameter("W_dec").copy_(rows)
    return sae


EYE = torch.eye(4)


def test_permuted_features_are_the_same():
    found = similarity(with_rows(EYE), with_rows(EYE[[2, 0, 3, 1]]))
    assert found == pytest.approx({"mmcs_ab": 1, "mmcs_ba": 1, "one_to_one": 1})


def test_directions_of_opposite_sign_are_not_the_same():
    assert similarity(with_rows(EYE), with_rows(-EYE))["mmcs_ab"] == pytest.approx(0)


def test_a_smaller_dictionary_is_found_in_a_larger_one_but_not_the_other_way_round():
    found = similarity(with_rows(EYE[:2]), with_rows(EYE))
    assert found == pytest.approx({"mmcs_ab": 1, "mmcs_ba": 0.5, "one_to_one": 1})
    assert similarity(with_rows(EYE), with_rows(EYE[:2]))["one_to_one"] == pytest.approx(1)


def test_one_to_one_counts_a_latent_once_where_the_nearest_does_not():
    """All of b's latents are near one of a's."""
    b = torch.nn.functional.normalize(EYE[0] + 0.1 * EYE, dim=1)
    found = similarity(with_rows(EYE[:1].repeat(4, 1)), with_rows(b), matched=True)
    assert found["mmcs_ba"] > 0.99 and found["mmcs_ab"] == pytest.approx(1)
    found = similarity(with_rows(EYE), with_rows(b))
    assert found["mmcs_ba"] > 0.99 and found["one_to_one"] < 0.4
    assert "one_to_one" not in similarity(with_rows(EYE), with_rows(b), matched=False)


def test_scale_and_norms_do_not_matter():
    a, b = with_rows(EYE), with_rows(3 * EYE)
    b.fit_input(torch.randn(50, 4) * 7 + 2)
    assert similarity(a, b)["mmcs_ab"] == pytest.approx(1)


def test_split_features_show_within_an_sae():
    assert within_similarity(with_rows(EYE)) == pytest.approx(0)
    assert within_similarity(with_rows(EYE[[0, 0, 1, 1]])) == pytest.approx(1)
    assert within_similarity(with_rows(EYE[[0, 0, 1, 2]])) == pytest.approx(0.5)


def test_other_widths_cannot_be_compared():
    with pytest.raises(ValueError, match="4 and 3"):
        similarity(with_rows(EYE), with_rows(torch.eye(3)))

"""Geometry of experts in closed form, and against the whole cosine matrix."""

from __future__ import annotations

import math

import pytest
import torch

from apportion import blocks
from apportion.evals.geometry import duplicated, geometry, nearest_cosines, similarity

EYE = torch.eye(8)


def test_orthogonal_rows_share_nothing():
    found = geometry(3 * EYE, 4)
    assert vars(found) == dict.fromkeys(vars(found), 0.0)


def test_experts_that_learned_the_same():
    """Two copies of the same directions: every row has its copy in the other expert."""
    found = geometry(torch.cat([torch.eye(16), 2 * torch.eye(16)]), 2)
    assert found.duplicated == found.duplicated_elsewhere == found.between == 1
    assert found.within == 0
    assert 0 < found.within_at_random < 1, "at random, copies also land in one expert"


def test_experts_that_are_clusters():
    """Rows at cosine 0.96 within experts, orthogonal between: duplicates are at home."""
    pairs = torch.stack([v for i in range(4) for v in (EYE[2 * i], 0.96 * EYE[2 * i] + 0.28 * EYE[2 * i + 1])])
    found = geometry(pairs, 4)
    assert found.duplicated == 1 and found.duplicated_elsewhere == 0
    assert found.within == pytest.approx(0.96) and found.between == 0
    assert found.within_at_random < 0.96 and found.between_at_random > 0


def test_the_bar_for_duplicates_is_a_cosine():
    angle = torch.tensor([0.0, math.acos(0.95), math.pi / 2 + 1])
    rows = torch.stack([angle.cos(), angle.sin()], 1)
    nearest = nearest_cosines(rows)
    assert nearest[:2, 0].tolist() == pytest.approx([0.95, 0.95], abs=1e-6)
    assert duplicated(nearest).tolist() == [True, True, False]
    assert duplicated(nearest, 0.96).tolist() == [False, False, False]
    assert geometry(-rows, 1).duplicated == pytest.approx(2 / 3), "opposite directions are different ones"


@pytest.mark.parametrize("num_experts", [1, 3, 5, 15])
@pytest.mark.parametrize("block", [1, 40, 2**20])
def test_equals_the_whole_matrix(num_experts, block, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_ENTRIES", block)
    monkeypatch.setattr(blocks, "MIN_BLOCK_ROWS", 1)
    rows = torch.randn(15, 6, generator=torch.Generator().manual_seed(0)).double()
    unit = rows / rows.norm(dim=1, keepdim=True)
    cosines = unit @ unit.T
    cosines.fill_diagonal_(-torch.inf)
    n = 15 // num_experts
    wanted = torch.stack([cosines[:, i * n : (i + 1) * n].amax(1) for i in range(num_experts)], 1)
    nearest = nearest_cosines(rows, num_experts)
    assert torch.allclose(nearest, wanted)
    pairs = [[wanted[h * n : (h + 1) * n, i].mean() for i in range(num_experts)] for h in range(num_experts)]
    assert torch.allclose(similarity(nearest), torch.tensor(pairs).double())
    found = geometry(rows, num_experts)
    assert math.isnan(found.within) == (num_experts == 15) and math.isnan(found.between) == (num_experts == 1)
    assert found.duplicated == (wanted.amax(1) > 0.9).double().mean().item()


def test_a_random_split_of_random_rows_changes_nothing():
    rows = torch.randn(400, 16, generator=torch.Generator().manual_seed(1))
    found = geometry(rows, 4)
    assert found.within == pytest.approx(found.within_at_random, rel=0.02)
    assert found.between == pytest.approx(found.between_at_random, rel=0.02)


def test_crosscoder_rows_are_one_vector_over_sites():
    rows = torch.randn(6, 2, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(nearest_cosines(rows, 2), nearest_cosines(rows.flatten(1), 2))


def test_unequal_experts_are_refused():
    with pytest.raises(ValueError, match="8 rows do not divide into 3"):
        geometry(EYE, 3)

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch

from apportion import matching
from apportion.matching import assign, directions, nearest_rows, one_to_one, pair_cosines


def rows(n: int, d: int, seed: int) -> torch.Tensor:
    return directions(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)).double())


@pytest.mark.parametrize(("n", "m"), [(1, 1), (7, 13), (33, 20)])
@pytest.mark.parametrize("block", [1, 5, 10**6])
def test_nearest_rows_both_ways(n, m, block, monkeypatch):
    monkeypatch.setattr(matching, "block_rows", lambda width, like: block)
    a, b = rows(n, 5, seed=0), rows(m, 5, seed=1)
    of_a, of_b = nearest_rows(a, b)
    cosines = a @ b.T
    assert torch.equal(of_a, cosines.argmax(1)) and torch.equal(of_b, cosines.argmax(0))


@pytest.mark.parametrize("block", [1, 4, 10**6])
def test_nearest_other_rows(block, monkeypatch):
    monkeypatch.setattr(matching, "block_rows", lambda width, like: block)
    a = rows(11, 5, seed=0)
    cosines = (a @ a.T).fill_diagonal_(-2)
    assert all(torch.equal(found, cosines.argmax(1)) for found in nearest_rows(a, a, skip_same=True))


@pytest.mark.parametrize("quantised", [True, False])
def test_assignment_is_the_best_of_all_permutations(quantised):
    rng = np.random.default_rng(0)
    for _ in range(100):
        n = int(rng.integers(1, 6))
        m = n + int(rng.integers(0, 3))
        cost = rng.integers(0, 4, (n, m)).astype(float) if quantised else rng.normal(size=(n, m))
        chosen = assign(cost)
        best = min(sum(cost[i, p[i]] for i in range(n)) for p in permutations(range(m), n))
        assert len(set(chosen.tolist())) == n and cost[np.arange(n), chosen].sum() == pytest.approx(best)
    assert not len(assign(np.zeros((0, 3))))


def test_one_to_one_undoes_a_permutation():
    a = rows(40, 8, seed=0)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    noisy = directions(a[order] + 0.05 * rows(40, 8, seed=2))
    assert torch.equal(order[one_to_one(a, noisy)], torch.arange(40))
    with pytest.raises(ValueError, match="needs as many"):
        one_to_one(a, a[:5])


def test_sites_make_one_direction_and_zero_rows_stay():
    W = torch.tensor([[[3.0, 0.0], [0.0, 4.0]], [[0.0, 0.0], [0.0, 0.0]]])
    assert torch.allclose(directions(W), torch.tensor([[0.6, 0, 0, 0.8], [0, 0, 0, 0]]))


def test_gradients_flow_through_the_pairs_only():
    a, b = rows(6, 4, seed=0).requires_grad_(), rows(5, 4, seed=1).requires_grad_()
    chosen = torch.tensor([0, 0, 3, 1, 3, 0])
    pair_cosines(a, b, chosen).sum().backward()
    assert torch.allclose(a.grad, b[chosen].detach())
    assert torch.allclose(b.grad[0], a.detach()[[0, 1, 5]].sum(0)) and not b.grad[[2, 4]].any()

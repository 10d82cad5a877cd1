"""The largest of rows and groups, compared with sorting."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from apportion import ranking
from apportion.ranking import below_largest, largest_of_rows, rank_within

DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def some_rows(rows: int, n: int, dtype: torch.dtype = torch.float32, ties: bool = False) -> Tensor:
    values = torch.randn(rows, n, generator=torch.Generator().manual_seed(rows + n))
    return (values.mul(3).round() if ties else values).to(dtype)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(5, 2), (64, 1), (64, 2), (67, 2), (512, 3), (517, 16), (16, 20), (512, 300)])
def test_the_largest_exceed_the_bound(n: int, k: int, dtype: torch.dtype, ties: bool) -> None:
    values = some_rows(20, n, dtype, ties)
    bound = below_largest(values, k)
    kth = values.sort(dim=1, descending=True).values[:, min(k, n) - 1 :][:, :1].clamp_min(0)
    assert bound.shape == (20, 1) and bound.dtype == dtype and bool((bound >= 0).all())
    assert bool((bound <= kth).all()) and bool(
        ((values > bound).sum(1) >= torch.minimum((values > 0).sum(1), torch.tensor(k))).all()
    )
    if n < 4 * k * 8:
        below = torch.nextafter(kth.float(), torch.zeros(())) if dtype != torch.float64 else None
        assert below is None or dtype == torch.bfloat16 or torch.equal(bound, below)


def test_of_wide_rows_hardly_more_exceed_it() -> None:
    values = some_rows(200, 2048)
    over = (values > below_largest(values, 32)).sum(1)
    assert int(over.min()) >= 32 and float(over.float().mean()) < 36


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("uneven", [False, True], ids=["even", "one long row"])
@pytest.mark.parametrize("k", [1, 3, 8])
def test_those_of_rows_are_those_of_sorting(k: int, uneven: bool, ties: bool) -> None:
    g = torch.Generator().manual_seed(k)
    counts = torch.randint(0, 12, (50,), generator=g)
    if uneven:
        counts[7] = 3000
    rows = torch.arange(50).repeat_interleave(counts)
    values = torch.rand(len(rows), generator=g) + 0.1
    values = (values * 4).ceil() if ties else values
    wanted = torch.zeros(len(rows), dtype=torch.bool)
    for row in range(50):
        own = (rows == row).nonzero().squeeze(1)
        wanted[own[values[own].argsort(descending=True, stable=True)[:k]]] = True
    assert torch.equal(largest_of_rows(rows, values, counts, k), wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [0, 1, 500])
def test_ranks_are_those_of_sorting(n: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(n)
    groups, values = torch.randint(9, (n,), generator=g), torch.randint(0, 20, (n,), generator=g).to(dtype) / 8
    wanted = torch.empty(n, dtype=torch.int64)
    for group in range(9):
        own = (groups == group).nonzero().squeeze(1)
        wanted[own[values[own].argsort(descending=True, stable=True)]] = torch.arange(len(own))
    assert torch.equal(rank_within(groups, values, 9), wanted)


def test_a_long_row_makes_no_wide_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranking, "below_largest", lambda *args: pytest.fail("laid side by side"))
    counts = torch.tensor([1000, *[1] * 500])
    rows = torch.arange(501).repeat_interleave(counts)
    assert int(largest_of_rows(rows, torch.rand(1500) + 1, counts, 2).sum()) == 502

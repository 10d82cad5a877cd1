"""Orders that are computed are permutations, and look like random ones; sets of rows find their members."""

from __future__ import annotations

import json
from itertools import islice

import pytest
import torch

from apportion.rows import order as order_module
from apportion.rows.batch import ArraySource
from apportion.rows.order import EpochOrder
from apportion.rows.permuting import Keyed, RowSet


def test_every_small_number_of_rows_is_permuted() -> None:
    for n in [*range(1, 300), *range(300, 10_001, 97), 10_000, 2**16 - 1, 2**16, 2**16 + 1, 10**6]:
        assert torch.equal(Keyed(n, 0, n)[torch.arange(n)].sort().values, torch.arange(n)), n


@pytest.mark.slow
def test_every_number_of_rows_up_to_10000_is_permuted() -> None:
    for n in range(1, 10_001):
        assert torch.equal(Keyed(n, 1)[torch.arange(n)].sort().values, torch.arange(n)), n


@pytest.mark.parametrize("n", [10**9, 2**40 + 1])
def test_no_two_of_very_many_have_one_image(n: int) -> None:
    at = torch.arange(n - 200_000, n)
    images = Keyed(n, "seed", 3)[at]
    assert len(images.unique()) == len(at) and images.min() >= 0 and images.max() < n
    assert torch.equal(Keyed(n, "seed", 3)[at[5:6]], images[5:6]), "any part of it alone"
    assert (images.double().mean() / n - 0.5).abs() < 0.005 and not torch.equal(images, Keyed(n, "seed", 4)[at])


@pytest.mark.parametrize("n", [7, 64, 1000])
def test_images_are_uniform(n: int) -> None:
    """Over keys, each position comes to each place alike, and neighbours are not kept together (chi squared)."""
    keys = 400 * n if n < 100 else 20_000
    positions = torch.tensor([0, 1, n - 1])
    images = torch.stack([Keyed(n, key)[positions] for key in range(keys)])
    buckets = min(n, 50)
    difference = (images[:, 1] - images[:, 0]) % n
    for column, possible in ((images[:, 0], 0), (images[:, 2], 0), (difference, 1)):  # which is never 0
        counts = torch.bincount(column * buckets // n, minlength=buckets).double()
        sizes = torch.bincount(torch.arange(possible, n) * buckets // n, minlength=buckets).double()
        expected = keys * sizes / sizes.sum()
        chi2 = float(((counts - expected).square() / expected.clamp(min=1e-9))[expected > 0].sum())
        degrees = int((expected > 0).sum()) - 1
        assert chi2 < degrees + 5 * (2 * degrees) ** 0.5, (chi2, degrees)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("n", [1, 63, 64, 65, 511, 512, 513, 5000])
def test_a_set_finds_its_members(n: int, share: float) -> None:
    mask = torch.rand(n, generator=torch.Generator().manual_seed(n)) < share
    members = mask.nonzero().squeeze(1)
    for parts in ([n], [n // 3, n - n // 3], [1] * min(n, 40) + [n - min(n, 40)]):
        rows = RowSet(mask.split(parts))
        assert len(rows) == len(members)
        order = torch.randperm(len(members), generator=torch.Generator().manual_seed(1))
        assert torch.equal(rows[order], members[order])


def test_computed_orders_visit_every_row_once_an_epoch_and_are_resumed(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.arange(500.0)[:, None].expand(500, 3)
    drawn = ArraySource(x, seed=3)
    monkeypatch.setattr(order_module, "DRAWN", 100)
    source = ArraySource(x, seed=3)
    batches = [batch.x[:, 0] for batch in islice(source.batches(25), 36)]
    epochs = [torch.cat(batches[:18]), torch.cat(batches[18:])]
    rows = [i for i in range(500) if i % 10 != 9]
    assert all(epoch.sort().values.tolist() == rows for epoch in epochs) and not torch.equal(*epochs)
    first = ArraySource(x, seed=3)
    for _ in islice(first.batches(25), 7):
        pass
    state = json.loads(json.dumps(first.state_dict()))
    second = ArraySource(x, seed=3)
    second.load_state_dict(state)
    assert torch.equal(next(second.batches(25)).x[:, 0], batches[7]) and state["order"] == "computed"
    # a run that was begun with an order that was drawn goes on with it
    before = drawn.state_dict()
    assert "order" not in before
    third = ArraySource(x, seed=3)
    third.load_state_dict(before)
    assert torch.equal(next(third.batches(25)).x, next(drawn.batches(25)).x)


def test_an_order_of_a_billion_rows_takes_no_memory() -> None:
    class All:
        def __len__(self) -> int:
            return 10**9

        def __getitem__(self, which: torch.Tensor) -> torch.Tensor:
            return which

    order = EpochOrder(All(), seed=0)
    chosen, position = next(order.upcoming(4096))
    assert len(chosen.unique()) == 4096 and position.row == 4096 and int(chosen.max()) > 9 * 10**8
    assert len(order.sample(1000).unique()) == 1000

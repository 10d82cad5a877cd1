"""Which entries of a row, or of a group, are its largest: without sorting all of them.

Positive floats read as integers are in order, all others lie below them; and integers are sorted and parted faster.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from apportion.devices import on_gpu

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""The integers that floats of so many bytes are read as."""
IN_GROUP = 8
"""Columns of which only the largest is looked at first."""
LEAST_GROUPS = 4
"""Groups, per entry that is asked for: with fewer, too many of a row's largest would share one."""
WIDEST = 8
"""Entries of a row with the most of them, in units of the mean row, up to which rows are laid side by side."""


def below_largest(values: Float[Tensor, "rows n"], k: int) -> Float[Tensor, "rows 1"]:
    """For each row a bound that its k largest positive entries exceed, and besides them hardly any others: ties, and of
    wide rows a few more.

    Of wide rows the largest of every IN_GROUP columns is taken, and the k-th of these: at least k entries reach it.
    """
    rows, n = values.shape
    if (groups := n // IN_GROUP) >= LEAST_GROUPS * k:
        tops = values[:, : IN_GROUP * groups].view(rows, IN_GROUP, groups).amax(1)
        values = tops if IN_GROUP * groups == n else torch.cat([tops, values[:, IN_GROUP * groups :]], 1)
    at, kind = max(values.shape[1] - k, 0), BITS[values.element_size()]
    if not on_gpu(values):
        # numpy partitions integers with vector instructions, many times faster than torch finds a k-th value.
        kth = torch.from_numpy(np.partition(values.view(kind).numpy(), at, axis=1)[:, at].copy())
    else:
        kth = values.topk(values.shape[1] - at, dim=1, sorted=False).values.amin(1).view(kind)
    return (kth.clamp_min(1) - 1).view(values.dtype)[:, None]


def largest_of_rows(
    rows: Int[Tensor, " n"], values: Float[Tensor, " n"], counts: Int[Tensor, " num_rows"], k: int
) -> Bool[Tensor, " n"]:
    """Marks the k largest of each row, earlier ones first among ties. Values are positive, rows ascend, and `counts`
    says how many entries each has."""
    width = int(counts.max())
    if width * len(counts) > WIDEST * len(values):
        return rank_within(rows, values, len(counts)) < k
    first = counts.cumsum(0) - counts
    table = values.new_zeros(len(counts), width)
    table.view(-1)[rows * width + torch.arange(len(rows), device=rows.device) - first[rows]] = values
    keep = values > below_largest(table, k)[rows, 0]
    over = torch.bincount(rows[keep], minlength=len(counts)) > k
    if bool(over.any()):
        some = keep & over[rows]
        keep[some] = rank_within(rows[some], values[some], len(counts)) < k
    return keep


def rank_within(groups: Int[Tensor, " n"], values: Float[Tensor, " n"], num_groups: int) -> Int[Tensor, " n"]:
    """Rank of each entry among those of its group, 0 for the largest; earlier entries first among ties.

    Values must not be negative.
    """
    order, counts = order_within(groups, values, num_groups)
    rank = torch.empty_like(order)
    rank[order] = ranks_in_order(counts, len(order))
    return rank


def order_within(
    groups: Int[Tensor, " n"], values: Float[Tensor, " n"], num_groups: int
) -> tuple[Int[Tensor, " n"], Int[Tensor, " num_groups"]]:
    """The order that puts group after group, each from its largest entry down, and how many entries each has."""
    if values.element_size() <= 4:
        falling = torch.iinfo(torch.int32).max - values.float().contiguous().view(torch.int32)
        order = ((groups.long() << 32) + falling).argsort(stable=True)
    else:
        order = values.argsort(descending=True, stable=True)
        order = order[groups[order].int().argsort(stable=True)]
    counts = torch.zeros(num_groups, dtype=torch.int64, device=groups.device)
    return order, counts.scatter_add_(0, groups.long(), torch.ones_like(groups, dtype=torch.int64))


def ranks_in_order(counts: Int[Tensor, " num_groups"], n: int) -> Int[Tensor, " n"]:
    """0, 1, .. of each group, of groups with so many entries, n in all."""
    first = counts.cumsum(0) - counts
    return torch.arange(n, device=counts.device) - first.repeat_interleave(counts, output_size=n)

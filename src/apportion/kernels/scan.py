"""Which entries of a block of the product exceed bounds: the pass over everything that follows the product.

Products of whole numbers stay whole for it. Their columns are looked at in groups: first the largest of each group,
then one by one those of the groups that may have something. An entry can only exceed its bound if the largest of its
group exceeds, over the group's latents j and in the notation of product.py,

    (bound_t min_j 1 / (norm_j r_j) - max_j b_j / r_j) / s_t
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from apportion.blocks import GROUP
from apportion.devices import marked
from apportion.kernels.dispatch import backend_for
from apportion.kernels.product import Block, WholeNumbers

FEW = 0.4
"""Share of the groups up to which it pays to look at these only."""
LEAST_ENTRIES = 2**15
"""Of smaller blocks all entries are looked at."""
Found = tuple[Int[Tensor, " n"], Int[Tensor, " n"], Float[Tensor, " n"], Float[Tensor, " n"]]
"""Rows, columns, codes and affinities; the last two are one tensor where they are the same."""


def above(block: Block | WholeNumbers, bounds: Tensor) -> Found:
    """Entries whose affinity exceeds the bounds (a scalar, one per column, or one per row [rows, 1]), in row order."""
    if isinstance(block, WholeNumbers):
        by_groups = block.numbers.shape[1] % GROUP == 0 and block.numbers.numel() >= LEAST_ENTRIES
        found = _in_groups(block, bounds) if by_groups else None
        return found or _at(block, marked(torch.gt(block.affinity, bounds).view(-1)))
    if backend_for(block.affinity) == "triton":
        from apportion.kernels import triton_kernels

        return _at(block, triton_kernels.above(block.affinity, bounds))
    affinity = block.affinity
    if affinity.element_size() == 2:  # comparing integers is much faster
        affinity, bounds = affinity.view(torch.int16), bounds.view(torch.int16).clamp_min(0)
    return _at(block, marked(torch.gt(affinity, bounds).view(-1)))


def _at(block: Block | WholeNumbers, flat: Int[Tensor, " n"]) -> Found:
    """The entries at these places."""
    width = block.codes.shape[1]
    rows = flat.div(width, rounding_mode="floor")
    codes = block.codes.view(-1).index_select(0, flat)
    affinity = codes if block.affinity is block.codes else block.affinity.view(-1).index_select(0, flat)
    return rows, flat - rows * width, codes, affinity


def _in_groups(block: WholeNumbers, bounds: Tensor) -> Found | None:
    """None if there is something in too many groups."""
    numbers, width = block.numbers, block.numbers.shape[1]
    per_row = width // GROUP

    def grouped(t: Tensor) -> Tensor:
        return t.view(per_row, GROUP)

    weights = block.latent_scales if block.norms is None else block.latent_scales * block.norms
    of_columns = torch.where(weights > 0, (bounds if bounds.ndim == 1 else 1.0) / weights, torch.inf)
    of_rows = (bounds if bounds.ndim != 1 else bounds.new_ones(())).reshape(-1, 1)
    of_rows = of_rows if block.gates is None else of_rows / block.gates[:, None]
    lowest = grouped(of_columns).amin(1)
    least = (of_rows * lowest - grouped(block.bias / block.latent_scales).amax(1)) / block.scales[:, None]
    groups = numbers.view(-1, GROUP)
    hits = marked((groups.amax(1).view(-1, per_row) > least).view(-1))
    if len(hits) > FEW * len(groups):
        return None
    rows = hits.div(per_row, rounding_mode="floor")
    part = hits - rows * per_row
    codes = groups.index_select(0, hits) * block.scales[rows, None]
    codes = torch.addcmul(grouped(block.bias)[part], codes, grouped(block.latent_scales)[part])
    affinity = codes if block.norms is None else codes * grouped(block.norms)[part]
    affinity = affinity if block.gates is None else affinity * block.gates[rows, None]
    own = grouped(bounds)[part] if bounds.ndim == 1 else bounds if bounds.ndim == 0 else bounds[rows]
    inside = marked((affinity > own).view(-1))
    group = inside.div(GROUP, rounding_mode="floor")
    found = codes.view(-1)[inside]
    weighted = found if affinity is codes else affinity.view(-1)[inside]
    return rows[group], part[group] * GROUP + (inside - group * GROUP), found, weighted

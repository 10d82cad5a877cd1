"""Both gradients of a decoder in one pass over those of its output, in Triton.

    sums      d W_j      = sum over the matches n of latent j of values_n g[rows_n]
    products  d values_n = <g[rows_n], W_j>

`weighted_sums` and `dot_products` (triton_kernels.py) read rows of g for every match each, and those of W besides. Here
matches are grouped by latent: a program keeps row j of W at hand, reads a row of g once, and uses it for both. Results
are those of the two, up to the order of the sum within a product; equal inputs give equal bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor
from triton.language import constexpr

from apportion.kernels import triton_kernels as shared

WIDEST = 4096
"""Columns that a program can have at hand."""


def gradients(
    order: Int[Tensor, " nnz"],
    rows: Int[Tensor, " nnz"],
    offsets: Int[Tensor, " groups_plus_1"],
    values: Float[Tensor, " nnz"],
    g: Float[Tensor, "tokens d"],
    table: Float[Tensor, "groups d"],
) -> tuple[Float[Tensor, " nnz"], Float[Tensor, "groups d"]]:
    """`products`, in the order of `values`, and `sums`, in the wider dtypes of what goes into each.

    Match n of the list by latent is number order[n] of `values`; d is at most `WIDEST`. Bytes: nnz (s d + 16 + 2 s),
    groups (2 s d + 8). Pieces of long groups add at most 8 / CHUNK of nnz d, as in `weighted_sums`.
    """
    (groups, d), chunk = table.shape, shared.CHUNK
    assert order.dtype == rows.dtype == offsets.dtype == torch.int64, "order, rows and offsets are int64"
    assert {values.dtype, g.dtype, table.dtype} <= {*shared.FLOATS}, "floats are float32, float64 or bfloat16"
    assert order.shape == rows.shape == values.shape and offsets.shape == (groups + 1,), "a match for each value"
    assert g.ndim == 2 and g.shape[1] == d <= WIDEST, "g and table have rows of one width, which fits"
    shared._check_layout(order, rows, offsets, values, g, table)
    products = torch.empty(len(values), dtype=torch.promote_types(g.dtype, table.dtype), device=g.device)
    sums = torch.empty(groups, d, dtype=torch.promote_types(values.dtype, g.dtype), device=g.device)
    if not sums.numel():
        return products, sums
    acc, chunks = shared._accumulator(values, g, table), len(values) // chunk
    partial = torch.empty(chunks, d, dtype=torch.float64 if acc == tl.float64 else torch.float32, device=g.device)
    width = max(16, triton.next_power_of_2(d))
    depth = min(16, max(1, shared.TILE_ENTRIES // width))
    shape = {"CHUNK": chunk, "DEPTH": depth, "WIDTH": width, "ACC": acc, "num_warps": 4 if width <= 2048 else 8}
    matches = order, rows, values, g, table, products
    if chunks:
        starts = torch.arange(0, chunks * chunk, chunk, device=offsets.device)
        group = torch.searchsorted(offsets, starts, right=True) - 1  # that the chunk begins in
        shared._launch(_pair_chunks, (chunks,), *matches, group, offsets, partial, d, **shape)
    shared._launch(_pair_groups, (groups,), *matches, offsets, partial, sums, d, **shape)
    return products, sums


@triton.jit
def _pair_chunks(
    order,
    rows,
    values,
    g,
    table,
    products,
    groups,
    offsets,
    partial,
    d,
    CHUNK: constexpr,
    DEPTH: constexpr,
    WIDTH: constexpr,
    ACC: constexpr,
):
    """One chunk of the list by latent, if it lies in one group; its sum goes to `partial`."""
    chunk = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    start = chunk * CHUNK
    group = tl.load(groups + chunk)
    if tl.load(offsets + group + 1) >= start + CHUNK:
        ours = tl.load(table + group * d + columns, mask=columns < d, other=0.0).to(ACC)
        total = tl.full([DEPTH, WIDTH], 0.0, ACC)
        total = _add_pairs(total, ours, start, start + CHUNK, order, rows, values, g, products, columns, d, DEPTH)
        tl.store(partial + chunk * d + columns, tl.sum(total, axis=0), mask=columns < d)


@triton.jit
def _pair_groups(
    order,
    rows,
    values,
    g,
    table,
    products,
    offsets,
    partial,
    sums,
    d,
    CHUNK: constexpr,
    DEPTH: constexpr,
    WIDTH: constexpr,
    ACC: constexpr,
):
    """One group: the matches before its first whole chunk, the sums of its whole chunks, the matches behind them."""
    group = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    start = tl.load(offsets + group)
    end = tl.load(offsets + group + 1)
    first = (start + CHUNK - 1) // CHUNK
    last = end // CHUNK
    has_chunks = first < last
    ours = tl.load(table + group * d + columns, mask=columns < d, other=0.0).to(ACC)
    total = tl.full([DEPTH, WIDTH], 0.0, ACC)
    before = tl.where(has_chunks, first * CHUNK, end)
    total = _add_pairs(total, ours, start, before, order, rows, values, g, products, columns, d, DEPTH)
    if has_chunks:
        for at in range(first, last, DEPTH):
            chunk = at + tl.arange(0, DEPTH)
            inside = (chunk < last)[:, None] & (columns < d)[None, :]
            total += tl.load(partial + chunk[:, None] * d + columns[None, :], mask=inside, other=0.0)
        total = _add_pairs(total, ours, last * CHUNK, end, order, rows, values, g, products, columns, d, DEPTH)
    tl.store(sums + group * d + columns, tl.sum(total, axis=0), mask=columns < d)


@triton.jit
def _add_pairs(total, ours, start, end, order, rows, values, g, products, columns, d, DEPTH: constexpr):
    """`total` [DEPTH, WIDTH] plus the weighted rows of g of the matches start : end; their products with `ours` are
    written."""
    for at in range(start, end, DEPTH):
        match = at + tl.arange(0, DEPTH)
        inside = match < end
        row = tl.load(rows + match, mask=inside, other=0)
        place = tl.load(order + match, mask=inside, other=0)
        value = tl.load(values + place, mask=inside, other=0.0).to(total.dtype)
        here = inside[:, None] & (columns < d)[None, :]
        entries = tl.load(g + row[:, None] * d + columns[None, :], mask=here, other=0.0).to(total.dtype)
        total += value[:, None] * entries
        tl.store(products + place, tl.sum(entries * ours[None, :], axis=1), mask=inside)
    return total

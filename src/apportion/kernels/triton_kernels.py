"""The primitives of `kernels.sparse`, `kernels.select` and the optimiser for GPUs, in Triton.

    weighted_sums   out[g] = sum over the matches n of group g of weights[n] table[indices[n]]
    dot_products    out[n] = <g[rows[n]], table[indices[n]]>
    above           flat positions of the entries of a matrix that exceed a bound
    MatchList       the same of many blocks, with their codes, into one list
    adam_rows       an Adam step, with or without unit rows, in one pass over memory

All are bound by memory, so each docstring gives the bytes moved (s = bytes of an entry, counted once per access: the
caches make it less where rows are shared). Sums are accumulated in float32, in float64 if an input is float64, in an
order that depends on shapes and match lists only: no atomics, so equal inputs give equal bits. No function waits for
the device, except that `above` reads one count; a `MatchList` leaves that to its reader. Indices are not checked
against the table: what `choose` returns fits.

Nobody imports this file before it is needed: it and triton_gradients.py are the only ones that import triton. With
TRITON_INTERPRET=1, set before triton is imported, they run on a CPU, very slowly, for tests.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor
from triton.language import constexpr

from apportion.kernels.dispatch import TRITON_DTYPES as FLOATS

CHUNK = 256
"""Matches in a piece of a group that is summed in pieces; no program walks twice as many."""
TILE_ENTRIES = 2048
"""Entries of a table that a program has in flight: 16 for each thread of four warps."""
SCAN_ENTRIES = 8192
"""Entries of a row that a program of `above` looks at, at most."""
SCAN_ROWS = 4
"""Rows that it looks at one after the other, with the bounds of their columns in registers."""

SHORTEST_ROW = torch.finfo(torch.float32).eps
"""Unit rows that are shorter, zero up to rounding, are divided by this instead of their norm."""


# Sums


def weighted_sums(
    indices: Int[Tensor, " nnz"],
    offsets: Int[Tensor, " groups_plus_1"],
    weights: Float[Tensor, " nnz"],
    table: Float[Tensor, "entries d"],
    out: Float[Tensor, "groups d"] | None = None,
) -> Float[Tensor, "groups d"]:
    """out[g] = sum over n in offsets[g] : offsets[g + 1] of weights[n] * table[indices[n]]; zeros for empty groups.

    With groups = tokens and table = W_dec this is the decoder; with table = W_enc the gradient of x; over the
    transposed list, with groups = latents and a table of tokens, the gradient of the weights. Every entry of `out` is
    written; without `out` the result has the wider dtype of weights and table.

    Bytes: nnz (s d + 8 + s) read, groups (s d + 8) read and written. Pieces of long groups add at most 8 / CHUNK of
    nnz d. A group is cut at fixed multiples of CHUNK in the match list: the whole chunks within it are summed by a
    program each, then one program adds them up with the loose ends before and behind them.
    """
    groups, d = offsets.numel() - 1, table.shape[1]
    assert indices.dtype == offsets.dtype == torch.int64, "indices and offsets are int64"
    assert weights.dtype in FLOATS and table.dtype in FLOATS, "weights and table are float32, float64 or bfloat16"
    assert indices.ndim == 1 and weights.shape == indices.shape, "one weight for each index"
    assert table.ndim == 2 and offsets.ndim == 1 and groups >= 0, "table [entries, d], offsets [groups + 1]"
    if out is None:
        out = torch.empty(groups, d, dtype=torch.promote_types(weights.dtype, table.dtype), device=table.device)
    assert out.shape == (groups, d) and out.dtype in FLOATS, "out is [groups, d]"
    _check_layout(indices, offsets, weights, table, out)
    if not out.numel():
        return out

    acc = _accumulator(weights, table)
    chunks = indices.numel() // CHUNK
    partial = torch.empty(chunks, d, dtype=torch.float64 if acc == tl.float64 else torch.float32, device=table.device)
    width, depth = _tile(d)
    shape = {"CHUNK": CHUNK, "DEPTH": depth, "WIDTH": width, "ACC": acc, "num_warps": 4}
    # Column blocks are the slow axis of the grid, so that programs running together share a slab of the table in cache.
    columns = triton.cdiv(d, width)
    if chunks:
        starts = torch.arange(0, chunks * CHUNK, CHUNK, device=offsets.device)
        ends = offsets[torch.searchsorted(offsets, starts, right=True)]  # of the group that the chunk begins in
        _launch(_sum_chunks, (chunks, columns), indices, ends, weights, table, partial, d, **shape)
    _launch(_sum_groups, (groups, columns), indices, offsets, weights, table, partial, out, d, **shape)
    return out


@triton.jit
def _sum_chunks(
    indices, ends, weights, table, partial, d, CHUNK: constexpr, DEPTH: constexpr, WIDTH: constexpr, ACC: constexpr
):
    """One chunk of the match list, if it lies in one group. `ends` are [chunks], `partial` [chunks, d], of which other
    rows are never read."""
    chunk = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    start = chunk * CHUNK
    if tl.load(ends + chunk) >= start + CHUNK:
        total = tl.full([DEPTH, WIDTH], 0.0, ACC)
        total = _add_matches(total, start, start + CHUNK, indices, weights, table, columns, d, DEPTH)
        tl.store(partial + chunk * d + columns, tl.sum(total, axis=0), mask=columns < d)


@triton.jit
def _sum_groups(
    indices,
    offsets,
    weights,
    table,
    partial,
    out,
    d,
    CHUNK: constexpr,
    DEPTH: constexpr,
    WIDTH: constexpr,
    ACC: constexpr,
):
    """One group: the matches before its first whole chunk, its whole chunks, the matches behind the last one."""
    group = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    start = tl.load(offsets + group)
    end = tl.load(offsets + group + 1)
    first = (start + CHUNK - 1) // CHUNK
    last = end // CHUNK
    has_chunks = first < last
    total = tl.full([DEPTH, WIDTH], 0.0, ACC)
    before = tl.where(has_chunks, first * CHUNK, end)
    total = _add_matches(total, start, before, indices, weights, table, columns, d, DEPTH)
    if has_chunks:
        for at in range(first, last, DEPTH):
            chunk = at + tl.arange(0, DEPTH)
            inside = (chunk < last)[:, None] & (columns < d)[None, :]
            total += tl.load(partial + chunk[:, None] * d + columns[None, :], mask=inside, other=0.0)
        total = _add_matches(total, last * CHUNK, end, indices, weights, table, columns, d, DEPTH)
    tl.store(out + group * d + columns, tl.sum(total, axis=0), mask=columns < d)


@triton.jit
def _add_matches(total, start, end, indices, weights, table, columns, d, DEPTH: constexpr):
    """`total` [DEPTH, WIDTH] plus the weighted table rows of the matches start : end, DEPTH of them at a time."""
    for at in range(start, end, DEPTH):
        match = at + tl.arange(0, DEPTH)
        inside = match < end
        index = tl.load(indices + match, mask=inside, other=0)
        weight = tl.load(weights + match, mask=inside, other=0.0).to(total.dtype)
        here = inside[:, None] & (columns < d)[None, :]
        entries = tl.load(table + index[:, None] * d + columns[None, :], mask=here, other=0.0)
        total += weight[:, None] * entries.to(total.dtype)
    return total


# Dot products


def dot_products(
    rows: Int[Tensor, " nnz"],
    indices: Int[Tensor, " nnz"],
    g: Float[Tensor, "tokens d"],
    table: Float[Tensor, "entries d"],
) -> Float[Tensor, " nnz"]:
    """<g[rows[n]], table[indices[n]]> for every match n, in the wider dtype of g and table.

    Any order of matches is right. In row-major order it is fast: a program takes several consecutive matches, mostly
    of one row, so that g comes from memory once and from the nearest cache after that.

    Bytes: nnz (s d + 16 + s), and tokens s d for g in row-major order.
    """
    nnz, d = indices.numel(), table.shape[1]
    assert rows.dtype == indices.dtype == torch.int64, "rows and indices are int64"
    assert g.dtype in FLOATS and table.dtype in FLOATS, "g and table are float32, float64 or bfloat16"
    assert indices.ndim == 1 and rows.shape == indices.shape, "one row for each index"
    assert g.ndim == table.ndim == 2 and g.shape[1] == d, "g and table have rows of one width"
    _check_layout(rows, indices, g, table)
    out = torch.empty(nnz, dtype=torch.promote_types(g.dtype, table.dtype), device=table.device)
    if nnz:
        width, depth = _tile(d)
        shape = {"DEPTH": depth, "WIDTH": width, "ACC": _accumulator(g, table), "num_warps": 4}
        _launch(_dot_products, (triton.cdiv(nnz, depth),), rows, indices, g, table, out, nnz, d, **shape)
    return out


@triton.jit(do_not_specialize=["nnz"])  # it changes from step to step
def _dot_products(rows, indices, g, table, out, nnz, d, DEPTH: constexpr, WIDTH: constexpr, ACC: constexpr):
    """DEPTH consecutive matches, WIDTH columns at a time."""
    match = tl.program_id(0).to(tl.int64) * DEPTH + tl.arange(0, DEPTH)
    inside = match < nnz
    g_rows = g + tl.load(rows + match, mask=inside, other=0) * d
    table_rows = table + tl.load(indices + match, mask=inside, other=0) * d
    total = tl.full([DEPTH, WIDTH], 0.0, ACC)
    for start in range(0, d, WIDTH):
        columns = start + tl.arange(0, WIDTH)
        here = inside[:, None] & (columns < d)[None, :]
        ours = tl.load(g_rows[:, None] + columns[None, :], mask=here, other=0.0).to(ACC)
        total += ours * tl.load(table_rows[:, None] + columns[None, :], mask=here, other=0.0).to(ACC)
    tl.store(out + match, tl.sum(total, axis=1), mask=inside)


# Selection


def above(
    affinity: Float[Tensor, "rows d_sae"],
    bounds: float | Float[Tensor, ""] | Float[Tensor, " d_sae"] | Float[Tensor, "rows 1"],
) -> Int[Tensor, " n"]:
    """Flat positions row * d_sae + latent of the entries strictly greater than the bounds, in ascending order.

    There is one bound for all, for each latent, or for each row. NaN exceeds nothing. A bound given as a number is
    rounded to the dtype of `affinity`.

    Bytes: N s read once (N = rows d_sae), N / 8 written and read for a bit per entry, 8 n written. The first pass
    marks and counts; the second writes each tile's positions behind those of the tiles before it. Between them the
    host reads the total.
    """
    assert affinity.ndim == 2, "affinity is [rows, d_sae]"
    d_sae = affinity.shape[1]
    if not isinstance(bounds, Tensor):
        bounds = torch.full((), bounds, dtype=affinity.dtype, device=affinity.device)
    if not affinity.numel():
        return torch.empty(0, dtype=torch.int64, device=affinity.device)

    marks, counts, words = _marked(affinity, bounds)
    ends = counts.view(-1).cumsum(0)
    out = torch.empty(int(ends[-1]), dtype=torch.int64, device=affinity.device)
    if out.numel():
        _launch(_write_positions, tuple(counts.shape), marks, ends, out, d_sae, WORDS=words, num_warps=4)
    return out


def _marked(affinity: Tensor, bounds: Tensor) -> tuple[Int[Tensor, "rows across words"], Tensor, int]:
    """A bit for each entry that exceeds its bound; how many of them each tile of a row has; words of a tile."""
    rows, d_sae = affinity.shape
    assert affinity.dtype in FLOATS, "affinity is float32, float64 or bfloat16"
    assert bounds.dtype == affinity.dtype, "bounds have the dtype of affinity"
    assert bounds.shape in ((), (d_sae,), (rows, 1)), "bounds are a scalar, one per latent, or one per row"
    _check_layout(affinity, bounds)
    words = max(1, min(SCAN_ENTRIES, triton.next_power_of_2(d_sae)) // 32)
    across = triton.cdiv(d_sae, 32 * words)
    marks = torch.empty(rows, across, words, dtype=torch.int32, device=affinity.device)
    counts = torch.empty(rows, across, dtype=torch.int32, device=affinity.device)
    shape = {"ROWS": SCAN_ROWS, "WORDS": words, "ACC": _accumulator(affinity), "num_warps": 8}
    grid = (triton.cdiv(rows, SCAN_ROWS), across)
    _launch(_mark_above, grid, affinity, bounds, marks, counts, rows, d_sae, bounds.ndim, **shape)
    return marks, counts, words


@triton.jit(do_not_specialize=["rows"])
def _mark_above(
    affinity, bounds, marks, counts, rows, d_sae, BOUNDS: constexpr, ROWS: constexpr, WORDS: constexpr, ACC: constexpr
):
    """A bit for each entry of a few tiles, one below the other: 32 * WORDS columns of ROWS rows.

    `marks` are [rows, across, WORDS], `counts` [rows, across]. BOUNDS is 0 for one bound, 1 for one per latent, 2 for
    one per row.
    """
    word = tl.arange(0, WORDS)
    bit = tl.arange(0, 32)
    columns = tl.program_id(1) * (32 * WORDS) + word[:, None] * 32 + bit[None, :]
    inside = columns < d_sae
    if BOUNDS == 1:
        bound = tl.load(bounds + columns, mask=inside, other=0.0).to(ACC)
    else:
        bound = tl.load(bounds).to(ACC)
    first = tl.program_id(0).to(tl.int64) * ROWS
    for row in range(first, tl.minimum(first + ROWS, rows)):  # pyright: ignore[reportArgumentType]
        entries = tl.load(affinity + row * d_sae + columns, mask=inside, other=0.0).to(ACC)
        if BOUNDS == 2:
            bound = tl.load(bounds + row).to(ACC)
        hit = ((entries > bound) & inside).to(tl.int32)
        tile = row * tl.num_programs(1) + tl.program_id(1)
        tl.store(marks + tile * WORDS + word, tl.sum(hit << bit[None, :], axis=1))
        tl.store(counts + tile, tl.sum(hit))


@triton.jit
def _write_positions(marks, ends, out, d_sae, WORDS: constexpr):
    """The marks of one tile as positions. Each turn takes the lowest mark of every word; few words have two.

    `ends` [rows * across] are the marks up to the end of each tile.
    """
    row = tl.program_id(0).to(tl.int64)
    tile = row * tl.num_programs(1) + tl.program_id(1)
    lane = tl.arange(0, WORDS)
    word = tl.load(marks + tile * WORDS + lane).to(tl.uint32, bitcast=True)
    count = _count_bits(word)
    place = tl.load(ends + tile) - tl.sum(count) + tl.cumsum(count, axis=0) - count
    position = row * d_sae + tl.program_id(1) * (32 * WORDS) + lane * 32
    for _ in range(tl.max(count)):  # pyright: ignore[reportArgumentType]
        rest = word & (word - 1)
        tl.store(out + place, position + _count_bits((word ^ rest) - 1), mask=word != 0)
        word = rest
        place += 1


class MatchList:
    """Entries of the blocks of a product that exceed bounds, written one behind the other: blocks follow each other
    without a wait, and how many there are is read once, from `count`. What does not fit is counted only.

    Bytes: as `above`, and 12 or 16 for each entry.
    """

    def __init__(self, capacity: int, like: Tensor, weighted: bool) -> None:
        self.places = torch.empty(capacity, dtype=torch.int64, device=like.device)
        """row * stride + column, with the row's and the column's numbers in the whole product."""
        self.values = torch.empty(capacity, dtype=like.dtype, device=like.device)
        self.affinity = torch.empty_like(self.values) if weighted else self.values
        self.count = torch.zeros((), dtype=torch.int64, device=like.device)

    def add(
        self,
        codes: Float[Tensor, "rows columns"],
        affinity: Float[Tensor, "rows columns"],
        bounds: Float[Tensor, ""] | Float[Tensor, " columns"] | Float[Tensor, "rows 1"],
        first: int,
        stride: int,
    ) -> None:
        """The entries of a block whose affinity exceeds the bounds; its first one has the place `first`."""
        if not affinity.numel():
            return
        marks, counts, words = _marked(affinity, bounds)
        ends = counts.view(-1).cumsum(0) + self.count
        _check_layout(codes, affinity, self.places)
        shape = {"WEIGHTED": self.affinity is not self.values, "WORDS": words, "num_warps": 4}
        lists = (self.places, self.values, self.affinity)
        width, capacity = affinity.shape[1], len(self.places)
        _launch(
            _append, tuple(counts.shape), marks, ends, codes, affinity, *lists, first, stride, width, capacity, **shape
        )
        self.count = ends[-1]


@triton.jit(do_not_specialize=["first", "capacity"])
def _append(
    marks,
    ends,
    codes,
    affinity,
    places,
    values,
    weights,
    first,
    stride,
    width,
    capacity,
    WEIGHTED: constexpr,
    WORDS: constexpr,
):
    """As `_write_positions`, with code and affinity of each entry."""
    row = tl.program_id(0).to(tl.int64)
    tile = row * tl.num_programs(1) + tl.program_id(1)
    lane = tl.arange(0, WORDS)
    word = tl.load(marks + tile * WORDS + lane).to(tl.uint32, bitcast=True)
    count = _count_bits(word)
    place = tl.load(ends + tile) - tl.sum(count) + tl.cumsum(count, axis=0) - count
    before = tl.program_id(1) * (32 * WORDS) + lane * 32
    for _ in range(tl.max(count)):  # pyright: ignore[reportArgumentType]
        rest = word & (word - 1)
        column = before + _count_bits((word ^ rest) - 1)
        here = (word != 0) & (place < capacity)
        tl.store(places + place, first + row * stride + column, mask=here)
        code = tl.load(codes + row * width + column, mask=here, other=0.0)
        tl.store(values + place, code.to(values.dtype.element_ty), mask=here)
        if WEIGHTED:
            weight = tl.load(affinity + row * width + column, mask=here, other=0.0)
            tl.store(weights + place, weight.to(weights.dtype.element_ty), mask=here)
        word = rest
        place += 1


@triton.jit
def _count_bits(word):
    """Bits set in each uint32: sums of 2, 4, 8 neighbours, then of the four bytes."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24).to(tl.int32)


# The optimiser


@torch.no_grad()
def adam_rows(
    p: Float[Tensor, "*shape"],
    grad: Float[Tensor, "*shape"],
    exp_avg: Float[Tensor, "*shape"],
    exp_avg_sq: Float[Tensor, "*shape"],
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    grad_scale: Float[Tensor, ""],
    unit_rows: bool,
) -> None:
    """One step of Adam in place on p, exp_avg and exp_avg_sq, float32; `grad` stays as it is.

    `step` counts from 1, this one included. The gradient is multiplied by `grad_scale`, a 0-d tensor on the device;
    by 0 it becomes 0 even where it is not finite.
    What follows is `torch.optim.Adam` without weight decay and amsgrad:

        exp_avg     <- beta1 exp_avg + (1 - beta1) grad
        exp_avg_sq  <- beta2 exp_avg_sq + (1 - beta2) grad^2
        p           <- p - lr / (1 - beta1^step) * exp_avg / (sqrt(exp_avg_sq) / sqrt(1 - beta2^step) + eps)

    With `unit_rows` the rows of p have unit norm: before the step the part of the gradient along them is removed
    (grad - <grad, p> p, before it is scaled), and after the step they are normalised. Without, p has any shape.

    Bytes: 28 per entry (four tensors read, three written), once. Unit rows are held in registers, which suffice up to
    d = 8192; wider ones are right too, and slower.
    """
    tensors = (p, grad, exp_avg, exp_avg_sq)
    assert all(t.dtype == torch.float32 and t.shape == p.shape for t in tensors), "float32 tensors of one shape"
    assert grad_scale.dtype == torch.float32 and grad_scale.ndim == 0, "grad_scale is a float32 scalar"
    assert step >= 1, "steps count from 1"
    assert p.ndim == 2 or not unit_rows, "unit rows need [rows, d]"
    _check_layout(*tensors, grad_scale)
    if not p.numel():
        return
    d = p.shape[1] if unit_rows else TILE_ENTRIES
    block = triton.next_power_of_2(d)
    warps = min(max(block // 512, 1), 16)
    corrections = lr / (1 - beta1**step), (1 - beta2**step) ** 0.5
    numbers = (1 - beta1, float(beta2), 1 - beta2, *corrections, float(eps))
    shape = {"UNIT_ROWS": unit_rows, "SHORTEST": SHORTEST_ROW, "BLOCK": block, "num_warps": warps}
    _launch(_adam_rows, (triton.cdiv(p.numel(), d),), *tensors, grad_scale, p.numel(), d, *numbers, **shape)
    torch.autograd.graph.increment_version((p, exp_avg, exp_avg_sq))


@triton.jit
def _adam_rows(
    p,
    grad,
    exp_avg,
    exp_avg_sq,
    grad_scale,
    numel,
    d,
    beta1_rest,
    beta2,
    beta2_rest,
    step_size,
    correction2_root,
    eps,
    UNIT_ROWS: constexpr,
    SHORTEST: constexpr,
    BLOCK: constexpr,
):
    """One row (d entries), held in registers from the projection to the normalisation."""
    columns = tl.arange(0, BLOCK)
    at = tl.program_id(0).to(tl.int64) * d + columns
    inside = (columns < d) & (at < numel)
    row = tl.load(p + at, mask=inside, other=0.0)
    slope = tl.load(grad + at, mask=inside, other=0.0)
    first = tl.load(exp_avg + at, mask=inside, other=0.0)
    second = tl.load(exp_avg_sq + at, mask=inside, other=0.0)
    if UNIT_ROWS:
        slope -= tl.sum(slope * row) * row
    scale = tl.load(grad_scale)
    slope = tl.where(scale == 0, 0.0, slope * scale)
    first += (slope - first) * beta1_rest
    second = second * beta2 + slope * slope * beta2_rest
    # Square roots and quotients are rounded as torch rounds them: the arithmetic hides behind the memory.
    row -= step_size * tl.div_rn(first, tl.div_rn(tl.sqrt_rn(second), correction2_root) + eps)
    if UNIT_ROWS:
        row = tl.div_rn(row, tl.maximum(tl.sqrt_rn(tl.sum(tl.where(inside, row * row, 0.0))), SHORTEST))
    tl.store(p + at, row, mask=inside)
    tl.store(exp_avg + at, first, mask=inside)
    tl.store(exp_avg_sq + at, second, mask=inside)


# Shared


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **shape: Any) -> None:
    """Run a kernel on the device of its first argument, whichever is the current one.

    Products and sums are fused into one rounding, said explicitly because Triton's default differs between versions.
    """
    with torch.cuda.device_of(arguments[0]):
        kernel[grid](*arguments, **shape, enable_fp_fusion=True)


def _accumulator(*tensors: Tensor) -> tl.dtype:
    return tl.float64 if any(t.dtype == torch.float64 for t in tensors) else tl.float32


def _tile(d: int) -> tuple[int, int]:
    """Columns and matches that a program handles at a time."""
    width = max(16, min(256, triton.next_power_of_2(d)))
    return width, min(16, TILE_ENTRIES // width)


def _check_layout(*tensors: Tensor) -> None:
    assert all(t.is_contiguous() for t in tensors), "kernels take contiguous tensors"
    assert len({t.device for t in tensors}) == 1, "kernels take tensors on one device"

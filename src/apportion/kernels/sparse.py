"""Encoder and decoder on chosen matches, with gradients that touch only those matches.

    encode   values_n = <x[row_n], W_enc[latent_n]> + b_enc[latent_n]
    decode   x_hat_t  = sum over the matches n of token t of values_n W_dec[latent_n]

Which matches there are is fixed beforehand (`kernels.select`). With n running over the matches and g the incoming
gradient:

    d values = <g[row_n], W_dec[latent_n]>                     one dot product per match
    d x      = sum_n g_n W_enc[latent_n]   grouped by token    the same operation as decode
    d W      = sum_n g_n x[row_n]          grouped by latent   decode over the transposed match list

All three are exact; nothing of size [tokens, d_sae] is made. Where so many entries are active that a list of them is no
longer short (ReLU, Gated and JumpReLU early in training), the same sums are made as dense products of row blocks.
Where every token's latents lie close together (those of its expert), tokens are taken in the order of their latents, so
that rows of W_enc and W_dec are read while they are in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from apportion.blocks import block_rows
from apportion.devices import on_gpu
from apportion.kernels import dispatch
from apportion.kernels.primitives import dot_products, gradients_at_once, weighted_sums
from apportion.latents import Latents

LOCAL_SHARE = 0.25
"""Share of all latents within which those of a token must lie, in the mean, for the order of tokens to matter."""


def encode_matches(
    x: Float[Tensor, "tokens d_in"],
    W_enc: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    matches: Latents,
    centre: Float[Tensor, " d_in"] | None = None,
) -> Latents:
    """The matches with their codes as an autograd function of x, W_enc and b_enc (fixed matches, codes known).

    `centre`, where given, is what has been subtracted from a constant x, and gets its gradient: -W_enc^T d b_enc, much
    cheaper than by way of d x.
    """
    values = _Encode.apply(x, W_enc, b_enc, centre, matches)
    return replace(matches, values=values)


def decode_matches(latents: Latents, W_dec: Float[Tensor, "d_sae d_out"]) -> Float[Tensor, "tokens d_out"]:
    """Sum of the decoder rows of each token's matches, weighted by the codes; no bias."""
    return _Decode.apply(latents.values, W_dec, latents)  # type: ignore[return-value]


def rows_of(table: Float[Tensor, " n *d"], ids: Int[Tensor, " m"]) -> Float[Tensor, " m *d"]:
    """Some rows of a table (ids ascending, none twice), whose gradient is sparse and has no more rows than these.

    autograd adds it to a dense gradient in place, so that no second one as large as the table is made; by itself it
    stays sparse.
    """
    return _RowsOf.apply(table, ids)  # type: ignore[return-value]


class _RowsOf(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, ids: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.shape = table.shape
        return table[ids]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (ids,) = ctx.saved_tensors
        return torch.sparse_coo_tensor(ids[None], grads[0], ctx.shape, is_coalesced=True, check_invariants=False), None


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor, centre: Tensor | None, matches: Latents) -> Tensor:
        ctx.save_for_backward(x, W_enc)
        ctx.matches = matches
        return matches.values.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = grads
        x, W_enc = ctx.saved_tensors
        of_x, of_W, of_b, of_centre, _ = ctx.needs_input_grad
        db = d_centre = None
        dx = _sum_by_row(ctx.matches, g, W_enc) if of_x else None
        dW = sum_by_latent(ctx.matches, g, x) if of_W else None
        if of_b or of_centre:
            db = totals_by_latent(ctx.matches, g)
            d_centre = -(db @ W_enc) if of_centre else None
        return dx, dW, db, d_centre, None


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, W_dec: Tensor, latents: Latents) -> Tensor:
        ctx.save_for_backward(values, W_dec)
        ctx.latents = latents
        return _sum_by_row(latents, values, W_dec)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = grads
        values, W_dec = ctx.saved_tensors
        of_values, of_W, _ = ctx.needs_input_grad
        of_both = of_values and of_W and not _is_dense(ctx.latents)
        if of_both and (both := gradients_at_once(ctx.latents, values, g, W_dec)) is not None:
            return *both, None
        d_values = match_products(ctx.latents, g, W_dec) if of_values else None
        dW = sum_by_latent(ctx.latents, values, g) if of_W else None
        return d_values, dW, None


def _sum_by_row(latents: Latents, weights: Tensor, table: Float[Tensor, "d_sae d"]) -> Float[Tensor, "tokens d"]:
    """sum over the matches of each token of weight * table[latent]."""
    if _is_dense(latents):
        return torch.cat([z @ table for _, _, z in _dense_blocks(latents, weights)])
    if _is_local(latents):
        order, matches = latents.by_first_latent()
        sums = weighted_sums(matches.indices, matches.offsets, weights[matches.values], table)
        return torch.empty_like(sums).index_copy_(0, order, sums)
    return weighted_sums(latents.indices, latents.offsets, weights, table)


def sum_by_latent(latents: Latents, weights: Tensor, table: Float[Tensor, "tokens d"]) -> Float[Tensor, "d_sae d"]:
    """sum over the matches of each latent of weight * table[token]."""
    if _is_dense(latents):
        total = table.new_zeros(latents.d_sae, table.shape[1])
        for tokens, _, z in _dense_blocks(latents, weights):
            total.addmm_(z.T, table[tokens])
        return total
    order, rows, offsets = latents.by_latent()
    return weighted_sums(rows, offsets, weights[order], table)


def totals_by_latent(latents: Latents, g: Float[Tensor, " nnz"]) -> Float[Tensor, " d_sae"]:
    """The sum over the matches of each latent, added up in the same order every time."""
    return _totals_in_order(latents, g) if on_gpu(g) else g.new_zeros(latents.d_sae).index_add_(0, latents.indices, g)


def _totals_in_order(latents: Latents, g: Tensor) -> Tensor:
    order, _, offsets = latents.by_latent()
    return torch.segment_reduce(g[order], "sum", offsets=offsets, unsafe=True)


def match_products(latents: Latents, g: Float[Tensor, "tokens d"], table: Float[Tensor, "d_sae d"]) -> Tensor:
    """<g[token], table[latent]> of every match."""
    if _is_dense(latents):
        found = g.new_empty(latents.nnz)
        for tokens, matches, _ in _dense_blocks(latents, None):
            rows = latents.rows()[matches] - tokens.start
            found[matches] = (g[tokens] @ table.T)[rows, latents.indices[matches]]
        return found
    if _is_local(latents):
        order, matches = latents.by_first_latent()
        products = dot_products(matches.offsets, matches.rows(), matches.indices, g[order], table)
        return torch.empty_like(products).index_copy_(0, matches.values, products)
    return dot_products(latents.offsets, latents.rows(), latents.indices, g, table)


def _is_dense(latents: Latents) -> bool:
    return latents.nnz > dispatch.DENSE_SHARE * latents.tokens * latents.d_sae


def _is_local(latents: Latents) -> bool:
    """True if reading the table in the order of latents pays: on a CPU, for latents that lie close together."""
    if on_gpu(latents.indices) or not latents.nnz:
        return False
    first, last = (
        latents.indices[ends.clamp(0, latents.nnz - 1)] for ends in (latents.offsets[:-1], latents.offsets[1:] - 1)
    )
    return bool((last - first).clamp_min(0).double().mean() < LOCAL_SHARE * latents.d_sae)


def _dense_blocks(latents: Latents, weights: Tensor | None) -> Iterator[tuple[slice, slice, Tensor]]:
    """Tokens, matches and (with weights) the dense code of each row block."""
    size = block_rows(latents.d_sae, latents.values)
    z = latents.values.new_empty(0)
    starts = list(range(0, latents.tokens, size))
    ends = [0, latents.nnz] if len(starts) == 1 else latents.offsets[[*starts, latents.tokens]].tolist()
    for start, (first, last) in zip(starts, pairwise(ends), strict=True):
        tokens, matches = slice(start, min(start + size, latents.tokens)), slice(first, last)
        if weights is not None:
            z = weights.new_zeros(tokens.stop - start, latents.d_sae)
            z[latents.rows()[matches] - start, latents.indices[matches]] = weights[matches]
        yield tokens, matches, z

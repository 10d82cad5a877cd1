"""Encoder and decoder on chosen matches, with gradients that touch only those matches.

    encode   values_n = <x[row_n], W_enc[latent_n]> + b_enc[latent_n]
    decode   x_hat_t  = sum over the matches n of token t of values_n W_dec[latent_n]

Which matches there are is fixed beforehand (`kernels.select`). With n running over the matches and g the incoming
gradient:

    d values = <g[row_n], W_dec[latent_n]>                     one dot product per match
    d x      = sum_n g_n W_enc[latent_n]   grouped by token    the same operation as decode
    d W      = sum_n g_n x[row_n]          grouped by latent   decode over the transposed match list

All three are exact; nothing of size [tokens, d_sae] is made.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from apportion.latents import Latents


def encode_matches(
    x: Float[Tensor, "tokens d_in"],
    W_enc: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    matches: Latents,
) -> Latents:
    """The matches with their codes as an autograd function of x, W_enc and b_enc (fixed matches, codes known)."""
    values = _Encode.apply(x, W_enc, b_enc, matches)
    return Latents(values, matches.indices, matches.offsets, matches.d_sae, matches.shape)


def decode_matches(latents: Latents, W_dec: Float[Tensor, "d_sae d_out"]) -> Float[Tensor, "tokens d_out"]:
    """Sum of the decoder rows of each token's matches, weighted by the codes; no bias."""
    return _Decode.apply(latents.values, W_dec, latents)  # type: ignore[return-value]


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor, matches: Latents) -> Tensor:
        ctx.save_for_backward(x, W_enc)
        ctx.matches = matches
        return matches.values.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = grads
        x, W_enc = ctx.saved_tensors
        dx = dW = db = None
        if ctx.needs_input_grad[0]:
            dx = _sum_by_row(ctx.matches, g, W_enc)
        if ctx.needs_input_grad[1]:
            dW = _sum_by_latent(ctx.matches, g, x)
        if ctx.needs_input_grad[2]:
            db = g.new_zeros(ctx.matches.d_sae).index_add_(0, ctx.matches.indices, g)
        return dx, dW, db, None


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
        d_values = dW = None
        if ctx.needs_input_grad[0]:
            d_values = _dot_products(ctx.latents, g, W_dec)
        if ctx.needs_input_grad[1]:
            dW = _sum_by_latent(ctx.latents, values, g)
        return d_values, dW, None


def _sum_by_row(latents: Latents, weights: Tensor, table: Float[Tensor, "d_sae d"]) -> Float[Tensor, "tokens d"]:
    """sum over the matches of each token of weight * table[latent]."""
    return _weighted_sums(latents.indices, latents.offsets, weights, table)


def _sum_by_latent(latents: Latents, weights: Tensor, table: Float[Tensor, "tokens d"]) -> Float[Tensor, "d_sae d"]:
    """sum over the matches of each latent of weight * table[token]."""
    order = latents.indices.argsort(stable=True)
    counts = latents.counts()
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return _weighted_sums(latents.rows()[order], offsets, weights[order], table)


def _weighted_sums(indices: Tensor, offsets: Tensor, weights: Tensor, table: Tensor) -> Tensor:
    if indices.numel() == 0:
        return table.new_zeros(offsets.numel() - 1, table.shape[1])
    return F.embedding_bag(
        indices, table, offsets, mode="sum", per_sample_weights=weights.contiguous(), include_last_offset=True
    )


def _dot_products(latents: Latents, g: Float[Tensor, "tokens d"], table: Float[Tensor, "d_sae d"]) -> Tensor:
    """<g[row_n], table[latent_n]> for every match n."""
    if latents.nnz == 0:
        return g.new_zeros(0)
    _accept_csr()
    pattern = torch.sparse_csr_tensor(
        latents.offsets,
        latents.indices,
        torch.zeros_like(latents.values),
        size=(latents.tokens, latents.d_sae),
        check_invariants=False,
    )
    return torch.sparse.sampled_addmm(pattern, g.contiguous(), table.T, beta=0.0).values()


@cache
def _accept_csr() -> None:
    """torch warns once per process that CSR tensors are in beta; use up that warning where nobody sees it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(torch.tensor([0, 0]), torch.zeros(0, dtype=torch.int64), torch.zeros(0), size=(1, 1))

"""The few operations on matches that training is made of; everything else in this room is put together from them.

weighted_sums   out_g = sum over the matches n of group g of weight_n * table[index_n]
dot_products    out_n = <g[row_n], table[index_n]>

`gradients_at_once` is both for the backward pass of a decoder, where a backend can do that.
"""

from __future__ import annotations

import warnings
from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from apportion.kernels.dispatch import backend_for
from apportion.latents import Latents


def weighted_sums(
    indices: Int[Tensor, " nnz"],
    offsets: Int[Tensor, " groups_plus_1"],
    weights: Float[Tensor, " nnz"],
    table: Float[Tensor, "n d"],
) -> Float[Tensor, "groups d"]:
    """Sums of rows of a table over consecutive groups of matches; an empty group gives zeros."""
    weights, table = weights.contiguous(), table.contiguous()
    if backend_for(weights, table) == "triton":
        from apportion.kernels import triton_kernels

        return triton_kernels.weighted_sums(indices, offsets, weights, table)
    if indices.numel() == 0:
        return table.new_zeros(offsets.numel() - 1, table.shape[1])
    return F.embedding_bag(indices, table, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True)


def dot_products(
    offsets: Int[Tensor, " tokens_plus_1"],
    rows: Int[Tensor, " nnz"],
    indices: Int[Tensor, " nnz"],
    g: Float[Tensor, "tokens d"],
    table: Float[Tensor, "n d"],
) -> Float[Tensor, " nnz"]:
    """<g[row], table[index]> of every match; matches in row order, `offsets` delimiting the rows."""
    g, table = g.contiguous(), table.contiguous()
    if backend_for(g, table) == "triton":
        from apportion.kernels import triton_kernels

        return triton_kernels.dot_products(rows, indices, g, table)
    if indices.numel() == 0:
        return g.new_zeros(0)
    if g.element_size() == 2:  # which sampled_addmm does not take
        return dot_products(offsets, rows, indices, g.float(), table.float()).to(g.dtype)
    _accept_csr()
    size = (offsets.numel() - 1, table.shape[0])
    pattern = torch.sparse_csr_tensor(offsets, indices, g.new_zeros(indices.numel()), size=size, check_invariants=False)
    return torch.sparse.sampled_addmm(pattern, g, table.T, beta=0.0).values()


def gradients_at_once(
    latents: Latents, values: Float[Tensor, " nnz"], g: Float[Tensor, "tokens d"], table: Float[Tensor, "d_sae d"]
) -> tuple[Float[Tensor, " nnz"], Float[Tensor, "d_sae d"]] | None:
    """<g[row], table[latent]> of every match, and of each latent the sum of values_n g[row_n] over its matches, in one
    pass over g; None where the backend has no such thing."""
    values, g, table = values.contiguous(), g.contiguous(), table.contiguous()
    if backend_for(values, g, table) != "triton":
        return None
    from apportion.kernels import triton_gradients

    if table.shape[1] > triton_gradients.WIDEST:
        return None
    order, rows, offsets = latents.by_latent()
    return triton_gradients.gradients(order, rows, offsets, values, g, table)


@cache
def _accept_csr() -> None:
    """torch warns once per process that CSR tensors are in beta; use up that warning where nobody sees it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(torch.tensor([0, 0]), torch.zeros(0, dtype=torch.int64), torch.zeros(0), size=(1, 1))

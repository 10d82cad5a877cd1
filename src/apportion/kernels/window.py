"""Gradients for thresholds: a step has none, so matches near their threshold stand in for it (arXiv 2407.14435).

Raising theta_j a little switches off the matches (b, j) with pre-activation a_bj just above it. If the loss rises by
jump_n when match n is switched on, the expected loss changes by

    d E[loss] / d theta_j = -sum over tokens of  p(a = theta_j) E[jump | a = theta_j]

and the density is estimated from the matches within a window of width eps around the threshold (rectangle kernel):

    d loss / d theta_j   := -(1 / eps) sum over n near of jump_n         near:  |a_n - theta_j| < eps / 2
    d loss / d t_j        =  theta_j  d loss / d theta_j                 theta = exp(t)

    jump of L0                1
    jump of a function of z   theta_j d loss / d z_n        (to first order: z goes from 0 to theta_j)

The window is about pre-activations, before any step or ReLU: half of it lies below the threshold, where codes are zero,
and where theta_j < eps / 2 part of it is negative. Those matches are not in the `Latents` of the code; `reach` finds
both lists in the same row-block scan, with one dense product. Sums run in float32 at least.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from apportion.allocation import Selection
from apportion.devices import marked
from apportion.kernels.select import all_above
from apportion.kernels.sparse import match_products, totals_by_latent
from apportion.latents import Latents, from_matches


@torch.no_grad()
def reach(
    x: Float[Tensor, "tokens d_in"],
    W_enc: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    theta: Float[Tensor, " d_sae"],
    bandwidth: Float[Tensor, ""],
    selection: Selection | None = None,
) -> tuple[Latents, Latents]:
    """The active matches, a > theta, and those near their threshold, |a - theta| < bandwidth / 2.

    Values of both are pre-activations a; of the second they can be negative, and it overlaps with the first. Of the
    selection only its screen counts, where the window lies above zero.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    bounds = (theta - bandwidth / 2).to(wide)
    found = all_above(x.to(wide), W_enc.to(wide), b_enc.to(wide), bounds, selection)
    above, values = found.values - theta[found.latents], found.values.to(x.dtype)
    active, near = (
        from_matches(found.rows[at], found.latents[at], values[at], W_enc.shape[0], (x.shape[0],))
        for at in map(marked, (above > 0, above.abs() < bandwidth / 2))
    )
    return active, near


def felt_by_thresholds(
    y_hat: Float[Tensor, "tokens d_out"],
    log_threshold: Float[Tensor, " d_sae"],
    W_dec: Float[Tensor, "d_sae d_out"],
    near: Latents,
    bandwidth: Float[Tensor, ""],
) -> Float[Tensor, "tokens d_out"]:
    """`y_hat` unchanged; whatever gradient g it receives reaches t through jump_n = theta_j <g, W_dec_j>."""
    return _Felt.apply(y_hat, log_threshold, W_dec, near, bandwidth)  # type: ignore[return-value]


def with_jumps(
    loss: Float[Tensor, ""],
    log_threshold: Float[Tensor, " d_sae"],
    near: Latents,
    jumps: Float[Tensor, " near"],
    bandwidth: Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """`loss` unchanged; its gradient reaches t as well, by the given jumps."""
    return _Felt.apply(loss, log_threshold, jumps, near, bandwidth)  # type: ignore[return-value]


class _Felt(torch.autograd.Function):
    """A value unchanged, whose gradient g reaches t: of a loss by its jumps, of a reconstruction by W_dec."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, log_threshold: Tensor, by: Tensor, near: Latents, bandwidth: Tensor) -> Tensor:
        ctx.save_for_backward(log_threshold, by, bandwidth)
        ctx.near = near
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = grads
        if not ctx.needs_input_grad[1]:
            return g, None, None, None, None
        log_threshold, by, bandwidth = ctx.saved_tensors
        near, wide = ctx.near, torch.promote_types(log_threshold.dtype, torch.float32)
        theta = log_threshold.to(wide).exp()
        jumps = theta[near.indices] * match_products(near, g, by) if g.ndim else g * by
        sums = totals_by_latent(near, jumps.to(wide))
        return g, (-theta / bandwidth.to(wide) * sums).to(log_threshold.dtype), None, None, None

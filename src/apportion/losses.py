"""Losses as pure functions of tensors: the equation, the scale, the source. No state, no model.

Everything is on scaled data (E||x||^2 = d_in), so weights mean the same for every model and width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from apportion.group import ALONE, Group
from apportion.metrics import no_spread


def reconstruction(
    x: Float[Tensor, " tokens *row"], x_hat: Float[Tensor, " tokens *row"], group: Group = ALONE
) -> Float[Tensor, ""]:
    """mean over tokens of ||x - x_hat||^2 / d. About the FVU; never divided by a per-batch variance."""
    return group.mean(F.mse_loss(x_hat, x), len(x))


def auxiliary(
    error: Float[Tensor, "tokens d"],
    error_hat: Float[Tensor, "tokens d"],
    share: float,
    size: Float[Tensor, ""] | float = 0.0,
    group: Group = ALONE,
) -> Float[Tensor, ""]:
    """How well silent latents reconstruct what the others left over (aux_k of arXiv 2406.04093, section 2).

        ||sg(e) - e_hat||^2 / ||sg(e) - mean e||^2 * share

    `error` = x - x_hat is a constant here, so the gradient reaches only the latents that made `error_hat`. `share` <= 1
    scales the term down while there are fewer silent latents than k_aux. `size` is the mean square of an entry of x:
    without any spread to explain but rounding (a perfect reconstruction, a single row, equal rows) the term and its
    gradient are 0.
    """
    error = error.detach()
    left = group.total(F.mse_loss(error_hat, error, reduction="sum"))
    of = group.total((error - group.mean(error.mean(0), len(error))).square().sum())
    nothing = no_spread(of, group.total(error.square().sum() + size * error.numel()))
    return share * left / torch.where(nothing, torch.inf, of)


def underutilised(
    density: Float[Tensor, " d_sae"], dead: Bool[Tensor, " d_sae"], expected: Float[Tensor, " d_sae"], c: float
) -> Bool[Tensor, " d_sae"]:
    """The latents that aux_zipf revives: { j : density_j < c * expected[rank of j] }, and all dead ones.

    `expected` holds the density wanted at each rank, most frequent first (a Zipf curve that sums to k). c = 0 leaves
    exactly the dead latents, which is aux_k. Our form: arXiv 2411.02124 describes the idea, its exact equation was not
    at hand.
    """
    if c == 0:
        return dead
    order = density.argsort(descending=True, stable=True)
    low = torch.zeros_like(dead)
    low[order] = density[order] < c * expected.to(density)
    return low | dead


def kl_divergence(
    clean: Float[Tensor, "*rows vocab"], logits: Float[Tensor, "*rows vocab"], group: Group = ALONE
) -> Float[Tensor, ""]:
    """mean over rows of KL(p_clean || p) = sum_v p_clean (log p_clean - log p), in nats, from logits.

    The direction of the public code of arXiv 2405.12241, whose docstring announces the other one. In float32 at least.
    """
    of, by = (torch.promote_types(t.dtype, torch.float32) for t in (clean, logits))
    log_clean, log_p = F.log_softmax(clean, -1, dtype=of), F.log_softmax(logits, -1, dtype=by)
    divergence = F.kl_div(log_p, log_clean, reduction="none", log_target=True).sum(-1)
    return group.mean(divergence.mean(), divergence.numel())


def load_balance(
    probabilities: Float[Tensor, "tokens e"], expert: Int[Tensor, " tokens"], group: Group = ALONE
) -> Float[Tensor, ""]:
    """E sum_i f_i P_i: keeps a router from sending everything to a few of its E experts (arXiv 2410.08201).

    f_i is the share of tokens whose `expert` is i, a constant, and P_i the mean over tokens of their probability for i.
    1 if either is uniform, E if one expert has all tokens with certainty. Both are means over the whole batch.
    """
    tokens, num_experts = probabilities.shape
    counts = group.total(torch.bincount(expert, minlength=num_experts).to(probabilities.dtype))
    return num_experts * (counts / group.count(tokens)) @ group.mean(probabilities.mean(0), tokens)

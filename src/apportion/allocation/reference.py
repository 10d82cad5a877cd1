"""The dense, obvious definition of every allocation. Slow on purpose: tests compare the fast paths with these.

Each function takes affinities [tokens, d_sae] and returns the boolean match matrix S of the same shape. Only positive
affinities can match; ties go to the lower token first, then the lower latent.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def token_choice(affinity: Float[Tensor, "b f"], k: int) -> Bool[Tensor, "b f"]:
    """Each token keeps its k best latents."""
    rank = affinity.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return (rank < k) & (affinity > 0)


def mutual_choice(affinity: Float[Tensor, "b f"], matches: int) -> Bool[Tensor, "b f"]:
    """The best `matches` matches anywhere."""
    flat = affinity.flatten()
    chosen = torch.zeros_like(flat, dtype=torch.bool)
    chosen[flat.argsort(descending=True, stable=True)[:matches]] = True
    return chosen.reshape(affinity.shape) & (affinity > 0)


def feature_choice(affinity: Float[Tensor, "b f"], budgets: Int[Tensor, " f"] | int) -> Bool[Tensor, "b f"]:
    """Each latent j keeps its budgets[j] best tokens (one number: the same for all)."""
    rank = affinity.argsort(dim=0, descending=True, stable=True).argsort(dim=0)
    return (rank < budgets) & (affinity > 0)


def threshold(
    affinity: Float[Tensor, "b f"], theta: Float[Tensor, " f"] | Float[Tensor, ""] | float
) -> Bool[Tensor, "b f"]:
    """Affinity strictly above theta."""
    return (affinity > theta) & (affinity > 0)

"""Multi-TopK: a TopK SAE that also learns to reconstruct with more latents than k. arXiv 2406.04093.

    loss = L(k) + w L(m k)          L(n) = ||x - x_hat(n)||^2 / d,   x_hat(n) from the n best latents of each token

A plain TopK SAE is good at its own k only; this one gets better and better as more latents are used, up to m k. With
m = 4 and w = 1/8 the second term is as in the public code of `sparsify`. In eval mode it is a TopK SAE.

Both selections come from one product: the m k best are chosen, and the k best of those are the k best of all. The
second reconstruction is the first and what the further latents add to it, so each match is decoded once.

When to use it: if the SAE is to serve at several budgets, for instance with more latents per token than it was trained
for.

Cost: one dense product as in TopK; m k matches per token are decoded and have gradients, in place of k.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from jaxtyping import Float
from torch import Tensor

from apportion import losses
from apportion.allocation import StepContext, TokenChoice
from apportion.allocation.token_choice import TokenChoiceConfig
from apportion.architectures.auxiliary import AffineWithAuxiliary, AuxiliaryConfig
from apportion.architectures.base import Pass
from apportion.kernels import decode_matches
from apportion.ranking import rank_within


@dataclass(frozen=True, kw_only=True)
class MultiTopKConfig(AuxiliaryConfig):
    multi_factor: int = 4
    """The second reconstruction uses this many times as many latents per token."""
    multi_weight: float = 1 / 8
    """Weight of the second reconstruction's loss."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.multi_factor, int) or self.multi_factor < 2:
            raise ValueError(f"multi_factor must be a whole number of at least 2, got {self.multi_factor!r}.")
        if not self.multi_weight > 0:
            raise ValueError(
                f'multi_weight must be above 0, got {self.multi_weight}. Without a second loss use "topk".'
            )


@dataclass(frozen=True)
class WidePass(Pass):
    wide: Tensor
    """The reconstruction from all that were chosen."""


@final
class MultiTopK(AffineWithAuxiliary):
    Config = MultiTopKConfig
    config: MultiTopKConfig  # type: ignore[assignment]
    form = "affine"

    def forward_scaled(self, x: Float[Tensor, "tokens d_in"], context: StepContext) -> Pass:
        assert isinstance(self.allocation, TokenChoice), "the paper's rule"
        k = self.allocation.row_limit
        wide_rule = TokenChoice(TokenChoiceConfig(k=min(self.config.multi_factor * k, self.d_sae)), self.d_sae)
        selection = self.selection(context)
        wide = self.encode_scaled(x, own := selection.by(wide_rule))
        selection.report(own)
        best = rank_within(wide.rows(), self.affinities(wide), wide.tokens) < k
        latents = wide.where(best)
        y_hat = self.decode_scaled(latents)
        further = decode_matches(wide.where(~best), self.W_dec)
        return WidePass(latents, y_hat, y_hat + further)

    def own_terms(
        self, x: Float[Tensor, "tokens d_in"], y: Float[Tensor, "tokens d_in"], made: Pass, context: StepContext
    ) -> dict[str, Tensor]:
        assert isinstance(made, WidePass)
        wide = self.config.multi_weight * losses.reconstruction(y, made.wide, context.group)
        return {"multi_topk": wide} | super().own_terms(x, y, made, context)

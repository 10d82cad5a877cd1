"""Token choice: each token keeps its k best latents. TopK SAEs, arXiv 2406.04093.

    S_b = the k largest affinities of token b          maximise sum S A   subject to  sum_j S_bj <= k  for every token b

Nothing couples tokens, so train and eval mode agree and there are no thresholds. In training k may be annealed
(annealing.py).

When to use it: where every token is to have the same number of latents, and to compare with: it is the simplest of the
SAEs with a budget, and has nothing to calibrate.

Cost: one dense product finds the matches; encoder, decoder and gradients then touch k matches per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from apportion.allocation import reference
from apportion.allocation.annealing import AnnealedConfig, AnnealedRule
from apportion.allocation.base import Candidates, Settled
from apportion.devices import on_gpu
from apportion.group import Group
from apportion.ranking import largest_of_rows, rank_within
from apportion.settings import settle


@dataclass(frozen=True, kw_only=True)
class TokenChoiceConfig(AnnealedConfig):
    k: int = 32
    """Latents kept per token."""

    def __post_init__(self) -> None:
        settle(self, strict=False)
        if isinstance(self.k, float):
            raise ValueError(
                f"TopK keeps a whole number of latents per token, got k = {self.k}. "
                "Round it, or use mutual_choice, whose budget may be fractional."
            )


@final
class TokenChoice(AnnealedRule):
    Config = TokenChoiceConfig
    batch_coupled = False
    eval_form = "topk"

    def __init__(self, config: TokenChoiceConfig, d_sae: int) -> None:
        super().__init__(config, d_sae, "TopK")

    @property
    def row_limit(self) -> int:
        return ceil(self.k_in_force)

    def budget(self, tokens: int) -> int:
        return self.row_limit * tokens

    def relaxed(self, factor: float) -> TokenChoice:
        k = min(max(1, round(self.config.k * factor)), self.d_sae)
        return TokenChoice(TokenChoiceConfig(k=k), self.d_sae)

    def settle(self, candidates: Candidates, budget: int | Tensor | None, group: Group) -> Settled:
        if on_gpu(candidates.rows):
            ranks = rank_within(candidates.rows, candidates.affinity, candidates.tokens)
            return Settled(keep=ranks < self.row_limit)
        counts = torch.bincount(candidates.rows, minlength=max(1, candidates.tokens))
        if int(counts.max()) <= self.row_limit:
            return Settled(keep=torch.ones_like(candidates.rows, dtype=torch.bool))
        return Settled(keep=largest_of_rows(candidates.rows, candidates.affinity, counts, self.row_limit))

    def reference(self, affinity: Float[Tensor, "tokens d_sae"]) -> Bool[Tensor, "tokens d_sae"]:
        return reference.token_choice(affinity, self.row_limit)

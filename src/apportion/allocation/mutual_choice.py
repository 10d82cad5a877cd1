"""Mutual Choice: the best k * tokens matches anywhere in the batch. arXiv 2411.02124.

    maximise sum S A   subject to  sum S <= M = floor(k * tokens)

No token and no latent has a quota: hard tokens take more latents, easy ones fewer. The forward pass is the same as
BatchTopK's (arXiv 2412.06410). In eval mode a token must not see its neighbours, so a match is made if its affinity
exceeds one scalar threshold, calibrated so that the expected L0 is k.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from apportion.allocation.base import Candidates, Rule, Settled, check_k, largest, threshold_between, total_matches

MARGIN = 0.9
"""The next batch is scanned above this share of the last cut: lower means more candidates, higher more second looks."""


@dataclass(frozen=True, kw_only=True)
class MutualChoiceConfig:
    k: float = 32
    """Mean active latents per token; may be fractional."""


@final
class MutualChoice(Rule):
    Config = MutualChoiceConfig
    batch_coupled = True
    threshold: Tensor

    def __init__(self, config: MutualChoiceConfig, d_sae: int) -> None:
        super().__init__(config, d_sae)
        check_k("Mutual Choice", config.k, d_sae)
        self.register_buffer("threshold", torch.tensor(torch.nan))

    def budget(self, tokens: int) -> int:
        return total_matches(self.config.k, tokens)

    def settle(self, candidates: Candidates, budget: int | Tensor | None) -> Settled:
        assert isinstance(budget, int)
        keep, cut = largest(candidates.affinity, budget)
        return Settled(keep=keep, cut=cut, next_bounds=MARGIN * cut)

    def first_bounds(self, affinity: Tensor) -> Tensor:
        count = min(self.budget(affinity.shape[0]), affinity.numel())
        if not count:
            return affinity.new_zeros(())
        return MARGIN * affinity.flatten().topk(count, sorted=False).values.min().clamp_min(0)

    def generous(self) -> MutualChoice:
        return MutualChoice(replace(self.config, k=min(2 * self.config.k, self.d_sae)), self.d_sae)

    def set_threshold(self, latents: Tensor, affinity: Tensor, tokens: int) -> None:
        wanted = self.budget(tokens)
        if 0 < wanted < affinity.numel():
            best = affinity.topk(wanted + 1).values
            self.threshold.fill_(threshold_between(best[-2], best[-1]))
        else:
            self.threshold.fill_(0.0 if wanted else torch.inf)

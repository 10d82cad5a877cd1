"""Mutual Choice: the best k * tokens matches anywhere in the batch. arXiv 2411.02124.

    maximise sum S A   subject to  sum S <= M = floor(k * tokens)

No token and no latent has a quota: hard tokens take more latents, easy ones fewer. The forward pass is the same as
BatchTopK's (arXiv 2412.06410). In eval mode a token must not see its neighbours, so a match is made if its affinity
exceeds one scalar threshold, calibrated so that the expected L0 is k. In training k may be annealed (annealing.py).

When to use it: by default. Tokens differ in how much there is to say about them, and here hard ones get more latents.
In our main experiment (docs/experiments.md) it leaves less variance unexplained than TopK at the same L0.

Cost: as TopK, one dense product and k matches per token; the selection only looks above a bound carried over from the
previous batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from apportion.allocation import reference
from apportion.allocation.annealing import AnnealedConfig, AnnealedRule
from apportion.allocation.base import Candidates, Pool, Settled, largest, threshold_between, total_matches
from apportion.allocation.threshold import ThresholdInEval
from apportion.group import Group

MARGIN = 0.9
"""The next batch is scanned above this share of the last cut: lower means more candidates, higher more second looks."""


@dataclass(frozen=True, kw_only=True)
class MutualChoiceConfig(AnnealedConfig):
    k: float = 32
    """Mean active latents per token; may be fractional."""


@final
class MutualChoice(ThresholdInEval, AnnealedRule):
    Config = MutualChoiceConfig
    batch_coupled = True

    def __init__(self, config: MutualChoiceConfig, d_sae: int) -> None:
        super().__init__(config, d_sae, "Mutual Choice")
        self.register_buffer("threshold", torch.tensor(torch.nan))

    def budget(self, tokens: int) -> int:
        return total_matches(self.k_in_force, tokens)

    def settle(self, candidates: Candidates, budget: int | Tensor | None, group: Group) -> Settled:
        assert isinstance(budget, int)
        return best_anywhere(candidates, budget, group)

    def reference(self, affinity: Float[Tensor, "tokens d_sae"]) -> Bool[Tensor, "tokens d_sae"]:
        return reference.mutual_choice(affinity, self.budget(len(affinity)))

    def first_bounds(self, affinity: Tensor) -> Tensor:
        return likely_bound(affinity, self.budget(affinity.shape[0]))

    def wanted(self, tokens: int) -> int:
        return total_matches(self.config.k, tokens)

    def set_threshold(self, pool: Pool) -> bool:
        threshold = scalar_threshold(pool, self.wanted(pool.tokens))
        if threshold is not None:
            self.threshold.copy_(threshold)
        return threshold is not None


def best_anywhere(candidates: Candidates, budget: int, group: Group) -> Settled:
    """The `budget` largest affinities of the batch."""
    affinity, own = group.joined(candidates.affinity)
    keep, cut = largest(affinity, budget)
    return Settled(keep=keep[own], cut=cut, next_bounds=MARGIN * cut)


def likely_bound(affinity: Float[Tensor, "rows d_sae"], budget: int) -> Float[Tensor, ""]:
    """Somewhat below what these rows alone would need to keep `budget` matches."""
    count = min(budget, affinity.numel())
    if not count:
        return affinity.new_zeros(())
    return MARGIN * affinity.flatten().topk(count, sorted=False).values.min().clamp_min(0)


def scalar_threshold(pool: Pool, wanted: int) -> Float[Tensor, ""] | None:
    """The threshold that exactly `wanted` matches exceed (all there are, if there are no more); None if the pool does
    not reach down to it."""
    affinity = pool.affinity
    if wanted == 0:
        return affinity.new_tensor(torch.inf)
    wanted -= int(pool.above)
    if wanted >= affinity.numel():
        return None if bool(pool.floor.max() > 0) else affinity.new_zeros(())
    best = affinity.topk(wanted + 1).values
    return threshold_between(best[-2], best[-1])

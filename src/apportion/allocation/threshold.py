"""Threshold: a match is made where its affinity exceeds theta, one for all latents or one each.

    S_bj = 1[A_bj > theta_j]

How Mutual Choice and Feature Choice run at inference; with theta = 0 it is the ReLU. No budget: L0 is what comes out.
Nothing here makes codes sparse, so a new SAE cannot choose this rule by `allocation`: relu and gated have it with
theta = 0 and a penalty, and SAEs that were loaded or converted have it with thresholds that somebody else found.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from apportion.allocation import reference
from apportion.allocation.base import Candidates, Rule, Settled
from apportion.group import Group


@dataclass(frozen=True, kw_only=True)
class ThresholdConfig:
    theta: float = 0.0
    """Matches with an affinity above this are kept."""
    per_latent: bool = False
    """One threshold for each latent, all theta at first, instead of one for all."""


class ThresholdInEval(Rule):
    """Base of the rules that in eval mode only compare with thresholds."""

    eval_form = "threshold"

    def in_eval(self, threshold: Tensor) -> Threshold:
        return Threshold.at(threshold, self.d_sae)


class ThresholdAlways(ThresholdInEval):
    """Base of the rules that in train mode do so, too."""

    batch_coupled = False

    def budget(self, tokens: int) -> None:
        return None

    def bounds(self, warm: Tensor | None) -> Tensor:
        return self.threshold.clamp_min(0)

    def settle(self, candidates: Candidates, budget: int | Tensor | None, group: Group) -> Settled:
        return Settled(keep=torch.ones_like(candidates.affinity, dtype=torch.bool))

    def reference(self, affinity: Float[Tensor, "tokens d_sae"]) -> Bool[Tensor, "tokens d_sae"]:
        return reference.threshold(affinity, self.threshold)


@final
class Threshold(ThresholdAlways):
    Config = ThresholdConfig
    not_to_train = (
        "has no budget, so that nothing would make codes sparse (loaded SAEs have it): train with a rule that has k, "
        "or use relu, gated or jumprelu"
    )

    def __init__(self, config: ThresholdConfig, d_sae: int) -> None:
        super().__init__(config, d_sae)
        self.register_buffer("threshold", torch.full((d_sae,) if config.per_latent else (), float(config.theta)))

    @staticmethod
    def at(threshold: Tensor, d_sae: int) -> Threshold:
        """The rule for given thresholds, a scalar or one per latent."""
        rule = Threshold(ThresholdConfig(), d_sae)
        rule.threshold = threshold
        return rule

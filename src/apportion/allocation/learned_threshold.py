"""Learned thresholds: a match is made where its affinity exceeds its latent's own theta, a parameter of the SAE.

    S_bj = 1[A_bj > theta_j]        theta_j = exp(t_j), so that it stays positive

JumpReLU SAEs, arXiv 2407.14435. The rule is the same in train and eval mode and has no budget. Nothing here gives t a
gradient: a step function has none, and the architecture supplies a substitute (architectures/jumprelu.py). In another
architecture t would stay where it is, so `allocation` cannot name this rule.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from apportion.allocation.threshold import ThresholdAlways


@dataclass(frozen=True, kw_only=True)
class LearnedThresholdConfig:
    pass


@final
class LearnedThreshold(ThresholdAlways):
    Config = LearnedThresholdConfig
    not_to_train = "learns by gradients that only the SAE jumprelu gives its thresholds: use that"

    def __init__(self, config: LearnedThresholdConfig, d_sae: int) -> None:
        super().__init__(config, d_sae)
        self.log_threshold = nn.Parameter(torch.zeros(d_sae))

    @property
    def threshold(self) -> Float[Tensor, " d_sae"]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """theta; no gradients."""
        return self.log_threshold.detach().exp()

    @torch.no_grad()
    def rescale(self, factor: float) -> None:
        self.log_threshold.add_(log(factor))

"""The coefficient of a sparsity penalty: fixed, or adapted while training so that L0 comes out as k.

ReLU, Gated and JumpReLU SAEs have no budget: their L0 is what the weight lambda of a penalty makes it. To be compared
at one budget with SAEs that have one they take k as a target, and lambda is steered. With l_t = log L0 of step t, and
r_t = log of the L0 that is wanted at step t,

    e_t              = l_t - r_t
    log lambda_t+1   = log lambda_t + P (e_t - e_t-1) + G clip(e_t, -C, C)

which is a proportional-integral controller in the logarithms, written as a change per step.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log
from typing import final

import torch
from torch import Tensor, nn

from apportion.allocation import StepContext
from apportion.allocation.base import check_k
from apportion.architectures.affine import AffineConfig

RAMP = 0.05
"""Share of the run in which a fixed coefficient rises linearly from zero."""
DESCENT = 0.6
"""Share of the run after which L0 is to be k."""
LEAST = 0.03
LEAST_LR_SHARE = 0.1
P, G, CLIP = 1.0, 0.03, 0.5


@dataclass(frozen=True, kw_only=True)
class SparsityConfig(AffineConfig):
    k: float = 32
    """Mean number of active latents per token, reached by adapting the sparsity coefficient while training."""
    coefficient: float | None = None
    """A fixed sparsity coefficient instead; k is then ignored."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_k("k", self.k, self.d_sae)
        if self.coefficient is not None and not self.coefficient >= 0:
            raise ValueError(f"coefficient must be at least 0, got {self.coefficient}. Leave it out to reach k instead.")


@final
class SparsityCoefficient(nn.Module):
    """The coefficient in force is `value`; call `begin_step` at the start of every training step."""

    value: Tensor
    error: Tensor
    log_start: Tensor

    def __init__(self, k: float, coefficient: float | None, *, initial: float) -> None:
        super().__init__()
        self.k, self.coefficient, self.least = k, coefficient, LEAST * initial
        self.register_buffer("value", torch.tensor(initial if coefficient is None else coefficient))
        self.register_buffer("error", torch.tensor(torch.nan))
        self.register_buffer("log_start", torch.tensor(torch.nan))

    @torch.no_grad()
    def begin_step(self, context: StepContext) -> None:
        if self.coefficient is not None:
            self.value.fill_(self.coefficient * min(1.0, context.progress / RAMP))
        elif context.l0 is not None:
            self._adapt(log(max(context.l0, 1e-3 * self.k) / self.k), context.progress, context.lr_share)

    def _adapt(self, above: float, progress: float, lr_share: float) -> None:
        """`above`: log of L0 / k."""
        self.log_start.copy_(self.log_start.nan_to_num(above))
        wanted = self.log_start.clamp_min(0) * max(0.0, 1 - progress / DESCENT)
        error = above - wanted
        gain = 1.0 if progress < DESCENT else 1 / max(lr_share, LEAST_LR_SHARE)
        change = gain * (torch.where(self.error.isnan(), 0.0, P * (error - self.error)) + G * error.clamp(-CLIP, CLIP))
        self.value.mul_(change.exp()).clamp_(min=self.least)
        self.error.copy_(error)

"""The coefficient of a sparsity penalty: fixed, or steered while training so that L0 comes out as k.

ReLU, Gated and JumpReLU SAEs have no budget: their L0 is what the weight lambda of a penalty makes of it. To be
compared at one budget with SAEs that have one, they take k as a target. At every step

    wanted_t         = log k + (log L0_first - log k) max(0, 1 - progress / DESCENT)
    e_t              = log L0_t-1 - wanted_t
    log lambda_t     = log lambda_t-1 + gain (PROPORTIONAL (e_t - e_t-1) + INTEGRAL clip(e_t, -CLIP, CLIP))

which is a proportional-integral controller, written as a change per step. Why it looks like this:

* Logarithms: L0 starts in the thousands, lambda ends anywhere within orders of magnitude, and L0 follows about a power
  of lambda; in logarithms the same constants do for all of them.
* L0 answers to lambda over a hundred steps or so, because weights have to move. Integrating alone would swing: the
  proportional term eases lambda off as soon as L0 comes down.
* L0 is led down a straight line (in the logarithm) over DESCENT of the run. Asked for k at once, lambda would rise
  until it kills latents that have not learnt anything yet, and where nothing revives them they stay dead. For the
  same reason the error is clipped before it is integrated.
* The learning rate falls towards the end and with it what lambda can still move, so from DESCENT on gain = 1 /
  max(lr_share, LEAST_LR_SHARE), lr_share being the learning rate as a share of its peak; before, gain = 1.
* lambda stays above LEAST times its start: below that it does nothing, and would take long to come back.

A run without an end has progress 1 throughout: L0 is wanted to be k from the first step on, and only the clipping keeps
lambda from rising too fast.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from apportion.allocation import StepContext
from apportion.architectures.affine import Affine, LearnedConfig
from apportion.architectures.start import cut_for

DESCENT = 0.5
"""Share of the run after which L0 is to be k."""
PROPORTIONAL = 1.0
INTEGRAL = 0.03
"""Per step."""
CLIP = 0.5
LEAST_LR_SHARE = 0.3
LEAST = 0.03
INITIAL_L0 = 3.0
"""L0 that biases begin at, in units of k: with half of all latents most of a run would go into closing them."""
RAMP = 0.05
"""Share of the run in which a fixed coefficient rises linearly from zero."""


@dataclass(frozen=True, kw_only=True)
class SparsityConfig(LearnedConfig):
    k: float | None = 32
    """Mean number of active latents per token, reached by steering the sparsity coefficient while training. None: of an
    SAE that was loaded and does not say it; training holds the L0 that it has."""
    coefficient: float | None = None
    """A fixed sparsity coefficient instead, of a penalty on scaled data; L0 then comes out as it may."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k is not None and not 0 < self.k <= self.d_sae:
            raise ValueError(f"k must lie between 0 and d_sae = {self.d_sae}, got {self.k}. Lower k or raise d_sae.")
        if self.coefficient is not None and not self.coefficient >= 0:
            raise ValueError(f"coefficient must be at least 0, got {self.coefficient}. Leave it out to reach k.")

    @property
    def initial_k(self) -> float:
        """What initial values are made for."""
        return 32 if self.k is None else self.k


def begin_sparse(sae: Affine, x: Float[Tensor, "n d_in"]) -> None:
    """Set biases below zero, alike, so far that prepared rows have the L0 to begin with (start.py)."""
    assert isinstance(sae.config, SparsityConfig)
    if cut := cut_for(sae, x, INITIAL_L0 * sae.config.initial_k):
        sae.b_enc.fill_(-cut)


@final
class SparsityCoefficient(nn.Module):
    """The coefficient in force is `value`; `begin_step` at the start of every training step keeps it up to date.

    `initial` is where steering begins; best about a tenth of where it may end. All state is in buffers, so that a
    resumed run steers alike; nothing waits for the device.
    """

    value: Tensor
    error: Tensor
    """e of the previous step."""
    log_first: Tensor
    """log (L0 / k) of the first step, at least 0; infinite before. Where k is None it is taken as 1."""

    def __init__(self, k: float | None, coefficient: float | None, *, initial: float) -> None:
        super().__init__()
        self.k, self.fixed, self.least = k, coefficient, LEAST * initial
        self.register_buffer("value", torch.tensor(float(initial if coefficient is None else coefficient)))
        self.register_buffer("error", torch.tensor(0.0))
        self.register_buffer("log_first", torch.tensor(torch.inf))

    @torch.no_grad()
    def begin_step(self, context: StepContext) -> None:
        """Reads `progress`, `l0` (mean of the previous step; nothing happens before there is one) and `lr_share`."""
        k = 1.0 if self.k is None else self.k
        if self.fixed is not None:
            self.value.fill_(self.fixed * min(1.0, context.progress / RAMP))
        elif context.l0 is not None:
            self._steer(log(max(context.l0, 1e-3 * k) / k), context.progress, context.lr_share)

    def _steer(self, above: float, progress: float, lr_share: float) -> None:
        first = self.log_first.isinf()
        self.log_first.masked_fill_(first, max(above, 0.0))
        error = above - self.log_first * (1.0 if self.k is None else max(0.0, 1 - progress / DESCENT))
        moved = (error - self.error).masked_fill(first, 0.0)
        gain = 1.0 if progress < DESCENT else 1 / max(lr_share, LEAST_LR_SHARE)
        change = gain * (PROPORTIONAL * moved + INTEGRAL * error.clamp(-CLIP, CLIP))
        self.value.mul_(change.exp()).clamp_(min=self.least)
        self.error.copy_(error)

    def target(self, l0: Tensor) -> float | Tensor:
        """k; where it is None the L0 of the first step, or `l0` before there was one."""
        return torch.where(self.log_first.isinf(), l0, self.log_first.exp()) if self.k is None else self.k

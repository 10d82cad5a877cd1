"""ReLU: every positive pre-activation is a match, and an L1 penalty keeps them few.

    z     = relu(W_enc x + b_enc)                  x prepared by the input description; b_dec is not subtracted
    x_hat = z W_dec + b_dec                        decoder rows of any norm
    loss  = mean ||x - x_hat||^2 / d_in  +  lambda * mean over tokens of sum_j z_j ||W_dec_j||

This is the recipe of Anthropic's update of April 2024. The norms in the penalty stand for the unit rows of other
recipes: without them codes would shrink and the decoder grow at no cost. Rows start with norm 0.1, the encoder as the
decoder's transpose. Published coefficients are for ||e||^2: divide one for E||x||^2 = d_in by d_in, one for
E||x||^2 = 1 by sqrt(d_in).

p-annealing (Karvonen et al. 2024, arXiv 2408.00113) makes the penalty look more like a count as the run goes on:

    sum_j (z_j ||W_dec_j||)^p       with p falling from 1 to p_end until the end of the run

and whenever p changes from p to p', lambda is multiplied by (mean penalty with p) / (mean penalty with p'), so that the
pressure stays. The paper changes p in steps and takes the means over recent batches; here p falls a little in every
step and both means come from the same batch, which needs no memory.

The L1 penalty shrinks codes: reconstructions are too small. And a latent that does not fire on any token has no
gradient: nothing here revives it. Steering lambda gently (sparsity.py) is what keeps latents alive.

When to use it: to compare with, or where a convex penalty is wanted. Codes are too small, and L0 is k only as well as
lambda can be steered.

Cost: one dense product, and as many matches as there are positive pre-activations: early in training these are so many
that dense row blocks take the place of lists of matches (kernels/sparse.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from apportion.allocation import Rule, StepContext
from apportion.architectures.affine import Affine
from apportion.architectures.base import Pass
from apportion.architectures.sparsity import SparsityCoefficient, SparsityConfig, begin_sparse
from apportion.group import Group
from apportion.latents import Latents

INITIAL_NORM = 0.1
"""Of decoder and encoder rows."""
SMALLEST = 1e-8
"""Where z^p with p < 1 is cut off: its slope at 0 is infinite."""


@dataclass(frozen=True, kw_only=True)
class ReLUConfig(SparsityConfig):
    subtract_b_dec: bool = False
    """Subtract the decoder bias from the encoder's input."""
    p_end: float = 1.0
    """Exponent of the penalty at the end of the run; 1 is the L1 penalty throughout, the paper ends at 0.2."""
    p_start_share: float = 0.1
    """Share of the run after which the exponent begins to fall from 1, steadily until the end."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.p_end <= 1:
            raise ValueError(f"p_end must be above 0 and at most 1, got {self.p_end}.")
        if not 0 <= self.p_start_share < 1:
            raise ValueError(f"p_start_share must be at least 0 and below 1, got {self.p_start_share}.")


@final
class ReLU(Affine):
    Config = ReLUConfig
    config: ReLUConfig  # type: ignore[assignment]
    form = "affine"
    initial_norm = INITIAL_NORM
    p: Tensor
    """Exponent of the penalty."""
    compensation: Tensor
    """What the coefficient is multiplied by, so that the pressure outlives the changes of p."""

    def __init__(self, config: ReLUConfig, allocation: Rule) -> None:
        super().__init__(config, allocation)
        initial = 0.1 * (config.d_in * config.initial_k) ** -0.5
        self.coefficient = SparsityCoefficient(config.k, config.coefficient, initial=initial)
        self.register_buffer("p", torch.tensor(1.0))
        self.register_buffer("compensation", torch.tensor(1.0))
        self._next_p = 1.0

    def _initial_encoder(self, rows: Float[Tensor, "d_sae d_in"]) -> Float[Tensor, "d_sae d_in"]:
        return INITIAL_NORM * rows

    def unit_rows(self) -> list[nn.Parameter]:
        return []

    def fit_rest(self, x: Float[Tensor, "n d_in"], y: Float[Tensor, "n d_in"]) -> None:
        begin_sparse(self, x)

    def begin_step(self, context: StepContext) -> None:
        super().begin_step(context)
        self.coefficient.begin_step(context)
        start = self.config.p_start_share
        fallen = max(0.0, context.progress - start) / (1 - start)
        self._next_p = 1 - fallen * (1 - self.config.p_end)

    def own_terms(self, x: Tensor, y: Tensor, made: Pass, context: StepContext) -> dict[str, Tensor]:
        if self.config.p_end != 1:
            self._lower_p(made.latents, context.group)
        penalty = context.group.mean(self.penalty(made.latents, self.p), made.latents.tokens)
        return {"sparsity": self.coefficient.value * self.compensation * penalty}

    @torch.no_grad()
    def _lower_p(self, latents: Latents, group: Group) -> None:
        both = (self.p, self.p.new_tensor(self._next_p))
        before, after = (group.mean(self.penalty(latents, p), latents.tokens) for p in both)
        self.compensation.mul_(torch.where(after > 0, before / after, 1.0))
        self.p.fill_(self._next_p)

    def penalty(self, latents: Latents, p: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """Mean over tokens of sum_j (z_j ||W_dec_j||)^p."""
        values, norms = latents.values, self.W_dec.norm(dim=1)
        if self.config.p_end != 1:
            values, norms = values.clamp_min(SMALLEST) ** p, norms**p
        totals = values.new_zeros(self.d_sae).index_add(0, latents.indices, values)
        return totals @ norms / max(latents.tokens, 1)

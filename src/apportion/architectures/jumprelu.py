"""JumpReLU: every latent has a threshold of its own, which is learned (arXiv 2407.14435).

    a     = W_enc (x - b_dec) + b_enc
    z     = a 1[a > theta]        theta = exp(t), one per latent
    x_hat = z W_dec + b_dec

There is no budget; sparsity terms make L0 what it is, and `objective` says which (means over tokens):

    l0          lambda L0                                              arXiv 2407.14435
    tanh        lambda sum_j tanh(c z_j ||W_dec_j||)                   Anthropic, January 2025: decoder norms are free
                + pre_act_weight lambda (k / d_sae) sum_j relu(theta_j - a_j) ||W_dec_j||
    l0_target   no such term
    all three   + set_point_weight (L0 / k - 1)^2                      as in the dictionary_learning library

With l0 and tanh lambda is adapted while training (architectures/sparsity.py); with a fixed `coefficient` there is no
set-point. That both are used together, as in an augmented Lagrangian, is our own: lambda alone reaches k only in long
runs, and the set-point alone leaves L0 above k by what a further latent is worth.

Thresholds learn from matches near them, through what kernels/window.py puts in place of the gradient of a step. L0
moves nothing but thresholds, while the tanh objective is a function of z and a, and moves the whole encoder and the
decoder norms. Codes have the gradient 1[a > theta] with respect to a. Training steps are screened where the window of
every latent lies above zero, as it does at a start from data.

The pre-activation term is about nearly all pairs of tokens and latents, and yet needs no dense matrix: relu(theta - a)
= (theta - a) + relu(a - theta), where the first part, summed over tokens, is linear in the mean input, and the second
is zero except at active matches.

The rule, learned_threshold, belongs to this architecture: in others nothing would move t, and `allocation` refuses it.

When to use it: where latents are to have thresholds of their own, and tokens as many latents as exceed them. With the
objective tanh the pre-activation term has gradients for latents that never fire; l0 is the plain case, with unit
decoder rows.

Cost: one dense product, and besides the active matches a dot product for each of those near their threshold.

Constants. The pre-activation term is in units of lambda k / d_sae, so that its pull on a latent keeps its proportion to
that of the tanh at any width; published is a constant. dictionary_learning starts thresholds at 0.001 and has a
bandwidth of 0.001 where E||x||^2 = 1, which is 0.001 sqrt(d_in) here; thresholds then have far to go. Here they start
near where they end, with a wider window and a higher learning rate, so that they settle within a few hundred steps. At
a start from data pre-activations have another scale and spread, and the window has theirs: with 0.2 it would hold a
seventh of the matches that it holds at a random start, and the error came out 2 % higher than from there.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log
from typing import Literal, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from apportion.allocation import LearnedThreshold, Rule, StepContext
from apportion.architectures.auxiliary import AffineWithAuxiliary, AuxiliaryConfig
from apportion.architectures.base import Pass
from apportion.architectures.sparsity import SparsityCoefficient, SparsityConfig
from apportion.architectures.start import cut_for
from apportion.kernels import encode_matches
from apportion.kernels.window import felt_by_thresholds, reach, with_jumps
from apportion.latents import Latents
from apportion.settings import newer

INITIAL_L0 = 0.5
"""L0 that the initial thresholds are made for, in units of k."""
WINDOW_L0 = 0.125, 0.875
"""L0 at the ends of the initial window, in units of k: thresholds learn from as many matches as lie between."""
USUAL_BANDWIDTH = 0.2
INITIAL_COEFFICIENT = 0.1
"""lambda at the start, divided by k."""


@dataclass(frozen=True, kw_only=True)
class JumpReLUConfig(SparsityConfig, AuxiliaryConfig):
    objective: Literal["l0", "l0_target", "tanh"] = "tanh"
    """What makes codes sparse: l0 (coefficient times L0), tanh (coefficient times a tanh of the codes, and a term that
    lifts pre-activations below their threshold), l0_target (nothing but the set-point)."""
    threshold: float | None = None
    """Initial thresholds, in units of prepared inputs (E||x||^2 = d_in). None: such that pre-activations of a standard
    normal distribution would have an L0 of k / 2."""
    threshold_lr: float = 10.0
    """Learning rate of log thresholds, in units of that of the other parameters."""
    bandwidth: float | None = newer(None, before=0.2)
    """Width of the window around thresholds whose matches give them a gradient, in units of prepared inputs. None: 0.2,
    and with init="data" as wide as thresholds lie apart at which L0 is 1/8 and 7/8 of k."""
    set_point_weight: float = 10.0
    """Weight of (L0 / k - 1)^2, which holds L0 at k; not used with a fixed coefficient. A small weight leaves L0
    above k where latents are scarce."""
    tanh_scale: float = 4.0
    """tanh: c, the steepness."""
    pre_act_weight: float = 0.05
    """tanh: weight of the pre-activation term, in units of lambda k / d_sae. It keeps latents alive; near 1 or above,
    codes grow and decoder rows shrink without end."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("threshold", "threshold_lr", "bandwidth", "tanh_scale"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}.")
        for name in ("set_point_weight", "pre_act_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}.")
        if self.affinity != "code":
            raise ValueError(
                f'Thresholds of a JumpReLU are about codes: affinity must be "code", got {self.affinity!r}.'
            )
        if self.objective == "l0_target" and self.coefficient is not None:
            raise ValueError('The objective l0_target has no coefficient: use set_point_weight, or objective="l0".')

    @property
    def initial_threshold(self) -> float:
        """`threshold` with its default filled in."""
        if self.threshold is not None:
            return self.threshold
        share = torch.tensor(INITIAL_L0 * self.initial_k / self.d_sae, dtype=torch.float64)
        return max(-torch.special.ndtri(share.clamp(max=0.5)).item(), 0.001 * self.d_in**0.5)


@dataclass(frozen=True)
class JumpReLUPass(Pass):
    near: Latents
    """Matches near their threshold, with pre-activations as value."""


@final
class JumpReLU(AffineWithAuxiliary):
    Config = JumpReLUConfig
    config: JumpReLUConfig  # type: ignore[assignment]
    form = "affine"
    allocation: LearnedThreshold
    bandwidth: Tensor

    def __init__(self, config: JumpReLUConfig, allocation: Rule) -> None:
        super().__init__(config, allocation)
        nn.init.constant_(self.log_threshold, torch.tensor(config.initial_threshold).log().item())
        self.register_buffer("bandwidth", torch.tensor(config.bandwidth or USUAL_BANDWIDTH))
        initial = INITIAL_COEFFICIENT / config.initial_k
        self.coefficient = SparsityCoefficient(config.k, config.coefficient, initial=initial)

    @property
    def log_threshold(self) -> nn.Parameter:
        """t; theta = exp(t)."""
        return self.allocation.log_threshold

    @property
    def takes_screen(self) -> bool:
        return True

    def begin_step(self, context: StepContext) -> None:
        super().begin_step(context)
        if self.config.objective != "l0_target" or self.k is None:
            self.coefficient.begin_step(context)

    def forward_scaled(self, x: Float[Tensor, "tokens d_in"], context: StepContext) -> Pass:
        rows = self.centred(x)
        theta, eps = self.allocation.threshold, self.bandwidth
        active, near = reach(rows, self.W_enc, self.b_enc, theta, eps, context.selection)
        latents = encode_matches(rows, self.W_enc, self.b_enc, active)
        y_hat = felt_by_thresholds(self.decode_scaled(latents, x), self.log_threshold, self.W_dec, near, self.bandwidth)
        return JumpReLUPass(latents, y_hat, near)

    def own_terms(self, x: Tensor, y: Tensor, made: Pass, context: StepContext) -> dict[str, Tensor]:
        assert isinstance(made, JumpReLUPass)
        config, latents, near, mean = self.config, made.latents, made.near, context.group.mean
        terms = super().own_terms(x, y, made, context)
        l0 = mean(self._l0(latents, near), latents.tokens)
        k = self.coefficient.target(l0.detach())
        if config.objective == "l0":
            terms["sparsity"] = self.coefficient.value * l0
        elif config.objective == "tanh":
            terms["sparsity"] = self.coefficient.value * mean(self._tanh(latents, near), latents.tokens)
            unit = self.coefficient.value * k / self.d_sae
            pre_act = mean(self._pre_act(self.centred(x), latents), latents.tokens)
            terms["pre_act"] = config.pre_act_weight * unit * pre_act
        if config.coefficient is None:
            terms["set_point"] = config.set_point_weight * (l0 / k - 1).square()
        return terms

    def _l0(self, latents: Latents, near: Latents) -> Float[Tensor, ""]:
        """Mean active latents per token; its gradient reaches thresholds only."""
        tokens = max(latents.tokens, 1)
        jumps = near.values.new_full((near.nnz,), 1 / tokens)
        l0 = self.W_dec.new_tensor(latents.nnz / tokens)
        return with_jumps(l0, self.log_threshold, near, jumps, self.bandwidth)

    def _tanh(self, latents: Latents, near: Latents) -> Float[Tensor, ""]:
        """mean over tokens of sum_j tanh(c z_j ||W_dec_j||)."""
        c, norms, tokens = self.config.tanh_scale, self.W_dec.norm(dim=1), max(latents.tokens, 1)
        value = (c * latents.values * norms[latents.indices]).tanh().sum() / tokens
        jumps = (c * self.allocation.threshold * norms.detach()).tanh() / tokens
        return with_jumps(value, self.log_threshold, near, jumps[near.indices], self.bandwidth)

    def _pre_act(self, x: Float[Tensor, "tokens d_in"], latents: Latents) -> Float[Tensor, ""]:
        """mean over tokens of sum_j relu(theta_j - a_j) ||W_dec_j||, over all latents; x without b_dec."""
        theta, norms = self.log_threshold.exp(), self.W_dec.norm(dim=1)
        everywhere = (theta - self.W_enc @ x.mean(0) - self.b_enc) @ norms
        above = (latents.values - theta[latents.indices]) * norms[latents.indices]
        return everywhere + above.sum() / max(latents.tokens, 1)

    def forward(self, x: Float[Tensor, "*lead d_in"]) -> Float[Tensor, "*lead d_in"]:
        """As always; in train mode thresholds get gradients too, which `decode(encode(x))` cannot give them."""
        if not (self.training and torch.is_grad_enabled()):
            return super().forward(x)
        rows = self.finite_rows(x)
        made = self.forward_scaled(self.input.apply_to(rows), StepContext())
        return self.undo(made.y_hat, rows).reshape(x.shape).to(x.dtype)

    def fit_rest(self, x: Float[Tensor, "n d_in"], y: Float[Tensor, "n d_in"]) -> None:
        """Thresholds become those at which these rows have the L0 that they are made for, and the window as wide as
        their pre-activations ask for."""
        k = self.config.initial_k
        if self.config.threshold is None and (cut := cut_for(self, x, INITIAL_L0 * k)):
            self.log_threshold.fill_(log(cut))
        high, low = (cut_for(self, x, share * k) for share in WINDOW_L0)
        if self.config.bandwidth is None and high and low and high > low:
            self.bandwidth.fill_(high - low)

    def rescale(self, factor: float) -> None:
        """Always by the encoder: rows of a decoder that began small would be lost in the first steps."""
        for weights in (self.W_enc, self.b_enc, self.bandwidth):
            weights.mul_(factor)
        self.log_threshold.add_(log(factor))

    def lr_factors(self) -> dict[Tensor, float]:
        return {self.log_threshold: self.config.threshold_lr}

    def unit_rows(self) -> list[nn.Parameter]:
        return [] if self.config.objective == "tanh" else super().unit_rows()

    def fold_in(self, mean: Float[Tensor, " d_in"], scale: Float[Tensor, ""]) -> None:
        super().fold_in(mean, scale)
        self.bandwidth.div_(scale)

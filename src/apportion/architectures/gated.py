"""Gated SAE (Rajamanoharan et al. 2024, arXiv 2404.16014): one path decides which latents fire, another how strongly.

    u     = W_enc (x - b_dec)                      x prepared by the input description; W_enc is the paper's W_gate
    pi    = u + b_enc                              the gate is open where pi > 0; b_enc is the paper's b_gate
    z     = 1[pi > 0] relu(exp(r_mag) u + b_mag)
    x_hat = z W_dec + b_dec                        decoder rows of unit norm

    loss  = mean ||x - x_hat||^2 / d_in
          + lambda * mean over tokens of sum_j relu(pi_j)
          + mean ||x - (relu(pi) sg(W_dec) + sg(b_dec))||^2 / d_in             sg: no gradient

The penalty shrinks relu(pi), which only decides; magnitudes are free of it. The step function has no gradient, so the
third term teaches the gate what is worth letting through. Published coefficients are for ||e||^2: divide one for
E||x||^2 = 1 by sqrt(d_in).

What the rule chooses by is relu(pi), so an open gate with a magnitude of zero counts for the penalty and not for L0.
With u = pi - b_enc the magnitude is a function of pi alone, and all three terms live on one list of matches:

    z = relu(exp(r_mag) pi + (b_mag - exp(r_mag) b_enc))

When to use it: where an L1 penalty is wanted, but not the shrinkage that comes with it. L0 is k only as well as lambda
can be steered.

Cost: one dense product and two reconstructions; early in training there are as many matches as in a ReLU SAE.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from apportion import losses
from apportion.allocation import Rule, Selection, StepContext
from apportion.architectures.affine import Affine
from apportion.architectures.base import Pass
from apportion.architectures.sparsity import SparsityCoefficient, SparsityConfig, begin_sparse
from apportion.kernels import decode_matches
from apportion.latents import Latents


@dataclass(frozen=True)
class GatedPass(Pass):
    gates: Latents
    """Open gates, with pi as value."""


@final
class Gated(Affine):
    Config = SparsityConfig
    config: SparsityConfig  # type: ignore[assignment]
    form = "gated"
    constants: ClassVar = {"gates": ("W_dec", "b_dec")}

    def __init__(self, config: SparsityConfig, allocation: Rule) -> None:
        super().__init__(config, allocation)
        self.r_mag = nn.Parameter(torch.zeros(config.d_sae))
        self.b_mag = nn.Parameter(torch.zeros(config.d_sae))
        initial = 0.1 * (config.d_in * config.initial_k) ** -0.5
        self.coefficient = SparsityCoefficient(config.k, config.coefficient, initial=initial)

    def fit_rest(self, x: Float[Tensor, "n d_in"], y: Float[Tensor, "n d_in"]) -> None:
        begin_sparse(self, x)

    def begin_step(self, context: StepContext) -> None:
        super().begin_step(context)
        self.coefficient.begin_step(context)

    def encode_scaled(self, x: Float[Tensor, "tokens d_in"], selection: Selection) -> Latents:  # type: ignore[override]
        return self.magnitudes(self.gates(x, selection))

    def gates(self, x: Float[Tensor, "tokens d_in"], selection: Selection) -> Latents:
        """The open gates, with pi as value."""
        return self.encode_centred(self.centred(x), selection)

    def magnitudes(self, gates: Latents) -> Latents:
        """What passes through the open gates."""
        gain, offset = (v.index_select(0, gates.indices) for v in self._from_pi())
        return gates.with_values((gain * gates.values + offset).relu())

    def _from_pi(self) -> tuple[Float[Tensor, " d_sae"], Float[Tensor, " d_sae"]]:
        """Factor and summand that turn pi into the magnitude before its relu."""
        gain = self.r_mag.exp()
        return gain, self.b_mag - gain * self.b_enc

    def affinities(self, latents: Latents) -> Float[Tensor, " nnz"]:
        gain, offset = (v.detach()[latents.indices] for v in self._from_pi())
        pi = (latents.values.detach() - offset) / gain
        return pi if self.config.affinity == "code" else pi * self.decoder_norms()[latents.indices]

    def forward_scaled(self, x: Float[Tensor, "tokens d_in"], context: StepContext) -> Pass:
        gates = self.gates(x, self.selection(context))
        latents = self.magnitudes(gates)
        return GatedPass(latents, self.decode_scaled(latents, x), gates)

    def own_terms(self, x: Tensor, y: Tensor, made: Pass, context: StepContext) -> dict[str, Tensor]:
        assert isinstance(made, GatedPass)
        gates, group = made.gates, context.group
        by_gates = decode_matches(gates, self.W_dec.detach()) + self.b_dec.detach()
        return {
            "sparsity": group.mean(self.coefficient.value * gates.values.sum() / max(gates.tokens, 1), gates.tokens),
            "gates": losses.reconstruction(y, by_gates, group),
        }

    def fold_in(self, mean: Float[Tensor, " d_in"], scale: Float[Tensor, ""]) -> None:
        if not self.config.subtract_b_dec:
            self.b_mag.sub_(scale * self.r_mag.exp() * (self.W_enc @ mean))
        self.b_mag.div_(scale)
        super().fold_in(mean, scale)

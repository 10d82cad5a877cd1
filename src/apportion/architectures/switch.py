"""Switch: a router sends each token to one of E small SAEs, its experts. arXiv 2410.08201.

    p     = softmax(W_router (x - b_router))                     x prepared by the input description
    e     = argmax p                                             one expert per token
    z     = p_e relu(W_enc (x - b_dec) + b_enc)                  on the latents of expert e, where the rule chose them
    x_hat = z W_dec + b_dec
    loss  = mean ||x - x_hat||^2 / d + balance_weight * E sum_i f_i P_i
                                                                 f_i: share of tokens sent to i, P_i: mean of p_i

Expert e owns the d_sae / E latents from e d_sae / E on; a code is an ordinary row of d_sae latents that is zero
outside one expert. Only that expert's product is done (kernels/product.py), 1 / E of a plain encoder's. The rule
chooses among the matches of all tokens with their own experts, so that under Mutual Choice experts, too, get as much of
the budget as their matches are worth. The gate p_e is the router's only gradient from the reconstruction; f is a
constant. Without the balance loss experts go idle; it is 1 (times its weight) where the load is even.

Two ways to compare with a plain SAE of width F:

    width-matched    num_experts=E, d_sae=F        1 / E of the encoder's work; in the paper's runs the error is larger
    FLOP-matched     num_experts=E, d_sae=E * F    the same encoder work per token, plus d_in E for the router, with E
                                                   times the parameters; in the paper's runs the error is smaller

Experts may learn the same direction several times over: evals/geometry.py counts that.

The paper's code has no encoder bias, computes all experts and masks them. Its balance weight, 3 in the launch script,
is multiplied by d and meets a squared error summed over d, of raw activations: about 1040 for E = 16, k = 64, so that
the balance term is 2.2 times the reconstruction loss where the load is even. Ours is a mean over d of scaled data, some
0.2 where we train (docs/family.md), and 0.3 is about as much beside it. As there, experts have no capacity: no token is
dropped, and a block is as long as its expert's share of the batch. As there, there is no auxiliary loss by default;
with one, a token revives silent latents of its own expert.

A latent sees the tokens of its expert only, about 1 / E of all. Windows of dead latents and densities count all tokens,
so that a dead window is E times shorter in tokens that a latent could have fired on: raise dead_window_tokens with E.

When to use it: when there are so many latents that the encoder's product is what a step costs.

Cost: 1 / E of a plain encoder's product, and one with the router; decoder and gradients touch k matches per token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from apportion import losses
from apportion.allocation import Rule, Selection, StepContext
from apportion.architectures.affine import unit_rows
from apportion.architectures.auxiliary import AffineWithAuxiliary, AuxiliaryConfig
from apportion.architectures.base import Pass
from apportion.architectures.start import SHARE_IN_COMMON, drawn
from apportion.kernels import Experts
from apportion.latents import Latents

DEFAULT_EXPERTS = 16
WIDTH_PER_K = 4
"""An expert has at least this many times k latents, unless num_experts is given."""


@dataclass(frozen=True, kw_only=True)
class SwitchConfig(AuxiliaryConfig):
    num_experts: int | None = None
    """Experts, a divisor of d_sae; a token has the latents of one. None: 16, or fewer that have 4 k latents each."""
    balance_weight: float = 0.3
    """Weight of the loss that keeps the experts' loads even."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_experts is not None and (self.num_experts < 1 or self.d_sae % self.num_experts):
            raise ValueError(
                f"num_experts = {self.num_experts} does not divide d_sae = {self.d_sae}, and experts are of equal "
                f"width. Use num_experts = {_experts(self.d_sae, self.num_experts, 1)}, or another d_sae."
            )


def _experts(d_sae: int, most: int, width: float) -> int:
    """The largest number of experts, `most` at most, that have equally many latents and at least `width` of them."""
    return max((e for e in range(1, most + 1) if d_sae % e == 0 and d_sae / e >= width), default=1)


@dataclass(frozen=True)
class Routing:
    """Where the router sends tokens."""

    probabilities: Float[Tensor, "tokens num_experts"]
    gate: Float[Tensor, " tokens"]
    """The largest probability."""
    expert: Int[Tensor, " tokens"]
    """Whose it is."""


@dataclass(frozen=True)
class SwitchPass(Pass):
    routing: Routing


@final
class Switch(AffineWithAuxiliary):
    Config = SwitchConfig
    config: SwitchConfig  # type: ignore[assignment]
    form = "switch"
    constants = dict.fromkeys(AffineWithAuxiliary.constants, ("made", "b_dec", "W_router", "b_router"))

    def __init__(self, config: SwitchConfig, allocation: Rule) -> None:
        k = allocation.k or 1
        self.num_experts = config.num_experts or _experts(config.d_sae, DEFAULT_EXPERTS, WIDTH_PER_K * k)
        self.expert_width = config.d_sae // self.num_experts
        if k > self.expert_width:
            raise ValueError(
                f"k = {k:g}, but a token has only the {self.expert_width} latents of its expert "
                f"(d_sae = {config.d_sae}, num_experts = {self.num_experts}). Lower k or num_experts, or raise d_sae."
            )
        super().__init__(replace(config, num_experts=self.num_experts), allocation)
        seed = None if config.seed is None else config.seed + 1  # not the same directions as the first latents
        self.W_router = nn.Parameter(unit_rows(self.num_experts, self.row_shape, seed))
        self.b_router = nn.Parameter(torch.zeros(config.d_in))
        self.data_share = SHARE_IN_COMMON  # rows of an expert are few, and its latents are to be near them

    def route(self, x: Float[Tensor, "tokens d_in"]) -> Routing:
        """The expert of each prepared row."""
        p = ((x - self.b_router) @ self.W_router.T).softmax(dim=1)
        return Routing(p, *p.max(dim=1))

    @torch.no_grad()
    def experts(self, x: Float[Tensor, "*lead d_in"]) -> Int[Tensor, "*lead"]:
        """The expert of each row of raw activations. See `metrics.load` and `metrics.entropy`."""
        return self.route(self.input.apply_to(self.finite_rows(x))).expert.reshape(x.shape[:-1])

    def encode_scaled(self, x: Float[Tensor, "tokens d_in"], selection: Selection) -> Latents:  # type: ignore[override]
        return self._encode(x, selection, self.route(x))

    def _encode(self, x: Float[Tensor, "tokens d_in"], selection: Selection, routing: Routing) -> Latents:
        return _gated(super().encode_scaled(x, selection, self._experts(routing)), routing)

    def encode_silent(
        self, x: Float[Tensor, "tokens d_in"], selection: Selection, silent: Int[Tensor, " n"]
    ) -> Latents:
        with torch.no_grad():
            centred, routing = self.centred(x), self.route(x)
        experts = self._experts(routing).among(silent)
        return _gated(self.encode_centred(centred, selection, silent, experts), routing)

    def _experts(self, routing: Routing) -> Experts:
        starts = torch.arange(0, self.d_sae + 1, self.expert_width)
        return Experts(routing.expert, routing.gate.detach(), starts)

    def forward_scaled(self, x: Float[Tensor, "tokens d_in"], context: StepContext) -> Pass:
        routing = self.route(x)
        latents = self._encode(x, self.selection(context), routing)
        return SwitchPass(latents, self.decode_scaled(latents), routing)

    def rows_for_latents(self, x: Float[Tensor, "n d_in"], generator: torch.Generator) -> Int[Tensor, " d_sae"]:
        """Of those that its expert gets."""
        expert, found = self.route(x).expert, list[Tensor]()
        for e in range(self.num_experts):
            own = (expert == e).nonzero().squeeze(1)
            own = own if len(own) else torch.arange(len(x))
            found.append(own[drawn(self.expert_width, len(own), generator)])
        return torch.cat(found)

    def own_terms(self, x: Tensor, y: Tensor, made: Pass, context: StepContext) -> dict[str, Tensor]:
        assert isinstance(made, SwitchPass)
        terms = super().own_terms(x, y, made, context)
        if self.config.balance_weight:
            balance = losses.load_balance(made.routing.probabilities, made.routing.expert, context.group)
            terms["load_balance"] = self.config.balance_weight * balance
        return terms

    def fold_in(self, mean: Float[Tensor, " d_in"], scale: Float[Tensor, ""]) -> None:
        """The router's logits stay equal, too: W_router -> s W_router, b_router -> mu + b_router / s."""
        super().fold_in(mean, scale)
        self.W_router.mul_(scale)
        self.b_router.div_(scale).add_(mean)


def _gated(codes: Latents, routing: Routing) -> Latents:
    """Every code times the gate of its token."""
    return replace(codes, values=codes.values * routing.gate.index_select(0, codes.rows()))

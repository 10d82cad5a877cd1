"""Baselines with random directions: sparse autoencoders of which a part stays at its random start. arXiv 2602.14111.

    decoder        W_dec is never trained                                    W_enc, b_enc and b_dec are
    soft_decoder   row j of W_dec keeps <w_j, w_j0> >= c, w_j0 its start     everything is
    encoder        W_enc is never trained                                    W_dec, b_enc and b_dec are

What a trained SAE is praised for it should do better than these. The three constraints and c = 0.8 are the paper's. The
rest is our form: encoder and decoder have the same random start, everything that is not frozen trains as in a plain
SAE, auxiliary loss included, and the soft constraint is held by projection. After each step a row w with <w, w_0> < c
(both of unit norm) moves to the nearest direction that keeps it:

    w <- c w_0 + sqrt(1 - c^2) u,      u = the unit vector along w - <w, w_0> w_0

When to use it: as a control. What a trained SAE scores is worth what it is above these.

Cost: that of TopK, less the gradients of what is frozen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from apportion.allocation import Rule
from apportion.architectures.auxiliary import AffineWithAuxiliary, AuxiliaryConfig


@dataclass(frozen=True, kw_only=True)
class FrozenConfig(AuxiliaryConfig):
    frozen: Literal["decoder", "soft_decoder", "encoder"] = "decoder"
    """What stays at its random start: the decoder, the decoder within min_cosine (soft_decoder), or the encoder."""
    init: Literal["random"] = "random"
    """Where training begins; elsewhere than in random directions it would be no such baseline."""
    min_cosine: float = 0.8
    """soft_decoder: the least cosine of a decoder row with its start."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not -1 <= self.min_cosine <= 1:
            raise ValueError(f"min_cosine is a cosine between -1 and 1, got {self.min_cosine}.")


@final
class Frozen(AffineWithAuxiliary):
    Config = FrozenConfig
    config: FrozenConfig  # type: ignore[assignment]
    form = "affine"
    W_start: Tensor
    """The random start of the decoder, kept by soft_decoder."""

    def __init__(self, config: FrozenConfig, allocation: Rule) -> None:
        super().__init__(config, allocation)
        if config.frozen == "soft_decoder":
            self.register_buffer("W_start", self.W_dec.detach().clone())
        else:
            (self.W_dec if config.frozen == "decoder" else self.W_enc).requires_grad_(False)

    def unit_rows(self) -> list[nn.Parameter]:
        return [] if self.config.frozen == "decoder" else [self.W_dec]

    @torch.no_grad()
    def after_step(self) -> None:
        if self.config.frozen == "soft_decoder":
            self.W_dec.copy_(within_cone(self.W_dec, self.W_start, self.config.min_cosine))


def within_cone(
    w: Float[Tensor, "d_sae d_in"], start: Float[Tensor, "d_sae d_in"], min_cosine: float
) -> Float[Tensor, "d_sae d_in"]:
    """Unit rows moved no further than it takes to have a cosine of at least `min_cosine` with unit rows `start`."""
    cosine = (w * start).sum(1, keepdim=True)
    across = w - cosine * start
    across /= across.norm(dim=1, keepdim=True).clamp_min(torch.finfo(w.dtype).tiny)
    return torch.where(cosine < min_cosine, min_cosine * start + (1 - min_cosine**2) ** 0.5 * across, w)

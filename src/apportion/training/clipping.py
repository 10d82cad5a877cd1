"""Clip gradients relative to what is usual, so that no setting depends on widths, batch size or loss scale.

    norm_t   global norm of the gradient at step t
    typical  geometric mean of the norms so far, with a window of WINDOW steps
    scale    min(1, clip_ratio * typical / norm_t)

Gradients are heavy-tailed even behind the token filter: at layer 15 of SmolLM2 about one batch of 1024 tokens in a
hundred has a gradient six times the usual. Adam keeps the square of it for a thousand steps, and latents die meanwhile.
"""

from __future__ import annotations

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

WINDOW = 100


@final
class RelativeClipping(nn.Module):
    """Its state is one number, so that a resumed run clips alike."""

    log_norm: Tensor
    steps: Tensor

    def __init__(self, ratio: float) -> None:
        super().__init__()
        self.ratio = ratio
        self.register_buffer("log_norm", torch.zeros((), dtype=torch.float64))
        self.register_buffer("steps", torch.zeros((), dtype=torch.float64))

    @torch.no_grad()
    def scale(self, norm: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """The factor for gradients of this norm, which also enters the mean; 0 if it is not finite. Nothing waits for
        the device."""
        counts = (norm > 0) & norm.isfinite()
        self.steps += counts
        weight = (1 / self.steps).clamp(1 / WINDOW, 1)
        log_norm = torch.where(counts, norm.double().log(), self.log_norm)
        self.log_norm += weight * (log_norm - self.log_norm)
        factor = (self.ratio * self.log_norm.exp() / norm).nan_to_num(1.0).clamp(max=1)
        return torch.where(norm.isfinite(), factor, 0.0)

"""Which latents are dead, and how often each one fires. Counted in tokens, so batch size does not matter.

dead       no firing within the last `dead_window` tokens
density    exponential average of the firing rate per token with a window of `density_window` tokens,
           corrected for its start at zero
"""

from __future__ import annotations

from math import exp
from typing import final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


@final
class Activity(nn.Module):
    silent_tokens: Tensor
    average: Tensor
    weight: Tensor

    def __init__(self, d_sae: int, dead_window: int, density_window: int) -> None:
        super().__init__()
        self.dead_window, self.density_window = dead_window, density_window
        self.register_buffer("silent_tokens", torch.zeros(d_sae, dtype=torch.int64))
        self.register_buffer("average", torch.zeros(d_sae, dtype=torch.float64))
        self.register_buffer("weight", torch.zeros((), dtype=torch.float64))

    def update(self, counts: Int[Tensor, " d_sae"], tokens: int) -> None:
        """Add a batch: on how many of its tokens each latent fired."""
        self.silent_tokens.add_(tokens).masked_fill_(counts > 0, 0)
        keep = exp(-tokens / self.density_window)
        self.average.mul_(keep).add_(counts, alpha=(1 - keep) / tokens)
        self.weight.mul_(keep).add_(1 - keep)

    def forget(self, latents: Int[Tensor, " n"]) -> None:
        """Count these latents anew: a dead window from now on, and a density of zero."""
        self.silent_tokens[latents] = 0
        self.average[latents] = 0

    def dead(self) -> Bool[Tensor, " d_sae"]:
        return self.silent_tokens >= self.dead_window

    def density(self) -> Float[Tensor, " d_sae"]:
        return self.average / self.weight.clamp_min(1e-12)

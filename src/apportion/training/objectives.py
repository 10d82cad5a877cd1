"""What is minimised: an objective turns (saes, batch, context) into named, weighted losses.

Local reconstruction is the plain case: each SAE reconstructs its input (or the batch's target) on its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from apportion import losses
from apportion.activations.batch import Batch
from apportion.allocation import StepContext
from apportion.architectures import SAE
from apportion.latents import Latents
from apportion.metrics import batch_fvu


@dataclass(frozen=True)
class TrainingContext(StepContext):
    """The step's context with a place for what the objective sees on the way."""

    seen: list[tuple[Latents, Tensor]] = field(default_factory=list)

    def observe(self, latents: Latents, x: Tensor, x_hat: Tensor) -> None:
        """To be called once for each SAE: the trainer counts firings and reports L0 and FVU from it."""
        self.seen.append((latents, batch_fvu(x.detach(), x_hat.detach())))


class Objective(Protocol):
    """Named, weighted losses; their sum is minimised. Calls `context.observe` for each SAE."""

    def __call__(self, saes: Sequence[SAE], batch: Batch, context: TrainingContext) -> dict[str, Tensor]: ...


def local_reconstruction(saes: Sequence[SAE], batch: Batch, context: TrainingContext) -> dict[str, Tensor]:
    """mean ||x~ - x~_hat||^2 / d_in on scaled data, and the SAE's own terms."""
    (sae,) = saes
    x = sae.input.apply_to(batch.x.to(sae.mean.device, sae.dtype))
    latents = sae.encode_scaled(x, context.warm)
    x_hat = sae.decode_scaled(latents)
    context.observe(latents, x, x_hat)
    return {"reconstruction": losses.reconstruction(x, x_hat)} | sae.own_terms(x, x_hat, latents, context)

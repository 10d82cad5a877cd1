"""What is minimised: an objective turns (saes, batch, context) into named, weighted losses.

Local reconstruction is the plain case: each SAE reconstructs its input (or the batch's target) on its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from apportion import losses
from apportion.activations.batch import Batch
from apportion.allocation import StepContext, WarmStart
from apportion.architectures import SAE
from apportion.latents import Latents
from apportion.metrics import batch_fvu


@dataclass(frozen=True)
class Outcome:
    """Losses (their sum is minimised), and what the step measured on the way."""

    terms: dict[str, Tensor]
    latents: Latents
    fvu_batch: Tensor


class Objective(Protocol):
    def __call__(self, saes: Sequence[SAE], batch: Batch, context: StepContext, warm: WarmStart) -> Outcome: ...


def local_reconstruction(saes: Sequence[SAE], batch: Batch, context: StepContext, warm: WarmStart) -> Outcome:
    """mean ||x~ - x~_hat||^2 / d_in on scaled data, and the SAE's own terms."""
    (sae,) = saes
    x = sae.input.apply_to(batch.x.to(sae.mean.device, sae.dtype))
    latents = sae.encode_scaled(x, warm)
    x_hat = sae.decode_scaled(latents)
    terms = {"reconstruction": losses.reconstruction(x, x_hat)}
    terms |= sae.own_terms(x, x_hat, latents, context)
    return Outcome(terms, latents, batch_fvu(x.detach(), x_hat.detach()))

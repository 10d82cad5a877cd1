"""What is minimised: an objective turns (saes, batch, context) into named, weighted losses.

Local reconstruction is the plain case: each SAE reconstructs its input (or the batch's target) on its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from torch import Tensor

from apportion.allocation import StepContext
from apportion.architectures import SAE
from apportion.latents import Latents
from apportion.metrics import batch_fvu
from apportion.rows.batch import Batch


@dataclass(frozen=True)
class TrainingContext:
    """What an objective is told about the step, and a place for what it sees on the way."""

    each: tuple[StepContext, ...]
    """For each SAE in turn: progress, dead latents, densities, warm bounds."""
    logged: bool = False
    """Whether this step's figures will be written down: the time for costly ones."""
    figures: dict[str, Tensor] = field(default_factory=dict)
    """What an objective wants to report besides its losses, as 0-d tensors."""
    seen: list[tuple[Latents, Tensor]] = field(default_factory=list)

    def observe(self, latents: Latents, y: Tensor, y_hat: Tensor) -> None:
        """To be called once for each SAE in turn: the trainer counts firings and reports L0 and FVU from it."""
        self.seen.append((latents, batch_fvu(y.detach().flatten(1), y_hat.detach().flatten(1))))


@runtime_checkable
class Objective(Protocol):
    """Named, weighted losses; their sum is minimised. Calls `context.observe` for each SAE in turn.

    A plain function will do. An objective may also have

        whole_contexts = True      it is given batches as they come, with rows that the mask leaves out
        reconstructs = False       a poor reconstruction is no sign that training went wrong
        after_step(trainer)        called behind each step
        describe() -> dict         its settings (JSON-able) for the run's record
    """

    def __call__(self, saes: Sequence[SAE], batch: Batch, context: TrainingContext) -> dict[str, Tensor]: ...


def local_reconstruction(saes: Sequence[SAE], batch: Batch, context: TrainingContext) -> dict[str, Tensor]:
    """mean ||y~ - y~_hat||^2 / d_out on scaled data, and the SAE's own terms; summed over SAEs."""
    total: dict[str, Tensor] = {}
    for sae, own in zip(saes, context.each, strict=True):
        x, y = sae.prepare(batch.x, batch.target)
        made = sae.forward_scaled(x, own)
        context.observe(made.latents, y, made.y_hat)
        add_terms(total, {"reconstruction": sae.reconstruction_loss(y, made)} | sae.own_terms(x, y, made, own))
    return total


def add_terms(total: dict[str, Tensor], terms: dict[str, Tensor]) -> None:
    """Add losses to those of the same name."""
    for name, term in terms.items():
        total[name] = total[name] + term if name in total else term

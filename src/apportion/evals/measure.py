"""What is measured of one SAE on held-out activations, always in eval mode.

A `Measure` is one thing that is added up row by row and then read. To add one, write the class and call `add_measure`:
its figures are then in the table, the JSON, the report and the card of whatever is evaluated.

Figures are over the rows that pass the token filter, whose share is given, because a handful of attention-sink tokens
can make every FVU look excellent.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from apportion.architectures import SAE
from apportion.evals.figures import Figure, add_figures
from apportion.latents import Latents
from apportion.metrics import Activations
from apportion.torch_state import usual


@dataclass(frozen=True)
class Seen:
    """Raw rows that an SAE has encoded and decoded, in eval mode."""

    x: Float[Tensor, " n *row"]
    mask: Bool[Tensor, " n"]
    """Which take part."""
    latents: Latents
    y: Float[Tensor, " n *out"]
    """What was to be reconstructed, mostly x."""
    y_hat: Float[Tensor, " n *out"]
    difficulty: Float[Tensor, " n"] | None = None
    """The model's cross-entropy of the prediction made at each row, NaN where there is none."""


class Measure(ABC):
    """One thing that is measured."""

    figures: ClassVar[tuple[Figure, ...]] = ()
    """What `result` has, as far as it is for the tables."""

    def __init__(self, sae: SAE) -> None:
        self.sae = sae

    @abstractmethod
    def add(self, seen: Seen) -> None:
        """Take note of some more rows."""

    @abstractmethod
    def result(self, activations: Activations) -> dict[str, Any]:
        """JSON-able; `None` where a figure does not exist. `activations`: of all rows that took part, in order."""


MEASURES: dict[str, type[Measure]] = {}
AnyMeasure = TypeVar("AnyMeasure", bound=Measure)


def add_measure(measure: type[AnyMeasure]) -> type[AnyMeasure]:
    """Have it measured, too; also as a decorator. ValueError for a name that another one has."""
    other = MEASURES.get(measure.__name__, measure)
    if (other.__module__, other.__qualname__) != (measure.__module__, measure.__qualname__):
        raise ValueError(f"There is a measure {measure.__name__!r} already ({other.__module__}). Name yours otherwise.")
    add_figures(*measure.figures)
    MEASURES[measure.__name__] = measure
    return measure


class Measurement:
    """Everything in MEASURES, of one SAE: `add` rows, then read `result`."""

    def __init__(self, sae: SAE) -> None:
        self.sae = sae
        self.activations = Activations(sae.d_sae)
        self.rows = 0
        self.measures = [measure(sae) for measure in MEASURES.values()]

    @torch.inference_mode()
    def add(
        self,
        x: Float[Tensor, " n *row"],
        mask: Bool[Tensor, " n"],
        difficulty: Float[Tensor, " n"] | None = None,
        target: Float[Tensor, " n *out"] | None = None,
    ) -> Float[Tensor, " n *out"]:
        """Measure raw rows, of which `mask` take part; returns the reconstruction of all of them.

        Rows that do not take part may hold anything: those with NaN or infinity count nowhere, and are returned as 0.
        `difficulty` is the model's cross-entropy of the prediction made at each row (NaN where there is none);
        `target` is what is to be reconstructed, if not x.
        """
        if self.sae.needs_target and target is None:
            raise ValueError(f"{self.sae.name} predicts a target from x: it can only be measured against one.")
        x, mask = x.to(self.sae.device), mask.to(self.sae.device)
        y = x if target is None else target.to(x.device)
        usable = mask | (finite_rows(x) & finite_rows(y))
        if not bool(usable.all()):
            y_hat = torch.zeros_like(y)
            y_hat[usable] = self.add(
                x[usable],
                mask[usable],
                None if difficulty is None else difficulty[usable.to(difficulty.device)],
                None if target is None else y[usable],
            )
            self.rows += int((~usable).sum())
            return y_hat
        with self.sae.in_eval_mode():
            latents = self.sae.encode(x)
            y_hat = self.sae.decode(latents, x)
        if y.shape != y_hat.shape:
            raise ValueError(f"{self.sae.name} predicts rows {[*y_hat.shape[1:]]}, got targets {[*y.shape[1:]]}.")
        self.record(Seen(x, mask, latents, y, y_hat, difficulty))
        return y_hat

    def record(self, seen: Seen) -> None:
        """Take note of rows that have been encoded and decoded already."""
        self.activations.add(seen.latents[seen.mask])
        self.rows += len(seen.x)
        for measure in self.measures:
            measure.add(seen)

    def of(self, measure: type[AnyMeasure]) -> AnyMeasure:
        """One of the measures."""
        return next(one for one in self.measures if isinstance(one, measure))

    def l0_of_tokens(self) -> Int[Tensor, " n"]:
        """Active latents of every token that took part."""
        return self.activations.l0()

    @usual()
    def result(self) -> dict[str, Any]:
        """JSON-able; `None` where a figure does not exist (a correlation with a constant L0, say)."""
        tokens = self.activations.tokens
        if not tokens:
            raise ValueError("Nothing to evaluate: no row passed the token filter. Give more text.")
        found = {
            "sae": self.sae.name,
            "k": self.sae.k,
            "d_sae": self.sae.d_sae,
            "mode": "eval (per-token top-k)" if not self.sae.allocation.batch_coupled else "eval (thresholds)",
            "tokens": tokens,
            "filtered_share": 1 - tokens / self.rows,
        }
        for measure in self.measures:
            found |= measure.result(self.activations)
        return found


def finite_rows(x: Float[Tensor, " n *row"]) -> Bool[Tensor, " n"]:
    return x.flatten(1).isfinite().all(1)

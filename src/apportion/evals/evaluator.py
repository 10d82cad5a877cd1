"""An evaluator finds something out about an SAE and says it in figures.

    needs       what it works on: rows, a model, labels (the true codes of made-up features, say)
    cost        what it will run, before it starts
    run         yields what it found, one figure after the other

To add one, write the class and call `add_evaluator`; another package names its own as entry points `apportion.evals`.
Its figures are then in the tables, the JSON, the report and the card, and `apportion eval --on NAME` runs it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import Any, ClassVar, Literal, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

from apportion.architectures import SAE
from apportion.evals.figures import FIGURES, Figure, add_figures
from apportion.settings import nearest

Need = Literal["rows", "model", "labels"]


@dataclass(frozen=True)
class Subject:
    """One SAE, and what it is evaluated on."""

    sae: SAE
    store: Any = None
    """A RowStore, if there is one."""
    rows: Int[Tensor, " n"] | None = None
    """Which of its rows; None: all."""
    model: Any = None
    """The model that the rows come from, if it is there."""
    progress: bool = False

    @property
    def indices(self) -> Int[Tensor, " n"]:
        return torch.arange(self.store.rows) if self.rows is None else self.rows

    def has(self, need: Need) -> bool:
        here = {"rows": self.store, "model": self.model, "labels": getattr(self.store, "codes", None)}
        return here[need] is not None


@dataclass(frozen=True)
class Found:
    """A figure of one SAE."""

    key: str
    value: float | None
    """None where it does not exist for this SAE."""
    tokens: int
    """Over how many rows."""
    mode: str
    """Eval mode and which of them, or train mode."""
    interval: tuple[float, float] | None = None


class Evaluator(ABC):
    name: ClassVar[str]
    version: ClassVar[int] = 1
    """To be raised whenever figures change their meaning or value."""
    needs: ClassVar[frozenset[Need]] = frozenset({"rows"})
    figures: ClassVar[tuple[Figure, ...]] = ()
    """Those of its own; others are in FIGURES already."""

    def cost(self, subject: Subject) -> str:
        """What it will run, in words."""
        return f"{len(subject.indices):,} rows" if "rows" in self.needs else "the weights alone"

    @abstractmethod
    def run(self, subject: Subject) -> Iterator[Found]:
        """What it finds; the key of each is in FIGURES."""


EVALS: dict[str, type[Evaluator]] = {}
AnyEvaluator = TypeVar("AnyEvaluator", bound=type[Evaluator])


def found_in(
    result: Mapping[str, Any], figures: Iterable[Figure], tokens: int, mode: str = "eval mode"
) -> Iterator[Found]:
    """Those of the figures that a result has; NaN is None."""
    for figure in figures:
        if figure.key in result:
            value = result[figure.key]
            yield Found(figure.key, None if value is None or value != value else value, tokens, mode)


def add_evaluator(evaluator: AnyEvaluator) -> AnyEvaluator:
    """Put it into the table; also as a decorator."""
    add_figures(*evaluator.figures)
    EVALS[evaluator.name] = evaluator
    return evaluator


def evaluators(names: Iterable[str], subject: Subject) -> list[Evaluator]:
    """The evaluators of these names. ValueError for one that there is not, or that lacks what it needs here."""
    chosen = []
    for name in known(names):
        if missing := [need for need in sorted(EVALS[name].needs) if not subject.has(need)]:
            raise ValueError(f"The evaluator {name} needs {' and '.join(missing)}, which there are none of here.")
        chosen.append(EVALS[name]())
    return chosen


def known(names: Iterable[str]) -> list[str]:
    """These names; ValueError for one of which there is no evaluator."""
    if names := list(names):
        load_others()
    for name in names:
        if name not in EVALS:
            raise ValueError(f"There is no evaluator {name!r}; {nearest(name, EVALS)}")
    return names


@cache
def load_others() -> None:
    """Evaluators of packages that are installed."""
    for entry in entry_points(group="apportion.evals"):
        add_evaluator(entry.load())


def figures_by(names: Iterable[str], subject: Subject) -> dict[str, Any]:
    """What these evaluators find, by key; all that can be wrong shows before the first is run."""
    return {key: value for one in evaluators(names, subject) for key, value in figures_of(one, subject).items()}


def figures_of(evaluator: Evaluator, subject: Subject) -> dict[str, Any]:
    """What it finds, by key. ValueError for a figure that nobody has defined."""
    found = list(evaluator.run(subject))
    for one in found:
        if one.key not in FIGURES:
            raise ValueError(f"The evaluator {evaluator.name} yields {one.key!r}, which nobody has defined.")
    return {one.key: one.value for one in found}

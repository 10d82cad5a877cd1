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
from apportion.disk import plain
from apportion.evals.figures import FIGURES, Figure, add_figures, is_number
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
    value: Any
    """A number, also of numpy or torch; None, or NaN, where it does not exist for this SAE."""
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
    """Those of the figures that a result has."""
    for figure in figures:
        if figure.key in result:
            yield Found(figure.key, result[figure.key], tokens, mode)


def add_evaluator(evaluator: AnyEvaluator) -> AnyEvaluator:
    """Put it into the table; also as a decorator. ValueError for a name that another one has."""
    other = EVALS.get(evaluator.name, evaluator)
    if (other.__module__, other.__qualname__) != (evaluator.__module__, evaluator.__qualname__):
        raise ValueError(f"There is an evaluator {evaluator.name!r} already ({other.__module__}). Choose another name.")
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
        try:
            add_evaluator(entry.load())
        except Exception as error:
            raise ValueError(
                f"The evaluator {entry.name!r} ({entry.value}) cannot be loaded: {error}. Mend or remove its package."
            ) from error


def with_found(found: Mapping[str, Any], evaluators: Iterable[Evaluator], subject: Subject) -> dict[str, Any]:
    """What is known of an SAE, and what these evaluators find, by key. ValueError for what is no number, and for a
    figure that nobody has defined, or that is known already and has another value."""
    found = dict(found)
    for evaluator in evaluators:
        for one in evaluator.run(subject):
            said, value = f"The evaluator {evaluator.name} yields {one.key!r}", plain(one.value)
            if one.key not in FIGURES:
                raise ValueError(f"{said}, which nobody has defined.")
            if value is not None and not is_number(value):
                raise ValueError(f"{said} = {value!r}, and a figure is a number or None.")
            if found.get(one.key) not in (None, value):
                raise ValueError(f"{said}, which is known already and has another value. Choose another key.")
            found[one.key] = value
    return found

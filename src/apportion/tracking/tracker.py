"""What a tracker is, and what it is told of a run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

PROJECT = "apportion"
"""Under which services that sort runs into projects, or experiments, show ours, unless they are told otherwise."""


@dataclass(frozen=True)
class TrackedRun:
    """A run that begins or goes on."""

    id: str
    """The same whenever the run goes on; kept in its folder."""
    folder: Path
    settings: Mapping[str, Any]
    """All of run.json: the SAE, training, the source, versions."""
    steps: int
    """Done so far; 0 at the beginning. What was recorded of later steps is from before a kill, and comes again."""

    @property
    def name(self) -> str:
        return self.folder.name

    def flat(self) -> dict[str, Any]:
        """The settings as {"train.lr": 0.001, ...}; lists as JSON."""
        return dict(_flat(self.settings))


@runtime_checkable
class Tracker(Protocol):
    """One record of a run, in a thread of its own: no step waits for it. After its first error it is called no more.

    It may also have begin(run: TrackedRun) -> int, called first, which returns the last step that its record holds, 0
    if none: all lines after that step follow, also earlier ones. Without it a run that goes on sends new lines only.
    """

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """A line of metrics.jsonl: finite numbers by name."""
        ...

    def close(self, figures: Mapping[str, Any]) -> None:
        """The run is finished, with these figures; without any it was stopped, and may go on."""
        ...


def numbers(figures: Mapping[str, Any]) -> dict[str, float]:
    """The final figures that are numbers, by names that no curve has."""
    return {f"final/{name}": float(value) for name, value in figures.items() if isinstance(value, int | float)}


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, json.dumps(value) if isinstance(value, list) else value

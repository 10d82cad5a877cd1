"""What training can minimise. One file, one objective; to add one, add it here, and the command line has it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from apportion import choices
from apportion.objectives.end_to_end import PRESETS, EndToEnd, EndToEndConfig
from apportion.objectives.mutual import MutualConfig, MutualFeatureRegularisation
from apportion.training.objective import LocalReconstruction, Objective


@dataclass(frozen=True)
class NamedObjective:
    objective: type[Objective]
    config: Any = None
    """Its settings, if it has any; their values are the defaults."""


OBJECTIVES: dict[str, NamedObjective] = {
    "local": NamedObjective(LocalReconstruction),
    "e2e": NamedObjective(EndToEnd, PRESETS["e2e"]),
    "e2e_ds": NamedObjective(EndToEnd, PRESETS["e2e_ds"]),
    "mutual": NamedObjective(MutualFeatureRegularisation, MutualConfig()),
}


def named_objective(name: str) -> NamedObjective:
    """The objective of that name in the table; ValueError with the known ones if there is none."""
    return OBJECTIVES[choices.objective(name, OBJECTIVES)]


__all__ = ["OBJECTIVES", "EndToEnd", "EndToEndConfig", "MutualConfig", "MutualFeatureRegularisation", "named_objective"]

"""Training: the loop, dead latents, run folders. What is minimised: objective.py, and the room `objectives`."""

from importlib import import_module
from typing import Any

from apportion.training.config import TrainConfig as TrainConfig
from apportion.training.objective import Objective as Objective
from apportion.training.objective import TrainingContext as TrainingContext
from apportion.training.objective import local_reconstruction as local_reconstruction
from apportion.training.trainer import Trainer as Trainer


def __getattr__(name: str) -> Any:
    """Objectives were here once."""
    if name in ("EndToEnd", "EndToEndConfig", "MutualConfig", "MutualFeatureRegularisation"):
        return getattr(import_module("apportion.objectives"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

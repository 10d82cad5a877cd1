"""Training: the loop, what is minimised, dead latents, run folders."""

from apportion.training.config import TrainConfig
from apportion.training.objectives import Objective, local_reconstruction
from apportion.training.trainer import Trainer

__all__ = ["Objective", "TrainConfig", "Trainer", "local_reconstruction"]

"""Training: the loop, what is minimised, dead latents, run folders."""

from apportion.training.config import TrainConfig
from apportion.training.end_to_end import EndToEnd, EndToEndConfig
from apportion.training.mutual import MutualConfig, MutualFeatureRegularisation
from apportion.training.objectives import Objective, local_reconstruction
from apportion.training.trainer import Trainer

__all__ = [
    "EndToEnd",
    "EndToEndConfig",
    "MutualConfig",
    "MutualFeatureRegularisation",
    "Objective",
    "TrainConfig",
    "Trainer",
    "local_reconstruction",
]

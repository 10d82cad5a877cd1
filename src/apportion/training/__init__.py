"""Training: the loop, dead latents, run folders. What is minimised: objective.py, and the room `objectives`."""

from apportion.training.config import TrainConfig as TrainConfig
from apportion.training.objective import Objective as Objective
from apportion.training.objective import TrainingContext as TrainingContext
from apportion.training.objective import local_reconstruction as local_reconstruction
from apportion.training.trainer import Trainer as Trainer

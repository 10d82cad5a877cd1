"""Rules of allocation: which token-latent matches become non-zero. One file, one rule; to add one, add it here."""

from apportion.allocation.base import Candidates, Pool, Rule, Screen, Selection, Settled, StepContext
from apportion.allocation.feature_choice import FeatureChoice
from apportion.allocation.learned_threshold import LearnedThreshold
from apportion.allocation.mutual_choice import MutualChoice
from apportion.allocation.threshold import Threshold, ThresholdInEval
from apportion.allocation.token_choice import TokenChoice

RULES: dict[str, type[Rule]] = {
    "topk": TokenChoice,
    "mutual_choice": MutualChoice,
    "feature_choice": FeatureChoice,
    "threshold": Threshold,
    "learned_threshold": LearnedThreshold,
}

__all__ = [
    "RULES",
    "Candidates",
    "FeatureChoice",
    "LearnedThreshold",
    "MutualChoice",
    "Pool",
    "Rule",
    "Screen",
    "Selection",
    "Settled",
    "StepContext",
    "Threshold",
    "ThresholdInEval",
    "TokenChoice",
]

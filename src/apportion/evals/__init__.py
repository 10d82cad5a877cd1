"""Evaluation in eval mode: reconstruction, sparsity, and what the language model loses."""

from apportion.evals import geometry as geometry
from apportion.evals.evaluate import evaluate
from apportion.evals.evaluator import EVALS, Evaluator, Found, Subject, add_evaluator
from apportion.evals.figures import FIGURES, Figure
from apportion.evals.language_model import evaluate_model
from apportion.evals.layers import evaluate_layers
from apportion.evals.measure import Measure, Measurement, add_measure
from apportion.evals.measures import Reconstruction, Sparsity
from apportion.evals.model_diff import model_diff
from apportion.evals.recovery import recovery
from apportion.evals.rows import evaluate_rows, held_out_rows

__all__ = [
    "EVALS",
    "FIGURES",
    "Evaluator",
    "Figure",
    "Found",
    "Subject",
    "add_evaluator",
    "evaluate",
    "Measure",
    "Measurement",
    "Reconstruction",
    "Sparsity",
    "add_measure",
    "evaluate_layers",
    "evaluate_model",
    "evaluate_rows",
    "held_out_rows",
    "model_diff",
    "recovery",
]

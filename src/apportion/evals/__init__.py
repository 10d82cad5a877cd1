"""Evaluation in eval mode: reconstruction, sparsity, and what the language model loses."""

from apportion.evals.language_model import evaluate_model
from apportion.evals.measure import Measurement
from apportion.evals.rows import evaluate_rows, held_out_rows

__all__ = ["Measurement", "evaluate_model", "evaluate_rows", "held_out_rows"]

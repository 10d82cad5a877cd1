"""Evaluate one SAE on rows: everything that is measured of every SAE, and what evaluators find besides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from apportion.architectures import SAE
from apportion.evals.evaluator import Subject, evaluators, with_found
from apportion.evals.rows import as_store, chosen_rows, evaluate_rows
from apportion.rows.batch import RowStore


def evaluate(
    sae: SAE,
    on: RowStore | Float[Tensor, " n *row"] | Any,
    rows: Int[Tensor, " n"] | Any = None,
    *,
    evals: str | Sequence[str] = (),
    model: Any = None,
    progress: bool = False,
) -> dict[str, Any]:
    """The figures of an SAE in eval mode, on `rows` (all by default) of an array or a store; JSON-able.

    `evals` names evaluators (`EVALS`, or of installed packages) whose figures are added; some need the language
    `model` that the rows come from. ValueError for one that lacks what it needs, before anything is run.
    """
    store = as_store(on)
    rows = None if rows is None else chosen_rows(rows, store)
    subject = Subject(sae, store, rows, model, progress)
    chosen = evaluators([evals] if isinstance(evals, str) else evals, subject)
    found = evaluate_rows({"sae": sae}, subject.store, rows, progress=progress)["sae"].result()
    return with_found(found, chosen, subject)

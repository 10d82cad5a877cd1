"""Evaluation on rows of an activation cache, without running the language model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Int
from torch import Tensor

from apportion.activations.order import held_out_groups, split_held_out
from apportion.activations.progress import progress_bar
from apportion.activations.sites import Rows
from apportion.architectures import SAE
from apportion.evals.measure import Measurement

CHUNK = 4096


def held_out_rows(store: Rows, held_out_share: float) -> Int[Tensor, " n"]:
    """Rows of contexts that a `CacheSource` with this share neither trains nor calibrates on, filtered or not."""
    groups = held_out_groups(int(store.contexts.max()) + 1, held_out_share)
    rows = split_held_out(groups)[1][store.contexts].nonzero().squeeze(1)
    if not len(rows):
        raise ValueError(
            f"With held_out_share = {held_out_share} the cache {store.folder} keeps no context for evaluation. "
            "Evaluate on another cache or on text."
        )
    return rows


def evaluate_rows(
    saes: Mapping[str, SAE],
    store: Rows,
    rows: Int[Tensor, " n"] | None = None,
    *,
    max_tokens: int | None = None,
    progress: bool = True,
) -> dict[str, Measurement]:
    """Measure SAEs on `rows` of a cache (all of them by default, at most `max_tokens`), in order.

    Transcoders are measured on a `PairStore`, crosscoders on a `SitesStore` (activations/sites.py).
    """
    rows = torch.arange(store.rows) if rows is None else rows
    rows = rows[:max_tokens]
    measurements = {name: Measurement(sae) for name, sae in saes.items()}
    with progress_bar("evaluating", len(rows), show=progress) as show:
        done = 0
        for indices in rows.split(CHUNK):
            batch, mask = store.batch(indices), store.mask[indices]
            for measurement in measurements.values():
                measurement.add(batch.x, mask, target=batch.target)
            done += len(indices)
            show(done)
    return measurements

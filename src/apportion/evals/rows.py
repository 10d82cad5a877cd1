"""Evaluation on rows of an activation cache, without running the language model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from apportion.architectures import SAE
from apportion.architectures.inputs import is_array
from apportion.evals.measure import Measurement
from apportion.progress import progress_bar
from apportion.rows.arrays import ArrayStore
from apportion.rows.order import held_out_groups, split_held_out
from apportion.rows.sites import Rows
from apportion.torch_state import usual

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


def unseen_rows(store: Rows, sae: SAE, where: str) -> tuple[Int[Tensor, " n"], str]:
    """Rows of a cache that an SAE was neither trained nor calibrated on, whole contexts in order; and what they are.

    ValueError if what it has seen of the cache is not known: it was trained on the same text, cut in another way.
    """
    source, found = sae.info.get("source", {}), store.describe()
    text = source.get("text") or {}
    if "tokens_sha256" in source:
        same = source["tokens_sha256"] == found["tokens_sha256"]
    else:  # of an older run
        same = all(source.get(name, store) == found.get(name) for name in ("text", "rows", "contexts"))
    if same and "held_out_share" in source:
        rows = held_out_rows(store, source["held_out_share"])
        return rows, f"held-out rows of its training cache {where}"
    if same or same_text(text, found.get("text") or {}):
        raise ValueError(
            f"{where} holds activations of the text that the SAE was trained on ({text.get('where')}), but not those "
            "of its training cache, so what it has seen of them is not known. Evaluate on text it was not trained on."
        )
    return torch.arange(store.rows), f"rows of {where}"


def same_text(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    """Do two descriptions of texts mean the same one? Files are known by name and size, in whatever folder."""
    if ours.get("bytes") and theirs.get("bytes"):
        same_size = all(ours.get(name) == theirs.get(name) for name in ("files", "bytes"))
        return same_size and Path(ours["where"]).name == Path(theirs["where"]).name
    named = {name: ours.get(name) for name in ("where", "split", "config", "field")}
    return bool(named["where"]) and all(theirs.get(name) == value for name, value in named.items())


def halves(store: Rows, rows: Int[Tensor, " n"]) -> tuple[Int[Tensor, " k"], Int[Tensor, " m"]]:
    """Every other context of `rows` each: to calibrate on, and to evaluate on. ValueError for a single context."""
    contexts = store.contexts[rows]
    number = (contexts.diff(prepend=contexts[:1]) != 0).cumsum(0)
    first, second = rows[number % 2 == 0], rows[number % 2 == 1]
    if not len(second):
        raise ValueError("One context cannot be split into two halves: give more tokens to evaluate on.")
    return first, second


def recalibrate(sae: SAE, store: Rows, rows: Int[Tensor, " n"]) -> float:
    """Set the thresholds of an SAE anew, on the rows of a cache that pass its filter; returns the L0 there."""
    kept = rows[store.mask[rows]]
    return sae.calibrate(Anew(lambda: map(store.batch, kept.split(CHUNK))))


class Anew:
    """What can be read again: rows in the order of a text are far from random order."""

    def __init__(self, read: Callable[[], Iterator[Any]]) -> None:
        self.read = read

    def __iter__(self) -> Iterator[Any]:
        return self.read()


@usual()
def evaluate_rows(
    saes: Mapping[str, SAE],
    store: Rows | ArrayStore | Float[Tensor, " n *row"],
    rows: Int[Tensor, " n"] | None = None,
    *,
    max_tokens: int | None = None,
    progress: bool = True,
) -> dict[str, Measurement]:
    """Measure SAEs on `rows` of a cache or an array (all of them by default, at most `max_tokens`), in order.

    Transcoders are measured on a `PairStore`, crosscoders on a `SitesStore` (rows/sites.py).
    """
    store = ArrayStore(store) if is_array(store) else cast(Rows, store)
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

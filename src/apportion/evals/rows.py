"""Evaluation on rows of an activation cache, without running the language model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from apportion.about import TextRecord
from apportion.architectures import SAE
from apportion.architectures.inputs import is_array
from apportion.evals.measure import Measurement
from apportion.progress import progress_bar
from apportion.rows.arrays import ArrayStore
from apportion.rows.batch import RowStore, chunks
from apportion.rows.order import held_out_groups, split_held_out
from apportion.torch_state import usual


def held_out_rows(store: RowStore, held_out_share: float) -> Int[Tensor, " n"]:
    """Rows of contexts that a `CacheSource` with this share neither trains nor calibrates on, filtered or not."""
    groups = held_out_groups(int(store.groups.max()) + 1, held_out_share)
    rows = split_held_out(groups)[1][store.groups].nonzero().squeeze(1)
    if not len(rows):
        raise ValueError(
            f"With held_out_share = {held_out_share} the cache {store.folder} keeps no context for evaluation. "
            "Evaluate on another cache or on text."
        )
    return rows


def unseen_rows(store: RowStore, sae: SAE, where: str) -> tuple[Int[Tensor, " n"], str]:
    """Rows of a store that an SAE was neither trained nor calibrated on, whole contexts in order; and what they are.

    ValueError if what it has seen of the cache is not known: it was trained on the same text, cut in another way.
    """
    source, found = sae.source, store.describe()
    ours, theirs = source.lm, found.lm
    if ours.tokens_sha256 is not None:
        same = ours.tokens_sha256 == theirs.tokens_sha256
    elif source.language is None:
        same = source.content_sha256 is not None and source.content_sha256 == found.content_sha256
    else:  # of an older run
        size, of_store = (source.rows, ours.contexts), (found.rows, theirs.contexts)
        same = size == of_store and ours.contexts is not None and ours.text == theirs.text
    if same and source.held_out_share is not None:
        rows = held_out_rows(store, source.held_out_share)
        return rows, f"held-out rows of its training {'cache' if source.language else 'rows'} {where}"
    if same or same_text(ours.text, theirs.text):
        raise ValueError(
            f"{where} holds activations of the text that the SAE was trained on ({ours.text.where}), but not those "
            "of its training cache, so what it has seen of them is not known. Evaluate on text it was not trained on."
        )
    return torch.arange(store.rows), f"rows of {where}"


def same_text(ours: TextRecord, theirs: TextRecord) -> bool:
    """Do two descriptions of texts mean the same one, or mixtures with one in common? Files are known by name and size,
    in whatever folder."""
    if ours.parts or theirs.parts:
        return any(same_text(one, other) for one in ours.parts or [ours] for other in theirs.parts or [theirs])
    if ours.bytes and theirs.bytes:
        same_size = (ours.files, ours.bytes) == (theirs.files, theirs.bytes)
        return same_size and Path(ours.where or "").name == Path(theirs.where or "").name
    one, other = ((text.where, text.split, text.config, text.field) for text in (ours, theirs))
    return bool(ours.where) and one == other


def halves(store: RowStore, rows: Int[Tensor, " n"]) -> tuple[Int[Tensor, " k"], Int[Tensor, " m"]]:
    """Every other context of `rows` each: to calibrate on, and to evaluate on. ValueError for a single context."""
    groups = store.groups[rows]
    number = (groups.diff(prepend=groups[:1]) != 0).cumsum(0)
    first, second = rows[number % 2 == 0], rows[number % 2 == 1]
    if not len(second):
        raise ValueError("One context cannot be split into two halves: give more tokens to evaluate on.")
    return first, second


def recalibrate(sae: SAE, store: RowStore, rows: Int[Tensor, " n"]) -> float:
    """Set the thresholds of an SAE anew, on the rows of a cache that pass its filter; returns the L0 there."""
    return sae.calibrate(Anew(lambda: chunks(store, rows)))


class Anew:
    """What can be read again: rows in the order of a text are far from random order."""

    def __init__(self, read: Callable[[], Iterator[Any]]) -> None:
        self.read = read

    def __iter__(self) -> Iterator[Any]:
        return self.read()


def as_store(on: RowStore | Float[Tensor, " n *row"] | Any) -> RowStore:
    """What to evaluate on: a store as it is, an array as one; ValueError for anything else."""
    if isinstance(on, RowStore):
        return on
    if not is_array(on):
        raise ValueError(
            "Rows to evaluate on are an array, or a store such as ActivationStore(folder) or ArrayStore(x); got "
            f"{type(on).__name__}."
        )
    return ArrayStore(on)


def chosen_rows(rows: Any, store: RowStore) -> Int[Tensor, " n"]:
    """Which rows: all for None, those that a mask marks, or those at these places."""
    if rows is None:
        return torch.arange(store.rows)
    rows = torch.as_tensor(rows)
    return rows.nonzero().squeeze(1) if rows.dtype == torch.bool else rows.long()


@usual()
def evaluate_rows(
    saes: Mapping[str, SAE],
    store: RowStore | Float[Tensor, " n *row"],
    rows: Int[Tensor, " n"] | Any = None,
    *,
    max_tokens: int | None = None,
    progress: bool = True,
) -> dict[str, Measurement]:
    """Measure SAEs on `rows` of a cache or an array (all of them by default, at most `max_tokens`), in order.

    Transcoders are measured on a `PairStore`, crosscoders on a `SitesStore` (rows/sites.py).
    """
    store = as_store(store)
    rows = chosen_rows(rows, store)[:max_tokens]
    measurements = {name: Measurement(sae) for name, sae in saes.items()}
    with progress_bar("evaluating", len(rows), show=progress) as show:
        done = 0
        for batch in chunks(store, rows):
            assert batch.mask is not None
            for measurement in measurements.values():
                measurement.add(batch.x, batch.mask, target=batch.target)
            done += len(batch.x)
            show(done)
    return measurements

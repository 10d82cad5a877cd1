"""What `fit` is given, as a source of batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from apportion.architectures.inputs import is_array
from apportion.rows.batch import ArraySource, Batch, Source, joined
from apportion.rows.stream import StreamSource, check_alike, rows_in

CALIBRATION_ROWS = 1_000_000
"""Held-out rows on which thresholds are calibrated, at most."""


def source_of(given: Any, seed: int, row_dims: int = 1, pairs: bool = False) -> Source:
    """Whatever a user calls activations, as a source; ValueError for what is none. Arguments as of `StreamSource`."""
    if isinstance(given, Source):
        return given
    if isinstance(given, Batch) or is_array(given):
        given = [given]
    if isinstance(given, list | tuple) and given:
        parts = [rows_in(part, row_dims, pairs) for part in given]
        for part in parts:
            check_alike(part, parts[0])
        rows = joined(parts) if len(parts) > 1 else parts[0]
        return ArraySource(rows.x, seed=seed, target=rows.target)
    if isinstance(given, Iterable) and not isinstance(given, str | Mapping):
        return StreamSource(given, row_dims=row_dims, pairs=pairs)
    raise ValueError(
        "fit takes a tensor or array of rows, an iterable of them (of a Dataset its DataLoader), or a source of "
        f"activations (of a folder CacheSource(ActivationStore(folder))), got {type(given).__name__}."
    )


def check_enough(source: Source, batch_tokens: int) -> None:
    """ValueError for a source whose rows fill no batch."""
    if source.num_rows is not None and source.num_rows < batch_tokens:
        raise ValueError(
            f"The source has {source.num_rows} training rows, fewer than batch_tokens = {batch_tokens}. Collect more "
            "tokens or lower batch_tokens."
        )


class HeldOut:
    """The rows that a source keeps back, as often as they are asked for."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __iter__(self) -> Iterator[Batch]:
        return self.source.held_out(CALIBRATION_ROWS)

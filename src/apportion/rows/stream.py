"""Training rows from whatever yields them: a DataLoader, a generator, any iterable of arrays, tuples or Batches.

Rows are taken in the order in which they come, and every tenth is held out (`held_out_share`), up to a million of them,
to calibrate on. An iterable that can be read again (a DataLoader, a list) begins anew when it ends, and the same places
are held out again; where it shuffles, later epochs train on rows that the first has held out. A generator gives its
rows only once: a run on it needs enough of them, and cannot be resumed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from apportion.about import About
from apportion.architectures.inputs import as_tensor, first_tensor
from apportion.rows.batch import Batch, joined, regrouped
from apportion.rows.order import held_out_groups
from apportion.rows.sane import SaneRows

MOST_HELD_OUT = 1_000_000
SAMPLE_ROWS = 32_768


def rows_in(item: Any, row_dims: int = 1, pairs: bool = False) -> Batch:
    """The rows of what an iterable yields, [n, *row], without their graph; of `pairs` the second is the target."""
    if isinstance(item, Batch):
        x, target = item.rows().x, item.rows().target
    else:
        x, target = first_tensor(item), _second(item) if pairs else None
    if x.ndim < row_dims:
        raise ValueError(f"activations have shape {list(x.shape)}: give rows [n, d_in].")
    x = x.detach().reshape(-1, *x.shape[x.ndim - row_dims :])
    return Batch(x, None if target is None else target.detach().reshape(len(x), -1))


def _second(item: Any) -> Tensor | None:
    if isinstance(item, Mapping):
        return as_tensor(item["target"]) if "target" in item else None
    return as_tensor(item[1]) if isinstance(item, list | tuple) and len(item) > 1 else None


def check_alike(rows: Batch, first: Batch) -> None:
    """ValueError for rows of another shape than the first."""
    for one, other in ((rows.x, first.x), (rows.target, first.target)):
        ours, theirs = (None if t is None else list(t.shape[1:]) for t in (one, other))
        if ours != theirs:
            raise ValueError(f"rows differ: the first are {theirs} and later ones {ours} (targets too count).")


class StreamSource:
    """Rows of an iterable, in its order."""

    num_rows = None
    """How many there are shows only at the end."""

    def __init__(
        self, items: Iterable[Any], held_out_share: float = 0.1, row_dims: int = 1, pairs: bool = False
    ) -> None:
        """`row_dims` is 2 for rows [num_sites, d_in]; `pairs`: what it yields has a target besides."""
        self.items, self.held_out_share, self.row_dims, self.pairs = items, held_out_share, row_dims, pairs
        self.again = iter(items) is not items
        self._rows_out, self._skip, self._trained = 0, 0, 0
        self._kept_back: list[Batch] = []
        self._num_kept_back = 0
        self._pass = self._parts()
        self._first = list(self._peek(SAMPLE_ROWS))
        if not self._first:
            raise ValueError("There are no rows to train on: the source of activations is empty.")
        self.d_in = self._first[0].x.shape[-1]
        self._sane = SaneRows(self.sample(SAMPLE_ROWS), "The first rows")

    def _parts(self) -> Iterator[Batch]:
        """All rows of one pass over the iterable."""
        first: Batch | None = None
        for item in self.items:
            rows = rows_in(item, self.row_dims, self.pairs)
            first = rows if first is None else first
            check_alike(rows, first)
            yield Batch(rows.x.float(), None if rows.target is None else rows.target.float())

    def _peek(self, rows: int) -> Iterator[Batch]:
        while rows > 0 and (part := next(self._pass, None)) is not None:
            rows -= len(part)
            yield part

    def _training(self) -> Iterator[Batch]:
        """Parts without the rows that are held out; pass after pass, if there can be several."""
        parts: Iterator[Batch] = chain(self._first, self._pass)
        first_pass = True
        while True:
            seen = 0
            for part in parts:
                place = seen + torch.arange(len(part) + 1, dtype=torch.float64)
                out = ((place * self.held_out_share + 1e-9).floor().diff() > 0).to(part.x.device)
                if first_pass and self._num_kept_back < MOST_HELD_OUT:
                    kept = part[out]
                    self._sane.check(replace(kept, index=seen + out.nonzero().squeeze(1)), "The held-out rows")
                    self._kept_back.append(kept)
                    self._num_kept_back += len(kept)
                seen += len(part)
                self._trained += len(part) - int(out.sum())
                yield part[~out]
            if not self.again:
                return
            if not seen:
                raise ValueError("The source of activations had rows once, and has none now: it can be read only once.")
            parts, first_pass = self._parts(), False

    def batches(self, batch_tokens: int) -> Iterator[Batch]:
        skip, self._skip = self._skip, 0
        for rows, _, _ in regrouped(self._training(), batch_tokens, skip):
            self._rows_out += batch_tokens
            yield rows
        raise ValueError(
            f"The rows ended after {self._trained:,} to train on: give more, lower total_tokens, or give "
            "something that can be read again (a list, a DataLoader) in place of a generator."
        )

    def sample(self, n: int) -> Batch:
        return joined(self._first)[:n]

    def held_out(self, max_rows: int, chunk: int = 4096) -> Iterator[Batch]:
        """What was held out of the rows that have come so far."""
        rows = joined(self._kept_back or [self._first[0][:0]])
        if not len(rows):
            first = joined(self._first)
            rows = first[held_out_groups(len(first), self.held_out_share).to(first.x.device)]
        for start in range(0, min(max_rows, len(rows)), chunk):
            yield rows[start : min(start + chunk, max_rows)]

    def state_dict(self) -> dict[str, Any]:
        return {"rows_out": self._rows_out}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if not self.again:
            raise ValueError("A run on a generator cannot be resumed: its rows come only once.")
        self._rows_out = self._skip = state["rows_out"]

    def describe(self) -> About:
        return About(kind="stream", d_in=self.d_in, held_out_share=self.held_out_share)

"""Training rows from whatever yields them: a DataLoader, a generator, any iterable of arrays, tuples or Batches.

Rows are taken in the order in which they come, and every tenth is held out (`held_out_share`), up to a million of them,
to calibrate on. An iterable that can be read again (a DataLoader, a list) begins anew when it ends. A generator gives
its rows only once: a run on it needs enough of them, and cannot be resumed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from apportion.activations.batch import Batch
from apportion.activations.order import held_out_groups
from apportion.architectures.inputs import first_tensor

MOST_HELD_OUT = 1_000_000
SAMPLE_ROWS = 32_768


class StreamSource:
    """Rows of an iterable, in its order."""

    def __init__(self, items: Iterable[Any], held_out_share: float = 0.1, row_dims: int = 1) -> None:
        """`row_dims` is 2 for rows [num_sites, d_in]."""
        self.items, self.held_out_share, self.row_dims = items, held_out_share, row_dims
        self.again = iter(items) is not items
        self._rows_out, self._skip = 0, 0
        self._kept_back: list[Tensor] = []
        self._num_kept_back, self._seen = 0, 0
        self._pass = self._parts()
        self._first = list(self._peek(SAMPLE_ROWS))
        if not self._first:
            raise ValueError("There are no rows to train on: the source of activations is empty.")

    @property
    def d_in(self) -> int:
        return self._first[0].shape[-1]

    @property
    def num_rows(self) -> None:
        """How many there are shows only at the end."""

    def _parts(self) -> Iterator[Float[Tensor, " n *row"]]:
        """All rows of one pass over the iterable."""
        for item in self.items:
            rows = item.rows().x if isinstance(item, Batch) else first_tensor(item)
            rows = rows[None] if rows.ndim == self.row_dims else rows
            yield rows.flatten(0, rows.ndim - self.row_dims - 1).float()

    def _peek(self, rows: int) -> Iterator[Tensor]:
        while rows > 0 and (part := next(self._pass, None)) is not None:
            rows -= len(part)
            yield part

    def _training(self) -> Iterator[Tensor]:
        """Parts without the rows that are held out; pass after pass, if there can be several."""
        parts: Iterator[Tensor] = chain(self._first, self._pass)
        kept = 0
        while True:
            for part in parts:
                place = self._seen + torch.arange(len(part) + 1, dtype=torch.float64)
                out = (place * self.held_out_share + 1e-9).floor().diff() > 0
                self._seen += len(part)
                if self._num_kept_back < MOST_HELD_OUT:
                    self._kept_back.append(part[out.to(part.device)])
                    self._num_kept_back += int(out.sum())
                kept += len(part)
                yield part[~out.to(part.device)]
            if not self.again:
                return
            if not kept:
                raise ValueError("The source of activations had rows once, and has none now: it can be read only once.")
            parts, kept = self._parts(), 0

    def batches(self, batch_tokens: int) -> Iterator[Batch]:
        waiting: list[Tensor] = []
        size = 0
        for part in self._training():
            skipped = min(self._skip, len(part))
            self._skip -= skipped
            waiting.append(part[skipped:])
            size += len(waiting[-1])
            while size >= batch_tokens:
                rows = torch.cat(waiting)
                waiting, size = [rows[batch_tokens:]], size - batch_tokens
                self._rows_out += batch_tokens
                yield Batch(rows[:batch_tokens])
        raise ValueError(
            f"The rows ended after {self._rows_out + size:,} to train on: give more, lower total_tokens, or give "
            "something that can be read again (a list, a DataLoader) in place of a generator."
        )

    def sample(self, n: int) -> Batch:
        return Batch(torch.cat(self._first)[:n])

    def held_out(self, max_rows: int, chunk: int = 4096) -> Iterator[Batch]:
        """What was held out of the rows that have come so far."""
        rows = torch.cat(self._kept_back) if self._kept_back else self._first[0][:0]
        if not len(rows):
            rows = torch.cat(self._first)[held_out_groups(sum(map(len, self._first)), self.held_out_share)]
        yield from map(Batch, rows[:max_rows].split(chunk))

    def state_dict(self) -> dict[str, Any]:
        return {"rows_out": self._rows_out}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if not self.again:
            raise ValueError("A run on a generator cannot be resumed: its rows come only once.")
        self._rows_out = self._skip = state["rows_out"]

    def describe(self) -> dict[str, Any]:
        return {"source": "stream", "d_in": self.d_in, "held_out_share": self.held_out_share}

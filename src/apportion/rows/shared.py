"""One stream of batches for several consumers that take them in step.

    shared = Shared(source)
    views = [shared.view() for _ in trainers]      each is a Source with a position of its own

Whoever comes first to a position has the batch read; the others get the same one. Each sees exactly what it would see
alone with the source, whatever the others do: one that falls behind, or goes on from elsewhere, has the source put back
for it, which costs time and changes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from apportion.about import About
from apportion.rows.batch import Batch, Source, as_stored

KEPT = 2
"""Batches that are kept for those who have not taken them yet."""


class Shared:
    def __init__(self, source: Source) -> None:
        self.source = source
        self._batches: Iterator[Batch] | None = None
        self._next = ""
        """The position of the batch that `_batches` yields next."""
        self._held: dict[str, tuple[Batch, dict[str, Any]]] = {}
        self._samples: dict[int, Batch] = {}

    def view(self) -> View:
        return View(self)

    def batch_at(self, state: dict[str, Any], batch_tokens: int) -> tuple[Batch, dict[str, Any]] | None:
        """The batch at a position of the source, and the position behind it; None at the end of one that ends."""
        at = _key(state, batch_tokens)
        self._samples.clear()  # everybody who begins has had them
        if at not in self._held:
            if self._batches is None or at != self._next:
                if self._batches is not None or self.source.state_dict() != state:
                    self.put(state)
                self._batches = as_stored(self.source)(batch_tokens)
            if (batch := next(self._batches, None)) is None:
                return None
            behind = self.source.state_dict()
            self._next = _key(behind, batch_tokens)
            self._held = dict([*self._held.items(), (at, (batch, behind))][-KEPT:])
        return self._held[at]

    def put(self, state: dict[str, Any]) -> None:
        """Put the source to a position; ValueError if it is that of another source."""
        self.source.load_state_dict(state)
        self._batches = None

    def sample(self, n: int) -> Batch:
        if n not in self._samples:
            self._samples[n] = self.source.sample(n)
        return self._samples[n]


class View:
    """A `Source` with a position of its own; what a source has besides, it has too."""

    def __init__(self, shared: Shared) -> None:
        self.shared, self._state = shared, shared.source.state_dict()

    def __getattr__(self, name: str) -> Any:
        if name == "shared":  # before it is there
            raise AttributeError(name)
        return getattr(self.shared.source, name)

    @property
    def d_in(self) -> int:
        return self.shared.source.d_in

    @property
    def num_rows(self) -> int | None:
        return self.shared.source.num_rows

    def batches(self, batch_tokens: int) -> Iterator[Batch]:
        while (found := self.shared.batch_at(self._state, batch_tokens)) is not None:
            batch, self._state = found
            yield batch

    def stored_batches(self, batch_tokens: int) -> Iterator[Batch]:
        return self.batches(batch_tokens)

    def sample(self, n: int) -> Batch:
        return self.shared.sample(n)

    def held_out(self, max_rows: int, chunk: int = 4096) -> Iterator[Batch]:
        return self.shared.source.held_out(max_rows, chunk)

    def state_dict(self) -> dict[str, Any]:
        return dict(self._state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.shared.put(state)
        self._state = self.shared.source.state_dict()

    def describe(self) -> About:
        return self.shared.source.describe()


def _key(state: dict[str, Any], batch_tokens: int) -> str:
    return json.dumps([state, batch_tokens], sort_keys=True)

"""Training rows from a cache on disk or another store, globally shuffled.

Whole contexts (or other groups) are held out, evenly spread over the text (every tenth by default), so held-out rows
share no context with training rows. Half of them serve to calibrate, the other half is left for evaluation
(`evals.rows`).

Threads read some batches ahead; the position counts batches handed out, not batches read, so resuming is exact whatever
they were doing. A store that memory cannot hold is read in windows of whole parts (windows.py).
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any, Literal

from jaxtyping import Int
from torch import Tensor

from apportion.about import About
from apportion.rows.batch import Batch, IndexedSource, RowStore, in_float
from apportion.rows.order import EpochOrder, Position, held_out_groups, split_held_out
from apportion.rows.permuting import RowSet
from apportion.rows.store import ActivationStore
from apportion.rows.windows import InParts, WindowOrder, Windows, choose_window, read_of

AHEAD = 2
"""Batches that are read ahead, a thread each."""

logger = logging.getLogger(__name__)


class CacheSource(IndexedSource):
    """The rows of a store that take part (of a cache, of an array): each epoch permutes all of them."""

    def __init__(
        self,
        store: RowStore,
        held_out_share: float = 0.1,
        seed: int = 0,
        window: int | Literal["auto"] | None = "auto",
    ) -> None:
        """`window`: how many parts of the store are held and mixed at a time, None for all rows in exact order, "auto"
        for what suits this machine's memory and disk (`choose_window`). A run that goes on keeps the one it had."""
        self.store, self.held_out_share, self.seed = store, held_out_share, seed
        self.d_in, self.hookpoint = store.d_in, store.hookpoint
        if not store.rows:
            raise ValueError(f"{store.folder} has no rows to train on.")
        held_out = held_out_groups(1 + max(int(groups.max()) for _, groups in parts_of(store)), held_out_share)
        first = split_held_out(held_out)[0]
        self._held_out = RowSet(mask & first[groups] for mask, groups in parts_of(store))
        self._train = RowSet(mask & ~held_out[groups] for mask, groups in parts_of(store))
        self._contexts_left = len(held_out) - int(held_out.sum())
        self._order = self._in_windows(choose_window(store) if window == "auto" else window)

    def __reduce__(self) -> tuple[Any, ...]:
        """The store, which is sent as a path, and the position."""
        return type(self), (self.store, self.held_out_share, self.seed, self.window), self.state_dict()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.load_state_dict(state)

    @property
    def is_fetched(self) -> bool:
        """Whether rows come from a URL, part by part."""
        return isinstance(self.store, InParts) and self.store.most_parts is not None

    @property
    def window(self) -> int | None:
        """Parts that are held and mixed at a time; None: all rows are."""
        return self._order.window if isinstance(self._order, WindowOrder) else None

    def _in_windows(self, window: int | None) -> EpochOrder:
        if window is None:
            return EpochOrder(self._train, self.seed)
        if not isinstance(self.store, InParts) or window < 1:
            raise ValueError(
                f"window={window} is a number of parts of a cache to hold, from 1 on, and "
                f"{self.store.folder} {'has' if isinstance(self.store, InParts) else 'is no cache and has no'} parts."
            )
        return WindowOrder(self._train, self.seed, self.store.part_rows, window)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state.get("window") != self.window:
            self._order = self._in_windows(state.get("window"))
        super().load_state_dict(state)

    def sample(self, n: int) -> Batch:
        return self._read(self._order.sample(n))

    def held_out(self, max_rows: int, chunk: int = 4096) -> Iterator[Batch]:
        if not isinstance(order := self._order, WindowOrder):
            yield from super().held_out(max_rows, chunk)
            return
        assert isinstance(self._held_out, RowSet)
        chosen = order.first_held_out(self._held_out, max_rows)
        with ExitStack() as until_then:
            each = chosen.split(chunk) if len(chosen) else ()
            reading = ((partial(self._read, rows), order.position) for rows in each)
            yield from (batch for batch, _ in _read_ahead(reading, until_then))

    def batches(self, batch_tokens: int) -> Iterator[Batch]:
        for batch in self.stored_batches(batch_tokens):
            yield in_float(batch)

    def stored_batches(self, batch_tokens: int) -> Iterator[Batch]:
        """`batches` in the precision in which the rows lie there."""
        with ExitStack() as until_then:
            reading = self._reading(batch_tokens, until_then)
            for batch, position in _read_ahead(reading, until_then):
                self._order.position = position
                yield batch

    def _reading(self, batch_tokens: int, until_then: ExitStack) -> Iterator[tuple[Callable[[], Batch], Position]]:
        """How to read the next batches, and the position behind each."""
        stored = {"stored": True} if isinstance(self.store, ActivationStore) else {}
        if not isinstance(order := self._order, WindowOrder):
            return (
                (partial(read_of, self.store, rows, **stored), position)
                for rows, position in order.upcoming(batch_tokens)
            )
        here, exact = order.others_of_its_context(batch_tokens, order.num_rows / max(1, self._contexts_left))
        what = "windows of %d parts: a row meets %.2g others of its context in its batch, %.2g in exact order"
        logger.info(what, order.window, here, exact)
        assert isinstance(self.store, InParts)
        until_then.callback((windows := Windows(self.store, stored)).close)
        return windows.reading(order, batch_tokens)

    def _read(self, indices: Int[Tensor, " n"]) -> Batch:
        return read_of(self.store, indices)

    def describe(self) -> About:
        split = {"held_out_share": self.held_out_share, "seed": self.seed}
        counts = {"rows_train": self.num_rows, "rows_calibrate": len(self._held_out)}
        return replace(self.store.describe(), **split, **counts)


def parts_of(store: RowStore) -> Iterator[tuple[Tensor, Tensor]]:
    """Which rows take part and their groups, part by part where the store can say so (`parts`): never of all rows."""
    parts = getattr(store, "parts", None)
    return iter([(store.mask, store.groups)]) if parts is None else parts()


def _read_ahead(
    reading: Iterator[tuple[Callable[[], Batch], Position]], until_then: ExitStack
) -> Iterator[tuple[Batch, Position]]:
    """Read `AHEAD` batches ahead, in threads that end then."""
    waiting: deque[tuple[Future[Batch], Position]] = deque()
    pool = ThreadPoolExecutor(max_workers=AHEAD, thread_name_prefix="apportion-read-ahead")
    until_then.callback(pool.shutdown)
    until_then.callback(lambda: [future.cancel() for future, _ in waiting])
    while True:
        for read, position in islice(reading, AHEAD - len(waiting)):
            waiting.append((pool.submit(read), position))
        if not waiting:
            return
        batch, position = waiting.popleft()
        yield batch.result(), position

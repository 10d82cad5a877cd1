"""Training rows from a cache on disk or another store, globally shuffled.

Whole contexts (or other groups) are held out, evenly spread over the text (every tenth by default), so held-out rows
share no context with training rows. Half of them serve to calibrate, the other half is left for evaluation
(`evals.rows`).

A thread reads up to two batches ahead; the position counts batches handed out, not batches read, so resuming is exact
whatever the thread was doing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from jaxtyping import Int
from torch import Tensor

from apportion.about import About
from apportion.rows.batch import Batch, IndexedSource, RowStore
from apportion.rows.order import EpochOrder, Position, held_out_groups, split_held_out
from apportion.rows.permuting import RowSet

PREFETCH = 2


class CacheSource(IndexedSource):
    """The rows of a store that take part (of a cache, of an array): each epoch permutes all of them."""

    def __init__(self, store: RowStore, held_out_share: float = 0.1, seed: int = 0) -> None:
        self.store, self.held_out_share, self.seed = store, held_out_share, seed
        self.d_in, self.hookpoint = store.d_in, store.hookpoint
        if not store.rows:
            raise ValueError(f"{store.folder} has no rows to train on.")
        held_out = held_out_groups(1 + max(int(groups.max()) for _, groups in parts_of(store)), held_out_share)
        first = split_held_out(held_out)[0]
        self._held_out = RowSet(mask & first[groups] for mask, groups in parts_of(store))
        self._order = EpochOrder(RowSet(mask & ~held_out[groups] for mask, groups in parts_of(store)), seed)

    def __reduce__(self) -> tuple[Any, ...]:
        """The store, which is sent as a path, and the position."""
        return type(self), (self.store, self.held_out_share, self.seed), self.state_dict()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.load_state_dict(state)

    def batches(self, batch_tokens: int) -> Iterator[Batch]:
        for batch, position in _read_ahead(self._read, self._order.upcoming(batch_tokens)):
            self._order.position = position
            yield batch

    def _read(self, indices: Int[Tensor, " n"]) -> Batch:
        return replace(self.store.batch(indices), index=indices)

    def describe(self) -> About:
        split = {"held_out_share": self.held_out_share, "seed": self.seed}
        counts = {"rows_train": self.num_rows, "rows_calibrate": len(self._held_out)}
        return replace(self.store.describe(), **split, **counts)


def parts_of(store: RowStore) -> Iterator[tuple[Tensor, Tensor]]:
    """Which rows take part and their groups, part by part where the store can say so (`parts`): never of all rows."""
    parts = getattr(store, "parts", None)
    return iter([(store.mask, store.groups)]) if parts is None else parts()


def _read_ahead(read: Any, upcoming: Iterator[tuple[Tensor, Position]]) -> Iterator[tuple[Batch, Position]]:
    """Read `PREFETCH` batches ahead in a thread that ends with this iterator."""
    waiting: deque[tuple[Future[Batch], Position]] = deque()
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="apportion-read-ahead")
    try:
        while True:
            while len(waiting) < PREFETCH:
                indices, position = next(upcoming)
                waiting.append((pool.submit(read, indices), position))
            batch, position = waiting.popleft()
            yield batch.result(), position
    finally:
        for future, _ in waiting:
            future.cancel()
        pool.shutdown()

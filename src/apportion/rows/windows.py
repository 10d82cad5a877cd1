"""An order for stores that memory cannot hold: parts are read whole, one after the other, and never at random.

Each epoch permutes the parts of the store (the shards of a cache) and cuts them into windows of `window` parts. A
window is held in memory and its rows are permuted as a whole; batches run on across the border of two, and the next
window is read while the current one is handed out, so that memory holds two. A window of all parts is as good as the
exact order. When each row comes follows from (seed, epoch) alone, so the position is two numbers, as ever.

How well rows are mixed: other rows of the same context that a row meets in its batch. In a window of M rows these are
(B - 1) (c - 1) / (M - 1) for batches of B and contexts of c rows; in the exact order the same with all rows.

Disks read 4 KiB at random some thirty times slower than they read on (22.9 and 796 MB/s, others measured), and object
stores have no random reads at all. `choose_window` looks whether it matters here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import pairwise
from time import perf_counter
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

from apportion.memory import free_bytes
from apportion.rows.batch import Batch, RowStore, joined
from apportion.rows.order import EpochOrder, Position, Rows, permutation, seeded, shuffled
from apportion.rows.permuting import RowSet

HELD_SHARE = 0.7
"""Of the memory that is free, what a store may take that is read at random: the system keeps it there."""
WINDOWS_SHARE = 0.5
"""Of the memory that is free, what two windows may take."""
FAIR = 0.5
"""Of the speed of reading on, that of random reads at which the exact order costs little."""
PROBE_S = 1.0
"""Seconds for each of the two."""

logger = logging.getLogger(__name__)


@runtime_checkable
class InParts(Protocol):
    """A store whose rows lie in parts that can be held in memory, each for itself."""

    @property
    def part_rows(self) -> Sequence[int]:
        """Rows of each part, in order."""
        ...

    @property
    def row_bytes(self) -> int:
        """Of a row, about."""
        ...

    def held(self, parts: Sequence[int]) -> Any:
        """The same store with these parts read into memory."""
        ...


class WindowOrder(EpochOrder):
    """The order of the training rows of a store in parts."""

    def __init__(self, rows: RowSet, seed: int, part_rows: Sequence[int], window: int) -> None:
        super().__init__(rows, seed)
        self.window = min(window, len(part_rows))
        self.before = rows.count_below(torch.tensor([0, *part_rows], device="cpu").cumsum(0))
        """Training rows before each part, and all of them."""

    def visiting(self, epoch: int) -> WindowedEpoch:
        return WindowedEpoch(self, epoch)

    def others_of_its_context(self, batch_tokens: int, context_rows: float) -> tuple[float, float]:
        """How many a row meets in its batch, about; and in the exact order."""
        in_window = self.num_rows * self.window / (len(self.before) - 1)
        pairs = (batch_tokens - 1) * max(0.0, context_rows - 1)
        return pairs / max(1.0, in_window - 1), pairs / max(1, self.num_rows - 1)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"window": self.window}


class WindowedEpoch:
    """Of one epoch which rows come when; `epoch(start, stop)` are those at these places."""

    def __init__(self, order: WindowOrder, epoch: int) -> None:
        self.order, self.key = order, (order.seed, epoch)
        parts = permutation(len(order.before) - 1, *self.key, "parts").long()
        counts = order.before.diff()[parts]
        self.windows = [*zip(parts.split(order.window), counts.split(order.window), strict=True)]
        """Of each its parts, and the training rows in them."""
        self.ends = torch.stack([own.sum() for _, own in self.windows]).cumsum(0)
        self._shuffled: tuple[int, Rows] | None = None

    def __call__(self, start: int, stop: int) -> Int[Tensor, " n"]:
        return torch.cat([rows for _, rows in self.pieces(start, stop)])

    def pieces(self, start: int, stop: int) -> list[tuple[int, Int[Tensor, " m"]]]:
        """The same, by the numbers of the windows that they lie in."""
        found = []
        for number, (first, end) in enumerate(pairwise([0, *self.ends.tolist()])):
            if max(start, first) < min(stop, end):
                at = torch.arange(max(start, first), min(stop, end), device="cpu") - first
                found.append((number, self._rows(number, at)))
        return found

    def _rows(self, number: int, at: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        """The rows at these places of a window."""
        parts, counts = self.windows[number]
        if self._shuffled is None or self._shuffled[0] != number:
            self._shuffled = number, shuffled(int(counts.sum()), self.order.drawn, *self.key, "window", number)
        at = self._shuffled[1][at].long()
        ends = counts.cumsum(0)
        part = torch.bucketize(at, ends, right=True)
        return self.order.rows[self.order.before[parts[part]] + at - (ends - counts)[part]].long()


class Windows:
    """The windows of a store that are in memory: the one that is handed out, and the next, which a thread reads."""

    def __init__(self, store: InParts, how: Mapping[str, Any] | None = None) -> None:
        """`how` its rows are read: arguments of `batch` besides."""
        self.store, self.how, self._held = store, how or {}, dict[tuple[int, int], Future[Any]]()
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="apportion-windows")

    def reading(self, order: WindowOrder, batch_tokens: int) -> Iterator[tuple[Callable[[], Batch], Position]]:
        """How to read each batch from the order's position on, and the position behind it."""
        epochs: dict[int, WindowedEpoch] = {}
        for epoch, start, stop in order.turns(batch_tokens):
            epochs = {n: epochs.get(n) or order.visiting(n) for n in (epoch, epoch + 1)}
            pieces = epochs[epoch].pieces(start, stop)
            used = [(epoch, number) for number, _ in pieces]
            last = used[-1][1] + 1
            then = (epoch, last) if last < len(epochs[epoch].windows) else (epoch + 1, 0)
            self._hold({key: epochs[key[0]].windows[key[1]][0].tolist() for key in (*used, then)})
            stores = [self._held[key] for key in used]
            yield partial(_read_pieces, stores, [rows for _, rows in pieces], self.how), Position(epoch, stop)

    def _hold(self, wanted: Mapping[tuple[int, int], list[int]]) -> None:
        self._held = {
            key: self._held.get(key) or self._pool.submit(self.store.held, parts) for key, parts in wanted.items()
        }

    def close(self) -> None:
        for coming in self._held.values():
            coming.cancel()
        self._pool.shutdown()


def _read_pieces(stores: Sequence[Future[RowStore]], pieces: Sequence[Tensor], how: Mapping[str, Any]) -> Batch:
    read = [read_of(store.result(), rows, **how) for store, rows in zip(stores, pieces, strict=True)]
    return joined(read) if len(read) > 1 else read[0]


def read_of(store: RowStore, indices: Int[Tensor, " n"], **how: Any) -> Batch:
    """These rows, each with its index."""
    return replace(store.batch(indices, **how), index=indices)


def choose_window(store: RowStore) -> int | None:
    """How many parts of a store to hold at a time; None for the exact order, where memory holds it all, or where its
    disk reads at random about as fast as it reads on."""
    if not isinstance(store, InParts) or len(store.part_rows) < 2:
        return None
    free, size = free_bytes(), store.rows * store.row_bytes
    if size <= HELD_SHARE * free:
        return None
    at_random, on = probe(store)
    speeds = f"random rows come at {at_random / 1e6:.0f} MB/s, rows in a row at {on / 1e6:.0f}"
    if at_random >= FAIR * on:
        logger.info("%s is larger than memory, and is read in exact order all the same: %s", store.folder, speeds)
        return None
    window = max(1, int(WINDOWS_SHARE * free / 2 / (max(store.part_rows) * store.row_bytes)))
    logger.info(
        "%s (%.1f GB) is larger than memory (%.1f GB are free), and %s: it is read in windows of %d of its %d parts",
        store.folder, size / 1e9, free / 1e9, speeds, window, len(store.part_rows),
    )  # fmt: skip
    return window


def probe(store: InParts) -> tuple[float, float]:
    """Bytes a second: of random rows, and of rows that lie together."""
    rows, generator = sum(store.part_rows), seeded("probe", sum(store.part_rows))
    speeds = []
    for together in (False, True):
        done, started = 0, perf_counter()
        while (seconds := perf_counter() - started) < PROBE_S:
            if together:
                size = min(rows, 16_384)
                chosen = torch.arange(size) + int(torch.randint(rows - size + 1, (1,), generator=generator))
            else:
                chosen = torch.randint(rows, (64,), generator=generator)
            store.batch(chosen)  # type: ignore[attr-defined]
            done += len(chosen)
        speeds.append(done * store.row_bytes / seconds)
    return speeds[0], speeds[1]

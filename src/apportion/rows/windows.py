"""An order for stores that memory cannot hold: parts are read whole, one after the other, and never at random.

Each epoch permutes the parts of the store (the shards of a cache) and cuts them into windows of `window` parts. A
window is held in memory and its rows are permuted as a whole; batches run on across the border of two, and the next
window is read while the current one is handed out, so that memory holds two. A window of all parts is as good as the
exact order. When each row comes follows from (seed, epoch) alone, so the position is two numbers, as ever.

How well rows are mixed: other rows of the same context that a row meets in its batch. In a window of M rows these are
(B - 1) (c - 1) / (M - 1) for batches of B and contexts of c rows; in the exact order the same with all rows.

Disks read 4 KiB at random some thirty times slower than they read on (22.9 and 796 MB/s, others measured), and object
stores have no random reads at all. `choose_window` looks whether it matters here; what lies at a URL is always read in
windows, so that training begins when the first one is here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import pairwise
from threading import Event
from time import perf_counter
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

from apportion.memory import free_bytes
from apportion.rows.batch import Batch, RowStore, joined
from apportion.rows.order import DRAWN, EpochOrder, Position, check_same_source, permutation, seeded, shuffled
from apportion.rows.permuting import RowSet
from apportion.rows.retries import wanted_until

HELD_SHARE = 0.7
"""Of the memory that is free, what a store may take that is read at random: the system keeps it there."""
WINDOWS_SHARE = 0.5
"""Of the memory that is free, what two windows may take."""
FAIR = 0.5
"""Of the speed of reading on, that of random reads at which the exact order costs little."""
PROBE_S = 1.0
"""Seconds for each of the two."""
MIXED_PARTS, MIXED_ROWS, MIXED_SHARE = 8, 1 << 20, 8
"""How many parts and rows a window has at least of a store at a URL, and one of how many parts of it, if there is room:
the first window is waited for, and of rows that are mixed in few parts an SAE learns less (docs/store.md)."""

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

    @property
    def most_parts(self) -> int | None:
        """How many can be here at the same time, of a store at a URL; None where all of them are."""
        ...

    def held(self, parts: Sequence[int]) -> Any:
        """The same store with these parts read into memory."""
        ...


class WindowOrder(EpochOrder):
    """The order of the training rows of a store in parts."""

    def __init__(self, rows: RowSet, seed: int, part_rows: Sequence[int], window: int) -> None:
        super().__init__(rows, seed)
        self.window = min(window, len(part_rows))
        self.begins = torch.tensor([0, *part_rows], device="cpu").cumsum(0)
        """The first row of each part, and how many there are."""
        self.before = rows.count_below(self.begins)
        """Training rows before each part, and all of them."""

    def visiting(self, epoch: int) -> WindowedEpoch:
        return WindowedEpoch(self, epoch)

    def parts_of(self, epoch: int) -> Int[Tensor, " parts"]:
        """The parts in the order in which an epoch comes to them."""
        return permutation(len(self.before) - 1, self.seed, epoch, "parts").long()

    def sample(self, n: int) -> Int[Tensor, " m"]:
        """Random rows of the first window, ascending; of more parts, where that has few."""
        parts = self._first_parts(self.before, n)
        at = shuffled(int(self.before.diff()[parts].sum()), self.drawn, self.seed, "sample")
        return self.rows[_places(self.before, parts, at[torch.arange(min(n, len(at)))].long())].sort().values

    def first_held_out(self, held_out: RowSet, n: int) -> Int[Tensor, " m"]:
        """At most `n` of these rows, ascending: of the parts that are read first, a window of them or more."""
        before = held_out.count_below(self.begins)
        parts = self._first_parts(before, n)
        total = int(before.diff()[parts].sum())
        at = shuffled(total, self.drawn, self.seed, "held out")[torch.arange(min(n, total))].long()
        return held_out[_places(before, parts, at)].sort().values

    def _first_parts(self, before: Int[Tensor, " parts"], n: int) -> Int[Tensor, " some"]:
        """Those that are read first, until they have `n` rows, of which `before` are before each part; a window of them
        at least."""
        parts = self.parts_of(0)
        enough = int((before.diff()[parts].cumsum(0) < min(n, int(before[-1]))).sum()) + 1
        return parts[: max(enough, self.window)]

    def others_of_its_context(self, batch_tokens: int, context_rows: float) -> tuple[float, float]:
        """How many a row meets in its batch, about; and in the exact order."""
        in_window = self.num_rows * self.window / (len(self.before) - 1)
        pairs = (batch_tokens - 1) * max(0.0, context_rows - 1)
        return pairs / max(1.0, in_window - 1), pairs / max(1, self.num_rows - 1)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"window": self.window, "parts": len(self.before) - 1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_same_source(state, {"parts": len(self.before) - 1})
        super().load_state_dict(state)


class WindowedEpoch:
    """Of one epoch which rows come when; `epoch(start, stop)` are those at these places."""

    def __init__(self, order: WindowOrder, epoch: int) -> None:
        self.order, self.key = order, (order.seed, epoch)
        parts = order.parts_of(epoch)
        self.windows = parts.split(order.window)
        """Of each its parts."""
        counts = order.before.diff()[parts].split(order.window)
        self.ends: list[int] = torch.stack([own.sum() for own in counts]).cumsum(0).tolist()

    def __call__(self, start: int, stop: int) -> Int[Tensor, " n"]:
        return torch.cat([self.rows(number)(first, last) for number, first, last in self.spans(start, stop)])

    def spans(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """Through which windows these places go: the number of each, and from which of its places up to which."""
        windows = enumerate(pairwise([0, *self.ends]))
        return [(n, max(start, first) - first, min(stop, end) - first) for n, (first, end) in windows
                if max(start, first) < min(stop, end)]  # fmt: skip

    def rows(self, number: int) -> RowsOfWindow:
        return RowsOfWindow(self.order, self.windows[number], (*self.key, "window", number))


class RowsOfWindow:
    """The rows of a window in the order in which they come; `rows(first, last)` are those at these places of it."""

    def __init__(self, order: WindowOrder, parts: Int[Tensor, " some"], key: tuple[int | str, ...]) -> None:
        self.order, self.parts = order, parts
        total = int(order.before.diff()[parts].sum())
        self.order_of_them = shuffled(total, order.drawn, *key)
        assert isinstance(order.rows, RowSet)
        bounds = zip(order.begins[parts].tolist(), order.begins[parts + 1].tolist(), strict=True)
        self.listed = torch.cat([order.rows.between(*each) for each in bounds]) if total <= DRAWN else None
        """Looked up faster."""

    def __call__(self, first: int, last: int) -> Int[Tensor, " n"]:
        at = self.order_of_them[torch.arange(first, last, device="cpu")].long()
        if self.listed is not None:
            return self.listed[at].long()
        return self.order.rows[_places(self.order.before, self.parts, at)].long()


def _places(before: Int[Tensor, " parts"], parts: Int[Tensor, " some"], at: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Which rows of all are those at these places of some parts, one behind the other."""
    counts = before.diff()[parts]
    ends = counts.cumsum(0)
    part = torch.bucketize(at, ends, right=True)
    return before[parts[part]] + at - (ends - counts)[part]


class Window(NamedTuple):
    """One that is in memory."""

    store: Any
    rows: RowsOfWindow


class Windows:
    """The windows of a store that are in memory: the one that is handed out, and the next, which a thread reads."""

    def __init__(self, store: InParts, how: Mapping[str, Any] | None = None) -> None:
        """`how` its rows are read: arguments of `batch` besides."""
        self.store, self.how, self._held = store, how or {}, dict[tuple[int, int], Future[Window]]()
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="apportion-windows")
        self._ending = Event()

    def reading(self, order: WindowOrder, batch_tokens: int) -> Iterator[tuple[Callable[[], Batch], Position]]:
        """How to read each batch from the order's position on, and the position behind it."""
        epochs: dict[int, WindowedEpoch] = {}
        for epoch, start, stop in order.turns(batch_tokens):
            epochs = {n: epochs.get(n) or order.visiting(n) for n in (epoch, epoch + 1)}
            spans = epochs[epoch].spans(start, stop)
            then = spans[-1][0] + 1
            after = (epoch, then) if then < len(epochs[epoch].windows) else (epoch + 1, 0)
            wanted = [*((epoch, number) for number, _, _ in spans), after]
            self._held = {key: self._held.get(key) or self._reads(epochs[key[0]], key[1]) for key in wanted}
            pieces = [(self._held[epoch, number], first, last) for number, first, last in spans]
            yield partial(_read_pieces, pieces, self.how), Position(epoch, stop)

    def _reads(self, epoch: WindowedEpoch, number: int) -> Future[Window]:
        read = wanted_until(
            self._ending, lambda: Window(self.store.held(epoch.windows[number].tolist()), epoch.rows(number))
        )
        return self._pool.submit(read)

    def close(self) -> None:
        self._ending.set()
        for coming in self._held.values():
            coming.cancel()
        self._pool.shutdown()


def _read_pieces(pieces: Sequence[tuple[Future[Window], int, int]], how: Mapping[str, Any]) -> Batch:
    windows = [(coming.result(), first, last) for coming, first, last in pieces]
    read = [read_of(window.store, window.rows(first, last), **how) for window, first, last in windows]
    return joined(read) if len(read) > 1 else read[0]


def read_of(store: RowStore, indices: Int[Tensor, " n"], **how: Any) -> Batch:
    """These rows, each with its index."""
    return replace(store.batch(indices, **how), index=indices)


def choose_window(store: RowStore) -> int | None:
    """How many parts of a store to hold at a time; None for the exact order, where memory holds it all, or where its
    disk reads at random about as fast as it reads on."""
    if not isinstance(store, InParts) or len(store.part_rows) < 2:
        return None
    if store.most_parts is not None:
        return _fetched_window(store, store.most_parts)
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


def _fetched_window(store: InParts, most_parts: int) -> int:
    """Of a store whose parts have to be fetched, so many that rows are mixed, as far as there is room for two."""
    parts = len(store.part_rows)
    mixed = max(MIXED_PARTS, parts // MIXED_SHARE, -(-MIXED_ROWS * parts // sum(store.part_rows)))
    in_memory = int(WINDOWS_SHARE * free_bytes() / 2 / (max(store.part_rows) * store.row_bytes))
    return max(1, min(mixed, in_memory, most_parts // 2, parts))


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

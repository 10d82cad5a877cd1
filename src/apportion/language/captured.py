"""The passes of a model over a set of contexts, each made once for all who read a hookpoint of it.

    captured = Captured(model, tokenizer, contexts)
    sources = [LiveSource(model, tokenizer, place, contexts, captured=captured) for place in places]

Whoever comes first to a few contexts has the model run over them; what the others will want of that pass is held until
they come. That is in memory for contexts to train on, which each reads once: at most `most_held` bytes, and readers for
which nothing could be held run the model again, which costs time and changes nothing. Contexts that are read again and
again (those held out, a sample) lie in a temporary file without a name, as far as there is room for it.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from concurrent.futures import CancelledError
from threading import Lock
from time import perf_counter
from typing import Any
from weakref import finalize

import torch
from jaxtyping import Float, Int
from torch import Tensor

from apportion.language.document_layout import Layout
from apportion.language.model import check_finite, run_contexts

Rows = dict[str, Float[Tensor, "rows d_in"]]
"""By hookpoint."""
Key = tuple[int, ...]
"""Which contexts."""
REMEMBERED = 4096
"""Passes of which it is known who has had them."""
DISK_SHARE = 0.25
"""Of the free space, what the temporary file may take."""


class Captured:
    """See the module."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        contexts: Int[Tensor, "contexts *columns positions"],
        most_held: float = math.inf,
        layout: Layout | None = None,
    ) -> None:
        self.model, self.tokenizer, self.contexts, self.most_held = model, tokenizer, contexts, most_held
        self.layout = layout or Layout()
        self.passes, self.seconds = 0, 0.0
        """Contexts that the model was run over, and how long it took."""
        self._readers: list[Reader] = []
        self._had: OrderedDict[Key, set[Reader]] = OrderedDict()
        self._held_bytes = 0
        self._kept = Kept()
        self._lock = Lock()

    def reader(self, hookpoints: Iterable[str]) -> Reader:
        """For one who reads these hookpoints, of all contexts that he trains on once and in the order of the others."""
        self._readers.append(reader := Reader(self, tuple(hookpoints)))
        return reader

    def rows(self, reader: Reader, chosen: Int[Tensor, " n"], again: bool) -> Rows:
        """What `Reader.rows` returns."""
        key = tuple(chosen.tolist())
        with self._lock:
            if again and (found := self._kept.find(key, reader.hookpoints)) is not None:
                return found
            if not again and (found := self._take(reader, key)) is not None:
                return found
            others = self._wanting(reader, key, again)
            names = dict.fromkeys(name for one in (reader, *others) for name in one.hookpoints)
            ids = self.contexts[chosen]
            started = perf_counter()
            rows = run_contexts(self.model, list(names), ids, layout=self.layout)
            self.passes, self.seconds = self.passes + len(ids), self.seconds + perf_counter() - started
            for name, x in rows.items():
                check_finite(name, x, ids, key, self.tokenizer)
            if again:
                self._kept.add(key, rows)
            else:
                self._hold(key, rows, others)
            return {name: rows[name] for name in reader.hookpoints}

    def _take(self, reader: Reader, key: Key) -> Rows | None:
        """What is held for him; whatever he did not come for is let go."""
        self._noted(key).add(reader)
        found = None
        while reader.held and found is None:
            at, rows = reader.held.popitem(last=False)
            self._held_bytes -= bytes_of(rows)
            found = rows if at == key else None
        return found

    def _noted(self, key: Key) -> set[Reader]:
        if key not in self._had and len(self._had) >= REMEMBERED:
            self._had.popitem(last=False)
        return self._had.setdefault(key, set())

    def _wanting(self, reader: Reader, key: Key, again: bool) -> list[Reader]:
        """Who else will come for these contexts."""
        others = [one for one in self._readers if one.reads and one is not reader]
        return others if again else [one for one in others if one not in self._noted(key)]

    def _hold(self, key: Key, rows: Rows, others: list[Reader]) -> None:
        for one in others:
            if key in one.held:
                continue
            own = {name: rows[name] for name in one.hookpoints}
            if self._held_bytes + (size := bytes_of(own)) <= self.most_held:
                one.held[key] = own
                self._held_bytes += size

    def let_go(self, reader: Reader) -> None:
        """Nothing is held for him any more."""
        with self._lock:
            while reader.held:
                self._held_bytes -= bytes_of(reader.held.popitem()[1])


class Reader:
    """One who reads some hookpoints."""

    def __init__(self, captured: Captured, hookpoints: tuple[str, ...]) -> None:
        self.captured, self.hookpoints = captured, hookpoints
        self.reads = False
        """Whether to hold anything for him."""
        self.stopped = False
        """What he is still coming for is not wanted any more."""
        self.held: OrderedDict[Key, Rows] = OrderedDict()

    def rows(self, chosen: Int[Tensor, " n"], again: bool = False) -> Rows:
        """The activations of a few contexts, one row per token; `again` if they are asked for more than once."""
        if self.stopped and not again:
            raise CancelledError
        return self.captured.rows(self, chosen, again)

    def join(self) -> None:
        """He will come for what the others come for, too."""
        self.reads = True

    def leave(self) -> None:
        """He will not any more."""
        self.reads = False
        self.captured.let_go(self)


class Kept:
    """Activations in a temporary file, as long as that takes no more than its share of the free space."""

    def __init__(self) -> None:
        self._places: dict[Key, dict[str, tuple[int, int, Tensor]]] = {}
        """Where each begins, its rows, and an empty one like it."""
        self._file: Any = None
        self._end, self._most = 0, 0.0

    def find(self, key: Key, names: Iterable[str]) -> Rows | None:
        places = self._places.get(key, {})
        return {name: self._read(*places[name]) for name in names} if all(name in places for name in names) else None

    def _read(self, at: int, rows: int, like: Tensor) -> Tensor:
        self._file.seek(at)
        data = bytearray(rows * like.shape[1] * like.element_size())
        self._file.readinto(data)
        return torch.frombuffer(data, dtype=like.dtype).view(rows, -1).to(like.device)

    def add(self, key: Key, rows: Mapping[str, Tensor]) -> None:
        """Keep them too, if there is room."""
        if self._file is None:
            place = _on_disk()
            self._file = tempfile.TemporaryFile(dir=place)  # noqa: SIM115
            finalize(self, self._file.close)
            self._most = DISK_SHARE * shutil.disk_usage(place).free
        places = self._places.setdefault(key, {})
        for name, x in rows.items():
            if name in places or self._end + x.nbytes > self._most:
                continue
            try:
                self._file.seek(self._end)
                self._file.write(x.cpu().contiguous().view(torch.uint8).numpy().data)
                self._file.flush()
            except OSError:  # no room after all
                self._most = 0
                return
            places[name] = (self._end, len(x), x.new_empty(0, x.shape[1]))  # a part of x would keep all of it in memory
            self._end += x.nbytes


def _on_disk() -> str:
    """A folder for temporary files, rather one on a disk than one in memory, unless the user has chosen."""
    disk = "/var/tmp"
    return disk if "TMPDIR" not in os.environ and os.access(disk, os.W_OK) else tempfile.gettempdir()


def bytes_of(rows: Mapping[str, Tensor]) -> int:
    return sum(x.nbytes for x in rows.values())

"""The activations of a cache at a URL: shards are fetched whole, when rows of them are asked for or before.

A shard that is here is mapped, until its copy leaves the folder of copies (copies.py); then it is let go, so that the
disk gets its room back, and fetched anew when it is asked for again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from apportion.rows.layout import acts_file
from apportion.rows.place import There, key_of, size_of
from apportion.rows.shards import Column, Shard, ShardedRows, open_shard

ROOM = 0.9
"""Of the folder of copies, what shards may take."""


class FetchedShards:
    """The files of one hookpoint with these columns; `heads` is the column that is known of all of them already, by its
    name, with which the file has to agree."""

    def __init__(
        self, place: There, hookpoint: str, shards: Sequence[Mapping[str, Any]], columns: Mapping[str, Column],
        heads: Mapping[str, ShardedRows], row_bytes: int,
    ) -> None:  # fmt: skip
        self.place, self.hookpoint, self.shards, self.columns, self.heads = place, hookpoint, shards, columns, heads
        self._row_bytes = row_bytes
        self._mapped: dict[int, dict[str, Tensor]] = {}
        self._lock = Lock()
        place.copies.is_mapped_by(self)

    def __len__(self) -> int:
        return len(self.shards)

    def column(self, name: str) -> ShardedRows:
        return ShardedRows(_Parts(self, name), [shard["rows"] for shard in self.shards])

    @property
    def most(self) -> int:
        """How many shards can be here at the same time, and files that are here besides."""
        return int(ROOM * self.place.copies.capacity / max(map(self._size, range(len(self)))))

    def fit(self, numbers: Iterable[int]) -> bool:
        """Whether all these can be here at the same time."""
        return sum(self._size(number) for number in set(numbers)) <= self.place.copies.capacity

    def fetch(self, numbers: Iterable[int]) -> None:
        """Have these shards here, several at a time. ValueError if they are too much for the folder of copies."""
        numbers = sorted(set(numbers))
        if all(number in self._mapped for number in numbers):
            for number in numbers:  # they are used
                self.place.copies.touch(self._key(number))
            return
        if not self.fit(numbers):
            total, copies = sum(map(self._size, numbers)) / 1e9, self.place.copies
            raise ValueError(
                f"{len(numbers)} shards of {self.place} have {total:.3g} GB, and the copies in {copies.folder} "
                f"may have {copies.limit / 1e9:.3g} GB: give --cache-gb more, or --cache-dir on another disk."
            )
        with self.place.copies.holding([self._key(number) for number in numbers]):
            self.place.together(self._map, [number for number in numbers if number not in self._mapped])
            self.let_go()

    def part(self, number: int) -> dict[str, Tensor]:
        """The columns of a shard."""
        if (found := self._mapped.get(number)) is not None:
            return found
        found = self._map(number)
        self.let_go()
        return found

    def _map(self, number: int) -> dict[str, Tensor]:
        name, shard = acts_file(self.hookpoint, number), self.shards[number]
        sample = shard.get("sample_sha256", {}).get(name)
        found = self.place.acts(
            self.hookpoint, number, shard,
            lambda file: open_shard(Shard(file, shard["rows"], sample), self.columns), self._row_bytes,
        )  # fmt: skip
        for column, head in self.heads.items():
            if not torch.equal(found[column], head.parts[number]):
                self.place.drop_head(shard, self.hookpoint, number)
                raise ValueError(f"the {column} of {self.place}/{name} were damaged on their way: run this again")
        with self._lock:
            self._mapped[number] = found
        return found

    def let_go(self) -> None:
        """Of shards whose copies have left, so that the disk gets its room back."""
        with self._lock:
            gone = [n for n in self._mapped if not self.place.copies.path(self._key(n)).exists()]
            for number in gone:
                del self._mapped[number]

    def _key(self, number: int) -> str:
        return key_of(self.shards[number]["sha256"][acts_file(self.hookpoint, number)])

    def _size(self, number: int) -> int:
        return size_of(self.shards[number], self._row_bytes)


class _Parts(Sequence):
    """One column of the shards."""

    def __init__(self, shards: FetchedShards, name: str) -> None:
        self._shards, self._name = shards, name

    def __len__(self) -> int:
        return len(self._shards)

    def __getitem__(self, number: Any) -> Any:
        if not 0 <= number < len(self):  # what ends an iteration
            raise IndexError(number)
        return self._shards.part(number)[self._name]

"""The files of a cache: looked at when it is opened, read when rows are asked for.

Opening reads of every file its header and five blocks of 4 KiB, whose digest is compared with the one that the manifest
has: so it notices files that are missing, cut, zeroed or exchanged, and nearly always others; only hashing all of them
(`ActivationStore.verify`, `apportion cache verify`) notices every edited row. Files are mapped into memory: gathering
random rows costs page-cache accesses, not file reads.
"""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Int, Shaped
from safetensors import SafetensorError, safe_open
from torch import Tensor

BLOCK_BYTES = 4096
BLOCKS = 5
"""The first, the last, and others evenly between."""


class Column(NamedTuple):
    """What each row of a shard has under one name."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Shard(NamedTuple):
    """A file, and what the manifest says of it."""

    file: Path
    rows: int
    sample_sha256: str | None


def sha256_of(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


WILL_NEED = getattr(mmap, "MADV_WILLNEED", 3)
"""Advice to a system: read these pages now."""
READERS = 8
"""Threads that read a window."""


def read_on(part: Shaped[Tensor, "rows ..."]) -> Shaped[Tensor, "rows ..."]:
    """A part that lies in a file, which the system reads from one end to the other where it can be told to."""
    start, stop = part.data_ptr(), part.data_ptr() + part.nbytes
    with suppress(AttributeError, OSError):
        advise = ctypes.CDLL(None, use_errno=True).madvise
        begin = start // mmap.PAGESIZE * mmap.PAGESIZE
        advise(ctypes.c_void_p(begin), ctypes.c_size_t(stop - begin), WILL_NEED)
    return part


def sample_sha256_of(file: Path) -> str:
    """Digest of the size of a file and of `BLOCKS` blocks of it."""
    with file.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        digest = hashlib.sha256(f"{size}\n".encode())
        for i in range(BLOCKS):
            stream.seek(max(0, size - BLOCK_BYTES) * i // (BLOCKS - 1))
            digest.update(stream.read(BLOCK_BYTES))
    return digest.hexdigest()


def in_words(part: Shaped[Tensor, "rows ..."]) -> Shaped[Tensor, "rows ..."]:
    """The same bytes as float32 where rows consist of such: torch gathers these several times as fast as numbers of 16
    bits, and moves all bits."""
    rows_of_words = part.ndim == 2 and part.shape[1] * part.element_size() % 4 == 0
    return part.view(torch.float32) if rows_of_words and part.element_size() < 4 else part


class Places(NamedTuple):
    """Where some rows lie."""

    within: Sequence[Int[Tensor, " _"]]
    """Of each shard, which of its rows."""
    back: Int[Tensor, " n"]
    """Where each comes among those, shard after shard."""

    @property
    def numbers(self) -> list[int]:
        """The shards that have some."""
        return [number for number, within in enumerate(self.within) if len(within)]


class ShardedRows:
    """One tensor [rows, ...] that lies in several files, of which each is a part with so many rows: all of them mapped,
    or mapped when they are asked for."""

    def __init__(self, parts: Sequence[Any], rows: Sequence[int]) -> None:  # parts that are checked would be mapped
        self.parts, self.rows = parts, rows
        self._ends = torch.tensor(rows, device="cpu").cumsum(0)

    def places(self, indices: Int[Tensor, " n"]) -> Places:
        """Where these rows lie, for columns with the same shards."""
        shard = torch.bucketize(indices, self._ends, right=True)
        order = shard.argsort(stable=True)
        counts = torch.bincount(shard, minlength=len(self.parts))
        begins = self._ends - self._ends.diff(prepend=self._ends.new_zeros(1))
        within = (indices - begins[shard])[order]
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device="cpu"))
        return Places(within.split(counts.tolist()), back)

    def gather(self, indices: Int[Tensor, " n"], places: Places | None = None) -> Shaped[Tensor, "n ..."]:
        """The rows at `indices`, in that order."""
        if len(self.parts) == 1 or not len(indices):
            part = self.parts[0]
            return in_words(part).index_select(0, indices).view(part.dtype)
        places, by_shard, dtype, start = places or self.places(indices), None, None, 0
        for number in places.numbers:
            within, part = places.within[number], self.parts[number]
            words, dtype = in_words(part), part.dtype
            if by_shard is None:
                by_shard = torch.empty((len(indices), *words.shape[1:]), dtype=words.dtype, device="cpu")
            torch.index_select(words, 0, within, out=by_shard[start : start + len(within)])
            start += len(within)
        assert by_shard is not None and dtype is not None, "there are rows"
        return by_shard.index_select(0, places.back).view(dtype)

    def held(self, ranges: Sequence[tuple[int, int]]) -> HeldRows:
        """The rows from one to another, for each of these, read into memory; none goes over the border of two parts."""
        ranges = sorted(ranges)
        starts, stops = (torch.tensor(ends, device="cpu") for ends in zip(*ranges, strict=True))
        ends = (stops - starts).cumsum(0)
        shards = torch.bucketize(starts, self._ends, right=True).tolist()
        firsts = (self._ends - self._ends.diff(prepend=self._ends.new_zeros(1))).tolist()
        like = self.parts[shards[0]]
        rows = torch.empty((int(ends[-1]), *like.shape[1:]), dtype=like.dtype, device="cpu")

        def read(i: int) -> None:
            start, stop = (row - firsts[shards[i]] for row in ranges[i])
            part = read_on(self.parts[shards[i]][start:stop])
            rows[int(ends[i]) - len(part) : int(ends[i])] = part

        with ThreadPoolExecutor(READERS, thread_name_prefix="apportion-windows-read") as pool:
            list(pool.map(read, range(len(ranges))))
        return HeldRows(rows, starts, starts - (ends - (stops - starts)))

    def all(self) -> Shaped[Tensor, "rows ..."]:
        return torch.cat([*self.parts])


class HeldRows:
    """Some rows of a column, in memory one behind the other."""

    def __init__(
        self, rows: Shaped[Tensor, "n ..."], starts: Int[Tensor, " ranges"], less: Int[Tensor, " ranges"]
    ) -> None:
        """`starts`: the first row of each range, ascending; `less`: by how much its rows come earlier here."""
        self.rows, self._starts, self._less = rows, starts, less

    def places(self, indices: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        """Where these rows are here."""
        return indices - self._less[torch.bucketize(indices, self._starts, right=True) - 1]

    def gather(self, indices: Int[Tensor, " n"], places: Any = None) -> Shaped[Tensor, "n ..."]:
        """The rows at `indices`, in that order, of those that are here."""
        places = self.places(indices) if places is None else places
        return in_words(self.rows).index_select(0, places).view(self.rows.dtype)


def open_shards(shards: Sequence[Shard], columns: Mapping[str, Column]) -> dict[str, ShardedRows]:
    """The columns that lie in these files, mapped. ValueError, naming the file, for one that is not as it should be."""
    opened, rows = [open_shard(shard, columns) for shard in shards], [shard.rows for shard in shards]
    return {name: ShardedRows([parts[name] for parts in opened], rows) for name in columns}


def open_shard(shard: Shard, columns: Mapping[str, Column]) -> dict[str, Tensor]:
    file = shard.file
    if not file.is_file():
        raise ValueError(f"{file} is missing")
    try:
        if shard.sample_sha256 not in (None, sample_sha256_of(file)):
            raise ValueError(f"{file} changed since it was collected")
        with safe_open(file, framework="pt") as opened:
            parts = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except PermissionError:
        raise
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file}: {error}") from error
    wanted = {name: (torch.Size((shard.rows, *column.shape)), column.dtype) for name, column in columns.items()}
    found = {name: (part.shape, part.dtype) for name, part in parts.items()}
    if found != wanted:
        raise ValueError(f"{file} holds {_listed(found)}, and should hold {_listed(wanted)}")
    return parts


def _listed(columns: Mapping[str, tuple[torch.Size, torch.dtype]]) -> str:
    return ", ".join(f"{name} {list(shape)} {dtype}" for name, (shape, dtype) in sorted(columns.items())) or "nothing"

"""Orders and sets of rows in little memory: a permutation that is computed rather than kept, and rows as bits.

`Keyed(n, *key)` is a bijection of range(n): a Feistel network over the smallest range of 2^b >= n, walked on from
images that are n or more until one is below. Any part of it can be asked for, and nothing is held, so that a billion
rows can be shuffled in the same memory as a thousand.

    half, other = the upper and the lower bits
    half ^= F(other), other ^= F(half), ...        each step undoes itself, so that the whole is one to one

`RowSet` holds which of the rows of a store belong to it, a bit for each (and eight bytes for 512), and finds the i-th.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from itertools import chain

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

ROUNDS = 12
GROUP = 64
"""Bytes of a block."""
BLOCK = 8 * GROUP
"""Rows of a block."""


class Keyed:
    """A permutation of range(n) that follows from a key; `keyed[positions]` are its images."""

    def __init__(self, n: int, *key: int | str) -> None:
        self.n = n
        bits = max(2, (n - 1).bit_length())
        self._low = np.uint64(bits // 2)
        self._masks = [np.uint64((1 << width) - 1) for width in (bits - bits // 2, bits // 2)]
        digest = hashlib.sha512(repr(key).encode()).digest() + hashlib.sha512(repr((key, 1)).encode()).digest()
        self._keys = np.frombuffer(digest, dtype="<u8", count=ROUNDS)

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, positions: Int[Tensor, " m"]) -> Int[Tensor, " m"]:
        at = self._image(positions.numpy().astype(np.uint64))
        while (outside := at >= self.n).any():
            at[outside] = self._image(at[outside])
        return torch.from_numpy(at.astype(np.int64))

    def _image(self, at: np.ndarray) -> np.ndarray:
        halves = [at >> self._low, at & self._masks[1]]
        for number, key in enumerate(self._keys):
            here = number % 2
            halves[here] = halves[here] ^ (_mixed(halves[1 - here] + key) & self._masks[here])
        return halves[0] << self._low | halves[1]


def _mixed(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: every bit of the result depends on every bit of x."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class RowSet:
    """Rows of a store, ascending; `rows[i]` is the i-th."""

    def __init__(self, masks: Iterable[Bool[Tensor, " _"]]) -> None:
        """`masks` say of all rows, part by part, which belong to it."""
        packed, counts, rest = list[np.ndarray](), list[np.ndarray](), np.zeros(0, dtype=bool)
        for mask in chain(masks, [None]):
            fill = np.zeros(-len(rest) % BLOCK, dtype=bool) if mask is None else mask.numpy()
            rest = np.concatenate([rest, fill])
            whole = rest[: len(rest) // BLOCK * BLOCK]
            packed.append(np.packbits(whole, bitorder="little"))
            counts.append(whole.reshape(-1, BLOCK).sum(1))
            rest = rest[len(whole) :]
        self._bits = np.concatenate(packed)
        self._before = np.concatenate([[0], np.cumsum(np.concatenate(counts), dtype=np.int64)])
        """How many belong to it before each block of 512."""

    def __len__(self) -> int:
        return int(self._before[-1])

    def __getitem__(self, i: Int[Tensor, " m"]) -> Int[Tensor, " m"]:
        wanted = i.numpy().astype(np.int64)
        block = np.searchsorted(self._before, wanted, side="right") - 1
        left = wanted - self._before[block]
        where = block[:, None] * GROUP + np.arange(GROUP)
        bits = np.where(where < len(self._bits), self._bits[np.minimum(where, max(0, len(self._bits) - 1))], 0)
        counted = np.cumsum(_ones(bits.astype(np.uint8)), axis=1)
        byte = (counted > left[:, None]).argmax(1)
        at = np.arange(len(wanted))
        left = left - np.where(byte > 0, counted[at, byte - 1], 0)
        ones = np.unpackbits(bits[at, byte].astype(np.uint8)[:, None], axis=1, bitorder="little")
        bit = (np.cumsum(ones, axis=1) > left[:, None]).argmax(1)
        return torch.from_numpy((block * GROUP + byte) * 8 + bit)

    def all(self) -> Int[Tensor, " rows"]:
        """All of them, at four bytes each where their numbers allow that."""
        return self.between(0, 8 * len(self._bits))

    def between(self, start: int, stop: int) -> Int[Tensor, " m"]:
        """Those from one row of the store on up to another."""
        first = start // 8
        bits = np.unpackbits(self._bits[first : -(-stop // 8)], bitorder="little")
        rows = np.flatnonzero(bits[start - 8 * first : stop - 8 * first]) + start
        return torch.from_numpy(rows.astype(np.int32 if 8 * len(self._bits) < 2**31 else np.int64))

    def count_below(self, rows: Int[Tensor, " m"]) -> Int[Tensor, " m"]:
        """How many rows of it are smaller than each of these, which may be as many as the store has."""
        at = rows.numpy().astype(np.int64)
        block, within = at // BLOCK, at % BLOCK
        where = block[:, None] * GROUP + np.arange(GROUP)
        bits = np.where(where < len(self._bits), self._bits[np.minimum(where, max(0, len(self._bits) - 1))], 0)
        ones = np.unpackbits(bits.astype(np.uint8), axis=1, bitorder="little")
        before = (ones * (np.arange(BLOCK) < within[:, None])).sum(1, dtype=np.int64)
        return torch.from_numpy(self._before[np.minimum(block, len(self._before) - 1)] + before)


_COUNTS = np.array([bin(byte).count("1") for byte in range(256)], dtype=np.int64)


def _ones(packed: np.ndarray) -> np.ndarray:
    """How many bits are set in each byte."""
    return _COUNTS[packed]

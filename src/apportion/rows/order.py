"""The order in which rows are visited: one exact global permutation per epoch, and a position in it.

The permutation of an epoch follows from (seed, epoch) alone, so the position is two numbers and resuming is exact and
free. Shuffling all rows at once, rather than within a buffer, is affordable because a cache on disk can be read at
random; where it cannot, windows.py has another. Up to `DRAWN` rows it is drawn, at four bytes a row; of more it is
computed as it is needed (permuting.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from apportion.rows.permuting import Keyed, RowSet

DRAWN = 1 << 24
"""More rows than this have an order that is computed."""


@runtime_checkable
class Rows(Protocol):
    """Numbers of rows: a tensor of them, or a `RowSet`."""

    def __len__(self) -> int: ...

    def __getitem__(self, which: Tensor, /) -> Tensor: ...


def seeded(*key: int | str) -> torch.Generator:
    """A CPU generator whose stream follows from `key`; different keys give unrelated streams."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))


def permutation(n: int, *key: int | str) -> Int[Tensor, " n"]:
    """A random permutation of range(n) that follows from `key`."""
    dtype = torch.int32 if n < 2**31 else torch.int64
    return torch.randperm(n, generator=seeded(*key), dtype=dtype)


def shuffled(n: int, drawn: bool, *key: int | str) -> Rows:
    """A random permutation of range(n) that follows from `key`: drawn, or computed as it is asked for."""
    return permutation(n, *key) if drawn else Keyed(n, *key)


def held_out_groups(num_groups: int, share: float) -> Bool[Tensor, " num_groups"]:
    """True for `share` of the groups, evenly spaced: with 0.1 every tenth; at least one of two or more if share > 0."""
    if not 0 <= share < 1:
        raise ValueError(f"held_out_share={share} must be at least 0 and below 1")
    steps = torch.arange(num_groups + 1, dtype=torch.float64).mul(share).add(1e-9).floor()
    held_out = steps.diff() > 0
    if share > 0 and num_groups > 1 and not held_out.any():
        held_out[-1] = True
    return held_out


def split_held_out(is_held_out: Bool[Tensor, " n"]) -> tuple[Bool[Tensor, " n"], Bool[Tensor, " n"]]:
    """Of the groups held out, every other one is for calibration, beginning with the first; the rest for evaluation."""
    first = is_held_out & (is_held_out.cumsum(0) % 2 == 1)
    return first, is_held_out & ~first


class Position(NamedTuple):
    """How far one has come: `row` rows of epoch `epoch` have been handed out."""

    epoch: int = 0
    row: int = 0


class EpochOrder:
    """The training rows, in the order in which they are visited, and the current position."""

    def __init__(self, rows: Rows, seed: int) -> None:
        self.rows, self.num_rows, self.seed, self.position = rows, len(rows), seed, Position()
        self.drawn = self.num_rows <= DRAWN
        self._listed: Int[Tensor, " rows"] | None = None

    def upcoming(self, batch_tokens: int) -> Iterator[tuple[Int[Tensor, " batch_tokens"], Position]]:
        """From the current position on: the rows of the next batch, and the position once it is handed out.

        Looking ahead does not move the position; whoever hands out the batch does.
        """
        visit, current = None, -1
        for epoch, start, stop in self.turns(batch_tokens):
            if visit is None or epoch != current:
                visit, current = self.visiting(epoch), epoch
            yield visit(start, stop), Position(epoch, stop)

    def turns(self, batch_tokens: int) -> Iterator[tuple[int, int, int]]:
        """From the current position on: of each batch the epoch, and from which place of it up to which it goes."""
        if batch_tokens < 1 or batch_tokens > self.num_rows:
            raise ValueError(
                f"batch_tokens={batch_tokens} does not fit {self.num_rows} training rows: use a number "
                f"between 1 and {self.num_rows}, or more rows"
            )
        epoch, row = self.position
        while True:
            while row + batch_tokens <= self.num_rows:
                row += batch_tokens
                yield epoch, row - batch_tokens, row
            epoch, row = epoch + 1, 0

    def visiting(self, epoch: int) -> Callable[[int, int], Int[Tensor, " n"]]:
        """Which rows come from one place of an epoch up to another."""
        order = shuffled(self.num_rows, self.drawn, self.seed, epoch)
        if self._listed is None and isinstance(self.rows, RowSet) and self.drawn:  # a list is looked up faster
            self._listed = self.rows.all()
        rows = self.rows if self._listed is None else self._listed
        return lambda start, stop: rows[order[torch.arange(start, stop, device="cpu")].long()].long()

    def sample(self, n: int) -> Int[Tensor, " m"]:
        """At most `n` random rows; the same at each call."""
        return self.first_of(self.rows, n, "sample")

    def first_of(self, rows: Rows, n: int, key: str) -> Int[Tensor, " m"]:
        """The first `n` of these rows in an order that follows from the seed and `key`."""
        return rows[shuffled(len(rows), self.drawn, self.seed, key)[torch.arange(min(n, len(rows)))]].long()

    def state_dict(self) -> dict[str, Any]:
        computed = {} if self.drawn else {"order": "computed"}
        return {**self.position._asdict(), "seed": self.seed, "num_rows": self.num_rows, **computed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_same_source(state, {"seed": self.seed, "num_rows": self.num_rows})
        self.drawn = state.get("order") != "computed"  # a run that was begun with either goes on with it
        self.position = Position(state["epoch"], state["row"])


def check_same_source(state: dict[str, Any], ours: dict[str, Any]) -> None:
    """ValueError if `state` was saved by a source with other data or another seed."""
    for name, value in ours.items():
        if state.get(name) != value:
            raise ValueError(
                f"this position belongs to a source with {name}={state.get(name)!r}, but the source has "
                f"{name}={value!r}: resume with the data and the seed the run began with"
            )

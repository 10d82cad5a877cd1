"""What the trainer consumes: batches of rows, and sources that make them.

A *row* is the activation of one token at one hookpoint. A `Source` hands out batches of filtered training rows in
shuffled order, epoch after epoch, for ever; it keeps some rows back that are never trained on, and it can say exactly
where it stands. `ArraySource` is the simplest one: a tensor in memory. `CacheSource` reads a cache on disk,
`LiveSource` runs the language model as it goes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from apportion.about import About
from apportion.rows.order import EpochOrder, Rows, held_out_groups


@dataclass
class Batch:
    """Rows with what is known about them. Everything but `x` is optional; dimension 0 is the row everywhere."""

    x: Float[Tensor, " n *sites d_in"]
    """The activations, raw (the SAE prepares its input itself)."""
    target: Float[Tensor, "n d_out"] | None = None
    """What to reconstruct if it is not x (transcoders)."""
    tokens: Int[Tensor, " n"] | None = None
    positions: Int[Tensor, " n"] | None = None
    site: Int[Tensor, " n"] | None = None
    """Which of several hookpoints a row comes from."""
    index: Int[Tensor, " n"] | None = None
    """Where a row lies in its source, if that is known: for messages."""
    mask: Bool[Tensor, " n"] | None = None
    """True rows take part; None means all do."""

    def rows(self) -> Batch:
        """The rows that take part, with no mask left."""
        return self if self.mask is None else replace(self, mask=None)[self.mask]

    def _columns(self) -> dict[str, Tensor]:
        """What there is, by name."""
        return {f.name: column for f in fields(self) if (column := getattr(self, f.name)) is not None}

    def __getitem__(self, which: Tensor | slice) -> Batch:
        """Some of the rows."""
        return replace(self, **{name: column[which] for name, column in self._columns().items()})

    def __len__(self) -> int:
        return len(self.x)


def in_float(rows: Batch) -> Batch:
    """With x and target in float32."""
    if rows.x.dtype == torch.float32 and (rows.target is None or rows.target.dtype == torch.float32):
        return rows
    return replace(rows, x=rows.x.float(), target=None if rows.target is None else rows.target.float())


def as_stored(source: Source) -> Callable[[int], Iterator[Batch]]:
    """Its `batches`, in the precision in which its rows lie there if it has them so, and no class further down has
    `batches` of its own."""
    for kind in type(source).__mro__:
        if "stored_batches" in vars(kind):
            return source.stored_batches  # type: ignore[attr-defined]
        if "batches" in vars(kind):
            break
    return source.batches


def joined(parts: Sequence[Batch]) -> Batch:
    """Several batches, which have the same columns, as one."""
    each = [part._columns() for part in parts]
    return Batch(**{name: torch.cat([columns[name] for columns in each]) for name in each[0]})


def regrouped(parts: Iterable[Batch], size: int, row: int = 0) -> Iterator[tuple[Batch, int, int]]:
    """All rows but the first `row`, in batches of `size`; each with the number of the part in which it ends and the row
    there. What fills no batch at the end is dropped."""
    waiting, missing = list[Batch](), size
    for number, rows in enumerate(parts):
        while row < len(rows):
            waiting.append(rows[row : row + missing])
            row, missing = row + len(waiting[-1]), missing - len(waiting[-1])
            if not missing:
                yield joined(waiting), number, row
                waiting, missing = [], size
        row -= len(rows)


@runtime_checkable
class Source(Protocol):
    """Where training rows come from. All rows handed out have passed the token filter, or a mask says which have.

    One with `makes_rows = True` makes its rows anew each time, sane ones: `fit` then does not look at them beforehand.
    """

    @property
    def d_in(self) -> int: ...

    @property
    def num_rows(self) -> int | None:
        """Training rows per epoch; None if there are no epochs."""
        ...

    def batches(self, batch_tokens: int) -> Iterator[Batch]:
        """Batches of exactly `batch_tokens` rows, endlessly, from the current position on.

        Each epoch visits every training row once, in an order that follows from (seed, epoch); the rest of an epoch
        that fills no batch is dropped. The position advances with each batch handed out.
        """
        ...

    def sample(self, n: int) -> Batch:
        """At most n random training rows, the same at each call whatever the position, to estimate mean and scale."""
        ...

    def held_out(self, max_rows: int, chunk: int = 4096) -> Iterator[Batch]:
        """Rows that are never trained on, in random order and in chunks, to calibrate thresholds."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The position, as JSON-able numbers; `load_state_dict` on an equal source continues bit for bit."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def describe(self) -> About:
        """What the rows are: hookpoint, dtype, filter, split, counts, and of a language model what else matters."""
        ...


@runtime_checkable
class RowStore(Protocol):
    """Rows that lie still, so that each can be asked for: what evaluations, reports and `CacheSource` stand on.

    A cache of a language model is one, and so is an array; the tokens of the one are labels like others of the other.
    """

    @property
    def rows(self) -> int: ...

    @property
    def d_in(self) -> int: ...

    @property
    def hookpoint(self) -> str | None:
        """Where in a model they come from, if they come from one."""
        ...

    @property
    def folder(self) -> Path | str:
        """Where they lie, for messages."""
        ...

    @property
    def mask(self) -> Any:
        """bool [rows]: which take part."""
        ...

    @property
    def groups(self) -> Int[Tensor, " rows"]:
        """Rows of equal number belong together (a context, a recording): they are held out and split as a whole."""
        ...

    @property
    def labels(self) -> Mapping[str, Any]:
        """Columns of what is known about each row besides."""
        ...

    def batch(self, indices: Int[Tensor, " n"]) -> Batch:
        """The rows at `indices`, in that order."""
        ...

    def describe(self) -> About: ...


CHUNK = 4096
"""Rows that are worked on together."""


def chunks(store: RowStore, rows: Int[Tensor, " n"], size: int | None = None) -> Iterator[Batch]:
    """These rows of a store, a part at a time, each with its index and whether it takes part."""
    for indices in rows.split(size or CHUNK) if len(rows) else ():
        yield replace(store.batch(indices), index=indices, mask=store.mask[indices])


class IndexedSource(ABC):
    """A source whose rows lie still: it visits them in an order, and knows which are held out."""

    _order: EpochOrder
    _held_out: Rows

    @property
    def num_rows(self) -> int:
        return self._order.num_rows

    @abstractmethod
    def _read(self, indices: Int[Tensor, " n"]) -> Batch:
        """These rows, each with its index."""

    def sample(self, n: int) -> Batch:
        return self._read(self._order.sample(n))

    def held_out(self, max_rows: int, chunk: int = 4096) -> Iterator[Batch]:
        chosen = self._order.first_of(self._held_out, max_rows, "held out")
        for indices in chosen.split(chunk) if len(chosen) else ():
            yield self._read(indices)

    def state_dict(self) -> dict[str, Any]:
        return self._order.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._order.load_state_dict(state)


class ArraySource(IndexedSource):
    """Rows of a tensor in memory, all of which count as filtered; every tenth is held out by default.

    `target` has what each row is to be reconstructed to, if that is not the row itself (transcoders).
    """

    def __init__(
        self,
        x: Float[Tensor, " n *sites d_in"],
        held_out_share: float = 0.1,
        seed: int = 0,
        target: Float[Tensor, "n d_out"] | None = None,
    ) -> None:
        if x.ndim < 2:
            raise ValueError(f"x has shape {tuple(x.shape)}: give rows [n, d_in], or [n, num_sites, d_in].")
        if target is not None and len(target) != len(x):
            raise ValueError(f"x has {len(x)} rows, target {len(target)}; each row needs its target.")
        self.x, self.target, self.d_in, self.held_out_share, self.seed = x, target, x.shape[-1], held_out_share, seed
        is_held_out = held_out_groups(len(x), held_out_share)
        self._held_out = is_held_out.nonzero().squeeze(1)
        self._order = EpochOrder((~is_held_out).nonzero().squeeze(1), seed)

    def _read(self, indices: Int[Tensor, " n"]) -> Batch:
        target = None if self.target is None else self.target[indices.to(self.target.device)].float()
        return Batch(self.x[indices.to(self.x.device)].float(), target, index=indices)

    def batches(self, batch_tokens: int) -> Iterator[Batch]:
        for indices, position in self._order.upcoming(batch_tokens):
            self._order.position = position
            yield self._read(indices)

    def describe(self) -> About:
        return About(
            kind="array",
            d_in=self.d_in,
            dtype=str(self.x.dtype).removeprefix("torch."),
            rows=len(self.x),
            rows_train=self.num_rows,
            rows_calibrate=len(self._held_out),
            seed=self.seed,
        )

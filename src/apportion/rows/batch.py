"""What the trainer consumes: batches of rows, and sources that make them.

A *row* is the activation of one token at one hookpoint. A `Source` hands out batches of filtered training rows in
shuffled order, epoch after epoch, for ever; it keeps some rows back that are never trained on, and it can say exactly
where it stands. `ArraySource` is the simplest one: a tensor in memory. `CacheSource` reads a cache on disk,
`LiveSource` runs the language model as it goes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Bool, Float, Int
from torch import Tensor

from apportion.about import About
from apportion.rows.order import EpochOrder, held_out_groups, permutation


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
        if self.mask is None:
            return self
        columns = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "mask"}
        kept = {name: None if column is None else column[self.mask] for name, column in columns.items()}
        return replace(self, **kept, mask=None)


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
    def folder(self) -> Path:
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


def read_held_out(
    gather: Callable[[Tensor], Batch], rows: Int[Tensor, " n"], max_rows: int, chunk: int, seed: int
) -> Iterator[Batch]:
    """At most `max_rows` of `rows`, in random order, gathered in chunks."""
    chosen = rows[permutation(len(rows), seed, "held out")[:max_rows]]
    for indices in chosen.split(chunk) if len(chosen) else ():
        yield replace(gather(indices), index=indices)


class ArraySource:
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
        self.x, self.target, self.held_out_share, self.seed = x, target, held_out_share, seed
        is_held_out = held_out_groups(len(x), held_out_share)
        self._held_out = is_held_out.nonzero().squeeze(1)
        self._order = EpochOrder((~is_held_out).nonzero().squeeze(1), seed)

    @property
    def d_in(self) -> int:
        return self.x.shape[-1]

    @property
    def num_rows(self) -> int:
        return self._order.num_rows

    def _gather(self, indices: Int[Tensor, " n"]) -> Batch:
        target = None if self.target is None else self.target[indices.to(self.target.device)].float()
        return Batch(self.x[indices.to(self.x.device)].float(), target)

    def batches(self, batch_tokens: int) -> Iterator[Batch]:
        for indices, position in self._order.upcoming(batch_tokens):
            self._order.position = position
            yield replace(self._gather(indices), index=indices)

    def sample(self, n: int) -> Batch:
        indices = self._order.sample(n)
        return replace(self._gather(indices), index=indices)

    def held_out(self, max_rows: int, chunk: int = 4096) -> Iterator[Batch]:
        return read_held_out(self._gather, self._held_out, max_rows, chunk, self.seed)

    def state_dict(self) -> dict[str, Any]:
        return self._order.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._order.load_state_dict(state)

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

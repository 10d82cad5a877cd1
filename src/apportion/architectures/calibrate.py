"""Thresholds for eval mode: where the best matches of many rows end.

    wanted       matches that the rule would hand out to all rows together: k * tokens, or so many to each latent
    threshold    what exactly the wanted ones exceed, over all rows, whatever their order and how they come in chunks

The matches of many rows do not fit into memory, the wanted ones do. So a pool holds the best matches seen so far, and a
floor under which no more are taken; the floor rises when the pool is full. While the number of rows to come is unknown,
the pool keeps twice what the rows so far want. If in the end the threshold lay below the floor, something was
let go that belonged to the wanted: then the rows are read again, with their number known and the floor where it has to
be. Rows that come only once (a generator) can then not be calibrated on, which is said.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from apportion.allocation import Pool
from apportion.allocation.token_choice import rank_within
from apportion.architectures.inputs import as_tensor, first_tensor, is_array

if TYPE_CHECKING:
    from apportion.architectures.base import SAE

HELD = {True: 1 << 22, False: 1 << 26}
"""Matches that the pool may hold before its floor rises (32 MB, 0.5 GB), if the rows want fewer; by whether the rows
can be read again: if not, letting too much go cannot be mended."""
RESERVE = {False: 2.0, True: 1.25}
"""How many times the wanted matches are kept, by whether the number of rows is known."""
AT_ONCE = 1 << 23
"""Possible matches of rows that are encoded together, while there is no floor: half of them may be made."""
ROUNDS = 8
"""Times that the rows are read, at most; twice is what it takes unless most latents lack matches."""

CHUNK = 4096
"""Rows that are encoded together."""

Rows = Callable[[], Iterable[Float[Tensor, " n *row"]]]
"""Prepared rows in parts, anew at each call."""


def calibrate(sae: SAE, xs: Tensor | Iterable[Any]) -> float:
    """What `SAE.calibrate` says."""
    was_training = sae.training
    xs = as_tensor(xs) if is_array(xs) else xs
    again = isinstance(xs, Tensor) or iter(xs) is not xs
    tokens = xs.shape[: xs.ndim - len(sae.row_shape)].numel() if isinstance(xs, Tensor) else None
    try:
        if sae.allocation.batch_coupled:
            tokens, matches = set_thresholds(sae, lambda: prepared_parts(sae, xs), tokens, again)
        else:
            tokens, matches = count_matches(sae, prepared_parts(sae, xs))
    finally:
        sae.train(was_training)
    sae.info["calibration"] = {"tokens": tokens, "l0": matches / tokens}
    return matches / tokens


def prepared_parts(sae: SAE, xs: Tensor | Iterable[Any]) -> Iterator[Tensor]:
    """Prepared rows, at most CHUNK at a time."""
    items: Iterable[Any] = [xs] if isinstance(xs, Tensor) else xs
    for x in items:
        batch = x.rows() if hasattr(x, "rows") else None
        rows = sae.finite_rows(first_tensor(x)) if batch is None else sae.finite_rows(batch.x, batch.index)
        for part in rows.split(CHUNK) if len(rows) else ():
            yield sae.input.apply_to(part.to(sae.device))


def count_matches(sae: SAE, parts: Iterable[Tensor]) -> tuple[int, int]:
    """Rows, and the matches that eval mode makes of them."""
    sae.eval()
    tokens = matches = 0
    for x in parts:
        latents = sae.encode_scaled(x, sae.selection())
        tokens, matches = tokens + latents.tokens, matches + latents.nnz
    if not tokens:
        raise ValueError("calibrate needs at least one row of activations, got none.")
    return tokens, matches


def set_thresholds(sae: SAE, rows: Rows, tokens: int | None, again: bool) -> tuple[int, int]:
    """Set the thresholds of the SAE's rule; returns the number of rows, and of matches above the thresholds.

    `tokens` is how many rows there are, if that is known; `again`: they can be read more than once. ValueError if they
    would have to be, and cannot.
    """
    reserve = RESERVE[tokens is not None]
    for _ in range(ROUNDS):
        pool = _pool(sae, rows, tokens, reserve, HELD[again])
        if sae.allocation.set_threshold(pool):
            theta = sae.allocation.threshold
            above = pool.affinity > (theta if theta.ndim == 0 else theta[pool.latents])
            return pool.tokens, int(above.sum())
        sae.allocation.forget_threshold()
        if not again:
            break
        tokens, reserve = pool.tokens, RESERVE[True] if tokens is None else 4 * reserve
    raise ValueError(
        "calibrate: the rows are far from random order, and reading them once is not enough to set thresholds exactly. "
        "Give them as one tensor or a list, which can be read again, or in random order."
    )


def _pool(sae: SAE, rows: Rows, total: int | None, reserve: float, held: int) -> Pool:
    """The best matches of all rows, as many as are wanted and more."""
    pool = _Growing(sae, total, reserve, held)
    for x in rows():
        size = len(x) if bool((pool.floor > 0).any()) else max(1, AT_ONCE // sae.d_sae)
        for part in x.split(size) if len(x) else ():
            pool.add(part)
    return pool.finish()


class _Growing:
    """A pool while rows come in."""

    def __init__(self, sae: SAE, total: int | None, reserve: float, most: int) -> None:
        self.sae, self.total, self.reserve, self.most = sae, total, reserve, most
        self.tokens = 0
        self.floor = torch.zeros_like(sae.allocation.threshold)
        self.latents: list[Int[Tensor, " n"]] = []
        self.affinity: list[Float[Tensor, " n"]] = []
        self.held = 0

    def add(self, x: Float[Tensor, " n *row"]) -> None:
        found = self.sae.encode_scaled(x, self.sae.selection(rule=self.sae.allocation.in_eval(self.floor)))
        self.latents.append(found.indices.int())
        self.affinity.append(self.sae.affinities(found))
        self.tokens += found.tokens
        self.held += found.nnz
        wanted = self.sae.allocation.wanted(self.total or self.tokens)
        needed = self.reserve * int(wanted if isinstance(wanted, int) else wanted.sum()) + 16 * self.sae.d_sae
        if self.held > max(self.most, 2 * needed):
            self._shrink(wanted)

    def _joined(self) -> tuple[Tensor, Tensor]:
        self.latents, self.affinity = [torch.cat(self.latents)], [torch.cat(self.affinity)]
        return self.latents[0], self.affinity[0]

    def _shrink(self, wanted: int | Tensor) -> None:
        """Raise the floor to the best that has to be kept; ties with the last are kept, whoever came first."""
        latents, affinity = self._joined()
        self.floor = raised(self.floor, latents, affinity, wanted, self.reserve)
        kept = affinity > (self.floor if self.floor.ndim == 0 else self.floor[latents])
        self.latents, self.affinity = [latents[kept]], [affinity[kept]]
        self.held = int(kept.sum())

    def finish(self) -> Pool:
        if not self.tokens:
            raise ValueError("calibrate needs at least one row of activations, got none.")
        latents, affinity = self._joined()
        return Pool(latents, affinity, self.tokens, self.floor)


def raised(floor: Tensor, latents: Tensor, affinity: Tensor, wanted: int | Tensor, reserve: float) -> Tensor:
    """A floor just below the last match to keep: `reserve` times the wanted ones and a few more, of each latent if it
    has its own."""
    if isinstance(wanted, int):
        keep = min(affinity.numel(), int(reserve * wanted) + 16)
        last = affinity.topk(keep, sorted=False).values.min()
        return floor.maximum(torch.nextafter(last, torch.zeros_like(last))) if keep else floor
    keep = (reserve * wanted).long() + 16
    at = (rank_within(latents.long(), affinity, len(floor)) == keep[latents] - 1).nonzero().squeeze(1)
    ids, last = latents[at], affinity[at]
    floor = floor.clone()
    floor[ids] = floor[ids].maximum(torch.nextafter(last, torch.zeros_like(last)))
    return floor

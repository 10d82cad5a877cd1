"""Thresholds for eval mode: where the best matches of many rows end.

    wanted       matches that the rule would hand out to all rows together: k * tokens, or so many to each latent
    threshold    what exactly the wanted ones exceed, over all rows, whatever their order and how they come in chunks

The matches of many rows do not fit into memory. As long as the wanted ones do, a pool holds the best matches seen so
far, above a floor under which no more are taken; the floor rises when the pool is full. While the number of rows to
come is unknown, the pool keeps twice what the rows so far want. If in the end the threshold lay below the floor,
something was let go that belonged to the wanted: then the rows are read again, with their number known and the floor
where it has to be. If the wanted ones are too many for the pool, they are counted, not held (counting.py).

Rows that come only once (a generator) are written to a temporary file as they come, to be read again if need be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from itertools import count
from tempfile import SpooledTemporaryFile
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from apportion.allocation import Pool
from apportion.architectures.counting import SPARE, Take, counted, kept
from apportion.architectures.inputs import as_tensor, first_tensor, is_array
from apportion.ranking import rank_within

if TYPE_CHECKING:
    from apportion.architectures.base import SAE

HELD = 1 << 22
"""Matches that the pool may hold before its floor rises, if the rows want fewer (32 MB)."""
MOST = 1 << 22
"""Matches that are held for the sake of those that are wanted; more are counted."""
RESERVE = {False: 2.0, True: 1.25}
"""How many times the wanted matches are kept, by whether the number of rows is known."""
AT_ONCE = 1 << 20
"""Matches of rows that are encoded together, about."""
IN_MEMORY = 1 << 27
"""Bytes of rows that come only once which are kept in memory, not in a file."""

CHUNK = 4096
"""Rows that are encoded together."""

Rows = Callable[[], Iterable[Float[Tensor, " n *row"]]]
"""Prepared rows in parts, anew at each call."""


def calibrate(sae: SAE, xs: Tensor | Iterable[Any]) -> float:
    """What `SAE.calibrate` says."""
    was_training = sae.training
    xs = as_tensor(xs) if is_array(xs) else xs
    tokens = xs.shape[: xs.ndim - len(sae.row_shape)].numel() if isinstance(xs, Tensor) else None
    try:
        if not sae.allocation.batch_coupled:
            tokens, matches = count_matches(sae, prepared_parts(sae, xs))
        elif isinstance(xs, Tensor) or iter(xs) is not xs:
            tokens, matches = set_thresholds(sae, lambda: prepared_parts(sae, xs), tokens)
        else:
            with ExitStack() as until_then:
                tokens, matches = set_thresholds(sae, Kept(prepared_parts(sae, xs), until_then), None)
    finally:
        sae.train(was_training)
    sae.info["calibration"] = {"tokens": tokens, "l0": matches / tokens}
    return matches / tokens


class Kept:
    """Rows that come once, as often as they are asked for."""

    def __init__(self, parts: Iterator[Float[Tensor, " n *row"]], until_then: ExitStack) -> None:
        self.parts, self.seen = parts, list[tuple[int, Tensor]]()
        self.file = until_then.enter_context(SpooledTemporaryFile(max_size=IN_MEMORY))  # noqa: SIM115

    def __call__(self) -> Iterator[Float[Tensor, " n *row"]]:
        for i in count():
            if i == len(self.seen):
                if (part := next(self.parts, None)) is None:
                    return
                at = self.file.seek(0, 2)
                self.file.write(part.cpu().contiguous().view(torch.uint8).numpy().tobytes())
                self.seen.append((at, part[:0]))
            else:
                at, like = self.seen[i]
                end = self.seen[i + 1][0] if i + 1 < len(self.seen) else self.file.seek(0, 2)
                self.file.seek(at)
                data = torch.frombuffer(bytearray(self.file.read(end - at)), dtype=like.dtype)
                part = data.view(-1, *like.shape[1:]).to(like.device)
            yield part


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


def set_thresholds(sae: SAE, rows: Rows, tokens: int | None) -> tuple[int, int]:
    """Set the thresholds of the SAE's rule; returns the number of rows, and of matches above the thresholds.

    `tokens` is how many rows there are, if that is known.
    """
    rule, reserve, fits = sae.allocation, RESERVE[tokens is not None], True
    while True:  # in the end nothing is let go
        pool, matches = pooled(sae, rows, tokens, reserve) if fits else None, None
        fits = pool is not None
        if pool is None:
            pool, matches = counted(rule, lambda floor, take: read(sae, rows, floor, take), sae.dtype, reserve, tokens)
            if pool is None:
                tokens, reserve = matches, RESERVE[True] if tokens is None else 4 * reserve
                continue
        if pool is not None and rule.set_threshold(pool):
            if matches is None:
                theta = rule.threshold
                matches = int((pool.affinity > (theta if theta.ndim == 0 else theta[pool.latents])).sum())
            return pool.tokens, matches
        rule.forget_threshold()
        if fits and tokens is None and pool is not None:
            tokens, reserve = pool.tokens, RESERVE[True]
        else:
            reserve *= 4


def read(sae: SAE, rows: Rows, floor: Tensor, take: Take) -> int:
    """Encode all rows, of which `take` gets the matches above the floor, part by part; returns how many there are."""
    tokens, at_once = 0, AT_ONCE // sae.d_sae
    for x in rows():
        while len(x):
            part, x = (x[: (size := max(1, at_once))], x[size:])
            found = sae.encode_scaled(part, sae.selection(rule=sae.allocation.in_eval(floor)))
            at_once = AT_ONCE * found.tokens // max(1, found.nnz)
            tokens += found.tokens
            higher = take(found.indices, sae.affinities(found), tokens)
            floor = floor if higher is None else higher.to(floor)
    if not tokens:
        raise ValueError("calibrate needs at least one row of activations, got none.")
    return tokens


def pooled(sae: SAE, rows: Rows, total: int | None, reserve: float) -> Pool | None:
    """The best matches of all rows, as many as are wanted and more; None if that is more than MOST."""
    pool = _Growing(sae, total, reserve)
    try:
        if total is not None:
            pool.needed(total)
        tokens = read(sae, rows, pool.floor, pool.take)
    except _TooMany:
        return None
    latents, affinity = pool.joined()
    return Pool(latents, affinity, tokens, pool.floor)


class _TooMany(Exception):
    """More matches are wanted than are held."""


class _Growing:
    """A pool while rows come in."""

    def __init__(self, sae: SAE, total: int | None, reserve: float) -> None:
        self.sae, self.total, self.reserve = sae, total, reserve
        self.floor = torch.zeros_like(sae.allocation.threshold)
        self.latents: list[Int[Tensor, " n"]] = []
        self.affinity: list[Float[Tensor, " n"]] = []
        self.held = 0

    def needed(self, tokens: int) -> float:
        """Matches to hold for the sake of so many rows."""
        wanted = self.sae.allocation.wanted(tokens)
        needed = self.reserve * int(wanted if isinstance(wanted, int) else wanted.sum())
        if needed > MOST:
            raise _TooMany
        return needed + self.reserve * SPARE * self.floor.numel()

    def take(self, latents: Int[Tensor, " n"], affinity: Float[Tensor, " n"], tokens: int) -> Tensor | None:
        """Add matches, of so many rows by now; returns a floor that has risen."""
        self.latents.append(latents.int())
        self.affinity.append(affinity)
        self.held += len(latents)
        if self.held <= max(HELD, 2 * self.needed(self.total or tokens)):
            return None
        latents, affinity = self.joined()
        wanted = self.sae.allocation.wanted(self.total or tokens)
        self.floor = raised(self.floor, latents, affinity, wanted, self.reserve)
        above = affinity > (self.floor if self.floor.ndim == 0 else self.floor[latents])
        self.latents, self.affinity = [latents[above]], [affinity[above]]
        self.held = int(above.sum())
        return self.floor

    def joined(self) -> tuple[Tensor, Tensor]:
        self.latents, self.affinity = [torch.cat(self.latents)], [torch.cat(self.affinity)]
        return self.latents[0], self.affinity[0]


def raised(floor: Tensor, latents: Tensor, affinity: Tensor, wanted: int | Tensor, reserve: float) -> Tensor:
    """A floor just below the last match to keep (counting.kept), of each latent if it has its own."""
    if isinstance(wanted, int):
        keep = min(affinity.numel(), int(kept(torch.tensor([wanted]), reserve)))
        last = affinity.topk(keep, sorted=False).values.min()
        return floor.maximum(torch.nextafter(last, torch.zeros_like(last))) if keep else floor
    keep = kept(wanted, reserve)
    at = (rank_within(latents.long(), affinity, len(floor)) == keep[latents] - 1).nonzero().squeeze(1)
    ids, last = latents[at], affinity[at]
    floor = floor.clone()
    floor[ids] = floor[ids].maximum(torch.nextafter(last, torch.zeros_like(last)))
    return floor

"""From inputs to chosen matches, without ever holding the [tokens, d_sae] matrix.

The one dense product of an SAE, x W_enc^T + b_enc, is made in row blocks into a reused buffer. Of each block only the
entries above the rule's bounds survive as candidates; after the last block the rule settles which are chosen. If the
bounds turn out too high, the kernel looks again: a scalar bound is lowered and the blocks are scanned once more;
latents with bounds of their own are looked up one by one in the transposed product. A rule that limits rows (TopK)
needs no settling: the best of each row are taken block by block.

With `screen="bfloat16"` the product is made in bfloat16, several times faster, and only finds candidates: everything
within SCREEN_MARGIN of the cut. Their codes are computed again in full precision, and on these the rule settles, so the
values are exact and a match is missed only if rounding moved it by more than the margin. The margin is relative, so the
screen suits sparse codes, whose cuts lie well above zero; a ReLU would lose entries next to zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from apportion.allocation.base import Candidates, Rule, Settled, WarmStart
from apportion.kernels.dispatch import backend_for
from apportion.kernels.primitives import dot_products

BLOCK_ENTRIES = 2**22
"""Entries of a row block: large enough for an efficient product, small enough to stay near the cache (16 MB)."""
GROUP = 64
"""Columns whose maximum is taken before single entries are looked at."""
SCREEN_MARGIN = 0.01
"""Relative distance below the cut down to which the screen keeps candidates."""
BITS = {torch.float32: torch.int32, torch.float64: torch.int64, torch.bfloat16: torch.int16}

Screen = Literal["bfloat16"] | None


@dataclass(frozen=True)
class Matches:
    """Chosen matches in (token, latent) order, with the code (not the affinity) as value."""

    rows: Int[Tensor, " nnz"]
    latents: Int[Tensor, " nnz"]
    values: Float[Tensor, " nnz"]


@dataclass(frozen=True)
class _Found:
    """Matches above a bound, with code and affinity (the same tensor where the affinity is the code)."""

    rows: Tensor
    latents: Tensor
    values: Tensor
    affinity: Tensor

    def __getitem__(self, keep: Tensor) -> _Found:
        values = self.values[keep]
        affinity = values if self.affinity is self.values else self.affinity[keep]
        return _Found(self.rows[keep], self.latents[keep], values, affinity)

    @staticmethod
    def cat(parts: list[_Found], like: Tensor) -> _Found:
        if not parts:
            none = torch.zeros(0, dtype=torch.int64, device=like.device)
            return _Found(none, none, like.new_zeros(0), like.new_zeros(0))
        if len(parts) == 1:
            return parts[0]
        rows, latents, values = (torch.cat([getattr(p, f) for p in parts]) for f in ("rows", "latents", "values"))
        same = all(p.affinity is p.values for p in parts)
        return _Found(rows, latents, values, values if same else torch.cat([p.affinity for p in parts]))


@torch.no_grad()
def choose(
    x: Float[Tensor, "tokens d_in"],
    W_enc: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    rule: Rule,
    *,
    norms: Float[Tensor, " d_sae"] | None = None,
    warm: WarmStart | None = None,
    screen: Screen = None,
) -> Matches:
    """The matches that `rule` chooses. Affinity = relu(x W_enc^T + b_enc), times `norms` if given (decoder norms).

    `warm`, if given, supplies the rule's bounds and receives those for the next batch.
    """
    scan = _Scan(x, W_enc, b_enc, norms, screen)
    if rule.row_limit is not None:
        chosen = scan.best_of_rows(rule.row_limit)
    else:
        chosen = _settled(scan, rule, warm)
    return Matches(chosen.rows, chosen.latents, chosen.values)


def _settled(scan: _Scan, rule: Rule, warm: WarmStart | None) -> _Found:
    """Candidates above the rule's bounds, lower ones until the result is exact, and of these the chosen."""
    budget = rule.budget(scan.tokens)
    bounds = rule.bounds(warm)
    if bounds is not None:
        bounds = bounds.to(scan.x)
    found, bounds, next_bounds = scan.candidates(rule, bounds, budget)
    settled = scan.settle(rule, found, budget)
    if bounds is not None and bounds.ndim == 0:
        for lower in (0.5 * bounds, torch.zeros_like(bounds)):
            if bounds is None or settled.cut is None or not bool(settled.cut < bounds):
                break
            found, bounds, next_bounds = scan.candidates(rule, lower, budget)
            settled = scan.settle(rule, found, budget)
    elif bounds is not None and settled.cut is not None:
        short = settled.cut < bounds
        if bool(short.any()):
            assert isinstance(budget, Tensor)
            found = _Found.cat(
                [found[~short[found.latents]], *scan.columns(short.nonzero().squeeze(-1), budget)], scan.x
            )
            found = found[(found.rows * scan.d_sae + found.latents).argsort()]
            settled = scan.settle(rule, found, budget)
            next_bounds = None
    if warm is not None:
        warm.bounds = settled.next_bounds if next_bounds is None else next_bounds
    return found[settled.keep]


class _Scan:
    """The blocked product of one batch."""

    def __init__(self, x: Tensor, W_enc: Tensor, b_enc: Tensor, norms: Tensor | None, screen: Screen = None) -> None:
        self.x, self.W_enc, self.b_enc, self.norms = x, W_enc, b_enc, norms
        self.tokens, self.d_sae = x.shape[0], W_enc.shape[0]
        self.screened = screen is not None and x.dtype == torch.float32

    def settle(self, rule: Rule, found: _Found, budget: int | Tensor | None) -> Settled:
        return rule.settle(Candidates(found.rows, found.latents, found.affinity, self.tokens, self.d_sae), budget)

    def blocks(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(first row, codes, affinities) of each row block; the buffers are reused."""
        size = max(1, min(self.tokens, BLOCK_ENTRIES // self.d_sae))
        to = torch.bfloat16 if self.screened else self.x.dtype
        x, W, b = (t.to(to) for t in (self.x, self.W_enc, self.b_enc))
        norms = None if self.norms is None else self.norms.to(to)
        buffer = x.new_empty(size, self.d_sae)
        weighted = buffer if norms is None else torch.empty_like(buffer)
        for start in range(0, self.tokens, size):
            block = x[start : start + size]
            codes = torch.addmm(b, block, W.T, out=buffer[: len(block)])
            yield start, codes, codes if norms is None else torch.mul(codes, norms, out=weighted[: len(block)])

    def candidates(
        self, rule: Rule, bounds: Tensor | None, budget: int | Tensor | None
    ) -> tuple[_Found, Tensor | None, Tensor | None]:
        """What may be chosen, in full precision; the bounds that held for all of it; bounds for the next batch."""
        if not self.screened:
            return *self.rows(rule, bounds, budget), None
        rough, low = self.rows(rule, None if bounds is None else (1 - SCREEN_MARGIN) * bounds, budget)
        held = None if low is None else low / (1 - SCREEN_MARGIN)
        if budget is None:
            found = self.exact(rough)
            return (found if held is None else found[found.affinity > _each(held, found.latents)]), held, None
        settled = self.settle(rule, rough, budget)
        keep = settled.keep
        if settled.cut is not None:
            keep = keep | (rough.affinity >= (1 - SCREEN_MARGIN) * _each(settled.cut, rough.latents))
        return self.exact(rough[keep]), held, settled.next_bounds

    def exact(self, rough: _Found) -> _Found:
        """The same matches with codes in full precision; those that are not positive are dropped."""
        offsets = torch.searchsorted(rough.rows, torch.arange(self.tokens + 1, device=rough.rows.device))
        values = dot_products(offsets, rough.rows, rough.latents, self.x, self.W_enc) + self.b_enc[rough.latents]
        affinity = values if self.norms is None else values * self.norms[rough.latents]
        found = _Found(rough.rows, rough.latents, values, affinity)
        return found[affinity > 0]

    def rows(self, rule: Rule, bounds: Tensor | None, budget: int | Tensor | None) -> tuple[_Found, Tensor | None]:
        """Candidates above `bounds` from all row blocks, and the bounds that held for all of them."""
        if bounds is not None and bounds.ndim == 1 and bool(torch.isposinf(bounds).all()):
            return _Found.cat([], self.x), bounds
        total = int(budget.sum()) if isinstance(budget, Tensor) else budget
        parts: list[_Found] = []
        pending = 0
        mask: Tensor | None = None
        for start, codes, affinity in self.blocks():
            if bounds is None:
                guess = rule.first_bounds(affinity)
                bounds = self.x.new_zeros(()) if guess is None else guess.to(self.x.dtype)
            mask = torch.empty(affinity.shape, dtype=torch.bool, device=self.x.device) if mask is None else mask
            found = _above(codes, affinity, bounds, mask[: len(codes)])
            values = found.values.to(self.x.dtype)
            weights = values if found.affinity is found.values else found.affinity.to(self.x.dtype)
            parts.append(_Found(found.rows + start, found.latents, values, weights))
            pending += found.rows.numel()
            if total is not None and pending > 2 * total + BLOCK_ENTRIES // 4:
                merged = _Found.cat(parts, self.x)
                settled = self.settle(rule, merged, budget)
                if settled.cut is not None:
                    parts, bounds = [merged[settled.keep]], torch.maximum(bounds, settled.cut)
                    pending = parts[0].rows.numel()
        return _Found.cat(parts, self.x), bounds

    def best_of_rows(self, limit: int) -> _Found:
        """The `limit` best positive entries of each row."""
        if not self.screened or not self.tokens:
            parts = []
            for start, codes, affinity in self.blocks():
                best = _best_of_rows(codes, affinity, limit)
                parts.append(_Found(best.rows + start, best.latents, best.values, best.affinity))
            return _Found.cat(parts, self.x)
        pool = min(self.d_sae, limit + limit // 4 + 8)
        columns = torch.cat([_top(affinity, pool)[1].sort(dim=1).values for _, _, affinity in self.blocks()])
        rows = torch.arange(self.tokens, device=columns.device)
        offsets = pool * torch.arange(self.tokens + 1, device=columns.device)
        flat = columns.flatten()
        codes = dot_products(offsets, rows.repeat_interleave(pool), flat, self.x, self.W_enc) + self.b_enc[flat]
        affinity = codes if self.norms is None else codes * self.norms[flat]
        best = _best_of_rows(codes.view(-1, pool), affinity.view(-1, pool), limit)
        return _Found(best.rows, columns[best.rows, best.latents], best.values, best.affinity)

    def columns(self, latents: Int[Tensor, " n"], budget: Int[Tensor, " d_sae"]) -> list[_Found]:
        """The best tokens of each of these latents: twice its budget and four more, so that bounds can be told."""
        latents = latents[budget[latents].argsort(descending=True)]
        size = max(1, BLOCK_ENTRIES // max(self.tokens, 1))
        parts = []
        for start in range(0, latents.numel(), size):
            ids = latents[start : start + size]
            codes = torch.addmm(self.b_enc[ids, None], self.W_enc[ids], self.x.T)
            affinity = codes if self.norms is None else codes * self.norms[ids, None]
            reach = min(self.tokens, 2 * int(budget[ids].max()) + 4)
            best = _best_of_rows(codes, affinity, reach)
            parts.append(_Found(best.latents, ids[best.rows], best.values, best.affinity))
        return parts


def _each(bounds: Tensor, latents: Tensor) -> Tensor:
    """The bound of each match."""
    return bounds if bounds.ndim == 0 else bounds[latents]


def _above(codes: Tensor, affinity: Tensor, bounds: Tensor, out: Tensor) -> _Found:
    """Entries whose affinity exceeds the bounds; in bfloat16 also those that equal them."""
    if backend_for(affinity) == "triton":
        from apportion.kernels import triton_kernels

        flat = triton_kernels.above(affinity, bounds)
    else:
        flat = _above_in_torch(affinity, bounds, out)
    rows = flat.div(codes.shape[1], rounding_mode="floor")
    values = codes.view(-1)[flat]
    return _Found(rows, flat - rows * codes.shape[1], values, values if affinity is codes else affinity.view(-1)[flat])


def _above_in_torch(affinity: Tensor, bounds: Tensor, out: Tensor) -> Int[Tensor, " n"]:
    if affinity.dtype == torch.bfloat16:
        bits = bounds.to(torch.bfloat16).view(torch.int16)
        torch.gt(affinity.view(torch.int16), (bits - 1).clamp_min(0), out=out)  # much faster than in bfloat16
    else:
        torch.gt(affinity, bounds, out=out)
    return _marked(out.view(-1))


def _marked(mask: Tensor) -> Int[Tensor, " n"]:
    """mask.nonzero() of a flat mask with few marks: eight entries are looked at together."""
    if len(mask) % 8 or mask.is_cuda:
        return mask.nonzero().squeeze(-1)
    eights = mask.view(torch.int64).nonzero().squeeze(-1)
    which = mask.view(-1, 8)[eights].nonzero()
    return 8 * eights[which[:, 0]] + which[:, 1]


def _best_of_rows(codes: Tensor, affinity: Tensor, k: int) -> _Found:
    """The k best positive entries of each row, the lower column first among ties, in column order."""
    k = min(k, affinity.shape[1])
    if k * GROUP > affinity.shape[1] and not affinity.is_cuda:
        return _above_row_cuts(codes, affinity, k)
    one_more = min(k + 1, affinity.shape[1])
    best, columns = _top(affinity, one_more)
    if one_more > k:
        # The smallest of k + 1 goes; if the next one equals it, the tie is decided by column, over the whole row.
        last = best.argmin(1, keepdim=True)
        cut = best.gather(1, last)
        best = best.scatter(1, last, torch.inf)
        tied = (best.amin(1, keepdim=True) == cut).squeeze(1) & (cut > 0).squeeze(1)
        kept = torch.ones_like(best, dtype=torch.bool).scatter_(1, last, False)
        columns = columns[kept].view(-1, k)
        if bool(tied.any()):
            columns[tied] = affinity[tied].argsort(dim=1, descending=True, stable=True)[:, :k]
    columns = columns.sort(dim=1).values
    chosen = affinity.gather(1, columns)
    keep = chosen > 0
    rows = torch.arange(len(codes), device=codes.device)[:, None].expand_as(columns)[keep]
    values = codes.gather(1, columns)[keep]
    return _Found(rows, columns[keep], values, values if affinity is codes else chosen[keep])


def _above_row_cuts(codes: Tensor, affinity: Tensor, k: int) -> _Found:
    """_best_of_rows for a k that is a large share of the columns: entries are compared with the row's k-th largest."""
    d_sae = affinity.shape[1]
    # numpy partitions with vector instructions, several times faster than torch finds a k-th value.
    kth = torch.from_numpy(np.partition(affinity.numpy(), d_sae - k, axis=1)[:, d_sae - k].copy())
    cut = torch.nextafter(torch.zeros_like(kth), torch.ones_like(kth)).maximum(kth)
    keep = affinity >= cut[:, None]
    tied = (keep.sum(1) > k).nonzero().squeeze(1)
    if len(tied):
        columns = affinity[tied].argsort(dim=1, descending=True, stable=True)[:, :k]
        keep[tied] = torch.zeros_like(keep[tied]).scatter_(1, columns, True)
    flat = keep.view(-1).nonzero().squeeze(-1)
    row = flat.div(d_sae, rounding_mode="floor")
    values = codes.reshape(-1)[flat]
    return _Found(row, flat - row * d_sae, values, values if affinity is codes else affinity.reshape(-1)[flat])


def _top(affinity: Float[Tensor, "rows d_sae"], count: int) -> tuple[Tensor, Tensor]:
    """affinity.topk(count, dim=1), in any order, right for positive entries; others may be any that are not positive.

    The `count` largest entries lie in the `count` groups of GROUP columns with the largest maxima.
    """
    rows, d_sae = affinity.shape
    if d_sae % GROUP or d_sae // GROUP < 2 * count or affinity.is_cuda:
        return affinity.topk(count, dim=1, sorted=False)
    grouped = affinity.view(rows, -1, GROUP)
    # As integers, positive numbers compare alike and all others lie below them; the maximum is found much faster.
    groups = grouped.view(BITS[affinity.dtype]).amax(2).topk(count, dim=1, sorted=False).indices
    pool = grouped.gather(1, groups[:, :, None].expand(-1, -1, GROUP)).view(rows, -1)
    best, places = pool.topk(count, dim=1, sorted=False)
    group = places.div(GROUP, rounding_mode="floor")
    return best, groups.gather(1, group) * GROUP + places - group * GROUP

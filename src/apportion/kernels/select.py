"""From inputs to chosen matches, without ever holding the [tokens, d_sae] matrix.

The one dense product of an SAE, x W_enc^T + b_enc, is made in row blocks into a reused buffer. Of each block only the
entries above the rule's bounds survive as candidates; after the last block the rule settles which are chosen. If the
bounds turn out too high, the kernel looks again: a scalar bound is lowered and the blocks are scanned once more;
latents with bounds of their own are looked up one by one in the transposed product.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from apportion.allocation.base import Candidates, Rule, Settled, WarmStart

BLOCK_ENTRIES = 2**20
"""Entries of a row block: large enough for an efficient product, small enough to stay near the cache (4 MB)."""

GROUP = 64
"""Columns whose maximum is taken before single entries are looked at."""
BITS = {torch.float32: torch.int32, torch.float64: torch.int64, torch.bfloat16: torch.int16}


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
        return _Found(self.rows[keep], self.latents[keep], self.values[keep], self.affinity[keep])

    @staticmethod
    def cat(parts: list[_Found], like: Tensor) -> _Found:
        if not parts:
            none = torch.zeros(0, dtype=torch.int64, device=like.device)
            return _Found(none, none, like.new_zeros(0), like.new_zeros(0))
        if len(parts) == 1:
            return parts[0]
        return _Found(*(torch.cat([getattr(p, f) for p in parts]) for f in ("rows", "latents", "values", "affinity")))


@torch.no_grad()
def choose(
    x: Float[Tensor, "tokens d_in"],
    W_enc: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    rule: Rule,
    *,
    norms: Float[Tensor, " d_sae"] | None = None,
    warm: WarmStart | None = None,
) -> Matches:
    """The matches that `rule` chooses. Affinity = relu(x W_enc^T + b_enc), times `norms` if given (decoder norms).

    `warm`, if given, supplies the rule's bounds and receives those for the next batch.
    """
    scan = _Scan(x, W_enc, b_enc, norms)
    budget = rule.budget(x.shape[0])
    bounds = rule.bounds(warm)
    if bounds is not None:
        bounds = bounds.to(x)

    found, bounds = scan.rows(rule, bounds, budget)
    settled = scan.settle(rule, found, budget)
    if bounds is not None and bounds.ndim == 0:
        for lower in (0.5 * bounds, torch.zeros_like(bounds)):
            if bounds is None or settled.cut is None or not bool(settled.cut < bounds):
                break
            found, bounds = scan.rows(rule, lower, budget)
            settled = scan.settle(rule, found, budget)
    elif bounds is not None and settled.cut is not None:
        short = settled.cut < bounds
        if bool(short.any()):
            assert isinstance(budget, Tensor)
            found = _Found.cat([found[~short[found.latents]], *scan.columns(short.nonzero().squeeze(-1), budget)], x)
            found = found[(found.rows * W_enc.shape[0] + found.latents).argsort()]
            settled = scan.settle(rule, found, budget)
    if warm is not None:
        warm.bounds = settled.next_bounds
    chosen = found[settled.keep]
    return Matches(chosen.rows, chosen.latents, chosen.values)


class _Scan:
    """The blocked product of one batch."""

    def __init__(self, x: Tensor, W_enc: Tensor, b_enc: Tensor, norms: Tensor | None) -> None:
        self.x, self.W_enc, self.b_enc, self.norms = x, W_enc, b_enc, norms
        self.tokens, self.d_sae = x.shape[0], W_enc.shape[0]

    def settle(self, rule: Rule, found: _Found, budget: int | Tensor | None) -> Settled:
        return rule.settle(Candidates(found.rows, found.latents, found.affinity, self.tokens, self.d_sae), budget)

    def rows(self, rule: Rule, bounds: Tensor | None, budget: int | Tensor | None) -> tuple[_Found, Tensor | None]:
        """Candidates above `bounds` from all row blocks, and the bounds that held for all of them."""
        if bounds is not None and bounds.ndim == 1 and bool(torch.isposinf(bounds).all()):
            return _Found.cat([], self.x), bounds
        size = max(1, min(self.tokens, BLOCK_ENTRIES // self.d_sae))
        buffer = self.x.new_empty(size, self.d_sae)
        weighted = torch.empty_like(buffer)
        above = torch.empty(size, self.d_sae, dtype=torch.bool, device=self.x.device)
        total = int(budget.sum()) if isinstance(budget, Tensor) else budget
        parts: list[_Found] = []
        pending = 0
        for start in range(0, self.tokens, size):
            block = self.x[start : start + size]
            codes = torch.addmm(self.b_enc, block, self.W_enc.T, out=buffer[: len(block)])
            affinity = codes if self.norms is None else torch.mul(codes, self.norms, out=weighted[: len(block)])
            if rule.row_limit is not None:
                found = _best_of_rows(codes, affinity, rule.row_limit)
            else:
                if bounds is None:
                    guess = rule.first_bounds(affinity)
                    bounds = affinity.new_zeros(()) if guess is None else guess
                found = _above(codes, affinity, bounds, above[: len(block)])
            parts.append(_Found(found.rows + start, found.latents, found.values, found.affinity))
            pending += found.rows.numel()
            if total is not None and bounds is not None and pending > 2 * total + BLOCK_ENTRIES:
                merged = _Found.cat(parts, self.x)
                settled = self.settle(rule, merged, budget)
                if settled.cut is not None:
                    parts, bounds = [merged[settled.keep]], torch.maximum(bounds, settled.cut)
                    pending = parts[0].rows.numel()
        return _Found.cat(parts, self.x), bounds

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


def _above(codes: Tensor, affinity: Tensor, bounds: Tensor, out: Tensor) -> _Found:
    """Entries whose affinity exceeds the bounds."""
    flat = _marked(torch.gt(affinity, bounds, out=out).view(-1))
    rows = flat.div(codes.shape[1], rounding_mode="floor")
    values = codes.view(-1)[flat]
    return _Found(rows, flat - rows * codes.shape[1], values, values if affinity is codes else affinity.view(-1)[flat])


def _marked(mask: Tensor) -> Tensor:
    """mask.nonzero() of a flat mask with few marks: eight entries are looked at together."""
    if len(mask) % 8 or mask.is_cuda:
        return mask.nonzero().squeeze(-1)
    eights = mask.view(torch.int64).nonzero().squeeze(-1)
    which = mask.view(-1, 8)[eights].nonzero()
    return 8 * eights[which[:, 0]] + which[:, 1]


def _best_of_rows(codes: Tensor, affinity: Tensor, k: int) -> _Found:
    """The k best positive entries of each row, the lower column first among ties, in column order."""
    k = min(k, affinity.shape[1])
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

"""From inputs to chosen matches, without ever holding the [tokens, d_sae] matrix.

The one dense product of an SAE, x W_enc^T + b_enc, is made in tiles into a reused buffer (kernels/product.py). Of
each tile only the entries above the rule's bounds survive as candidates (kernels/scan.py), and if they become too many
the rule prunes those that cannot be chosen any more. After the last tile it settles which are chosen. If the bounds
turn out too high, the kernel looks again: a scalar bound is lowered and the tiles are scanned once more; latents with
bounds of their own are looked up one by one in the transposed product. Under a rule that limits rows (TopK) each row
has a bound from its first tile, below which few rows have anything that counts: those with less than their limit above
it are looked at again, whole.

With experts the blocks come expert by expert, but candidates are settled all together and in token order: the rule
chooses exactly as if all other entries were zero.

With a screen the product is made in bfloat16 or in whole numbers of 8 bits, several times faster, and only finds
candidates: everything within a margin of the cut. Their codes are computed again in full precision, and on these the
rule settles. Values are exact, and a match is missed only if the screen moved it by about the margin. Now bfloat16
moves a code by about

    2^-9 (|code| + |b_enc| + ||x * w||)        x * w: the d_in products that add up to the code

and whole numbers by some times as much, while the margin is a share of the cut: so it depends on the data how wide it
has to be, and it is measured (training/screen.py; MARGINS are what it is elsewhere). Inputs should be centred, as the
input description makes them: where b_enc cancels a large component common to all inputs, or where the cut is next to
zero (a ReLU), no screen is of use.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil, sqrt
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from apportion.allocation import Candidates, Selection, Settled, Threshold
from apportion.devices import marked, on_gpu
from apportion.kernels.dispatch import backend_for
from apportion.kernels.product import Block, Experts, Product, WholeNumbers
from apportion.kernels.scan import above
from apportion.ranking import below_largest, rank_within

SPARE_CANDIDATES = 2**20
"""So many candidates beyond twice the budget, and those that cannot be chosen any more are thrown out."""
ROUNDING = 1e-5
"""Relative distance within which float32 tells no affinities apart."""
MARGINS = {"bfloat16": 0.01, "int8": 0.08}
"""Relative distance below the cut down to which a screen keeps candidates, unless the selection has another: some three
times how far it moved affinities of a language model (docs/kernels.md)."""


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
        """Those that a mask marks, or those at given places."""
        return self.marked(keep) if keep.dtype == torch.bool else self.at(keep)

    def marked(self, keep: Tensor, count: int | None = None) -> _Found:
        """Those that a mask marks, and how many these are, if it is known."""
        places = marked(keep, count)
        return self if places.numel() == keep.numel() else self.at(places)

    def at(self, places: Tensor) -> _Found:
        values = self.values[places]
        affinity = values if self.affinity is self.values else self.affinity[places]
        return _Found(self.rows[places], self.latents[places], values, affinity)

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
    selection: Selection,
    *,
    norms: Float[Tensor, " d_sae"] | None = None,
    experts: Experts | None = None,
) -> Matches:
    """The matches of a selection. Affinity = relu(x W_enc^T + b_enc), times `norms` if given (decoder norms).

    With `experts` each token has the latents of its expert only, and its affinities are multiplied by its gate; the
    codes are not. The bounds for the next batch are left in `selection.next_warm`.
    """
    product = Product(x, W_enc, b_enc, norms, experts)
    if selection.padded and on_gpu(x) and selection.rule.row_limit is not None and experts is None:
        return _padded(product, selection.rule.row_limit)
    scan = _Scan(product, selection)
    found, bounds = scan.look(scan.first_bounds())
    settled = scan.settle(found)
    short, count = scan.short(settled, bounds)
    if short is not None and bounds is not None and bounds.ndim:
        found, settled = scan.with_columns(found, settled, short)
        count = None
    elif short is not None and bounds is not None:
        for lower in (0.5 * bounds, torch.zeros_like(bounds)):
            scan.screened = False  # a second look is rare, and leaves nothing open
            found, bounds = scan.look(lower)
            settled = scan.settle(found)
            short, count = scan.short(settled, bounds)
            if short is None:
                break
    selection.next_warm = settled.next_bounds if scan.rough_next is None else scan.rough_next
    chosen = found.marked(settled.keep, count)
    if selection.check:
        selection.checked, selection.missed = scan.missed(chosen, settled.cut, selection.check)
    return Matches(chosen.rows, chosen.latents, chosen.values)


def _padded(product: Product, limit: int) -> Matches:
    """The best of each row, as many of every one: where fewer are positive, with codes of zero."""
    parts = []
    for _, block in product.blocks(product.x.dtype, whole=True):
        latents = block.affinity.topk(limit, dim=1, sorted=False).indices.sort(1).values
        parts.append((latents, block.codes.gather(1, latents).clamp_min(0)))
    latents, codes = (torch.cat(t).flatten() for t in zip(*parts, strict=True))
    rows = torch.arange(len(product.x), device=codes.device).repeat_interleave(limit, output_size=len(codes))
    return Matches(rows, latents, codes)


@torch.no_grad()
def all_above(
    x: Float[Tensor, "tokens d_in"],
    W_enc: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    bounds: Float[Tensor, " d_sae"],
    selection: Selection | None = None,
) -> Matches:
    """Every match whose pre-activation exceeds its latent's bound; under a negative bound also negative ones.

    A screen of the selection is used where all bounds are positive; its rule says nothing here.
    """
    rule = Threshold.at(bounds, W_enc.shape[0])
    own = Selection(rule) if selection is None else selection.by(rule)
    scan = _Scan(Product(x, W_enc, b_enc), own)
    scan.screened = scan.screened and bool((bounds > 0).all())
    found, _ = scan.reach(bounds := bounds.to(scan.x))
    if selection is not None and selection.check:
        own.checked, own.missed = scan.missed(found, bounds, selection.check)
        selection.report(own)
    return Matches(found.rows, found.latents, found.values)


class _Scan:
    """The search for candidates in the blocks of one product."""

    def __init__(self, product: Product, selection: Selection) -> None:
        self.product, self.rule, self.selection = product, selection.rule, selection
        self.x = product.x
        self.tokens, self.d_sae = product.x.shape[0], product.W_enc.shape[0]
        self.budget = self.rule.budget(selection.group.count(self.tokens))
        self.total = self.rule.total(selection.group.count(self.tokens))
        self.screened = selection.screen is not None and self.x.dtype == torch.float32
        self.margin = selection.margin or MARGINS.get(selection.screen or "", 0.0)
        self.precision = {"bfloat16": torch.bfloat16, "int8": "int8"}.get(selection.screen or "", self.x.dtype)
        self.cold = False
        """Nothing is known of latents with bounds of their own: each is looked up by itself."""
        self.rough_next: Tensor | None = None
        """Bounds for the next batch, of all that the screen let through."""

    def first_bounds(self) -> Tensor | None:
        bounds = None if self.rule.row_limit is not None else self.rule.bounds(self.selection.warm)
        self.cold = bounds is None and isinstance(self.budget, Tensor)
        if self.cold:
            return self.x.new_full((self.d_sae,), torch.inf)
        return None if bounds is None else bounds.to(self.x)

    def short(self, settled: Settled, bounds: Tensor | None) -> tuple[Tensor | None, int | None]:
        """Marks the bounds below which something could have been chosen, if there are such; and how many matches are
        chosen, on a GPU, where both are read together."""
        short = None if bounds is None or settled.cut is None else settled.cut < bounds
        if not on_gpu(self.x):
            return short if short is not None and bool(short.any()) else None, None
        kept = settled.keep.sum()
        count, lower = torch.stack([kept, torch.zeros_like(kept) if short is None else short.sum()]).tolist()
        return short if lower else None, count

    def prune(self, found: _Found) -> Settled:
        return self.rule.prune(self.candidates(found), self.budget)

    def settle(self, found: _Found) -> Settled:
        settled = self.rule.settle(self.candidates(found), self.budget, self.selection.group)
        if on_gpu(self.x) and self.screened:  # `exact` has left those in that are not positive
            settled = replace(settled, keep=settled.keep & (found.affinity > 0))
        return settled

    def candidates(self, found: _Found) -> Candidates:
        return Candidates(found.rows, found.latents, found.affinity, self.tokens, self.d_sae)

    def look(self, bounds: Tensor | None) -> tuple[_Found, Tensor | None]:
        """In full precision: what may be chosen; and bounds, of which no cut above them leaves any out.

        Bounds are the same in all processes, and None where every row had its own.
        """
        differ = self.rule.row_limit is None and (self.screened or bounds is None)
        found, bounds = self.reach(bounds)
        if differ:  # each process has guessed its own, or given up the screen
            bounds = self.selection.group.highest(self.x.new_zeros(()) if bounds is None else bounds)
        return found, bounds

    def reach(self, bounds: Tensor | None) -> tuple[_Found, Tensor | None]:
        """What this process finds, and its own bounds."""
        found, bounds = self.rows(bounds)
        self.rough_next = None
        if not self.screened:
            return found, bounds
        if bounds is None:
            return self.exact(found, None), None
        if self.budget is None:
            found = self.exact(found, bounds)
            return found[found.affinity > _each(bounds, found.latents)], bounds
        pruned = self.prune(found)
        self.rough_next = pruned.next_bounds
        # On a GPU to find out how many are in reach costs more than to compute the others, too.
        found = self.exact(found if on_gpu(self.x) else found[self.in_reach(found, pruned)], bounds)
        return found, bounds * (1 - self.margin) / (1 - self.margin / 2)

    def exact(self, rough: _Found, bounds: Tensor | None) -> _Found:
        """The same matches with codes in full precision; those not positive are dropped, on a GPU by `settle`."""
        values, affinity = self.product.at(rough.rows, rough.latents)
        if self.selection.check:
            self.selection.moved = self.moved(rough, affinity, bounds)
        found = _Found(rough.rows, rough.latents, values, affinity)
        return found if on_gpu(self.x) else found[affinity > 0]

    def moved(self, rough: _Found, affinity: Float[Tensor, " n"], bounds: Tensor | None) -> float | None:
        """How far the screen moved candidates, as a share of the lowest of a token, of a latent or of all: of those
        that have a bound in common, and a cut above zero, because there are as many as there may be. None without
        such candidates."""
        if not len(affinity):
            return None
        by = ((affinity - rough.affinity) / rough.affinity.min()).square()
        if bounds is None or bounds.ndim:
            groups, n = (rough.rows, self.tokens) if bounds is None else (rough.latents, self.d_sae)
            lowest = self.x.new_full((n,), torch.inf).scatter_reduce(0, groups, rough.affinity, "amin")[groups]
            most = self.rule.row_limit if bounds is None else self.budget
            full = torch.bincount(groups, minlength=n) >= (0 if most is None else most)
            by = ((affinity - rough.affinity) / lowest).square()[full[groups]]
        return by.mean().sqrt().item() if len(by) else None

    def rows(self, bounds: Tensor | None) -> tuple[_Found, Tensor | None]:
        """Candidates from all row blocks, and the bounds that held for all of them (None if rows had their own).

        Under the screen both are rough, and candidates go down to the margin below the bounds.
        """
        if self.cold:
            return _Found.cat([], self.x), bounds
        total, limit = self.total, self.rule.row_limit
        precision = self.precision if self.screened else self.x.dtype
        if limit is None and bounds is None:
            block = self.product.first_rows(precision)
            guess = None if block is None else self.rule.first_bounds(block.affinity)
            bounds = self.x.new_zeros(()) if guess is None else guess.to(self.x.dtype)
        self.product.shared_scales = bounds is None or bounds.ndim == 0
        if backend_for(self.x) == "triton" and (listed := self.listed(bounds, precision)) is not None:
            return listed, bounds
        parts: list[_Found] = []
        pending, of_rows = 0, _RowBounds(self.product, limit)
        for latents, block in self.product.blocks(precision):
            found = self.above(block, self.lowered(self.bounds_of(block, latents, bounds, of_rows)))
            parts.append(_Found(found.rows, found.latents + latents.start, found.values, found.affinity))
            pending += found.rows.numel()
            if total is not None and pending > 2 * total + SPARE_CANDIDATES:
                merged = self.merged(parts)
                pruned = self.prune(merged)
                parts = [merged[self.in_reach(merged, pruned)]]
                pending = parts[0].rows.numel()
                if bounds is not None and pruned.cut is not None:
                    bounds = torch.maximum(bounds, self.below(pruned.cut))
                if self.screened and pending > 2 * total + SPARE_CANDIDATES:  # too much lies within the margin
                    self.screened = False
                    return self.rows(bounds)
        return self.with_whole_rows(self.merged(parts), of_rows), bounds

    def listed(self, bounds: Tensor | None, precision: Any) -> _Found | None:
        """On a GPU: candidates from all blocks, which is waited for once; None if they are more than expected."""
        from apportion.kernels.triton_kernels import MatchList

        weighted = self.product.norms is not None or self.product.gates is not None
        matches = MatchList(2 * (self.total or 0) + SPARE_CANDIDATES, self.x, weighted)
        of_rows = _RowBounds(self.product, self.rule.row_limit)
        for latents, block in self.product.blocks(precision):
            assert isinstance(block, Block)
            at = self.lowered(self.bounds_of(block, latents, bounds, of_rows))
            place = block.first * self.d_sae + latents.start
            matches.add(block.codes, block.affinity, at.contiguous(), place, self.d_sae)
        count = self.selection.counted_with(matches.count)
        if count > len(matches.places):
            return None
        places, values, affinity = (t[:count] for t in (matches.places, matches.values, matches.affinity))
        rows = self.product.tokens_at(places.div(self.d_sae, rounding_mode="floor"))
        found = _Found(rows, places % self.d_sae, values, affinity if weighted else values)
        return self.with_whole_rows(self.in_token_order(found), of_rows)

    def bounds_of(self, block: Any, latents: slice, bounds: Tensor | None, of_rows: _RowBounds) -> Tensor:
        """A scalar, one for each column, or one for each row [rows, 1]."""
        if self.rule.row_limit is not None:
            return of_rows.of(block)
        assert bounds is not None
        return bounds if bounds.ndim == 0 else bounds[latents]

    def merged(self, parts: list[_Found]) -> _Found:
        """In (token, latent) order, each token's matches being in order already."""
        return self.in_token_order(_Found.cat(parts, self.x))

    def in_token_order(self, found: _Found) -> _Found:
        return found if self.product.in_order else found[found.rows.int().argsort(stable=True)]

    def lowered(self, bounds: Tensor) -> Tensor:
        """What a block is compared with: the bounds, under the screen less the margin.

        For a product in bfloat16 they are rounded down to that, which changes no comparison with such a number.
        """
        if not self.screened:
            return bounds
        low = (1 - self.margin) * bounds.float()
        if self.precision == "int8":
            return low
        return (low.view(torch.int32) & ~0xFFFF).view(torch.float32).bfloat16()

    def in_reach(self, found: _Found, pruned: Settled) -> Tensor:
        """Marks what may be chosen in the end: the chosen; under the screen all within the margin of the cut.

        Where they do not come in token order an earlier token may still come, and ties at the cut are then its.
        """
        if not self.screened:
            if self.product.in_order or pruned.cut is None:
                return pruned.keep
            return pruned.keep | (found.affinity == _each(pruned.cut, found.latents))
        if pruned.cut is None:
            return torch.ones_like(pruned.keep)
        return found.affinity > (1 - self.margin) * _each(pruned.cut, found.latents)

    def below(self, cut: Tensor) -> Tensor:
        """A bound that whatever may still be chosen exceeds; see `in_reach`."""
        return cut if self.product.in_order else torch.nextafter(cut, torch.zeros_like(cut))

    def above(self, block: Block | WholeNumbers, bounds: Tensor) -> _Found:
        """Entries whose affinity exceeds the bounds, by token and by place among the columns."""
        rows, columns, codes, affinity = above(block, bounds)
        values = codes.to(self.x.dtype)
        weights = values if affinity is codes else affinity.to(self.x.dtype)
        return _Found(self.product.tokens_at(rows + block.first), columns, values, weights)

    def with_whole_rows(self, found: _Found, of_rows: _RowBounds) -> _Found:
        """What was found, with the best of whole rows for the tokens that have too little above their bounds."""
        limit = of_rows.limit
        if limit is None or not of_rows.some_guessed:
            return found
        counts = torch.bincount(found.rows, minlength=self.tokens)
        short = ((counts < limit) & of_rows.guessed).nonzero().squeeze(-1)
        if not len(short):
            return found
        part = _Scan(self.product.of_tokens(short), self.selection)
        parts = []
        for latents, block in part.product.blocks(self.x.dtype, whole=True):
            one = part.above(block, below_largest(block.affinity, limit))
            parts.append(_Found(short[one.rows], one.latents + latents.start, one.values, one.affinity))
        marks = torch.zeros(self.tokens, dtype=torch.bool, device=self.x.device)
        marks[short] = True
        both = _Found.cat([found[~marks[found.rows]], *parts], self.x)
        return both[both.rows.int().argsort(stable=True)]

    def missed(self, chosen: _Found, cut: Tensor | None, check: int) -> tuple[int, int]:
        """Over so many tokens: how many matches they have, and how many more affinities exceed the cut."""
        tokens = torch.arange(0, self.tokens, max(1, self.tokens // max(1, check)), device=self.x.device)
        own = chosen[torch.isin(chosen.rows, tokens)]
        limit = self.rule.row_limit
        if limit is not None:
            least = self.x.new_full((self.tokens,), torch.inf).scatter_reduce(0, own.rows, own.affinity, "amin")
            full = torch.bincount(own.rows, minlength=self.tokens) >= limit
            lowest = torch.where(full, least, 0.0)[:, None]
        else:
            bounds = self.rule.bounds(None) if cut is None else cut
            lowest = self.x.new_zeros(()) if bounds is None else bounds
        lowest = lowest * (1 + ROUNDING)
        level = lowest[own.rows, 0] if lowest.ndim == 2 else _each(lowest, own.latents)
        above_it, part, exceeding = int((own.affinity > level).sum()), self.product.of_tokens(tokens), 0
        for latents, block in part.blocks(self.x.dtype):
            rows = tokens[
                part.tokens_at(torch.arange(block.first, block.first + len(block.codes), device=tokens.device))
            ]
            at = lowest[rows] if lowest.ndim == 2 else lowest if lowest.ndim == 0 else lowest[latents]
            exceeding += len(above(block, at)[0])
        return len(own.rows), max(0, exceeding - above_it)

    def with_columns(self, found: _Found, settled: Settled, short: Bool[Tensor, " d_sae"]) -> tuple[_Found, Settled]:
        """What was chosen, with what latents in `short` choose from all that they have in place of what they chose."""
        columns = _Found.cat(self.columns(short.nonzero().squeeze(-1)), self.x)
        again = self.settle(columns)
        if self.rough_next is not None:
            settled, self.rough_next = replace(settled, next_bounds=self.rough_next), None
        chosen = _Found.cat([found[settled.keep & ~short[found.latents]], columns[again.keep]], self.x)
        chosen = chosen[(chosen.rows * self.d_sae + chosen.latents).argsort()]
        cut, next_bounds = (
            None if old is None or new is None else torch.where(short, new, old)
            for old, new in ((settled.cut, again.cut), (settled.next_bounds, again.next_bounds))
        )
        return chosen, Settled(torch.ones_like(chosen.rows, dtype=torch.bool), cut, next_bounds)

    def columns(self, latents: Int[Tensor, " n"]) -> list[_Found]:
        """The best tokens of each of these latents: twice its budget and four more, so that bounds can be told."""
        parts, budget = [], self.budget
        assert isinstance(budget, Tensor)
        for ids, block in self.product.columns(latents[budget[latents].argsort(descending=True)]):
            reach = 2 * int(budget[ids].max()) + 4
            found = _Found(*above(block, below_largest(block.affinity, reach)))
            found = found[rank_within(found.rows, found.affinity, len(ids)) < reach]
            tokens = self.product.tokens_at(found.latents + block.first)
            parts.append(_Found(tokens, ids[found.rows], found.values, found.affinity))
        return parts


class _RowBounds:
    """Below which nothing of a row has to be looked at, under a rule that limits rows."""

    def __init__(self, product: Product, limit: int | None) -> None:
        self.product, self.limit = product, limit
        self.guessed = torch.zeros(len(product.x), dtype=torch.bool, device=product.x.device)
        """Tokens whose bounds are a guess from a part of their latents, and not zero."""
        self.some_guessed = False
        self.bounds = torch.empty(0)
        self.first = -1

    def of(self, block: Block | WholeNumbers) -> Tensor:
        """Of these rows: for a tile that is the first of them so high that all of their tiles together are likely to
        have somewhat more than the limit above it."""
        if block.first != self.first:
            assert self.limit is not None
            expected = self.limit * block.share
            affinity = block.affinity
            likely = min(ceil(expected + 3 * sqrt(expected) + 3), affinity.shape[1])
            some = self.limit if block.share == 1 else min(self.limit, likely)
            self.first, self.bounds = block.first, below_largest(affinity, some)
            if some < self.limit:
                self.some_guessed = True
                places = torch.arange(block.first, block.first + len(self.bounds), device=self.guessed.device)
                self.guessed[self.product.tokens_at(places)] = (self.bounds > 0).squeeze(1)
        return self.bounds


def _each(bounds: Tensor, latents: Tensor) -> Tensor:
    """The bound of each match."""
    return bounds if bounds.ndim == 0 else bounds[latents]

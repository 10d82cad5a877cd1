"""The matches at a rank among more than fit into memory: counted, not held.

Read as integers, positive floats are in order, so equal parts of a range of integers are bins of floats. The rows are
read several times: first all matches are counted, of all latents together or of each; then those in the bin where the
wanted ones end, and in that of the next one, in finer bins; until a bin is one float. The result is exact, whatever the
order of the rows.

Memory is CELLS counters, whatever the number of rows and of matches. With one threshold for all latents that takes two
readings of float32, with 16,384 thresholds three.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from apportion.allocation import Pool, Rule
from apportion.ranking import BITS

CELLS = 2**25
"""Counters, at most."""
MOST_BINS = 2**16
"""Of one group."""
SPARE = 16
"""Matches that are kept beyond the wanted ones, in units of the reserve."""
AT_ONCE = 2**20
"""Counters that are summed together."""

Take = Callable[[Tensor, Tensor, int], Tensor | None]
Read = Callable[[Tensor, Take], int]
"""read(floor, take): encode all rows, hand latents and affinities of those above the floor, and the number of rows so
far, part by part to `take`, which may return a higher floor; returns the number of rows."""
Range = tuple[Int[Tensor, " groups"], Int[Tensor, " groups"]]
"""For each group the integers from the first to below the second."""


class Bins:
    """How many matches lie where in a range of affinities: of all latents together, or of each."""

    def __init__(self, low: Int[Tensor, " groups"], high: Int[Tensor, " groups"], cells: int) -> None:
        self.low, self.high = low, high
        self.bins = min(MOST_BINS, 1 << max(1, (cells // len(low)).bit_length() - 1))
        self.width = ((high - low + self.bins - 1) // self.bins).clamp_min(1)
        self.counts = torch.zeros(len(low), self.bins, dtype=torch.int64 if len(low) == 1 else torch.int32)
        self.beyond = torch.zeros_like(low)

    def add(self, latents: Int[Tensor, " n"], keys: Int[Tensor, " n"]) -> None:
        groups = latents.long() if len(self.low) > 1 else torch.zeros_like(keys)
        beyond = keys >= self.high[groups]
        self.beyond += torch.bincount(groups[beyond], minlength=len(self.low))
        here = ~beyond & (keys >= self.low[groups])
        groups, keys = groups[here], keys[here]
        cells = groups * self.bins + (keys - self.low[groups]) // self.width[groups]
        self.counts.view(-1).scatter_add_(0, cells, torch.ones_like(cells, dtype=self.counts.dtype))

    def highest(self, rank: Int[Tensor, " groups"]) -> tuple[Int[Tensor, " groups"], Int[Tensor, " groups"]]:
        """The highest bin that so many matches of each group reach, -1 if there are not so many; and how many reach it,
        or else how many there are."""
        parts, reach = [], []
        for rows in torch.arange(len(self.low)).split(max(1, AT_ONCE // self.bins)):
            reached = self.counts[rows].flip(1).cumsum(1).flip(1) + self.beyond[rows, None]
            parts.append((reached >= rank[rows, None]).sum(1) - 1)
            reach.append(reached.gather(1, parts[-1].clamp_min(0)[:, None]).squeeze(1))
        return torch.cat(parts), torch.cat(reach)

    def range_of(self, part: Int[Tensor, " groups"]) -> Range:
        """What lies in these bins."""
        low = self.low + part * self.width
        return low, torch.minimum(low + self.width, self.high)

    def above(self, part: Int[Tensor, " groups"]) -> Int[Tensor, " groups"]:
        """How many matches lie in these bins or above."""
        sums = []
        for rows in torch.arange(len(self.low)).split(max(1, AT_ONCE // self.bins)):
            later = torch.arange(self.bins) >= part[rows, None]
            sums.append(torch.where(later, self.counts[rows], 0).sum(1))
        return torch.cat(sums) + self.beyond

    def holding(self, rank: Int[Tensor, " groups"]) -> tuple[Range, Int[Tensor, " groups"]]:
        """The bin that holds the match of that rank (1 is the best) of each group, and how many lie above it."""
        part, reach = self.highest(rank)
        part = part.clamp_min(0)
        return self.range_of(part), reach - self.counts.gather(1, part[:, None]).squeeze(1)


def counted(
    rule: Rule, read: Read, dtype: torch.dtype, reserve: float, tokens: int | None = None
) -> tuple[Pool | None, int]:
    """A pool that holds, of each group, the last of the wanted matches and the next one; and how many matches lie above
    the threshold between them. None and the number of rows if the floor, what is `kept` of what the rows want (those so
    far, if `tokens` does not say how many there are), was too high in the end."""
    several = isinstance(rule.wanted(1), Tensor)
    groups, shape = rule.threshold.numel() if several else 1, rule.threshold.shape

    def floor_at(low: Tensor) -> Tensor:
        floors = below(low, dtype)
        return floors if several else floors[0].expand(shape)

    infinity = int(torch.full((1,), torch.inf, dtype=dtype).view(BITS[dtype.itemsize]))
    first = Bins(torch.ones(groups, dtype=torch.int64), torch.full((groups,), infinity), CELLS)
    tokens, floored = count_all(rule, read, first, floor_at, reserve, tokens)
    held = first.above(floored)
    available = torch.where(floored > 0, tokens if several else held, held)
    wanted = per_group(rule.wanted_of(tokens, available.to(rule.threshold.device)))
    if bool(((floored > 0) & (wanted >= held)).any()):
        return None, tokens
    ranks = [torch.minimum(rank, held) for rank in (wanted.clamp_min(1), wanted + 1)]
    found = [first.holding(rank) for rank in ranks]
    del first  # its counters make room for the others
    while any(bool((high - low > 1).any()) for (low, high), _ in found):
        finer = [Bins(*part, CELLS // 2) for part, _ in found]

        def refine(latents: Tensor, affinity: Tensor, tokens: int, finer: list[Bins] = finer) -> None:
            latents, keys = latents.cpu(), keys_of(affinity)
            for bins in finer:
                bins.add(latents, keys)

        read(floor_at(found[1][0][0]), refine)
        found = [bins.holding(rank) for bins, rank in zip(finer, ranks, strict=True)]
    (last, above), (next_one, _) = ((low, over) for (low, _), over in found)
    there = [held >= 1, held > wanted]
    latents = torch.cat([torch.arange(groups)[some] for some in there])
    affinity = below(torch.cat([low[some] for low, some in zip((last, next_one), there, strict=True)]) + 1, dtype)
    better = torch.where(held >= 1, ranks[0] - 1, 0)
    here = rule.threshold.device
    better, available = better.to(here) if several else int(better), available.to(here)
    pool = Pool(latents.to(here), affinity.to(here), tokens, torch.zeros_like(rule.threshold), better, available)
    tied = (last == next_one) & (held > wanted)
    return pool, int(torch.where(tied, above, torch.minimum(wanted, held)).sum())


def count_all(
    rule: Rule, read: Read, bins: Bins, floor_at: Callable[[Tensor], Tensor], reserve: float, total: int | None
) -> tuple[int, Int[Tensor, " groups"]]:
    """Count all matches above a floor that rises with the rows; returns the number of rows, and the floor's bins."""
    floored, looked = torch.zeros_like(bins.low), 0

    def count(latents: Tensor, affinity: Tensor, tokens: int) -> Tensor | None:
        nonlocal floored, looked
        bins.add(latents.cpu(), keys_of(affinity))
        if tokens < 2 * looked:
            return None
        looked = tokens
        keep = kept(per_group(rule.wanted(total or tokens)), reserve)
        floored = torch.maximum(floored, bins.highest(keep)[0])
        return floor_at(bins.range_of(floored)[0])

    return read(torch.zeros_like(rule.threshold), count), floored


def kept(wanted: Int[Tensor, " groups"], reserve: float) -> Int[Tensor, " groups"]:
    """Matches to keep of each group, of which so many are wanted: also of one of which none are, for so far is not yet
    in the end, and with a larger reserve more of all."""
    return (reserve * (wanted + SPARE).double()).long()


def per_group(wanted: int | Int[Tensor, " groups"]) -> Int[Tensor, " groups"]:
    return torch.as_tensor(wanted).view(-1).cpu()


def keys_of(affinity: Float[Tensor, " n"]) -> Int[Tensor, " n"]:
    return affinity.detach().cpu().contiguous().view(BITS[affinity.element_size()]).long()


def below(keys: Int[Tensor, " n"], dtype: torch.dtype) -> Float[Tensor, " n"]:
    """The floats just below those that are read as these integers."""
    return (keys - 1).to(BITS[dtype.itemsize]).view(dtype)

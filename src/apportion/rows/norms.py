"""The norms of a shard's rows as a histogram, from which the token filter is fitted again whenever rows are added.

A shard keeps of each kind of row (ordinary ones, first positions, special tokens) how many have a norm in each bin, and
the sum of these. A bin is what the first bits of a float32 say (16 bins to an octave), so histograms are the same on
every machine, and adding them up is exact in the counts. The median is interpolated within its bin: on SmolLM2's
activations it is within a thousandth of the exact one, where ten times the median is what the filter asks for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from apportion.rows.filter import TokenFilter, kinds_of

SHIFT = 19
"""Bits of a float32 that a bin leaves out: 4 of the 23 behind the point remain."""
MOST_BINS = 0x7F800000 >> SHIFT
"""Of finite numbers."""
MOST_ROWS = 1 << 40
KINDS = ("ordinary", "first_position", "special")

Histogram = dict[int, tuple[int, float]]
"""For each bin the number of norms and their sum."""


def histograms(
    norms: Float[Tensor, " n"], tokens: Int[Tensor, " n"], positions: Int[Tensor, " n"], special_ids: tuple[int, ...]
) -> dict[str, list[list[float]]]:
    """For each kind of row [bin, count, sum of norms], ascending; JSON-able."""
    kinds = kinds_of(tokens, positions, special_ids)
    return {kind: _histogram(norms[rows]) for kind, rows in kinds.items()}


def _histogram(norms: Float[Tensor, " n"]) -> list[list[float]]:
    bins = (norms.float().contiguous().view(torch.int32) >> SHIFT).clamp(max=MOST_BINS - 1)
    found, where, counts = bins.unique(return_inverse=True, return_counts=True)
    sums = torch.zeros(len(found), dtype=torch.float64).index_add_(0, where, norms.double()).nan_to_num()
    return [[b, n, s] for b, n, s in zip(found.tolist(), counts.tolist(), sums.tolist(), strict=True)]


def check_histograms(found: Any, where: str) -> None:
    """ValueError unless it is what `histograms` makes."""
    kinds = found if isinstance(found, dict) else {}
    if kinds.keys() != set(KINDS) or not all(map(_is_histogram, kinds.values())):
        raise ValueError(f"{where} are no histograms of norms.")


def _is_histogram(found: Any) -> bool:
    if not isinstance(found, list) or not all(isinstance(entry, list) and len(entry) == 3 for entry in found):
        return False
    whole = all(type(b) is int and type(n) is int and 0 <= b < MOST_BINS and 0 < n < MOST_ROWS for b, n, _ in found)
    return whole and all(isinstance(s, float) for _, _, s in found)


def fitted(asked: TokenFilter, shards: Iterable[Mapping[str, Any]], special_ids: Iterable[int]) -> TokenFilter:
    """The filter with the median norm of all ordinary rows of these shards (of all rows, where none is ordinary)."""
    asked = replace(asked, special_ids=tuple(sorted(set(special_ids))))
    if asked.median_norm is not None:
        return asked
    shards = list(shards)
    together = _added(shards, KINDS[:1]) or _added(shards, KINDS)
    return replace(asked, median_norm=_median(together)) if together else asked


def num_ordinary(shards: Iterable[Mapping[str, Any]]) -> int:
    return sum(count for shard in shards for _, count, _ in shard[KINDS[0]])


def _added(shards: Iterable[Mapping[str, Any]], kinds: Iterable[str]) -> Histogram:
    together: Histogram = {}
    for entry in (entry for shard in shards for kind in kinds for entry in shard[kind]):
        count, total = together.get(entry[0], (0, 0.0))
        together[entry[0]] = count + entry[1], total + entry[2]
    return together


def _median(together: Histogram) -> float:
    """Of an even number the lower of the two in the middle, as torch has it."""
    rank = (sum(count for count, _ in together.values()) - 1) // 2
    for b in sorted(together):
        count = together[b][0]
        if rank < count:
            low, high = edges(b)
            return low + (high - low) * (rank + 0.5) / count
        rank -= count
    raise AssertionError("there is a norm")


def edges(b: int) -> tuple[float, float]:
    """The norms of a bin: from the first to below the second."""
    low, high = torch.tensor([b << SHIFT, (b + 1) << SHIFT], dtype=torch.int32).view(torch.float32).tolist()
    return low, high


def counted(token_filter: TokenFilter, shard: Mapping[str, Any]) -> dict[str, Any] | None:
    """Rows of a shard that take part (`kept`), the sum of their norms and rows left out by reason; None where the
    histogram cannot tell, because the filter's limit lies within a bin that has rows."""
    left_out, kept, norm_sum = {"first_position": 0, "special": 0, "norm_outlier": 0}, 0, 0.0
    asked = {"first_position": token_filter.first_position, "special": token_filter.special_tokens}
    limit = token_filter.limit
    for kind, entries in shard.items():
        for b, count, total in entries:
            low, high = edges(b)
            if asked.get(kind):
                left_out[kind] += count
            elif limit is None or high <= limit:
                kept, norm_sum = kept + count, norm_sum + total
            elif low > limit:
                left_out["norm_outlier"] += count
            else:
                return None
    return {"kept": kept, "norm_sum": norm_sum, "left_out": left_out}


def counted_exactly(token_filter: TokenFilter, columns: Mapping[str, Tensor]) -> dict[str, Any]:
    """The same from the norms, tokens and positions themselves."""
    left_out = {"first_position": 0, "special": 0, "norm_outlier": 0}
    norms = columns["norms"]
    mask: Bool[Tensor, " n"] = token_filter.counted(norms, columns["tokens"], columns["positions"], left_out)
    return {"kept": int(mask.sum()), "norm_sum": float(norms[mask].double().sum()), "left_out": left_out}

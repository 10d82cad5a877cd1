"""What a cache says of each hookpoint, made again from its shards: the token filter, its counts, norms.

Each file of activations has its statistics in the header (`stats` in its metadata, JSON): histograms of norms
(norms.py) and what its precision lost. So the filter is always that of all rows, in whatever order they came.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from apportion.about import Site
from apportion.rows.filter import REASONS, TokenFilter
from apportion.rows.layout import folder_name
from apportion.rows.norms import check_histograms, counted, counted_exactly, fitted, num_ordinary
from apportion.rows.place import Place


def refitted(manifest: Mapping[str, Any], shards: Sequence[Mapping[str, Any]], place: Place) -> dict[str, Any]:
    """`hookpoints` of the manifest, for these shards."""
    asked = TokenFilter.from_dict(manifest["plan"]["filter"]) if "plan" in manifest else TokenFilter()
    found = manifest["hookpoints"].items()
    return {
        name: of_hookpoint(name, said["d_in"], asked, tuple(said["filter"]["special_ids"]), shards, place)
        for name, said in found
    }


def of_hookpoint(
    hookpoint: str, d_in: int, asked: TokenFilter, special_ids: tuple[int, ...], shards: Sequence[Mapping[str, Any]],
    place: Place,
) -> dict[str, Any]:  # fmt: skip
    """What the manifest says of a hookpoint with these shards."""
    stats = place.together(lambda shard: place.head(hookpoint, shard["shard"], shard, stats_of), shards)
    norms = [said["norms"] for said in stats]
    token_filter = fitted(asked, norms, special_ids)
    counts = [
        counted(token_filter, each) or counted_exactly(token_filter, _columns(place, hookpoint, shard))
        for each, shard in zip(norms, shards, strict=True)
    ]
    rows, kept = sum(shard["rows"] for shard in shards), sum(count["kept"] for count in counts)
    site = Site(
        hookpoint=hookpoint,
        d_in=d_in,
        filter=token_filter.to_dict(),
        median_norm=token_filter.median_norm,
        median_norm_rows=num_ordinary(norms),
        mean_norm=sum(count["norm_sum"] for count in counts) / max(1, kept),
        filtered={reason: sum(count["left_out"][reason] for count in counts) for reason in REASONS},
        filtered_share=1 - kept / max(1, rows),
        precision_fvu=_precision_fvu([said["lost"] for said in stats if "lost" in said]),
    )
    return {"folder": folder_name(hookpoint), **site.to_json()}


def stats_of(file: Path) -> dict[str, Any]:
    """The statistics in the header of a file of activations; ValueError if it has none."""
    try:
        with safe_open(file, framework="pt") as opened:
            stats = json.loads((opened.metadata() or {})["stats"])
    except (OSError, SafetensorError, ValueError, KeyError, RecursionError) as error:
        raise ValueError(f"{file} has no statistics ({type(error).__name__}: {error}): collect it again.") from error
    check_histograms(stats.get("norms") if isinstance(stats, dict) else None, f"norms in {file}")
    lost = stats.get("lost", [0.0, 0.0])
    if not (isinstance(lost, list) and len(lost) == 2 and all(isinstance(total, float) for total in lost)):
        raise ValueError(f"lost in {file} are no sums of squares.")
    return stats


def _columns(place: Place, hookpoint: str, shard: Mapping[str, Any]) -> dict[str, Any]:
    labels = place.labels(shard["shard"], shard, lambda file: _read(file, "tokens", "positions"))
    return labels | place.head(hookpoint, shard["shard"], shard, lambda file: _read(file, "norms"))


def _read(file: Path, *names: str) -> dict[str, Any]:
    with safe_open(file, framework="pt") as opened:
        return {name: opened.get_tensor(name) for name in names}


def _precision_fvu(lost: list[list[float]]) -> float | None:
    """None where nothing says so."""
    total = sum(variance for _, variance in lost)
    return sum(error for error, _ in lost) / total if total else None

"""What a cache says of itself: its manifest, with what the journal has besides.

While a cache is collected its journal (journal.py) has shards that the manifest does not have yet: whoever reads the
manifest gets both together, the shards from the first to before the first gap.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from apportion.about import About
from apportion.rows.journal import JOURNAL
from apportion.rows.layout import DIGEST, GOES_ON, MANIFEST, OF_FILES, UNFINISHED, check_manifest, check_shard
from apportion.rows.place import Place, place_of
from apportion.rows.refit import refitted


def read_manifest(path: str | Path | Place) -> dict[str, Any]:
    """The manifest of a cache, with what the journal has. ValueError, naming the field, unless it is whole and fits
    itself."""
    place = place_of(path)
    while True:
        manifest = read_written(place)
        if manifest["format_version"] == 1:
            return manifest
        known = known_shards(manifest, place)
        if read_written(place) == manifest:  # else the journal has moved into it meanwhile
            return _with_journal(manifest, known, place)


def read_written(path: str | Path | Place) -> dict[str, Any]:
    """The manifest as it is written."""
    place = place_of(path)
    if (manifest := place.manifest()) is None:
        raise ValueError(f"{str(place)!r} is no activation cache (no {MANIFEST}): make one with `apportion collect`")
    check_manifest(manifest, str(place))
    return manifest


def _with_journal(manifest: dict[str, Any], known: Mapping[int, dict[str, Any]], place: Place) -> dict[str, Any]:
    if list(known.values()) == manifest["shards"]:
        return manifest
    shards = from_the_first(known, manifest["shard_contexts"])
    rows, contexts = (sum(shard[name] for shard in shards) for name in ("rows", "contexts"))
    ended = manifest["ended"] if manifest["ended"] in GOES_ON else UNFINISHED
    hookpoints = refitted(manifest, shards, place)
    return {**manifest, "shards": shards, "rows": rows, "contexts": contexts, "ended": ended, "hookpoints": hookpoints}


def known_shards(manifest: Mapping[str, Any], path: str | Path | Place) -> dict[int, dict[str, Any]]:
    """The shards that are there, by their numbers, ascending: of the manifest as it is written, and the journal.
    ValueError for a line that is no shard of this cache."""
    place = place_of(path)
    return with_lines({shard["shard"]: shard for shard in manifest["shards"]}, place.lines(), manifest, place)


def with_lines(
    known: Mapping[int, dict[str, Any]], more: Iterable[dict[str, Any]], manifest: Mapping[str, Any], where: object
) -> dict[int, dict[str, Any]]:
    """The shards that are known, and what lines of the journal say besides."""
    known = dict(known)
    for line in more:
        try:
            check_shard(line, manifest, name := f"journal.{line.get('shard')}")
            if line["rows"] > line["contexts"] * manifest["context_tokens"]:
                raise ValueError(f"{name} has {line['rows']} rows of {line['contexts']} contexts.")
        except ValueError as error:
            raise ValueError(f"{where}/{JOURNAL}: {error} Collect the cache again.") from None
        known[line["shard"]] = line
    return {number: known[number] for number in sorted(known) if known[number]["contexts"]}


def from_the_first(known: Mapping[int, dict[str, Any]], shard_contexts: int) -> list[dict[str, Any]]:
    """The shards from the first to before a gap: behind one that is not full there is a gap."""
    shards: list[dict[str, Any]] = []
    while len(shards) in known:
        shards.append(known[len(shards)])
        if shards[-1]["contexts"] < shard_contexts:
            break
    return shards


def about_cache(path: str | Path) -> About:
    """What is known of a cache; `sites` are all that it has."""
    return about_manifest(read_manifest(path))


def about_manifest(manifest: Mapping[str, Any]) -> About:
    """Everything in a manifest but the list of shards."""
    shared = {name: value for name, value in manifest.items() if name not in (*OF_FILES, DIGEST)}
    sites = [
        {"hookpoint": name} | {key: value for key, value in said.items() if key != "folder"}
        for name, said in manifest["hookpoints"].items()
    ]
    return About.from_json(shared | {"sites": sites})

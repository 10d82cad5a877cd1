"""A damaged cache without its damaged shards, and several caches as one.

repair("acts")                  takes out what does not fit its digests; `collect` makes it again
merge(["a", "b"], "ab")         the shards of a, then those of b, whose contexts are numbered on
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from apportion.about import TextRecord
from apportion.disk import whole_folder, write_json, write_tensors
from apportion.progress import progress_bar
from apportion.rows.journal import JOURNAL, add_line
from apportion.rows.layout import MANIFEST, UNFINISHED, acts_file, sealed, token_file
from apportion.rows.manifest import from_the_first, known_shards, read_manifest, read_written
from apportion.rows.out import folder_lock
from apportion.rows.place import Here
from apportion.rows.refit import refitted
from apportion.rows.shards import sample_sha256_of, sha256_of
from apportion.rows.writer import check_free_disk, check_out
from apportion.trust import expanded
from apportion.urls import url_of


def repair(path: str | Path, progress: bool = False) -> list[str]:
    """Read all of a cache and take out the shards of which a file is damaged or missing; their files, which are
    returned. What was being collected when a machine went down is put in order, too."""
    folder = _folder(path)
    if read_written(folder)["format_version"] == 1:
        raise ValueError(f"{str(path)!r} has format version 1, whose shards depend on each other: collect it again.")
    looked_at, bad, done = known_shards(read_written(folder), folder), dict[int, list[str]](), 0
    with progress_bar("verifying", sum(shard["rows"] for shard in looked_at.values()), show=progress) as show:
        for number, shard in looked_at.items():
            if files := [file for file, digest in shard["sha256"].items() if not _is(folder / file, digest)]:
                bad[number] = files
            done += shard["rows"]
            show(done)
    if not bad:
        return []
    files = [file for files in bad.values() for file in files]
    with folder_lock(folder):  # not while all is read: others may be at work
        manifest = read_written(folder)
        if "plan" not in manifest:
            raise ValueError(
                f"{str(path)!r} is damaged ({', '.join(files)}), and was not made by collect: merge or write it again."
            )
        known = known_shards(manifest, folder)
        _rewrite(folder, manifest, {n: shard for n, shard in known.items() if n not in bad or shard != looked_at[n]})
    return files


def _folder(path: str | Path) -> Path:
    if url_of(path) is not None:
        raise ValueError(f"{path} lies at a URL: copy it to a folder here, do this there, and copy it back.")
    return expanded(path)


def _is(file: Path, digest: str) -> bool:
    with suppress(OSError):
        return file.is_file() and sha256_of(file) == digest
    return False


def _rewrite(folder: Path, manifest: dict[str, Any], known: Mapping[int, dict[str, Any]]) -> None:
    """Manifest and journal that have these shards alone."""
    shards = from_the_first(known, manifest["shard_contexts"])
    hookpoints = refitted(manifest, shards, Here(folder))
    for number in {shard["shard"] for shard in manifest["shards"]} - known.keys():
        add_line(folder, {"shard": number, "contexts": 0, "rows": 0, "sha256": {}, "sample_sha256": {}})
    counts = {name: sum(shard[name] for shard in shards) for name in ("rows", "contexts")}
    write_json(
        folder / MANIFEST,
        sealed({**manifest, **counts, "ended": UNFINISHED, "shards": shards, "hookpoints": hookpoints}),
    )
    (folder / JOURNAL).unlink(missing_ok=True)
    for shard in list(known.values())[len(shards) :]:
        add_line(folder, shard)


SAME = ("dtype", "model", "model_dtype", "tokenizer", "bos", "context_tokens", "layout", "bos_prepended")
"""What must be equal for rows to stand in one cache."""


def merge(paths: Sequence[str | Path], out: str | Path) -> dict[str, Any]:
    """One cache with the rows of several, in this order; its manifest. Files of activations are linked where the disk
    can do that, else copied. ValueError for caches of other models, hookpoints or settings, and of format version 1."""
    folders, place = [_folder(path) for path in paths], check_out(_folder(out))
    manifests = [read_manifest(folder) for folder in folders]
    if len(manifests) < 2:
        raise ValueError(f"to merge takes two caches or more, got {len(manifests)}.")
    for path, manifest in zip(paths, manifests, strict=True):
        _check_same(manifests[0], manifest, paths[0], path)
    check_free_disk(place, sum(file.stat().st_size for folder in folders for file in folder.glob("tokens-*")))
    with whole_folder(place, last=[MANIFEST], locked=True) as partial:
        shards: list[dict[str, Any]] = []
        for folder, manifest in zip(folders, manifests, strict=True):
            first = sum(shard["contexts"] for shard in shards)
            shards += [
                _taken(folder, partial, manifest, shard, len(shards) + i, first)
                for i, shard in enumerate(manifest["shards"])
            ]
        merged = _merged(manifests, shards)
        merged["hookpoints"] = refitted(merged, shards, Here(partial))
        write_json(partial / MANIFEST, sealed(merged))
    return read_manifest(place)


def _check_same(one: Mapping[str, Any], other: Mapping[str, Any], path: Any, other_path: Any) -> None:
    if other["format_version"] == 1:
        raise ValueError(f"{str(other_path)!r} has format version 1: collect it again to merge it.")
    for name in SAME:
        if one.get(name) != other.get(name):
            raise ValueError(
                f"{str(other_path)!r} has another {name} than {str(path)!r} ({other.get(name)}, and not "
                f"{one.get(name)}): their rows do not belong together."
            )
    places = [{name: said["d_in"] for name, said in manifest["hookpoints"].items()} for manifest in (one, other)]
    if places[0] != places[1]:
        raise ValueError(f"{str(other_path)!r} has rows at {places[1]}, and {str(path)!r} at {places[0]}.")


def _taken(
    folder: Path, to: Path, manifest: Mapping[str, Any], shard: Mapping[str, Any], number: int, first: int
) -> dict[str, Any]:
    """A shard of another cache as shard `number` of this one, with contexts from `first` on."""
    labels = load_file(folder / token_file(shard["shard"]))
    labels["contexts"] = labels["contexts"] + first
    write_tensors(to / token_file(number), labels)
    files = {token_file(shard["shard"]): token_file(number)}
    digests: dict[str, dict[str, str]] = {"sha256": {}, "sample_sha256": {}}
    for name in manifest["hookpoints"]:
        files[acts_file(name, shard["shard"])] = acts_file(name, number)
        (to / acts_file(name, number)).parent.mkdir(exist_ok=True)
        _link(folder / acts_file(name, shard["shard"]), to / acts_file(name, number))
    for old, new in files.items():
        for field, digest in (("sha256", sha256_of), ("sample_sha256", sample_sha256_of)):
            digests[field][new] = digest(to / new) if new == token_file(number) else shard[field][old]
    return {"shard": number, "contexts": shard["contexts"], "rows": shard["rows"], **digests}


def _link(file: Path, to: Path) -> None:
    try:
        to.hardlink_to(file.resolve())
    except OSError:  # another disk, or one without links
        shutil.copyfile(file, to)


def _merged(manifests: Sequence[Mapping[str, Any]], shards: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the caches say together, without the filter; nobody can go on with it."""
    texts = [TextRecord.from_json(manifest["text"], "text").in_words() for manifest in manifests]
    counts = {name: sum(shard[name] for shard in shards) for name in ("rows", "contexts")}
    left_out: dict[str, dict[str, int]] = {"text_skipped": {}, "text_repaired": {}}
    for manifest in manifests:
        for field, of in left_out.items():
            for reason, count in (manifest.get(field) or {}).items():
                of[reason] = of.get(reason, 0) + count
    rest = {name: value for name, value in manifests[0].items() if name not in ("plan", "manifest_sha256")}
    asked = sum(manifest.get("tokens_asked") or manifest["rows"] for manifest in manifests)
    ended = {"tokens_asked": asked, "ended": "complete", "text_ended_early": counts["rows"] < asked}
    text = {"text": TextRecord(where=" + ".join(texts)).to_json()}
    size = max(shard["contexts"] for shard in shards)
    return {**rest, **counts, **left_out, **ended, **text, "shard_contexts": size, "shards": list(shards)}

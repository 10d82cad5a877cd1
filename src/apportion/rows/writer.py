"""Writing an activation cache (its layout is explained in store.py), shard by shard, by any number of processes.

    with CacheWriter("acts", widths, ..., plan=plan, about=about) as cache:
        with cache.claim(3) as claimed:              no other process makes shard 3 meanwhile
            cache.write(3, acts, tokens, positions, contexts)
        cache.finish("complete")

A shard is committed when its files are there and the journal has its line. `Out` and `RemoteOut` know where that is, in
a folder or at a URL. Whoever comes next goes on with what there is; what is in a shard depends on nothing but the
numbers of its contexts, so the files are those of a collection in one piece.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int, Shaped
from safetensors import safe_open
from torch import Tensor

from apportion.disk import all_finite, existing, occupied
from apportion.durable import place_in, sweep
from apportion.locks import Lock, lock_of
from apportion.rows.copies import usual_copies
from apportion.rows.filter import TokenFilter, row_norms
from apportion.rows.layout import (
    FORMAT_VERSION,
    GOES_ON,
    LABELS,
    MANIFEST,
    UNFINISHED,
    acts_file,
    folder_name,
    sealed,
    token_file,
)
from apportion.rows.manifest import from_the_first, read_manifest, read_written
from apportion.rows.norms import histograms
from apportion.rows.numbers import lost, restored, row_bytes, stored
from apportion.rows.out import Out, folder_lock, tidy
from apportion.rows.place import bytes_of_a_row
from apportion.rows.refit import of_hookpoint
from apportion.rows.remote_out import Claim, RemoteOut, check_may_put, check_url
from apportion.trust import resolved
from apportion.urls import url_of

SHARD_ROWS = 1 << 17
SHARD_BYTES = 1 << 30
"""A shard holds at most this many bytes over all hookpoints, because that is what is held in memory."""
BEGINNING_S = 2


class CacheWriter:
    """Writes a cache, or goes on with one. Whatever ends it, shards stay that are whole; without any nothing is left.

    `plan` says what the bytes of the cache depend on; without one there is no manifest before `finish`, and nobody can
    go on with it. `about(ended, contexts)` is what the manifest says besides of that many contexts.
    """

    def __init__(
        self,
        out: str | Path,
        widths: Mapping[str, int],
        *,
        dtype: str,
        token_filter: TokenFilter,
        special_ids: tuple[int, ...],
        shard_contexts: int,
        plan: Mapping[str, Any] | None = None,
        about: Callable[[str, int], Mapping[str, Any]] = lambda ended, contexts: {},
    ) -> None:
        self.out = RemoteOut(url) if (url := url_of(out)) else Out(resolved(out))
        self.place = self.out.place
        self.widths, self.dtype, self.asked = dict(widths), dtype, token_filter
        self.special_ids, self.shard_contexts, self.plan, self.about = special_ids, shard_contexts, plan, about
        self.shards: dict[int, dict[str, Any]] = {}
        """Those that are there, as far as this process has looked (`look`)."""
        self.began = False

    def __enter__(self) -> CacheWriter:
        folders = [folder_name(name) for name in self.widths]
        try:
            self.out.begin(folders)
            with self.out.lock():
                if self.out.has_manifest():
                    check_plan(read_written(self.out.reading), self.plan, self.place)
                    self.look()
                else:
                    self.began = True
                    if self.plan is not None:
                        self.write_manifest(UNFINISHED, [])
            self.out.make_folders(folders)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: Any) -> None:
        try:
            if not self.began or (self.shards and self.out.has_manifest()):
                return
            with suppress(OSError, ValueError), self.out.lock():
                if (self.plan is None or not self.look()) and not self.out.others():
                    self.out.remove([folder_name(name) for name in self.widths])
            self.out.leave()
        finally:
            self.out.end()

    def look(self) -> dict[int, dict[str, Any]]:
        """The shards that are there now, others' too."""
        self.shards = self.out.look(self.shards)
        return self.shards

    @property
    def contexts(self) -> int:
        return sum(shard["contexts"] for shard in self.shards.values())

    @property
    def rows(self) -> int:
        return sum(shard["rows"] for shard in self.shards.values())

    @property
    def readable_rows(self) -> int:
        """Those before the first gap."""
        return sum(shard["rows"] for shard in from_the_first(self.shards, self.shard_contexts))

    @contextmanager
    def claim(self, number: int) -> Iterator[Lock | Claim | None]:
        """Within the block no other process makes this shard; None if one is at it."""
        with self.out.claim(number) as claimed:
            if claimed is not None:
                self.look()
            yield claimed

    def is_free(self, number: int) -> bool:
        """Whether nobody makes this shard now."""
        return self.out.is_free(number)

    def held(self, number: int, contexts: int) -> tuple[dict[str, Tensor], Int[Tensor, "3 n"]]:
        """The rows of the first contexts of a shard at each hookpoint, and their labels; not of one in 8 bits."""
        shard, reading = self.shards[number], self.out.reading
        labels = torch.stack([reading.labels(number, shard, _column(label)) for label in LABELS])
        rows = int((labels[2] < number * self.shard_contexts + contexts).sum())
        acts = {
            name: reading.acts(name, number, shard, _column("acts", rows), bytes_of_a_row(self.dtype, d_in))
            for name, d_in in self.widths.items()
        }
        return acts, labels[:, :rows]

    def tokens(self, number: int) -> Int[Tensor, " rows"]:
        """The tokens of a shard."""
        return self.out.reading.labels(number, self.shards[number], _column("tokens"))

    def write(
        self, number: int, acts: Mapping[str, Shaped[Tensor, "n d_in"]], labels: Int[Tensor, "3 n"],
        lock: Lock | Claim | None = None, contexts: int | None = None,
    ) -> None:  # fmt: skip
        """Commit a shard: its rows at each hookpoint, and tokens, positions and contexts. `lock` is what claims it;
        `contexts` how many it has, if some may have no rows."""
        for name, x in acts.items() if self.dtype == "int8" else ():
            if not all_finite(x):
                raise ValueError(f"rows at {name!r} are not finite (NaN or infinity), which 8 bits cannot hold.")
        columns = {name: column.int().clone() for name, column in zip(LABELS, labels, strict=True)}
        if self.plan is not None and number in self.shards:
            self._note({"shard": number, "contexts": 0, "rows": 0}, lock)
        files = [self.out.save(token_file(number), columns, None)]
        for name, x in acts.items():
            held = stored(x, self.dtype)
            norms = row_norms(restored(held))
            of = (norms, columns["tokens"], columns["positions"])
            stats: dict[str, Any] = {"norms": histograms(*of, self.special_ids)}
            if self.dtype == "int8":
                mask = self.asked.fit(*of, self.special_ids).mask_of(*of)
                stats["lost"] = lost(x[mask], {c: part[mask] for c, part in held.items()})
            held = {c: part.contiguous() for c, part in held.items()}
            files.append(self.out.save(acts_file(name, number), {**held, "norms": norms}, {"stats": json.dumps(stats)}))
        self.out.publish(digests := self.out.digests(files))
        self._note({
            "shard": number,
            "contexts": len(columns["contexts"].unique()) if contexts is None else contexts,
            "rows": len(columns["tokens"]),
            **digests,
        }, lock)  # fmt: skip

    def _note(self, line: dict[str, Any], lock: Lock | Claim | None) -> None:
        if lock is not None:
            lock.check()
        line = {"sha256": {}, "sample_sha256": {}, **line}
        if self.plan is not None:
            self.out.note(line)
        self.shards[line["shard"]] = line
        if not line["contexts"]:
            del self.shards[line["shard"]]

    def finish(self, ended: str) -> dict[str, Any]:
        """The manifest of the shards up to the first gap, written; of the journal stays what lies behind the gap."""
        with self.out.lock() as lock:
            self.look()
            shards = from_the_first(self.shards, self.shard_contexts)
            if lock is not None:
                lock.check()
            manifest = self.write_manifest(ended if shards else UNFINISHED, shards)
            self.out.tidy()
        return manifest

    def write_manifest(self, ended: str, shards: list[dict[str, Any]]) -> dict[str, Any]:
        rows, contexts = (sum(shard[name] for shard in shards) for name in ("rows", "contexts"))
        of = self.asked, self.special_ids, shards, self.out.reading
        manifest = sealed({
            "format": "apportion-activations",
            "format_version": FORMAT_VERSION,
            "model": {},
            "text": {},
            "contexts": contexts,
            **self.about(ended, contexts),
            **({"plan": self.plan} if self.plan is not None else {}),
            "dtype": self.dtype,
            "rows": rows,
            "shard_contexts": self.shard_contexts,
            "hookpoints": {name: of_hookpoint(name, d_in, *of) for name, d_in in self.widths.items()},
            "shards": shards,
        })  # fmt: skip
        self.out.write_manifest(manifest)
        return manifest


def _column(name: str, rows: int | None = None) -> Callable[[Path], Tensor]:
    """Reads the first rows of a column of a file."""

    def read(file: Path) -> Tensor:
        with safe_open(file, framework="pt") as opened:
            return opened.get_slice(name)[:rows].clone()

    return read


class StoreWriter:
    """A cache of rows that come one after the other, written by one process, with a manifest at the end."""

    def __init__(
        self, out: str | Path, widths: Mapping[str, int], *, dtype: str, token_filter: TokenFilter,
        special_ids: tuple[int, ...],
    ) -> None:  # fmt: skip
        asked = {"dtype": dtype, "token_filter": token_filter, "special_ids": special_ids}
        self.cache = CacheWriter(check_out(out), widths, **asked, shard_contexts=1)
        self.shard_rows = shard_rows(widths, dtype)
        self._acts: dict[str, list[Tensor]] = {name: [] for name in widths}
        self._labels: list[Int[Tensor, "3 n"]] = []

    def __enter__(self) -> StoreWriter:
        self.cache.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.cache.__exit__()

    def add(
        self, acts: Mapping[str, Shaped[Tensor, "n d_in"]], tokens: Tensor, positions: Tensor, contexts: Tensor
    ) -> None:
        """Append rows."""
        for name, x in acts.items():
            self._acts[name].append(x)
        self._labels.append(torch.stack([tokens, positions, contexts]))
        while sum(labels.shape[1] for labels in self._labels) >= self.shard_rows:
            self._flush()

    def _flush(self) -> None:
        """Write the first pending rows as one shard."""
        labels, held = torch.cat(self._labels, 1), {name: torch.cat(parts) for name, parts in self._acts.items()}
        first = {name: x[: self.shard_rows] for name, x in held.items()}
        self.cache.write(len(self.cache.shards), first, labels[:, : self.shard_rows])
        self._labels = [labels[:, self.shard_rows :]]
        self._acts = {name: [x[self.shard_rows :]] for name, x in held.items()}

    def finish(self, about: Mapping[str, Any]) -> dict[str, Any]:
        """Write what is pending and the manifest, which says this besides and is returned."""
        if any(labels.shape[1] for labels in self._labels):
            self._flush()
        if not (shards := list(self.cache.shards.values())):
            raise ValueError(f"{str(self.cache.place)!r} would have no rows: add some first.")
        self.cache.shard_contexts = max(shard["contexts"] for shard in shards)
        self.cache.about = lambda ended, contexts: about
        return self.cache.write_manifest("complete", shards)


def shard_rows(widths: Mapping[str, int], dtype: str) -> int:
    """How many rows a shard has at most; those of 8 bits are held as they come."""
    of_row = sum(row_bytes("float32" if dtype == "int8" else dtype, d_in) for d_in in widths.values())
    return max(1, min(SHARD_ROWS, SHARD_BYTES // of_row))


def contexts_of_a_shard(widths: Mapping[str, int], dtype: str, context_tokens: int, together: int) -> int:
    """How many contexts a shard has: a multiple of those that the model takes together."""
    return together * max(1, shard_rows(widths, dtype) // (context_tokens * together))


def check_plan(found: Mapping[str, Any], plan: Mapping[str, Any] | None, out: str | Path) -> None:
    """ValueError unless a cache was begun with this plan."""
    theirs = found.get("plan")
    if theirs is None or plan is None:
        raise ValueError(f"{str(out)!r} exists already: choose another folder or delete it first")
    for name, value in plan.items():
        if theirs.get(name) != value:
            raise ValueError(
                f"{str(out)!r} exists already, begun with {name} = {theirs.get(name)}, and not {value}: collect with "
                "the same settings to go on, or choose another folder"
            )


def cache_at(out: str | Path, append: bool = False) -> dict[str, Any] | None:
    """The manifest of a cache at `out` with which a collection can go on; None where there is nothing yet. ValueError
    for anything else, and for a cache that is complete, unless it is to be appended to."""
    if (url := url_of(out)) is not None:
        return _cache_at_url(url, append)
    place = resolved(out)
    if place.is_dir():
        with suppress(OSError), folder_lock(place, BEGINNING_S):  # somebody may be beginning
            pass
    if not (place / MANIFEST).is_file():
        check_out(out)
        return None
    for folder in (place.parent, place):
        sweep(folder)
    manifest = read_manifest(place)
    if "plan" in manifest:  # caches of version 1 and merged ones have none
        with suppress(OSError), folder_lock(place):  # one that may only be read stays as it is
            tidy(place)
    _check_goes_on(manifest, out, append)
    return manifest


def _cache_at_url(url: str, append: bool) -> dict[str, Any] | None:
    if not RemoteOut(url).has_manifest():
        check_url(url)
        return None
    manifest = read_manifest(url)
    _check_goes_on(manifest, url, append)
    check_may_put(url)
    return manifest


def _check_goes_on(manifest: Mapping[str, Any], out: str | Path, append: bool) -> None:
    planned = "plan" in manifest
    if not planned or not (append or manifest.get("ended") in GOES_ON):
        more = ", or append to it, with more tokens" if planned else ""
        raise ValueError(f"{str(out)!r} exists already: choose another folder or delete it first{more}")


def check_out(out: str | Path) -> Path | str:
    """Where the cache will lie, without ~ and links; ValueError if something is there or nothing can be written."""
    if (url := url_of(out)) is not None:
        check_url(url)
        return url
    place = resolved(out)
    if occupied(place):
        raise ValueError(f"{str(out)!r} exists already: choose another folder or delete it first")
    try:
        with place_in(existing(place), place.name):
            pass
        if place.parent.is_dir() and not place.is_dir():
            with Lock(lock_of(place), f"the cache {str(out)!r}"):
                pass
    except OSError as error:
        raise ValueError(f"{str(out)!r} cannot be made ({error.strerror}): choose another folder") from None
    return place


def check_free_disk(out: str | Path, needed_bytes: int) -> None:
    """ValueError if the disk that will hold `out` has less than `needed_bytes` free; of a URL, that which holds one
    shard at a time."""
    place = resolved(out) if url_of(out) is None else usual_copies().folder
    needed_bytes = needed_bytes if url_of(out) is None else min(needed_bytes, 2 * SHARD_BYTES)
    free = shutil.disk_usage(existing(place)).free
    if needed_bytes > free:
        raise ValueError(
            f"{str(out)!r} needs {size_text(needed_bytes)} but its disk has {size_text(free)} free: "
            "collect fewer tokens or hookpoints, or choose another disk"
        )


def size_text(num_bytes: int) -> str:
    unit, factor = next((u for u in (("GB", 1e9), ("MB", 1e6)) if num_bytes >= u[1]), ("kB", 1e3))
    return f"{num_bytes / factor:.1f} {unit}"

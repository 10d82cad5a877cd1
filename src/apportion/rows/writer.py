"""Writing an activation cache (its layout is explained in store.py), shard by shard, by any number of processes.

    with CacheWriter("acts", widths, ..., plan=plan, about=about) as cache:
        with cache.claim(3) as claimed:              no other process makes shard 3 meanwhile
            cache.write(3, acts, tokens, positions, contexts)
        cache.finish("complete")

A shard is committed when its files are on the disk and the journal has its line. Short work on what all share (manifest
and journal) is done under the lock of the folder, long work under a lock of the shard. Whoever comes next goes on with
what there is; what is in a shard depends on nothing but the numbers of its contexts, so the files are those of a
collection in one piece.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import torch
from jaxtyping import Int, Shaped
from safetensors import safe_open
from torch import Tensor

from apportion.disk import all_finite, existing, naming, occupied, write_json, write_tensors
from apportion.durable import place_in, sweep, sync_folder
from apportion.locks import LOCK, Lock, lock_of
from apportion.rows.filter import TokenFilter, row_norms
from apportion.rows.journal import JOURNAL, Follower, add_line
from apportion.rows.layout import (
    FORMAT_VERSION,
    GOES_ON,
    LABELS,
    MANIFEST,
    UNFINISHED,
    acts_file,
    folder_name,
    read_written,
    sealed,
    token_file,
)
from apportion.rows.manifest import from_the_first, known_shards, read_manifest, with_lines
from apportion.rows.norms import histograms
from apportion.rows.numbers import lost, restored, row_bytes, stored
from apportion.rows.refit import of_hookpoint
from apportion.rows.shards import sample_sha256_of, sha256_of
from apportion.trust import resolved, within

SHARD_ROWS = 1 << 17
SHARD_BYTES = 1 << 30
"""A shard holds at most this many bytes over all hookpoints, because that is what is held in memory."""
PATIENCE_S = 60
"""How long the lock of the folder, under which nothing takes long, is waited for."""
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
        self.place = resolved(out)
        self.widths, self.dtype, self.asked = dict(widths), dtype, token_filter
        self.special_ids, self.shard_contexts, self.plan, self.about = special_ids, shard_contexts, plan, about
        self.shards: dict[int, dict[str, Any]] = {}
        """Those that are on the disk, as far as this process has looked (`look`)."""
        self._journal = Follower(self.place)
        self._manifest: dict[str, Any] = {}
        self._written: tuple[int, int] | None = None
        """Which manifest was read, and when it was written."""
        self._made: list[Path] = []
        self.began = False

    def __enter__(self) -> CacheWriter:
        folders = [within(self.place, folder_name(name)) for name in self.widths]
        try:
            with naming(self.place):
                self._made = [folder for folder in (self.place, *self.place.parents) if not folder.exists()]
                self.place.mkdir(parents=True, exist_ok=True)
            with folder_lock(self.place):
                if (self.place / MANIFEST).is_file():
                    check_plan(read_written(self.place), self.plan, self.place)
                    self.look()
                else:
                    self.began = True
                    if self.plan is not None:
                        self.write_manifest(UNFINISHED, [])
            with naming(self.place):
                for folder in folders:
                    folder.mkdir(parents=True, exist_ok=True)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: Any) -> None:
        if not self.began or (self.shards and (self.place / MANIFEST).is_file()):
            return
        with suppress(OSError, ValueError), folder_lock(self.place):
            if (self.plan is None or not self.look()) and not self._others():
                self._remove()
        for folder in self._made:  # from the inside out
            with suppress(OSError):
                folder.rmdir()

    def look(self) -> dict[int, dict[str, Any]]:
        """The shards that are on the disk now, others' too."""
        if not (self.place / MANIFEST).is_file():
            return self.shards
        found = (self.place / MANIFEST).stat()
        written = found.st_ino, found.st_mtime_ns
        if written != self._written or self._journal.is_new():
            self._written, self._manifest = written, read_written(self.place)
            self._journal.rewind()
            self.shards = {shard["shard"]: shard for shard in self._manifest["shards"]}
        self.shards = with_lines(self.shards, self._journal.lines(), self._manifest, self.place)
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
    def claim(self, number: int) -> Iterator[Lock | None]:
        """Within the block no other process makes this shard; None if one is at it."""
        lock = Lock(self._claim(number), f"shard {number} of the cache {str(self.place)!r}")
        try:
            lock.__enter__()
        except ValueError:
            yield None
            return
        try:
            self.look()
            yield lock
        finally:
            lock.__exit__()

    def is_free(self, number: int) -> bool:
        """Whether nobody makes this shard now."""
        with self.claim(number) as lock:
            return lock is not None

    def _claim(self, number: int) -> Path:
        return self.place / f"{number:05d}{LOCK}"

    def _others(self) -> bool:
        """Whether somebody makes a shard."""
        sweep(self.place)
        return any(file.name != LOCK for file in self.place.glob(f"*{LOCK}"))

    def held(self, number: int, contexts: int) -> tuple[dict[str, Tensor], Int[Tensor, "3 n"]]:
        """The rows of the first contexts of a shard at each hookpoint, and their labels; not of one in 8 bits."""
        labels = torch.stack([self._column(token_file(number), label) for label in LABELS])
        rows = int((labels[2] < number * self.shard_contexts + contexts).sum())
        acts = {name: self._column(acts_file(name, number), "acts", rows) for name in self.widths}
        return acts, labels[:, :rows]

    def tokens(self, number: int) -> Int[Tensor, " rows"]:
        """The tokens of a shard."""
        return self._column(token_file(number), "tokens")

    def _column(self, file: str, name: str, rows: int | None = None) -> Tensor:
        with safe_open(self.place / file, framework="pt") as opened:
            return opened.get_slice(name)[:rows].clone()

    def write(
        self, number: int, acts: Mapping[str, Shaped[Tensor, "n d_in"]], labels: Int[Tensor, "3 n"],
        lock: Lock | None = None, contexts: int | None = None,
    ) -> None:  # fmt: skip
        """Commit a shard: its rows at each hookpoint, and tokens, positions and contexts. `lock` is what claims it;
        `contexts` how many it has, if some may have no rows."""
        for name, x in acts.items() if self.dtype == "int8" else ():
            if not all_finite(x):
                raise ValueError(f"rows at {name!r} are not finite (NaN or infinity), which 8 bits cannot hold.")
        columns = {name: column.int().clone() for name, column in zip(LABELS, labels, strict=True)}
        if self.plan is not None and number in self.shards:
            self._note({"shard": number, "contexts": 0, "rows": 0}, lock)
        files = [self._save(token_file(number), columns, None)]
        for name, x in acts.items():
            held = stored(x, self.dtype)
            norms = row_norms(restored(held))
            of = (norms, columns["tokens"], columns["positions"])
            stats: dict[str, Any] = {"norms": histograms(*of, self.special_ids)}
            if self.dtype == "int8":
                mask = self.asked.fit(*of, self.special_ids).mask_of(*of)
                stats["lost"] = lost(x[mask], {c: part[mask] for c, part in held.items()})
            held = {c: part.contiguous() for c, part in held.items()}
            files.append(self._save(acts_file(name, number), {**held, "norms": norms}, {"stats": json.dumps(stats)}))
        self._note({
            "shard": number,
            "contexts": len(columns["contexts"].unique()) if contexts is None else contexts,
            "rows": len(columns["tokens"]),
            "sha256": {file: sha256_of(self.place / file) for file in files},
            "sample_sha256": {file: sample_sha256_of(self.place / file) for file in files},
        }, lock)  # fmt: skip

    def _note(self, line: dict[str, Any], lock: Lock | None) -> None:
        if lock is not None:
            lock.check()
        line = {"sha256": {}, "sample_sha256": {}, **line}
        if self.plan is not None:
            with folder_lock(self.place):
                add_line(self.place, line)
        self.shards[line["shard"]] = line
        if not line["contexts"]:
            del self.shards[line["shard"]]

    def _save(self, name: str, tensors: dict[str, Tensor], metadata: dict[str, str] | None) -> str:
        write_tensors(self.place / name, tensors, metadata)
        return name

    def finish(self, ended: str) -> dict[str, Any]:
        """The manifest of the shards up to the first gap, written; of the journal stays what lies behind the gap."""
        with folder_lock(self.place):
            self.look()
            shards = from_the_first(self.shards, self.shard_contexts)
            manifest = self.write_manifest(ended if shards else UNFINISHED, shards)
            tidy(self.place)
        return manifest

    def write_manifest(self, ended: str, shards: list[dict[str, Any]]) -> dict[str, Any]:
        rows, contexts = (sum(shard[name] for shard in shards) for name in ("rows", "contexts"))
        of = self.asked, self.special_ids, shards, self.place
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
        write_json(self.place / MANIFEST, manifest)
        for folder in (self.place, *(folder.parent for folder in self._made)):
            sync_folder(folder)
        return manifest

    def _remove(self) -> None:
        """What was made here, of which nothing is a whole shard."""
        for file in (MANIFEST, JOURNAL, *self.place.glob("tokens-*.safetensors")):
            with suppress(OSError):
                (self.place / file).unlink(missing_ok=True)
        for name in self.widths:
            for file in (self.place / folder_name(name)).glob("*.safetensors"):
                with suppress(OSError):
                    file.unlink()
            with suppress(OSError):
                (self.place / folder_name(name)).rmdir()


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


def tidy(place: Path) -> None:
    """Remove the journal of a cache if the manifest has all of it."""
    manifest = read_written(place)
    if list(known_shards(manifest, place).values()) == manifest["shards"] and manifest["ended"] != UNFINISHED:
        (place / JOURNAL).unlink(missing_ok=True)
        sync_folder(place)


@contextmanager
def folder_lock(place: Path, patience_s: float = PATIENCE_S) -> Iterator[None]:
    """Within the block nobody else writes manifest or journal of a cache; it is waited for."""
    lock, deadline = Lock(place / LOCK, f"the cache {str(place)!r}"), monotonic() + patience_s
    while True:
        try:
            lock.__enter__()
            break
        except ValueError:
            if monotonic() > deadline:
                raise
            sleep(0.02)
    try:
        yield
    finally:
        lock.__exit__()


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
    place = resolved(out)
    if place.is_dir():
        with suppress(OSError), folder_lock(place, BEGINNING_S):  # somebody may be beginning
            pass
    if not (place / MANIFEST).is_file():
        check_out(out)
        return None
    sweep(place)
    manifest = read_manifest(place)
    planned = "plan" in manifest  # caches of version 1 and merged ones have none
    if planned:
        with suppress(OSError), folder_lock(place):  # one that may only be read stays as it is
            tidy(place)
    if not planned or not (append or manifest.get("ended") in GOES_ON):
        more = ", or append to it, with more tokens" if planned else ""
        raise ValueError(f"{str(out)!r} exists already: choose another folder or delete it first{more}")
    return manifest


def check_out(out: str | Path) -> Path:
    """Where the cache will lie, without ~ and links; ValueError if something is there or nothing can be written."""
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


def check_free_disk(out: Path, needed_bytes: int) -> None:
    """ValueError if the disk that will hold `out` has less than `needed_bytes` free."""
    free = shutil.disk_usage(existing(out.resolve())).free
    if needed_bytes > free:
        raise ValueError(
            f"{str(out)!r} needs {size_text(needed_bytes)} but its disk has {size_text(free)} free: "
            "collect fewer tokens or hookpoints, or choose another disk"
        )


def size_text(num_bytes: int) -> str:
    unit, factor = next((u for u in (("GB", 1e9), ("MB", 1e6)) if num_bytes >= u[1]), ("kB", 1e3))
    return f"{num_bytes / factor:.1f} {unit}"

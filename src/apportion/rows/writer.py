"""Writing an activation cache (its layout is explained in store.py), shard by shard.

Rows are held until they fill a shard. Behind each shard the manifest is written anew, so that what lies on the disk is
a whole cache at any moment; `ended` in it is "unfinished" until the end. Whoever writes there next goes on behind what
there is: what is in a shard depends on nothing but the rows, so the files are those of a collection in one piece.

The token filter is fitted on the first rows of the first shard, so every mask is known when its shard is written; norms
are those of the stored values, so a mask can be recomputed from the cache.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int, Shaped
from safetensors import safe_open
from torch import Tensor

from apportion.about import Site
from apportion.disk import existing, naming, occupied, write_json, write_tensors
from apportion.durable import place_in, sweep, sync_folder
from apportion.locks import LOCK, Lock, lock_of
from apportion.rows.filter import FIT_ROWS, REASONS, TokenFilter, row_norms
from apportion.rows.manifest import (
    FORMAT_VERSION,
    GOES_ON,
    MANIFEST,
    UNFINISHED,
    acts_file,
    folder_name,
    read_manifest,
    sealed,
    token_file,
    torch_dtype,
)
from apportion.rows.shards import sample_sha256_of, sha256_of
from apportion.trust import resolved, within

log = logging.getLogger(__name__)

SHARD_ROWS = 1 << 17
SHARD_BYTES = 1 << 30
"""A shard holds at most this many bytes over all hookpoints, because that is what is held in memory."""
LABELS = ("tokens", "positions", "contexts")


class _HookpointStats:
    """Filter, counts and mean norm of one hookpoint while its shards are written."""

    def __init__(self, d_in: int, token_filter: TokenFilter) -> None:
        self.d_in, self.filter, self.asked = d_in, token_filter, token_filter
        self.shards: list[dict[str, Any]] = []
        """Of each: rows that take part, the sum of their norms, rows left out by reason."""
        self.fit_rows = 0

    def fit(self, norms: Tensor, tokens: Tensor, positions: Tensor, special_ids: tuple[int, ...]) -> None:
        rows = slice(0, FIT_ROWS)
        self.filter = self.asked.fit(norms[rows], tokens[rows], positions[rows], special_ids)
        self.fit_rows = len(norms[rows])

    def go_on(self, shards: list[dict[str, Any]], found: Mapping[str, Any]) -> None:
        """Behind these shards, which the manifest has, and what it says of the hookpoint."""
        self.shards = shards
        if shards:
            self.filter, self.fit_rows = TokenFilter.from_dict(found["filter"]), found["median_norm_rows"]

    def mask(self, norms: Tensor, tokens: Tensor, positions: Tensor) -> Bool[Tensor, " n"]:
        """The rows of the next shard that take part, counted."""
        left_out = dict.fromkeys(REASONS, 0)
        mask = self.filter.counted(norms, tokens, positions, left_out)
        kept = {"kept": int(mask.sum()), "norm_sum": float(norms[mask].double().sum())}
        self.shards.append({**kept, "left_out": left_out})
        return mask

    def to_dict(self, hookpoint: str, rows: int) -> dict[str, Any]:
        kept = sum(shard["kept"] for shard in self.shards)
        site = Site(
            hookpoint=hookpoint,
            d_in=self.d_in,
            filter=self.filter.to_dict(),
            median_norm=self.filter.median_norm,
            median_norm_rows=self.fit_rows,
            mean_norm=sum(shard["norm_sum"] for shard in self.shards) / max(1, kept),
            filtered={reason: sum(shard["left_out"][reason] for shard in self.shards) for reason in REASONS},
            filtered_share=1 - kept / max(1, rows),
        )
        return {"folder": folder_name(hookpoint), **site.to_json()}


class StoreWriter:
    """Writes a cache, or goes on with one. Whatever ends it, whole shards stay; without any nothing is left.

    `about(ended)` is what the manifest says besides, at any moment; without it there is no manifest before `finish`.
    `found` is the manifest of a cache to go on with, of which the first `keep` rows stay.
    """

    def __init__(
        self,
        out: str | Path,
        widths: Mapping[str, int],
        *,
        dtype: str,
        token_filter: TokenFilter,
        special_ids: tuple[int, ...],
        about: Callable[[str], Mapping[str, Any]] | None = None,
        found: Mapping[str, Any] | None = None,
        keep: int = 0,
    ) -> None:
        self.place = resolved(out) if found else check_out(out)
        self.dtype_name, self.dtype, self.special_ids = dtype, torch_dtype(dtype), special_ids
        self.about, self.found, self.keep = about, found, keep
        self.stats = {name: _HookpointStats(d_in, token_filter) for name, d_in in widths.items()}
        self.shard_rows = shard_rows(widths, dtype)
        self.shards: list[dict[str, Any]] = []
        self._acts: dict[str, list[Tensor]] = {name: [] for name in widths}
        self._labels: list[Int[Tensor, "3 n"]] = []  # tokens, positions, contexts
        self._pending = 0
        self._replaces = False
        """Whether the manifest has a shard that the next one takes the place of."""
        self._until_then = ExitStack()
        self._lock: Lock | None = None
        self._made: list[Path] = []

    def __enter__(self) -> StoreWriter:
        folders = [within(self.place, folder_name(name)) for name in self.stats]
        try:
            with naming(self.place):
                self._made = [folder for folder in (self.place, *self.place.parents) if not folder.exists()]
                self.place.mkdir(parents=True, exist_ok=True)
                self._lock = self._until_then.enter_context(Lock(self.place / LOCK, f"the cache {str(self.place)!r}"))
            if self.found:
                self._go_on(self.found)
            elif self.about is not None:
                self._write_manifest(UNFINISHED)
            with naming(self.place):
                for folder in folders:
                    folder.mkdir(parents=True, exist_ok=True)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: Any) -> None:
        nothing = self.found is None and not self.shards
        if nothing and self._lock is not None:
            self._remove()
        self._until_then.close()
        for folder in self._made if nothing else ():  # from the inside out
            with suppress(OSError):
                folder.rmdir()

    def _go_on(self, found: Mapping[str, Any]) -> None:
        """Keep the whole shards among the first rows, and hold the rows behind these."""
        if read_manifest(self.place) != found:
            raise ValueError(f"{str(self.place)!r} was written by another process meanwhile: collect again.")
        whole, rest = divmod(self.keep, self.shard_rows)
        self.shards = list(found["shards"][:whole])
        for name, stats in self.stats.items():
            stats.go_on([shard["stats"][name] for shard in self.shards], found["hookpoints"][name])
        self._replaces = len(found["shards"]) > whole
        if rest:
            held = {name: self._held(acts_file(name, whole), "acts", rest) for name in self.stats}
            self.add(held, *(self._held(token_file(whole), label, rest) for label in LABELS))

    def _held(self, file: str, name: str, rows: int) -> Tensor:
        with safe_open(self.place / file, framework="pt") as opened:
            return opened.get_slice(name)[:rows].clone()

    @property
    def rows(self) -> int:
        return sum(shard["rows"] for shard in self.shards) + self._pending

    def add(
        self, acts: Mapping[str, Shaped[Tensor, "n d_in"]], tokens: Tensor, positions: Tensor, contexts: Tensor
    ) -> None:
        """Append rows; `acts` must already be in the cache's dtype."""
        for name, x in acts.items():
            self._acts[name].append(x.cpu())
        self._labels.append(torch.stack([tokens.int(), positions.int(), contexts.int()]).cpu())
        self._pending += len(tokens)
        while self._pending >= self.shard_rows:
            self._flush(self.shard_rows)
            if self.about is not None:
                self._write_manifest(UNFINISHED)

    def _flush(self, rows: int) -> None:
        """Write the first `rows` pending rows as one shard."""
        self._check_lock()
        if self._replaces:
            self._write_manifest(UNFINISHED)
        number, self._replaces = len(self.shards), False
        labels = torch.cat(self._labels, dim=1)
        columns = {name: column[:rows].clone() for name, column in zip(LABELS, labels, strict=True)}
        tokens, positions = columns["tokens"], columns["positions"]
        files = [self._save(token_file(number), columns)]
        for name, stats in self.stats.items():
            held = torch.cat(self._acts[name])
            x, self._acts[name] = held[:rows], [held[rows:].clone()]
            norms = row_norms(x)
            if number == 0:
                stats.fit(norms, tokens, positions, self.special_ids)
            mask = stats.mask(norms, tokens, positions)
            files.append(self._save(acts_file(name, number), {"acts": x.contiguous(), "mask": mask}))
        self._labels, self._pending = [labels[:, rows:].clone()], self._pending - rows
        digests = {file: sha256_of(self.place / file) for file in files}
        samples = {file: sample_sha256_of(self.place / file) for file in files}
        stats = {name: stats.shards[-1] for name, stats in self.stats.items()}
        self.shards.append({"rows": rows, "sha256": digests, "sample_sha256": samples, "stats": stats})

    def _save(self, name: str, tensors: dict[str, Tensor]) -> str:
        write_tensors(self.place / name, tensors)
        return name

    def finish(self, about: Mapping[str, Any] | None = None, ended: str = "complete") -> dict[str, Any]:
        """Write what is pending and the manifest, which is returned."""
        if self._pending:
            self._flush(self._pending)
        manifest = self._write_manifest(ended, about)
        number = len(self.shards)
        for file in (token_file(number), *(acts_file(name, number) for name in self.stats)):
            (self.place / file).unlink(missing_ok=True)  # of a shard that a kill broke off
        return manifest

    def _write_manifest(self, ended: str, about: Mapping[str, Any] | None = None) -> dict[str, Any]:
        self._check_lock()
        rows = sum(shard["rows"] for shard in self.shards)
        said = about or (self.about(ended) if self.about is not None else {})
        manifest = sealed({
            "format": "apportion-activations",
            "format_version": FORMAT_VERSION,
            "model": {},
            "text": {},
            **said,
            "dtype": self.dtype_name,
            "rows": rows,
            "shard_rows": self.shard_rows,
            "hookpoints": {name: stats.to_dict(name, rows) for name, stats in self.stats.items()},
            "shards": self.shards,
        })  # fmt: skip
        write_json(self.place / MANIFEST, manifest)
        for folder in (self.place, *(folder.parent for folder in self._made)):
            sync_folder(folder)
        return manifest

    def _check_lock(self) -> None:
        assert self._lock is not None, "the writer was entered"
        self._lock.check()

    def _remove(self) -> None:
        """What this writer has made, of which nothing is a whole shard."""
        for file in (MANIFEST, token_file(0), *(acts_file(name, 0) for name in self.stats)):
            with suppress(OSError):
                (self.place / file).unlink(missing_ok=True)
        for name in self.stats:
            with suppress(OSError):
                (self.place / folder_name(name)).rmdir()


def shard_rows(widths: Mapping[str, int], dtype: str) -> int:
    """How many rows a shard has."""
    return max(1, min(SHARD_ROWS, SHARD_BYTES // (sum(widths.values()) * torch_dtype(dtype).itemsize)))


def cache_at(out: str | Path, append: bool = False) -> dict[str, Any] | None:
    """The manifest of a cache at `out` with which a collection can go on; None where there is nothing yet. ValueError
    for anything else, and for a cache that is complete, unless it is to be appended to."""
    place = resolved(out)
    if not (place / MANIFEST).is_file():
        check_out(out)
        return None
    sweep(place)
    manifest = read_manifest(place)
    planned = "plan" in manifest  # older caches have none
    if not planned or not (append or manifest.get("ended") in GOES_ON):
        more = ", or append to it, with more tokens" if planned else ""
        raise ValueError(f"{str(out)!r} exists already: choose another folder or delete it first{more}")
    with Lock(lock_of(place), f"the cache {str(out)!r}"):
        pass
    return manifest


def check_out(out: str | Path) -> Path:
    """Where the cache will lie, without ~ and links; ValueError if something is there or nothing can be written."""
    place = resolved(out)
    if occupied(place):
        raise ValueError(f"{str(out)!r} exists already: choose another folder or delete it first")
    try:
        with place_in(existing(place), place.name):
            pass
        if place.parent.is_dir():
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

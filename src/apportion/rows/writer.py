"""Writing an activation cache (its layout is explained in store.py).

Rows are held until they fill a shard. The token filter is fitted on the first rows of the first shard, so every mask is
known when its shard is written; norms are those of the stored values, so a mask can be recomputed from the cache.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from apportion.about import Site
from apportion.disk import existing, occupied, whole_folder, write_json, write_tensors
from apportion.durable import place_in
from apportion.locks import Lock, lock_of
from apportion.rows.filter import FIT_ROWS, REASONS, TokenFilter, row_norms
from apportion.rows.manifest import FORMAT_VERSION, MANIFEST, acts_file, folder_name, sealed, token_file, torch_dtype
from apportion.rows.shards import sample_sha256_of, sha256_of
from apportion.trust import resolved, within

SHARD_ROWS = 1 << 17
SHARD_BYTES = 1 << 30
"""A shard holds at most this many bytes over all hookpoints, because that is what is held in memory."""


class _HookpointStats:
    """Filter, counts and mean norm of one hookpoint while its shards are written."""

    def __init__(self, d_in: int, token_filter: TokenFilter) -> None:
        self.d_in, self.filter = d_in, token_filter
        self.filtered = dict.fromkeys(REASONS, 0)
        self.kept_rows, self.norm_sum, self.fit_rows = 0, 0.0, 0

    def fit(self, norms: Tensor, tokens: Tensor, positions: Tensor, special_ids: tuple[int, ...]) -> None:
        rows = slice(0, FIT_ROWS)
        self.filter = self.filter.fit(norms[rows], tokens[rows], positions[rows], special_ids)
        self.fit_rows = len(norms[rows])

    def mask(self, norms: Tensor, tokens: Tensor, positions: Tensor) -> Bool[Tensor, " n"]:
        """The rows that take part, counted."""
        mask = self.filter.counted(norms, tokens, positions, self.filtered)
        self.kept_rows += int(mask.sum())
        self.norm_sum += float(norms[mask].double().sum())
        return mask

    def to_dict(self, hookpoint: str, rows: int) -> dict[str, Any]:
        site = Site(
            hookpoint=hookpoint,
            d_in=self.d_in,
            filter=self.filter.to_dict(),
            median_norm=self.filter.median_norm,
            median_norm_rows=self.fit_rows,
            mean_norm=self.norm_sum / max(1, self.kept_rows),
            filtered=self.filtered,
            filtered_share=1 - self.kept_rows / max(1, rows),
        )
        return {"folder": folder_name(hookpoint), **site.to_json()}


class StoreWriter:
    """Writes a cache. As a context manager it leaves either a complete cache at `out` or nothing at all."""

    def __init__(
        self,
        out: str | Path,
        widths: Mapping[str, int],
        *,
        dtype: str,
        token_filter: TokenFilter,
        special_ids: tuple[int, ...],
    ) -> None:
        self._whole = whole_folder(check_out(out), last=[MANIFEST], locked=True)
        self.dtype_name, self.dtype = dtype, torch_dtype(dtype)
        self.special_ids = special_ids
        self.stats = {name: _HookpointStats(d_in, token_filter) for name, d_in in widths.items()}
        row_bytes = sum(widths.values()) * self.dtype.itemsize
        self.shard_rows = max(1, min(SHARD_ROWS, SHARD_BYTES // row_bytes))
        self.shards: list[dict[str, Any]] = []
        self._acts: dict[str, list[Tensor]] = {name: [] for name in widths}
        self._labels: list[Int[Tensor, "3 n"]] = []  # tokens, positions, contexts
        self._pending = 0

    def __enter__(self) -> StoreWriter:
        self.partial = self._whole.__enter__()
        for name in self.stats:
            within(self.partial, folder_name(name)).mkdir(parents=True)
        return self

    def __exit__(self, *error: Any) -> None:
        self._whole.__exit__(*error)

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

    def _flush(self, rows: int) -> None:
        """Write the first `rows` pending rows as one shard."""
        number = len(self.shards)
        labels = torch.cat(self._labels, dim=1)
        tokens, positions, contexts = (column[:rows].clone() for column in labels)
        columns = {"tokens": tokens, "positions": positions, "contexts": contexts}
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
        digests = {file: sha256_of(self.partial / file) for file in files}
        samples = {file: sample_sha256_of(self.partial / file) for file in files}
        self.shards.append({"rows": rows, "sha256": digests, "sample_sha256": samples})

    def _save(self, name: str, tensors: dict[str, Tensor]) -> str:
        write_tensors(self.partial / name, tensors)
        return name

    def finish(self, about: Mapping[str, Any]) -> dict[str, Any]:
        """Write what is pending and the manifest, which is returned; the cache is in place when the context ends."""
        if self._pending:
            self._flush(self._pending)
        manifest = sealed({
            "format": "apportion-activations",
            "format_version": FORMAT_VERSION,
            "model": {},
            "text": {},
            **about,
            "dtype": self.dtype_name,
            "rows": self.rows,
            "shard_rows": self.shard_rows,
            "hookpoints": {name: stats.to_dict(name, self.rows) for name, stats in self.stats.items()},
            "shards": self.shards,
        })  # fmt: skip
        write_json(self.partial / MANIFEST, manifest)
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

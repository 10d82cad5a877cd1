"""Writing an activation cache (its layout is explained in store.py).

Rows are held until they fill a shard. The token filter is fitted on the first rows of the first shard, so every mask is
known when its shard is written; norms are those of the stored values, so a mask can be recomputed from the cache.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from jaxtyping import Bool, Int, Shaped
from safetensors.torch import save_file
from torch import Tensor

from apportion.activations.filter import FIT_ROWS, REASONS, TokenFilter, row_norms
from apportion.activations.store import FORMAT_VERSION, MANIFEST, folder_name, sha256_of, torch_dtype

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
        mask = torch.ones(len(norms), dtype=torch.bool)
        for reason, rows in self.filter.reasons(norms, tokens, positions).items():
            self.filtered[reason] += int(rows.sum())
            mask &= ~rows
        self.kept_rows += int(mask.sum())
        self.norm_sum += float(norms[mask].double().sum())
        return mask

    def to_dict(self, hookpoint: str, rows: int) -> dict[str, Any]:
        return {
            "folder": folder_name(hookpoint),
            "d_in": self.d_in,
            "filter": self.filter.to_dict(),
            "median_norm": self.filter.median_norm,
            "median_norm_rows": self.fit_rows,
            "mean_norm": self.norm_sum / max(1, self.kept_rows),
            "filtered": self.filtered,
            "filtered_share": 1 - self.kept_rows / max(1, rows),
        }


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
        self.out = Path(out)
        refuse_existing(self.out)
        self.partial = self.out.with_name(f"{self.out.name}.partial-{os.getpid()}")
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
        self.partial.mkdir(parents=True)
        for name in self.stats:
            (self.partial / folder_name(name)).mkdir()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self.partial, ignore_errors=True)  # already renamed away if `finish` was reached

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
        sha256 = self._save(f"tokens-{number:05d}.safetensors", columns)
        for name, stats in self.stats.items():
            held = torch.cat(self._acts[name])
            x, self._acts[name] = held[:rows], [held[rows:].clone()]
            norms = row_norms(x)
            if number == 0:
                stats.fit(norms, tokens, positions, self.special_ids)
            mask = stats.mask(norms, tokens, positions)
            sha256 |= self._save(
                f"{folder_name(name)}/{number:05d}.safetensors", {"acts": x.contiguous(), "mask": mask}
            )
        self._labels, self._pending = [labels[:, rows:].clone()], self._pending - rows
        self.shards.append({"rows": rows, "sha256": sha256})

    def _save(self, name: str, tensors: dict[str, Tensor]) -> dict[str, str]:
        file = self.partial / name
        save_file(tensors, file)
        return {name: sha256_of(file)}

    def finish(self, about: Mapping[str, Any]) -> dict[str, Any]:
        """Write what is pending and the manifest, move the folder into place and return the manifest."""
        if self._pending:
            self._flush(self._pending)
        manifest = {
            "format": "apportion-activations",
            "format_version": FORMAT_VERSION,
            **about,
            "dtype": self.dtype_name,
            "rows": self.rows,
            "shard_rows": self.shard_rows,
            "hookpoints": {name: stats.to_dict(name, self.rows) for name, stats in self.stats.items()},
            "shards": self.shards,
        }
        (self.partial / MANIFEST).write_text(json.dumps(manifest, indent=1))
        refuse_existing(self.out)
        self.partial.replace(self.out)
        return manifest


def refuse_existing(out: Path) -> None:
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ValueError(f"{str(out)!r} exists already: choose another folder or delete it first")


def check_free_disk(out: Path, needed_bytes: int) -> None:
    """ValueError if the disk that will hold `out` has less than `needed_bytes` free."""
    folder = out.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed_bytes > free:
        raise ValueError(
            f"{str(out)!r} needs {needed_bytes / 1e9:.1f} GB but its disk has {free / 1e9:.1f} GB free: "
            "collect fewer tokens or hookpoints, or choose another disk"
        )

"""The activation cache: rows of numbers on disk, with everything one must know about them.

    acts/manifest.json                      model, hookpoints, filter, tokenizer, text, dtype, rows, sha256 of files
    acts/tokens-00000.safetensors           tokens, positions, contexts: int32 [rows]
    acts/model.layers.15/00000.safetensors  acts [rows, d_in] in the chosen dtype, mask [rows] (True = takes part)

All shards but the last have the same number of rows. A cache appears when it is complete, the manifest last (disk.py):
a folder with a manifest is a whole cache. `ended` in the manifest says whether it has all the tokens asked for:

    complete         it has
    text             the text had no more
    stream: ...      the stream that the text came from failed for good
    interrupted      it was told to stop

Reading maps the files into memory: gathering random rows costs page-cache accesses, not file reads.
"""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from safetensors import SafetensorError, safe_open
from torch import Tensor

from apportion.activations.batch import Batch
from apportion.activations.filter import TokenFilter
from apportion.activations.hookpoints import Hookpoint
from apportion.activations.text import expanded
from apportion.answers import of_the_system
from apportion.disk import check_may_open, read_json

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def torch_dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise ValueError(f"dtype {name!r} is not supported: use one of {', '.join(DTYPES)}")
    return DTYPES[name]


def folder_name(hookpoint: str) -> str:
    """The folder of a hookpoint inside a cache: its name without characters that file systems dislike."""
    return hookpoint.replace(":", "--")


def sha256_of(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class ShardedRows:
    """One tensor [rows, ...] that lies in several memory-mapped files of `shard_rows` rows each."""

    def __init__(self, files: list[Path], key: str, shard_rows: int) -> None:
        self.shard_rows = shard_rows
        self._parts: list[Tensor] = []
        for file in files:
            with safe_open(file, framework="pt") as opened:
                self._parts.append(opened.get_tensor(key))  # a view of the mapped file: nothing is read yet

    def gather(self, indices: Int[Tensor, " n"]) -> Shaped[Tensor, "n ..."]:
        """The rows at `indices`, in that order."""
        if len(self._parts) == 1:
            return self._parts[0][indices]
        first = self._parts[0]
        out = torch.empty((len(indices), *first.shape[1:]), dtype=first.dtype)
        shard = indices // self.shard_rows
        for number in shard.unique().tolist():
            where = (shard == number).nonzero().squeeze(1)
            out[where] = self._parts[number][indices[where] - number * self.shard_rows]
        return out

    def all(self) -> Shaped[Tensor, "rows ..."]:
        return torch.cat(self._parts)


class ActivationStore:
    """A cache opened for reading at one hookpoint."""

    def __init__(self, folder: str | Path, hookpoint: str | None = None) -> None:
        self.folder = expanded(folder)
        self.manifest = read_manifest(self.folder)
        self.hookpoint = self._choose(hookpoint)
        about = self.manifest["hookpoints"][self.hookpoint]
        self.rows: int = self.manifest["rows"]
        self.d_in: int = about["d_in"]
        self.filter = TokenFilter.from_dict(about["filter"])
        self._subfolder = about["folder"]
        self._acts = self._open(f"{self._subfolder}/{{:05d}}.safetensors", "acts")

    def _choose(self, hookpoint: str | None) -> str:
        names = list(self.manifest["hookpoints"])
        if hookpoint is None and len(names) == 1:
            return names[0]
        name = None if hookpoint is None else str(Hookpoint.parse(hookpoint))
        if name is None or name not in names:
            problem = "several hookpoints" if name is None else f"no hookpoint {name!r}"
            raise ValueError(f"the cache {str(self.folder)!r} has {problem}: choose one of {', '.join(names)}")
        return name

    def _open(self, pattern: str, key: str) -> ShardedRows:
        files = [self.folder / pattern.format(number) for number in range(len(self.manifest["shards"]))]
        try:
            return ShardedRows(files, key, self.manifest["shard_rows"])
        except (OSError, SafetensorError, RuntimeError) as error:
            if (system := of_the_system(error)) is not None:
                raise system from error
            for file in files:
                check_may_open(file)
            raise ValueError(f"the cache {str(self.folder)!r} is damaged ({error}): collect it again") from error

    @cached_property
    def _tokens(self) -> ShardedRows:
        return self._open("tokens-{:05d}.safetensors", "tokens")

    @cached_property
    def _positions(self) -> ShardedRows:
        return self._open("tokens-{:05d}.safetensors", "positions")

    @cached_property
    def mask(self) -> Bool[Tensor, " rows"]:
        """True for the rows that take part."""
        return self._open(f"{self._subfolder}/{{:05d}}.safetensors", "mask").all()

    @cached_property
    def tokens(self) -> Int[Tensor, " rows"]:
        return self._tokens.all()

    @cached_property
    def positions(self) -> Int[Tensor, " rows"]:
        return self._positions.all()

    @cached_property
    def contexts(self) -> Int[Tensor, " rows"]:
        """For each row the number of the context it comes from."""
        return self._open("tokens-{:05d}.safetensors", "contexts").all()

    def gather(self, indices: Int[Tensor, " n"]) -> Float[Tensor, "n d_in"]:
        """The activations at `indices`, in that order, as float32."""
        return self._acts.gather(indices).float()

    def gather_labels(self, indices: Int[Tensor, " n"]) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
        """The tokens and positions at `indices`."""
        return self._tokens.gather(indices), self._positions.gather(indices)

    def batch(self, indices: Int[Tensor, " n"]) -> Batch:
        """The rows at `indices` with their labels."""
        tokens, positions = self.gather_labels(indices)
        return Batch(self.gather(indices), tokens=tokens, positions=positions)

    def verify(self) -> None:
        """ValueError naming the files whose sha256 differs from the manifest's."""
        wanted = {name: digest for shard in self.manifest["shards"] for name, digest in shard["sha256"].items()}
        bad = [n for n, d in wanted.items() if not (self.folder / n).is_file() or sha256_of(self.folder / n) != d]
        if bad:
            raise ValueError(
                f"the cache {str(self.folder)!r} is damaged: {', '.join(bad)} changed since it was "
                "collected; collect it again"
            )

    @property
    def tokens_sha256(self) -> str:
        """Which tokens these are: equal for equal tokens in equal contexts, at whatever hookpoint and precision."""
        shards = self.manifest["shards"]
        each = [shard["sha256"].get(f"tokens-{number:05d}.safetensors") for number, shard in enumerate(shards)]
        return hashlib.sha256(repr(each).encode()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """What one must know about these rows: everything in the manifest but the shard list."""
        about = self.manifest["hookpoints"][self.hookpoint]
        shared = {k: v for k, v in self.manifest.items() if k not in ("shards", "hookpoints", "shard_rows")}
        shared |= {"tokens_sha256": self.tokens_sha256, "hookpoint": self.hookpoint}
        return shared | {k: v for k, v in about.items() if k != "folder"}


def read_manifest(folder: str | Path) -> dict[str, Any]:
    folder = expanded(folder)
    file = folder / MANIFEST
    if not file.is_file():
        raise ValueError(f"{str(folder)!r} is no activation cache (no {MANIFEST}): make one with `apportion collect`")
    manifest = read_json(file)
    if manifest.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{str(file)!r} has format version {manifest.get('format_version')!r}, this program reads "
            f"{FORMAT_VERSION}: collect the cache again or use a matching version of apportion"
        )
    return manifest

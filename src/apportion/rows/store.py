"""The activation cache: rows of numbers on disk, with everything one must know about them.

    acts/manifest.json                      model, hookpoints, filter, tokenizer, text, dtype, rows, digests of files
    acts/journal.jsonl                      what the manifest does not have yet, while the cache is collected
    acts/tokens-00000.safetensors           tokens, positions, contexts: int32 [rows]
    acts/model.layers.15/00000.safetensors  acts [rows, d_in] in the chosen dtype, norms float32 [rows]

A shard has all rows of `shard_contexts` contexts, the last one of fewer; what is in it follows from their numbers, so
it does not matter who made it, when, and behind what. docs/store.md reads it in ten lines of numpy. Which rows take
part follows from norms, tokens and positions by the filter in the manifest, which is that of all rows. (A cache of
format version 1 has a mask in place of norms, and shards of equal numbers of rows.)

A folder with a manifest is a whole cache of the rows that manifest and journal name. `ended` says whether these are all
the tokens asked for:

    complete         they are
    text             the text had no more
    stream: ...      the stream that the text came from failed for good
    interrupted      it was told to stop
    unfinished       it is being collected, or its process was killed

`collect` with the same settings goes on with the last two, whose files in the end are those of a collection in one
piece: `plan` in the manifest has what they depend on.

manifest.py and journal.py have the fields of the manifest, shards.py what is looked at when a cache is opened. A cache
may lie at a URL, too (place.py, fetched.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from apportion.about import About
from apportion.answers import of_the_system
from apportion.disk import check_may_open
from apportion.progress import progress_bar
from apportion.rows.batch import Batch
from apportion.rows.copies import Copies
from apportion.rows.fetched import FetchedShards
from apportion.rows.filter import TokenFilter
from apportion.rows.hookpoint import Hookpoint
from apportion.rows.layout import LABELS, acts_file, token_file
from apportion.rows.manifest import about_manifest, read_manifest
from apportion.rows.numbers import columns_of, restored, row_bytes
from apportion.rows.place import Here, There, bytes_of_a_row, place_of
from apportion.rows.retries import Refused, Unreachable
from apportion.rows.shards import Column, Shard, ShardedRows, open_shard, open_shards
from apportion.urls import in_full

PART_BYTES = 1 << 20
"""Of a part that is read as a whole, where a cache lies on this machine: so much that a disk reads it at its speed, and
so little that a window of many has rows of all of the cache."""
LARGEST_ID = 1 << 24
"""No vocabulary has more tokens."""


class ActivationStore:
    """A cache opened for reading at one hookpoint: of a folder, or of a URL (s3://bucket/acts), whose shards are
    fetched into `copies` (a folder of bounded size; None: the usual one)."""

    def __init__(self, folder: str | Path, hookpoint: str | None = None, copies: Copies | None = None) -> None:
        self.place = place_of(folder, copies)
        self.folder = self.place.folder if isinstance(self.place, Here) else self.place.url
        self._where = self.folder.absolute() if isinstance(self.folder, Path) else self.folder
        self.manifest = read_manifest(self.place)
        if not self.manifest["rows"]:
            raise ValueError(f"the cache {str(self.folder)!r} has no rows yet: collect it with the same settings again")
        self.num_shards, self.context_tokens = len(self.manifest["shards"]), self.manifest["context_tokens"]
        self.hookpoint = self._choose(hookpoint)
        self._about = about_manifest(self.manifest)
        self.site = self._about.at(self.hookpoint)
        """What this hookpoint has of its own."""
        assert self._about.rows and self.site.d_in and self.site.filter, "every manifest says so"
        self.rows, self.d_in, self.filter = self._about.rows, self.site.d_in, TokenFilter.from_dict(self.site.filter)
        labels = {name: Column((), torch.int32) for name in LABELS}
        own = {"mask": Column((), torch.bool)} if self.manifest["format_version"] == 1 else {}
        self._numbers = columns_of(self.manifest["dtype"], self.d_in)
        acts = self._numbers | (own or {"norms": Column((), torch.float32)})
        self._fetched: FetchedShards | None = None
        if isinstance(self.place, There):
            self._labels, self._rows = self._fetched_columns(self.place, labels, acts)
            return
        self._labels = self._opened([token_file(number) for number in range(self.num_shards)], labels)
        self._rows = self._opened([acts_file(self.hookpoint, number) for number in range(self.num_shards)], acts)

    def __reduce__(self) -> tuple[Any, ...]:
        """Where it lies, not what it holds: a process that it is sent to opens it again."""
        copies = self.place.copies if isinstance(self.place, There) else None
        return type(self), (self._where, self.hookpoint, copies)

    @property
    def is_remote(self) -> bool:
        """Whether it lies at a URL."""
        return isinstance(self.place, There)

    def fetch(self, shards: Iterable[int]) -> None:
        """Have these shards, by their numbers, on this machine when this returns; several are fetched at a time.
        ValueError if they are more than the folder of copies may hold. Nothing to do where the cache is a folder."""
        if self._fetched is not None:
            with self._naming():
                self._fetched.fetch(shards)

    def _choose(self, hookpoint: str | None) -> str:
        names = list(self.manifest["hookpoints"])
        if hookpoint is None and len(names) == 1:
            return names[0]
        name = None if hookpoint is None else str(Hookpoint.parse(hookpoint))
        if name is None or name not in names:
            problem = "several hookpoints" if name is None else f"no hookpoint {name!r}"
            raise ValueError(f"the cache {str(self.folder)!r} has {problem}: choose one of {', '.join(names)}")
        return name

    def _opened(self, files: list[str], columns: dict[str, Column]) -> dict[str, ShardedRows]:
        """The columns in one file of each shard."""
        shards = [
            Shard(Path(self.folder) / file, shard["rows"], shard.get("sample_sha256", {}).get(file))
            for file, shard in zip(files, self.manifest["shards"], strict=True)
        ]
        try:
            return open_shards(shards, columns)
        except (OSError, RuntimeError, ValueError) as error:
            if (system := of_the_system(error)) is not None:
                raise system from error
            for shard in shards:
                check_may_open(shard.file)
            raise ValueError(f"the cache {str(self.folder)!r} is damaged ({error}): collect it again") from error

    def _fetched_columns(
        self, place: There, labels: dict[str, Column], acts: dict[str, Column]
    ) -> tuple[dict[str, ShardedRows], dict[str, ShardedRows]]:
        """The labels, and of the activations what is known of every row; the rest comes when it is asked for."""
        known = {name: column for name, column in acts.items() if name not in self._numbers}

        def opened(number: int) -> dict[str, torch.Tensor]:
            shard, rows = self.manifest["shards"][number], self.shard_rows[number]
            found = place.labels(number, shard, lambda file: open_shard(Shard(file, rows, None), labels))
            return found | place.head(
                self.hookpoint, number, shard, lambda file: open_shard(Shard(file, rows, None), known)
            )

        with self._naming():
            parts = place.together(opened, range(self.num_shards))
        found = {name: ShardedRows([part[name] for part in parts], self.shard_rows) for name in (*labels, *known)}
        heads, row_bytes = {name: found[name] for name in known}, bytes_of_a_row(self.manifest["dtype"], self.d_in)
        self._fetched = FetchedShards(place, self.hookpoint, self.manifest["shards"], acts, heads, row_bytes)
        rest = {name: self._fetched.column(name) for name in self._numbers}
        return {name: found[name] for name in labels}, heads | rest

    @contextmanager
    def _naming(self) -> Iterator[None]:
        """What is wrong with a file that was fetched, as an error about this cache."""
        try:
            yield
        except (Refused, Unreachable):
            raise
        except ValueError as error:
            if "--cache-gb" in str(error):
                raise
            raise ValueError(f"the cache {str(self.folder)!r} is damaged ({error})") from error

    @cached_property
    def mask(self) -> Bool[Tensor, " rows"]:
        """True for the rows that take part."""
        return torch.cat([mask for mask, _ in self.parts()])

    def parts(self) -> Iterator[tuple[Bool[Tensor, " n"], Int[Tensor, " n"]]]:
        """`mask` and `groups` of one shard after the other."""
        for contexts in self._labels["contexts"].parts:
            self._check_numbers("contexts", contexts, self._about.lm.contexts or self.rows)
        return map(self._part, range(self.num_shards))

    def _part(self, number: int) -> tuple[Bool[Tensor, " n"], Int[Tensor, " n"]]:
        tokens, positions, contexts = (self._labels[name].parts[number] for name in LABELS)
        if "mask" in self._rows:
            return self._rows["mask"].parts[number], contexts
        return self.filter.mask_of(self._rows["norms"].parts[number], tokens, positions), contexts

    @cached_property
    def tokens(self) -> Int[Tensor, " rows"]:
        return self._below("tokens", LARGEST_ID)

    @cached_property
    def positions(self) -> Int[Tensor, " rows"]:
        return self._below("positions", self.context_tokens)

    @cached_property
    def contexts(self) -> Int[Tensor, " rows"]:
        """For each row the number of the context it comes from."""
        return self._below("contexts", self._about.lm.contexts or self.rows)

    @property
    def groups(self) -> Int[Tensor, " rows"]:
        """The contexts."""
        return self.contexts

    @property
    def labels(self) -> dict[str, Int[Tensor, " rows"]]:
        return {"tokens": self.tokens, "positions": self.positions}

    def _below(self, name: str, limit: int) -> Int[Tensor, " rows"]:
        """A column of numbers from 0 to below `limit`; others lead to tables of any size, so ValueError for them."""
        self._check_numbers(name, column := self._labels[name].all(), limit)
        return column

    def _check_numbers(self, name: str, column: Int[Tensor, " n"], limit: int) -> None:
        if not len(column):
            return
        low, high = (int(end) for end in column.aminmax())
        if low < 0 or high >= limit:
            raise ValueError(
                f"the cache {str(self.folder)!r} is damaged ({name} between {low} and {high}, where they lie between "
                f"0 and {limit - 1}): collect it again"
            )

    def gather(self, indices: Int[Tensor, " n"]) -> Float[Tensor, "n d_in"]:
        """The activations at `indices`, in that order, as float32."""
        return restored(self._columns(indices, self._labels["tokens"].places(indices)))

    def _columns(self, indices: Int[Tensor, " n"], places: Any) -> dict[str, Tensor]:
        if self._fetched is not None and self._fetched.fit(places.numbers):
            self.fetch(places.numbers)  # else one after the other
        with self._naming():
            return {name: self._rows[name].gather(indices, places) for name in self._numbers}

    def gather_labels(self, indices: Int[Tensor, " n"]) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
        """The tokens and positions at `indices`."""
        return self._labels["tokens"].gather(indices), self._labels["positions"].gather(indices)

    def batch(self, indices: Int[Tensor, " n"], stored: bool = False) -> Batch:
        """The rows at `indices` with their labels; `stored`: as they lie there, where they have no scale."""
        places = self._labels["tokens"].places(indices)
        columns = self._columns(indices, places)
        x = columns["acts"] if stored and len(columns) == 1 else restored(columns)
        tokens, positions = (self._labels[name].gather(indices, places) for name in ("tokens", "positions"))
        return Batch(x, tokens=tokens, positions=positions)

    @cached_property
    def shard_rows(self) -> list[int]:
        """Rows of each shard, in order."""
        return [shard["rows"] for shard in self.manifest["shards"]]

    @cached_property
    def part_rows(self) -> list[int]:
        """Rows of each part that is read as a whole: of a shard, which is fetched whole, or of a piece of one that lies
        here."""
        if self.is_remote:
            return self.shard_rows
        size = max(1, PART_BYTES // self.row_bytes)
        return [min(size, rows - first) for rows in self.shard_rows for first in range(0, rows, size)]

    @property
    def row_bytes(self) -> int:
        return row_bytes(self.manifest["dtype"], self.d_in)

    @property
    def most_parts(self) -> int | None:
        """How many shards can be here at the same time; None where the cache is a folder."""
        return None if self._fetched is None else self._fetched.most

    def held(self, parts: Sequence[int]) -> ActivationStore:
        """This store with the rows of these parts alone, read into memory."""
        self.fetch(parts)
        ends = [*accumulate(self.part_rows, initial=0)]
        ranges = [(ends[part], ends[part + 1]) for part in parts]
        found = object.__new__(type(self))  # a copy would open the files again
        vars(found).update(vars(self))
        found._fetched = None  # what is read is held
        found._rows = {name: self._rows[name].held(ranges) for name in self._numbers}
        found._labels = {name: column.held(ranges) for name, column in self._labels.items()}
        return found

    def verify(self, progress: bool = False) -> None:
        """Read all of the cache, every hookpoint. ValueError naming the files whose sha256 is not the manifest's."""
        bad: list[str] = []
        with progress_bar("verifying", self.rows, show=progress) as show:
            done = 0
            for shard in self.manifest["shards"]:
                digests = dict(zip(shard["sha256"], self.place.digests(shard["sha256"]), strict=True))
                bad += [name for name, digest in shard["sha256"].items() if digests[name] != digest]
                done += shard["rows"]
                show(done)
        if bad:
            raise ValueError(
                f"the cache {str(self.folder)!r} is damaged: {', '.join(bad)} changed since it was "
                "collected; collect it again"
            )

    @property
    def tokens_sha256(self) -> str:
        """Which tokens these are: equal for equal tokens in equal contexts, at whatever hookpoint and precision."""
        return self._digest_of([token_file(number) for number in range(self.num_shards)])

    @property
    def content_sha256(self) -> str:
        """Which activations these are: equal for equal rows in the same precision and shards, wherever they lie."""
        return self._digest_of([acts_file(self.hookpoint, number) for number in range(self.num_shards)])

    def _digest_of(self, files: list[str]) -> str:
        each = [shard["sha256"][file] for file, shard in zip(files, self.manifest["shards"], strict=True)]
        return hashlib.sha256(repr(each).encode()).hexdigest()

    def describe(self) -> About:
        """What one must know about these rows: everything in the manifest but the shard list."""
        about = self._about
        language = replace(about.lm, tokens_sha256=self.tokens_sha256)
        own = {"kind": "cache", "folder": in_full(self.folder), "content_sha256": self.content_sha256}
        return about.of_site(self.site, sites=(), language=language, **own)

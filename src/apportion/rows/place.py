"""Where a cache lies that is read: a folder of this machine (`Here`), or a URL (`There`).

Of a file one says what is to be made of it; `There` has it made of a copy (copies.py), which it fetches:

    place.labels(3, shard, read)             read(file) of tokens, positions and contexts
    place.acts("layers.1", 3, shard, read)   of the activations, whole
    place.head("layers.1", 3, shard, read)   of a file with their norms and statistics; of a URL only these are fetched

A file that is fetched whole is compared with its sha256 before anybody sees it. Of a head that cannot be done: its
norms are compared when the rest comes (fetched.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from apportion.disk import parse_json, read_json
from apportion.rows.copies import Copies, usual_copies
from apportion.rows.journal import lines, parsed
from apportion.rows.layout import JOURNALS, MANIFEST, MOST_BYTES, acts_file, token_file
from apportion.rows.numbers import row_bytes
from apportion.rows.remote import Remote
from apportion.rows.retries import Refused
from apportion.rows.shards import sha256_of
from apportion.trust import expanded
from apportion.urls import url_of

T = TypeVar("T")
Read = Callable[[Path], T]
TRIES = 3
"""How often a file is fetched that does not have its sha256."""
HEADER_BYTES = 1 << 16
"""What is fetched at first to find the header; usually it has some 10 kB."""
LABEL_BYTES = 12
OF_HEAD = {"norms": (torch.float32, np.float32), "mask": (torch.bool, np.bool_)}
"""What is read of all rows when a cache is opened; the mask in version 1."""


class Here:
    """A cache in a folder."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = expanded(folder)
        self._lies = self.folder.absolute()

    def __str__(self) -> str:
        return str(self.folder)

    def manifest(self) -> dict[str, Any] | None:
        """As it is written, unchecked; None if there is none."""
        file = self.folder / MANIFEST
        return read_json(file, MOST_BYTES) if file.is_file() else None

    def lines(self) -> Iterator[dict[str, Any]]:
        """Of the journal."""
        return lines(self.folder)

    def together(self, do: Callable[[Any], T], each: Iterable[Any]) -> list[T]:
        """`do` of each; of a URL several at a time."""
        return [do(one) for one in each]

    def digests(self, names: Iterable[str]) -> list[str | None]:
        """The sha256 of files; None for what is no file, or cannot be read."""
        return [_digest(self._lies / name) for name in names]

    def labels(self, number: int, shard: Mapping[str, Any], read: Read[T]) -> T:
        return read(self.folder / token_file(number))

    def acts(self, hookpoint: str, number: int, shard: Mapping[str, Any], read: Read[T], row: int = 0) -> T:
        return read(self.folder / acts_file(hookpoint, number))

    def head(self, hookpoint: str, number: int, shard: Mapping[str, Any], read: Read[T]) -> T:
        return self.acts(hookpoint, number, shard, read)


class There:
    """A cache at a URL."""

    def __init__(self, url: str, copies: Copies | None = None) -> None:
        self.url, self._copies = url, copies

    def __str__(self) -> str:
        return self.url

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.url, self._copies)

    @cached_property
    def remote(self) -> Remote:
        return Remote(self.url)

    @cached_property
    def copies(self) -> Copies:
        return self._copies or usual_copies()

    def manifest(self) -> dict[str, Any] | None:
        try:
            content = self.remote.read(MANIFEST, 0, MOST_BYTES)
        except FileNotFoundError:
            return None
        return parse_json(_text(content, f"{self.url}/{MANIFEST}"), f"{self.url}/{MANIFEST}")

    def lines(self) -> Iterator[dict[str, Any]]:
        """What the objects of the journal say; nothing where one may not list them."""
        try:
            names = sorted(self.remote.names(JOURNALS))
        except Refused:
            return
        for content in self.remote.together(self._line, names):
            yield from parsed(content)

    def together(self, do: Callable[[Any], T], each: Iterable[Any]) -> list[T]:
        return self.remote.together(do, each)

    def digests(self, names: Iterable[str]) -> list[str | None]:
        return self.together(self._digest, names)

    def _digest(self, name: str) -> str | None:
        try:
            return self.remote.sha256_of(name)
        except FileNotFoundError:
            return None

    def line(self, name: str) -> Iterator[dict[str, Any]]:
        return parsed(self._line(name))

    def _line(self, name: str) -> str:
        try:
            return _text(self.remote.read(f"{JOURNALS}/{name}", 0, MOST_BYTES), f"{self.url}/{JOURNALS}/{name}")
        except FileNotFoundError:  # it has just moved into the manifest
            return ""

    def labels(self, number: int, shard: Mapping[str, Any], read: Read[T]) -> T:
        return self._use(token_file(number), shard, LABEL_BYTES, read)

    def acts(self, hookpoint: str, number: int, shard: Mapping[str, Any], read: Read[T], row: int) -> T:
        """`row`: about how many bytes a row has."""
        return self._use(acts_file(hookpoint, number), shard, row, read)

    def _use(self, name: str, shard: Mapping[str, Any], row: int, read: Read[T]) -> T:
        digest, size = shard["sha256"][name], size_of(shard, row)
        return self.copies.use(key_of(digest), size, lambda to: self._fetch(name, digest, 2 * size, to), read)

    def _fetch(self, name: str, digest: str, most: int, to: Path) -> None:
        for _ in range(TRIES):
            try:
                if self.remote.fetch(name, to, most) == digest:
                    return
            except FileNotFoundError:
                raise ValueError(f"{self.url}/{name} is missing") from None
        raise ValueError(f"{self.url}/{name} is damaged: what comes from there is not what was collected")

    def head(self, hookpoint: str, number: int, shard: Mapping[str, Any], read: Read[T]) -> T:
        name = acts_file(hookpoint, number)
        digest = shard["sha256"][name]

        def make(to: Path) -> None:
            whole = self.copies.path(key_of(digest))
            try:
                columns, metadata = _head_of(whole)
            except (OSError, SafetensorError):  # it is not here, or just left
                columns, metadata = self._fetched_head(name, shard["rows"])
            save_file(columns, to, metadata)

        return self.copies.use(key_of(digest, "head"), size_of(shard, 4), make, read)

    def _fetched_head(self, name: str, rows: int) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """The norms (or the mask), and the metadata, of a file of which the rest stays there."""
        where = f"{self.url}/{name}"
        try:
            start = self.remote.read(name, 0, HEADER_BYTES)
            length = int.from_bytes(start[:8], "little")
            if 8 + length > len(start) and length <= MOST_BYTES:
                start += self.remote.read(name, len(start), 8 + length - len(start))
            header = parse_json(_text(start[8 : 8 + length], where), where)
            metadata, columns = header.pop("__metadata__", {}), {}
            for column, (dtype, kind) in OF_HEAD.items():
                if column in header:
                    low, high = (8 + length + at for at in header[column]["data_offsets"])
                    if high - low > np.dtype(kind).itemsize * rows:
                        raise ValueError(f"{where} is damaged: it says that it has more than {rows} rows")
                    content = start[low:high] if high <= len(start) else self.remote.read(name, low, high - low)
                    if len(content) < high - low:
                        raise ValueError(f"{where} ends too early")
                    columns[column] = torch.from_numpy(np.frombuffer(content, kind).copy()).to(dtype)
        except FileNotFoundError:
            raise ValueError(f"{where} is missing") from None
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{where} is no .safetensors file") from error
        return columns, metadata

    def drop_head(self, shard: Mapping[str, Any], hookpoint: str, number: int) -> None:
        self.copies.drop(key_of(shard["sha256"][acts_file(hookpoint, number)], "head"))


Place = Here | There


def place_of(path: str | Path | Place, copies: Copies | None = None) -> Place:
    """Where a cache lies."""
    if isinstance(path, Here | There):
        return path
    url = url_of(path)
    return Here(path) if url is None else There(url, copies)


def key_of(digest: str, what: str = "") -> str:
    """What a copy is called. ValueError for what is no sha256."""
    if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
        raise ValueError(f"{digest!r:.80} is no sha256.")
    return f"{digest}.{what}{'.' * bool(what)}safetensors"


def size_of(shard: Mapping[str, Any], row: int) -> int:
    """About how many bytes a file has with so many for each row."""
    return shard["rows"] * row + HEADER_BYTES


def bytes_of_a_row(dtype: str, d_in: int) -> int:
    """In a file of activations, with the norm."""
    return row_bytes(dtype, d_in) + 4


def _digest(file: Path) -> str | None:
    try:
        return sha256_of(file) if file.is_file() else None
    except OSError:
        return None


def _head_of(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(file, framework="pt") as opened:
        return {name: opened.get_tensor(name).clone() for name in OF_HEAD if name in opened.keys()}, opened.metadata()  # noqa: SIM118


def _text(content: bytes, where: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is no text in UTF-8: {error}") from None

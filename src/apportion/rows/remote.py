"""The objects of a cache at a URL, through fsspec, which is imported when there is one.

Every request is made again as long as that may help (retries.py). An object appears whole or not at all: object stores
see to that, elsewhere it is written under another name and renamed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from math import inf
from pathlib import Path
from threading import Event
from typing import Any, TypeVar
from uuid import uuid4

from apportion.disk import naming
from apportion.extras import install
from apportion.rows.retries import Refused, Retries, check_wanted, status_of, wanted_until

T = TypeVar("T")
CHUNK_BYTES = 16 << 20
"""What is asked for at a time."""
TOGETHER = 8
"""How many objects are read at once."""
WHOLE = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "memory", "oss", "oci"}
"""Where an object appears whole."""
PART = ".part-"
IN_A_LISTING = ("size", "ETag", "etag", "LastModified", "mtime", "last_modified", "updated", "created")
"""What of an entry changes when the object is written anew."""


class Remote:
    """What lies at a URL. FileNotFoundError, and those of retries.py, from every method."""

    def __init__(self, url: str) -> None:
        self.url, self._retries = url, Retries(url)
        self._fs, self._root = _opened(url)

    def read(self, name: str, start: int = 0, size: int | None = None) -> bytes:
        """An object, or `size` bytes of it from `start` on; fewer, where it ends before."""
        end = None if size is None else start + size
        try:
            content = self._call(self._fs.cat_file, name, start=start or None, end=end)
        except Refused as error:
            if size is not None and status_of(error.__cause__) == 416:  # it ends before
                return b""
            raise
        if size is not None and len(content) > size:  # from a server that does not know ranges
            return content[start : start + size]
        return content

    def parts(self, name: str, most: float = inf) -> Iterator[bytes]:
        """A .safetensors file in pieces. Its header says how long it is; one that is shorter ends before. ValueError
        for one of more than so many bytes."""
        part = self.read(name, 0, CHUNK_BYTES)
        yield part
        at, size = len(part), size_of_tensors(part)
        if size > most:
            raise ValueError(f"{self.url}/{name} is damaged: it says that it has {size / 1e9:.3g} GB")
        while at < size and part:
            check_wanted()
            part = self.read(name, at, min(CHUNK_BYTES, size - at))
            yield part
            at += len(part)

    def fetch(self, name: str, to: Path, most: float = inf) -> str:
        """Write an object that is a .safetensors file, of at most so many bytes, to a file here; its sha256."""
        digest = hashlib.sha256()
        with naming(to):
            stream = to.open("wb")
        with stream:
            for part in self.parts(name, most):
                digest.update(part)
                with naming(to):
                    stream.write(part)
        return digest.hexdigest()

    def sha256_of(self, name: str) -> str:
        """Of an object that is a .safetensors file."""
        digest = hashlib.sha256()
        for part in self.parts(name):
            digest.update(part)
        return digest.hexdigest()

    def write(self, name: str, content: bytes) -> None:
        self._put(name, lambda path: self._fs.pipe_file(path, content))

    def put(self, name: str, file: Path) -> None:
        """An object that holds what a file here holds."""
        self._put(name, lambda path: self._fs.put_file(str(file), path))

    def remove(self, name: str) -> None:
        """Nothing where there is none."""
        with suppress(FileNotFoundError):
            self._call(self._fs.rm_file, name)

    def version(self, name: str) -> str:
        """A text that changes when an object is written anew; empty if there is none."""

        def said() -> dict[str, Any]:
            self._fs.invalidate_cache()
            return self._fs.info(self._at(name))

        try:
            return _version(self._retries.call(said, name))
        except FileNotFoundError:
            return ""

    def names(self, folder: str = "", empty: bool = True) -> dict[str, str]:
        """What lies in a folder, and of each its `version`; without folders that are empty, if these do not count."""
        at = self._at(folder)

        def listed() -> list[dict[str, Any]]:
            self._fs.invalidate_cache()
            return self._fs.ls(at, detail=True)

        try:
            found = self._retries.call(listed, folder)
        except FileNotFoundError:
            return {}
        itself = {at.strip("/"), at.strip("/") + "/"}  # as some stores mark a folder
        names = {
            entry["name"].rstrip("/").rpartition("/")[2]: entry
            for entry in found
            if entry["name"].lstrip("/") not in itself
        }
        names = {name: entry for name, entry in names.items() if name and PART not in name}
        folders = [] if empty else [name for name, entry in names.items() if entry.get("type") == "directory"]
        left_out = {name for name in folders if not self.names(_in(folder, name), empty=False)}
        return {name: _version(entry) for name, entry in names.items() if name not in left_out}

    def together(self, do: Callable[[T], Any], each: Iterable[T]) -> list[Any]:
        """`do` of each, several at a time. Whatever ends it, nobody goes on waiting for the store."""
        ending = Event()
        with ThreadPoolExecutor(TOGETHER, thread_name_prefix="apportion-fetch") as pool:
            try:
                return list(pool.map(wanted_until(ending, do), each))
            except BaseException:
                ending.set()
                pool.shutdown(cancel_futures=True)
                raise

    def _call(self, do: Callable[..., Any], name: str, **how: Any) -> Any:
        return self._retries.call(lambda: do(self._at(name), **how), name)

    def _put(self, name: str, write: Callable[[str], Any]) -> None:
        at = self._at(name)
        protocols = {self._fs.protocol} if isinstance(self._fs.protocol, str) else set(self._fs.protocol)

        def put() -> None:
            if protocols & WHOLE:
                write(at)
                return
            self._fs.makedirs(at.rpartition("/")[0], exist_ok=True)
            part = f"{at}{PART}{uuid4().hex[:8]}"
            write(part)
            self._fs.mv(part, at)

        try:
            self._retries.call(put, name)
        except FileNotFoundError as error:
            raise ValueError(
                f"{self.url} cannot be written ({error}): make its bucket first, or check the URL."
            ) from error
        except NotImplementedError as error:
            raise ValueError(f"{self.url} can only be read. Give a place that can be written to.") from error

    def _at(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}" if name else self._root


def _in(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _version(entry: Mapping[str, Any]) -> str:
    return repr([str(entry.get(field)) for field in IN_A_LISTING])


def size_of_tensors(start: bytes) -> int:
    """How long a .safetensors file is that begins with these bytes; 0 where that is none."""
    try:
        header = int.from_bytes(start[:8], "little")
        columns = json.loads(start[8 : 8 + header])
        return 8 + header + max(said["data_offsets"][1] for name, said in columns.items() if name != "__metadata__")
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        return 0


def _opened(url: str) -> tuple[Any, str]:
    """The file system that knows a URL, and what it calls the place. ValueError for one that nobody knows, or whose
    package is not installed."""
    try:
        from fsspec.core import url_to_fs
        from fsspec.registry import known_implementations
    except ImportError as error:
        raise ValueError(f"{url!r} needs fsspec, not installed here. {install('fsspec')}") from error
    scheme = url.partition("://")[0]
    try:
        fs, root = url_to_fs(url)
    except ImportError as error:
        package = known_implementations.get(scheme, {}).get("class", error.name or "fsspec").partition(".")[0]
        package = "aiohttp" if package == "fsspec" else package
        raise ValueError(f"{url!r} needs {package}, not installed here. {install(package)}") from error
    except ValueError as error:
        raise ValueError(f"{url!r} is no URL that fsspec can open ({error}). Check it, or give a folder.") from error
    return fs, str(root)

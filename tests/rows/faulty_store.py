"""A store at faulty://, in memory, whose requests fail as a test says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import fsspec
from fsspec.implementations.memory import MemoryFileSystem

Fault = Callable[[str, str, int], Any]
"""Given the operation, the path and how many requests there were before: raises, or changes what is read (a function of
bytes), or returns None."""


class Answer(Exception):
    """An answer with a status, as libraries raise it that know no other kinds."""

    def __init__(self, status: int) -> None:
        super().__init__(f"answered {status}")
        self.status = status


class FaultyStore(MemoryFileSystem):
    protocol = "faulty"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    fault: ClassVar[Fault | None] = None
    requests: ClassVar[list[tuple[str, str, int]]] = []
    """Operation, path and bytes."""
    listings: ClassVar[dict[tuple[str, str], Any]] = {}

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return MemoryFileSystem._strip_protocol(str(path).replace("faulty://", "memory://"))

    def _asked(self, what: str, path: str) -> Any:
        number = len(self.requests)
        self.requests.append((what, path, 0))
        return None if FaultyStore.fault is None else FaultyStore.fault(what, path, number)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **how: Any) -> bytes:
        change = self._asked("read", path)
        content = super().cat_file(path, start, end, **how)
        self.requests[-1] = "read", path, len(content)
        return content if change is None else change(content)

    def ls(self, path: str, detail: bool = True, **how: Any) -> Any:
        self._asked("list", path)
        return self._known("ls", path, lambda: super(FaultyStore, self).ls(path, detail, **how))

    def info(self, path: str, **how: Any) -> Any:
        return self._known("info", path, lambda: super(FaultyStore, self).info(path, **how))

    def _known(self, what: str, path: str, find: Callable[[], Any]) -> Any:
        """What was found before, as libraries remember listings until they are told to forget them."""
        if (what, path) not in self.listings:
            self.listings[what, path] = find()
        return self.listings[what, path]

    def invalidate_cache(self, path: str | None = None) -> None:
        self.listings.clear()

    def pipe_file(self, path: str, value: bytes, *args: Any, **how: Any) -> None:
        self._asked("write", path)
        super().pipe_file(path, value, *args, **how)

    def put_file(self, lpath: str, rpath: str, *args: Any, **how: Any) -> None:
        self._asked("write", rpath)
        super().put_file(lpath, rpath, *args, **how)


fsspec.register_implementation("faulty", FaultyStore, clobber=True)


@contextmanager
def failing(fault: Fault) -> Iterator[list[tuple[str, str, int]]]:
    """Within the block requests meet this fault; yields the requests."""
    FaultyStore.fault = fault
    FaultyStore.requests.clear()
    try:
        yield FaultyStore.requests
    finally:
        FaultyStore.fault = None


def every(error: Callable[[], Exception], first: int = 0, before: int = 10**9, name: str = "") -> Fault:
    """Requests from number `first` to `before`, of paths that end so, fail with an error."""

    def fault(what: str, path: str, number: int) -> None:
        if first <= number < before and path.endswith(name):
            raise error()

    return fault


def changed(how: Callable[[bytes], bytes], name: str, times: int = 1) -> Fault:
    """The first so many reads of a path with this end come changed."""
    left = [times]

    def fault(what: str, path: str, number: int) -> Any:
        if what != "read" or not path.endswith(name) or not left[0]:
            return None
        left[0] -= 1
        return how

    return fault


def clear() -> None:
    for kind in (FaultyStore, MemoryFileSystem):
        kind.store.clear()
        kind.pseudo_dirs[:] = [""]
    FaultyStore.requests.clear()
    FaultyStore.listings.clear()


def copy_to(url: str, folder: Any) -> None:
    """Put all files of a folder at a URL."""
    fs, root = fsspec.core.url_to_fs(url)
    fs.invalidate_cache()
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            fs.makedirs(f"{root}/{file.relative_to(folder).parent}".removesuffix("/."), exist_ok=True)
            fs.pipe_file(f"{root}/{file.relative_to(folder)}", file.read_bytes())


def contents(url: str) -> dict[str, bytes]:
    """All objects at a URL."""
    fs, root = fsspec.core.url_to_fs(url)
    fs.invalidate_cache()
    if not fs.exists(root):
        return {}
    return {name.removeprefix(root).lstrip("/"): bytes(fs.cat_file(name)) for name in fs.find(root)}

"""Copies of what lies at URLs, in one folder of bounded size that any number of processes share.

A copy is named by the sha256 of the file that it is of, so it never is out of date, and caches that share shards share
copies. It is made under another name and renamed when it is whole. Those used longest ago leave when there is no room;
whoever has one mapped into memory keeps reading it.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import RLock
from time import sleep
from typing import Any, TypeVar
from weakref import WeakSet

from safetensors import SafetensorError

from apportion.disk import existing, naming
from apportion.durable import place_in
from apportion.locks import LOCK, Lock
from apportion.trust import expanded

T = TypeVar("T")
FOLDER_VARIABLE, SIZE_VARIABLE = "APPORTION_CACHE_DIR", "APPORTION_CACHE_GB"
USUAL_GB = 20.0
SLACK = 20
"""One part in so many is kept free, so that the folder is looked through only once for so much that comes."""
OURS = re.compile(r"[0-9a-f]{64}(\.head)?\.safetensors")
"""What copies are called."""
TRIES = 3
LOOK_EVERY_S = 0.05


class Copies:
    """The folder, and how many bytes it may hold. None: what the variables say, else ~/.cache/apportion with 20 GB, or
    half of what the disk can give where that is less."""

    def __init__(self, folder: str | Path | None = None, gigabytes: float | None = None) -> None:
        home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        self.folder = expanded(folder or os.environ.get(FOLDER_VARIABLE) or Path(home) / "apportion").absolute()
        gigabytes = _size_told() if gigabytes is None else gigabytes
        if gigabytes is not None and not gigabytes > 0:
            raise ValueError(f"{gigabytes:g} GB hold no copies: give --cache-gb more than 0.")
        self.gigabytes = gigabytes
        self._lock, self._room = RLock(), 0
        """Bytes that may come before the folder is looked through again."""
        self._limit: int | None = None
        self._held: dict[str, int] = {}
        """Copies that are to stay, and how many say so."""
        self._coming: dict[str, int] = {}
        """Copies that are being made, and about how many bytes they will have."""
        self._mapping: WeakSet[Any] = WeakSet()

    def __reduce__(self) -> tuple[type[Copies], tuple[Path, float | None]]:
        return type(self), (self.folder, self.gigabytes)

    @property
    def limit(self) -> int:
        """Bytes."""
        if self._limit is None:
            if self.gigabytes is not None:
                self._limit = int(self.gigabytes * 1e9)
            else:
                mine = sum(size for _, size, _ in self._there())
                free = shutil.disk_usage(existing(self.folder)).free
                self._limit = int(min(USUAL_GB * 1e9, (free + mine) / 2))
        return self._limit

    @property
    def capacity(self) -> int:
        """Bytes that can be here at the same time."""
        return self.limit - self.limit // SLACK

    def path(self, key: str) -> Path:
        return self.folder / key

    def use(self, key: str, size: int, make: Callable[[Path], None], read: Callable[[Path], T]) -> T:
        """What `read` makes of the copy, which `make` writes if it is not here; it will have about `size` bytes.

        A copy that is gone before it is read, or that `read` finds damaged, is made again.
        """
        with self.holding([key]):
            return self._use(key, size, make, read)

    def _use(self, key: str, size: int, make: Callable[[Path], None], read: Callable[[Path], T]) -> T:
        damaged = False
        for trial in range(TRIES):
            file = self._get(key, size, make)
            try:
                return read(file)
            except (FileNotFoundError, ValueError, SafetensorError):
                if trial == TRIES - 1 or (damaged and file.exists()):
                    raise
                damaged |= file.exists()
                file.unlink(missing_ok=True)
        raise AssertionError("the last trial returns or raises")

    def add(self, key: str, file: Path) -> None:
        """Take over a file as a copy."""
        size = file.stat().st_size
        if size <= self.capacity:
            self._make_room(size)
            file.replace(self._made() / key)

    def drop(self, key: str) -> None:
        self.path(key).unlink(missing_ok=True)

    @contextmanager
    def holding(self, keys: list[str]) -> Iterator[None]:
        """Within the block this process does not make room by removing these."""
        with self._lock:
            for key in keys:
                self._held[key] = self._held.get(key, 0) + 1
        try:
            yield
        finally:
            with self._lock:
                for key in keys:
                    self._held[key] -= 1
                    if not self._held[key]:
                        del self._held[key]

    def _get(self, key: str, size: int, make: Callable[[Path], None]) -> Path:
        file = self.path(key)
        if self._touched(file):
            return file
        if size > self.capacity:
            raise ValueError(
                f"a file of {size / 1e9:.3g} GB does not fit the copies in {self.folder}, which may have "
                f"{self.limit / 1e9:.3g} GB: give --cache-gb more, or --cache-dir on another disk."
            )
        with self._alone(file):
            if self._touched(file):  # somebody else was at it
                return file
            with self._lock:
                self._make_room(size)
                self._coming[key] = size
            try:
                with place_in(self.folder, key) as place:
                    make(place / key)
                    (place / key).replace(file)
            finally:
                with self._lock:
                    del self._coming[key]
        return file

    def is_mapped_by(self, one: Any) -> None:
        """Have `one.let_go()` called when copies have left."""
        with self._lock:
            self._mapping.add(one)

    def touch(self, key: str) -> None:
        """Say that a copy is used."""
        self._touched(self.path(key))

    def _touched(self, file: Path) -> bool:
        """Whether it is here; if so it was used now."""
        with suppress(OSError):
            os.utime(file)
            return True
        return file.exists()  # somebody else's, who shares the folder

    def _made(self) -> Path:
        with naming(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder

    @contextmanager
    def _alone(self, file: Path) -> Iterator[None]:
        """Within the block nobody else makes this copy; whoever does is waited for."""
        self._made()
        lock = Lock(file.with_name(file.name + LOCK), str(file))
        while True:
            try:
                lock.__enter__()
                break
            except ValueError:
                sleep(LOOK_EVERY_S)
        try:
            yield
        finally:
            lock.__exit__()

    def _make_room(self, size: int) -> None:
        """Remove those used longest ago, unless `size` more bytes fit."""
        with self._lock:
            self._room -= size
            if self._room >= 0:
                return
            found = sorted(self._there())
            total = sum(bytes_ for _, bytes_, _ in found) + sum(self._coming.values())
            for _, bytes_, file in found:
                if total + size <= self.capacity:
                    break
                if file.name not in self._held:
                    file.unlink(missing_ok=True)
                    total -= bytes_
            self._room = min(self.limit // SLACK, max(0, self.limit - total - size))  # others add to it, too
            for one in list(self._mapping):
                one.let_go()

    def _there(self) -> list[tuple[float, int, Path]]:
        """When each was used, its bytes, and the file."""
        found = []
        for file in self.folder.glob("*.safetensors"):
            if OURS.fullmatch(file.name) is None:  # somebody's own, in a folder that he named
                continue
            with suppress(OSError):
                said = file.stat()
                found.append((said.st_mtime, said.st_size, file))
        return found


def usual_copies() -> Copies:
    """Those of this process: one object for one folder, so that all its caches share the room."""
    made = Copies()
    return _USUAL.setdefault((made.folder, made.gigabytes), made)


_USUAL: dict[tuple[Path, float | None], Copies] = {}


def choose(folder: Path | None, gigabytes: float | None) -> None:
    """From now on copies go there, also those of processes that this one starts."""
    if folder is not None:
        os.environ[FOLDER_VARIABLE] = str(folder.absolute())
    if gigabytes is not None:
        os.environ[SIZE_VARIABLE] = repr(gigabytes)
    Copies()


def _size_told() -> float | None:
    if not (told := os.environ.get(SIZE_VARIABLE)):
        return None
    try:
        return float(told)
    except ValueError:
        raise ValueError(f"{SIZE_VARIABLE}={told} is no number of GB: write it as 20, or unset it.") from None

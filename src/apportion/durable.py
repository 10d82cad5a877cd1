"""Places to write in: what is finished survives a power cut, what is not vanishes, at the latest at the next start.

    with place_in(folder, "a.json") as place:          folder/a.json.unfinished-<machine>-<random>/
        write(place / "a.json")
        make_durable(place / "a.json")                  its bytes are on the disk
        (place / "a.json").replace(folder / "a.json")   whole: the old file or the new one
        sync_folder(folder)                             and so is its name

A place is a folder of its own, so that whatever a library leaves beside the file that it writes goes with it. While
somebody has a place in a folder, that folder is locked as shared (flock); whoever gets it for himself knows that places
which are left there belong to nobody. The kernel ends such locks with their process, however it ends.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import sleep, time
from uuid import uuid4

from apportion.locks import LOCK, STALE_S, fcntl, host_name, locked, remove_if_gone

UNFINISHED, COMPLETE = "unfinished", "complete"
PLACE = re.compile(rf"(?:^|\.)({UNFINISHED}|{COMPLETE})-([0-9a-f]{{8}})-[0-9a-f]{{8}}$")
CANNOT = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.ENOTTY, errno.EACCES, errno.EPERM}
"""What a file system answers that cannot make a folder durable, or set permissions; and a folder that may be written in
and not be listed."""
TRIES = 100
"""How often a lock is tried, every tenth of a second."""


@contextmanager
def place_in(folder: Path, name: str = "") -> Iterator[Path]:
    """A new folder in `folder`, whose name says what it is to become; at the end of the block it is gone."""
    if not is_unfinished(folder):
        sweep(folder)
    pid = os.getpid()
    place = folder / f"{name}{'.' * bool(name)}{UNFINISHED}-{host_name()}-{uuid4().hex[:8]}"
    with _shared(folder):
        try:
            place.mkdir()
            yield place
        finally:
            if os.getpid() == pid:  # a fork that ends leaves it to whom it belongs
                shutil.rmtree(place, ignore_errors=True)


def is_unfinished(path: Path) -> bool:
    """True for a place, and whatever lies in one."""
    return any(UNFINISHED in part and PLACE.search(part) for part in path.parts)


def sweep(folder: Path) -> None:
    """Remove the places and locks in `folder` whose processes are gone, and move up what is complete."""
    try:
        entries = list(folder.iterdir())
    except OSError:
        return
    for lock in entries:
        if lock.name.endswith(LOCK):
            remove_if_gone(lock)
    if not (left := [(entry, found) for entry in entries if (found := PLACE.search(entry.name))]):
        return
    with _opened(folder) as opened:  # locked, it is for oneself: nobody else has a place in it, or can make one
        for place, found in left if opened is not None and locked(opened, "LOCK_EX") is True else ():
            with suppress(OSError):
                # that of another machine is kept for a while: locks may not reach from machine to machine
                if found[2] != host_name() and time() - place.stat().st_mtime < STALE_S:
                    continue
                if found[1] == COMPLETE:
                    move_up(place)
                else:
                    shutil.rmtree(place, ignore_errors=True)


def complete(place: Path) -> Path:
    """Say of a place in the folder that it is to become that it has all that belongs there: nobody will remove it."""
    renamed = place.with_name(place.name.replace(UNFINISHED, COMPLETE))
    place.rename(renamed)
    sync_folder(place.parent)
    return renamed


def move_up(folder: Path, last: Iterable[str] = ()) -> None:
    """Move what a folder holds into the folder around it, entries named in `last` after all others are durable."""
    after = list(last)
    for entry in sorted(folder.iterdir(), key=lambda e: (after.index(e.name) if e.name in after else -1, e.name)):
        if entry.name in after:
            sync_folder(folder.parent)
        entry.rename(folder.parent / entry.name)
    folder.rmdir()


def remove(path: Path) -> None:
    """Remove a folder; it is there whole, or its name is gone."""
    with place_in(path.parent, path.name) as place:
        path.rename(place / path.name)
        sync_folder(path.parent)


def make_durable(path: Path) -> None:
    """The bytes of a file, or of all files in a folder and their names, are on the disk when this returns.

    Files get the permissions that the umask gives to new ones: some libraries make theirs private.
    """
    folder = path if path.is_dir() else path.parent
    mode = folder.stat().st_mode & 0o666
    for at, _, names in os.walk(path, topdown=False) if folder == path else [(folder, [], [path.name])]:
        for file in (Path(at) / name for name in names):
            with _if_possible():
                file.chmod(mode)
            _sync(file, os.O_RDONLY)
        if folder == path:
            sync_folder(Path(at))


def sync_folder(folder: Path) -> None:
    """The names in `folder` are on the disk when this returns, where the file system knows how to see to it."""
    if os.name != "nt":
        with _if_possible():
            _sync(folder, os.O_RDONLY | os.O_DIRECTORY)


@contextmanager
def _if_possible() -> Iterator[None]:
    """What the file system cannot do is left out."""
    try:
        yield
    except OSError as error:
        if error.errno not in CANNOT:
            raise


def _sync(path: Path, flags: int) -> None:
    opened = os.open(path, flags)
    try:
        if hasattr(fcntl, "F_FULLFSYNC"):  # where fsync leaves data in the drive's cache
            fcntl.fcntl(opened, fcntl.F_FULLFSYNC)  # type: ignore[union-attr]
        else:
            os.fsync(opened)
    finally:
        os.close(opened)


@contextmanager
def _shared(folder: Path) -> Iterator[None]:
    """Within the block nobody has `folder` for himself (unless he needs long); nothing where there are no locks."""
    with _opened(folder) as opened:
        for _ in range(TRIES):
            if opened is None or locked(opened, "LOCK_SH") is not False:
                break
            sleep(0.1)
        yield


@contextmanager
def _opened(folder: Path) -> Iterator[int | None]:
    """The folder's number while it is open, which ends its locks; None if it cannot be opened."""
    opened = None
    with suppress(OSError):
        opened = os.open(folder, os.O_RDONLY)
    try:
        yield opened
    finally:
        if opened is not None:
            os.close(opened)

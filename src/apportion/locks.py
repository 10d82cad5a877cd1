"""One process at a time writes a run, or a cache.

    with Lock(file, "the run in runs/x"):      ValueError if somebody else has it

A lock is a file that its holder keeps locked (flock, which ends with the process, however it ends) and touches every
minute; it says which process of which boot of which machine holds it, since when. Where flock does not reach, because
the holder is on another machine or the file system has no locks, that decides: a process of this machine that is gone
holds nothing, and whoever has not touched his lock for ten minutes is taken to be gone.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import threading
from contextlib import suppress
from pathlib import Path
from time import sleep, strftime, time
from typing import Any

try:
    import fcntl
except ImportError:  # Windows: what a lock says decides alone
    fcntl = None

LOCK = ".apportion.lock"
NO_LINK = getattr(os, "O_NOFOLLOW", 0)
"""A lock is written, and a folder from elsewhere can have a link of that name to anything."""
TOUCHED_EVERY_S = 60
TRIES = 20
"""How often a lock is looked at before it counts as held by somebody who does not say who he is."""
STALE_S = 600
"""Whoever has not touched his lock for so long is taken to be gone."""


def lock_of(target: Path) -> Path:
    """Where the lock of a folder lies: in it, or beside its place as long as it does not exist."""
    return target / LOCK if target.is_dir() else target.with_name(target.name + LOCK)


class Lock:
    """Held while entered. `file` lies where the work lies, and vanishes at the end."""

    def __init__(self, file: Path, what: str) -> None:
        self.file, self.what = file.absolute(), what
        self._opened: int | None = None
        self._pid = 0
        self._done = threading.Event()

    def __enter__(self) -> Lock:
        for trial in range(TRIES):
            opened = os.open(self.file, os.O_RDWR | os.O_CREAT | NO_LINK, 0o666)
            if self._take(opened, trial):
                break
            os.close(opened)
        assert self._opened is not None
        try:
            os.ftruncate(self._opened, 0)
            os.pwrite(self._opened, json.dumps(this_process()).encode(), 0)
        except OSError:  # a full disk
            self.__exit__()
            raise
        threading.Thread(target=self._touch, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        if self._opened is not None:
            if self._pid == os.getpid() and self._is(self._opened):  # a fork that ends gives nothing up
                with suppress(OSError):  # a disk that can only be read any more; it is unlocked all the same
                    self.file.unlink()
            os.close(self._opened)
            self._opened = None

    def check(self) -> None:
        """ValueError if somebody took the lock: this process seemed to be gone, because it or its disk stood still."""
        if self._opened is None or not self._is(self._opened):
            raise ValueError(f"{self.what} was taken over by another process while this one stood still: stopping.")

    def _take(self, opened: int, trial: int) -> bool:
        """Whether the lock is held from now on; False if one should look again. ValueError if somebody has it."""
        holder, had = _read(opened), locked(opened, "LOCK_EX")
        gone = is_gone(holder, time() - os.fstat(opened).st_mtime, unlocked=had is True)
        if had is not False and gone and self._is(opened):
            self._opened, self._pid = opened, os.getpid()
            return True
        if holder and gone and trial == TRIES // 2:  # a child of the holder, which does not write, outlived it
            self.file.unlink(missing_ok=True)
        elif trial == TRIES - 1 or (holder and not gone):
            os.close(opened)
            raise ValueError(f"{self.what} is being written by {_said(holder)}. Wait for it, or end it first.")
        sleep(0.05)  # somebody looks at it, or removes it at this moment
        return False

    def _is(self, opened: int) -> bool:
        """Whether what is opened is still what lies there under that name."""
        with suppress(OSError):
            return os.path.samestat(os.fstat(opened), self.file.stat())
        return False

    def _touch(self) -> None:
        while not self._done.wait(TOUCHED_EVERY_S):
            with suppress(OSError):
                os.utime(self.file)


def remove_if_gone(file: Path) -> None:
    """Remove a lock that nobody holds."""
    with suppress(OSError):
        opened = os.open(file, os.O_RDWR | NO_LINK)
        try:
            had = locked(opened, "LOCK_EX") is True
            if is_gone(_read(opened), time() - os.fstat(opened).st_mtime, unlocked=had):
                file.unlink()
        finally:
            os.close(opened)


def host_name() -> str:
    """This machine, as others that share its disks can tell it from theirs."""
    name = platform.node()
    with suppress(OSError):
        name += Path("/etc/machine-id").read_text(encoding="utf-8").strip()
    return hashlib.sha256(name.encode()).hexdigest()[:8]


def locked(opened: int, kind: str) -> bool | None:
    """Lock what is opened as LOCK_SH or LOCK_EX; False if somebody else has it, None if it cannot be locked."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(opened, getattr(fcntl, kind) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def this_process() -> dict[str, Any]:
    """What tells a process from all others, also from one of the same number in another container or after a boot."""
    pid = os.getpid()
    return {
        "host": host_name(), "boot": _line("/proc/sys/kernel/random/boot_id"), "space": _link("/proc/self/ns/pid"),
        "pid": pid, "start": start_of(pid), "name": platform.node(), "since": strftime("%Y-%m-%d %H:%M:%S"),
    }  # fmt: skip


def start_of(pid: int) -> str | None:
    """When a process began, in the kernel's ticks; None if it is not there any more, or no /proc is."""
    fields = (_line(f"/proc/{pid}/stat") or "").rpartition(")")[2].split()
    return fields[19] if fields and fields[0] != "Z" else None


def is_gone(holder: dict[str, Any], silent_s: float, unlocked: bool) -> bool:
    """Whether the process that wrote this lock is gone, or, where nobody can tell, has been silent for too long.

    `unlocked` says that the lock could be taken, which a holder under the same kernel would have prevented.
    """
    now = this_process()
    if not holder:
        return unlocked or silent_s > STALE_S
    if holder.get("boot") == now["boot"] and (now["boot"] is not None or holder.get("host") == now["host"]):
        if not unlocked and holder.get("space") == now["space"] and now["start"] and isinstance(holder.get("pid"), int):
            return start_of(holder["pid"]) != holder.get("start")
        return unlocked or (fcntl is None and silent_s > STALE_S)
    return holder.get("host") == now["host"] or silent_s > STALE_S  # started again since then, or another machine


def _read(opened: int) -> dict[str, Any]:
    try:
        found = json.loads(os.pread(opened, 4096, 0))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _said(holder: dict[str, Any]) -> str:
    if not holder:
        return "another process"
    return f"another process ({holder.get('pid')} on {holder.get('name')}, since {holder.get('since')})"


def _line(file: str) -> str | None:
    with suppress(OSError):
        return Path(file).read_text(encoding="utf-8").strip()
    return None


def _link(file: str) -> str | None:
    with suppress(OSError):
        return str(Path(file).readlink())
    return None

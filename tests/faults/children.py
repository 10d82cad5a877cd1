"""Work in a process of its own that dies where a test wants it to."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from apportion import disk
from apportion.durable import PLACE
from apportion.locks import LOCK

CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod", "os.utime")
"""Audit events of what changes a file system; besides, files opened for writing, fsync and save_file."""
FAILED = 70


class Killer:
    """Counts the changes that this process makes below `root`, and kills it before number `at` (from 0)."""

    def __init__(self, root: Path, at: int | None) -> None:
        self.root, self.at, self.count = str(root.resolve()), at, 0
        sys.addaudithook(self._event)
        self._fsync, os.fsync = os.fsync, self._before_fsync  # type: ignore[assignment]
        self._save_file, disk.save_file = disk.save_file, self._half_a_file

    def change(self) -> None:
        if self.count == self.at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.count += 1

    def _event(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = args
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and str(path).startswith(self.root):
                self.change()
        elif event in CHANGES and (str(args[0]).startswith(self.root) or not Path(str(args[0])).is_absolute()):
            self.change()

    def _before_fsync(self, opened: int) -> None:
        self.change()
        self._fsync(opened)

    def _half_a_file(self, tensors: Any, file: Path, metadata: Any) -> None:
        """Before it, and in the middle of it, where the library's own temporary file lies beside."""
        self.change()
        if self.count == self.at:
            self._save_file(tensors, file, metadata)
            file.rename(file.with_name(".tmpAbCdEf"))
            os.truncate(file.with_name(".tmpAbCdEf"), 100)
            os.kill(os.getpid(), signal.SIGKILL)
        self.count += 1
        self._save_file(tensors, file, metadata)


def start(work: Callable[[], Any]) -> int:
    """Fork; the child does the work and ends with 0, or FAILED after an exception, which it prints. Returns its id."""
    pid = os.fork()
    if pid:
        return pid
    status = FAILED
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        work()
        status = 0
    except KeyboardInterrupt as error:
        sys.stderr.write(f"{error}\n")
        status = 130
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def end_of(pid: int) -> int:
    """Wait for a child; its exit status, negative if a signal ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed(work: Callable[[], Any], root: Path, at: int) -> bool:
    """Do the work in a child that dies before change number `at`; False if it was done before it came to that."""

    def child() -> None:
        Killer(root, at)
        work()

    status = end_of(start(child))
    assert status in (0, -signal.SIGKILL), f"the work itself failed with {status}"
    return status != 0


def changes_of(work: Callable[[], Any], root: Path, note: Path) -> int:
    """How many changes the work makes; found in a child."""

    def child() -> None:
        killer = Killer(root, None)
        work()
        count = killer.count
        note.write_text(str(count))

    assert end_of(start(child)) == 0
    return int(note.read_text())


def orphans(root: Path) -> list[str]:
    """What nobody would ever remove."""
    return [
        str(entry.relative_to(root))
        for entry in root.rglob("*")
        if PLACE.search(entry.name) or entry.name.endswith((LOCK, ".partial")) or entry.name.startswith(".tmp")
    ]

"""The journal of a cache that is being collected: one line for each shard, written when its files are on the disk.

    journal.jsonl    {"shard": 3, "contexts": 512, "rows": 131072, "sha256": {...}, ..., "line_sha256": ...}

The last line of a shard counts; one with no contexts takes the shard back, before its files are replaced. A line that a
crash cut off is passed over, and so is one whose digest is not that of its content. At the end all of it moves into the
manifest.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from apportion.disk import naming, plain
from apportion.durable import sync_folder
from apportion.trust import read_text

JOURNAL = "journal.jsonl"
DIGEST = "line_sha256"
MOST_BYTES = 1 << 28


def add_line(folder: Path, line: Mapping[str, Any]) -> None:
    """Write a line; it is on the disk when this returns."""
    file = folder / JOURNAL
    content = line_text(line)
    with naming(file):
        new = not file.exists()
        opened = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            size = os.fstat(opened).st_size
            begun = size > 0 and os.pread(opened, 1, size - 1) != b"\n"  # behind a line that a crash cut off
            text = ("\n" if begun else "") + content
            if os.write(opened, text.encode()) != len(text):
                raise OSError(28, "No space left on device")
            os.fsync(opened)
        finally:
            os.close(opened)
        if new:
            sync_folder(folder)


def line_text(line: Mapping[str, Any]) -> str:
    return json.dumps(plain({**line, DIGEST: _digest(line)})) + "\n"


def lines(folder: Path) -> Iterator[dict[str, Any]]:
    """The lines that are whole; none where there is no journal."""
    file = folder / JOURNAL
    yield from parsed(read_text(file, MOST_BYTES)) if file.is_file() else ()


def parsed(content: str) -> Iterator[dict[str, Any]]:
    for text in content.splitlines():
        try:
            line = json.loads(text)
            whole = isinstance(line, dict) and line.pop(DIGEST, None) == _digest(line)
        except (ValueError, RecursionError):
            continue
        if whole:
            yield line


class Follower:
    """Reads a journal that grows: each time only what has come since."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / JOURNAL
        self._read = 0, 0
        """Which file it was, and how many bytes of whole lines were read."""

    def is_new(self) -> bool:
        """Whether it is another file than before, or shorter."""
        inode, start = self._read
        if not self.file.is_file():
            return start > 0
        found = self.file.stat()
        return start > 0 and (found.st_ino != inode or found.st_size < start)

    def rewind(self) -> None:
        self._read = 0, 0

    def lines(self) -> Iterator[dict[str, Any]]:
        """The whole lines that have come."""
        if not self.file.is_file():
            return
        inode, start = self.file.stat().st_ino, self._read[1]
        content = read_text(self.file, MOST_BYTES, start)
        whole = content[: content.rfind("\n") + 1]  # somebody may be writing the rest
        self._read = inode, start + len(whole.encode())
        yield from parsed(whole)


def _digest(line: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain(line), sort_keys=True).encode()).hexdigest()

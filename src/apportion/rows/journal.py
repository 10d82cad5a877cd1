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
    content = plain({**line, DIGEST: _digest(line)})
    with naming(file):
        new = not file.exists()
        opened = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            size = os.fstat(opened).st_size
            begun = size > 0 and os.pread(opened, 1, size - 1) != b"\n"  # behind a line that a crash cut off
            text = ("\n" if begun else "") + json.dumps(content) + "\n"
            if os.write(opened, text.encode()) != len(text):
                raise OSError(28, "No space left on device")
            os.fsync(opened)
        finally:
            os.close(opened)
        if new:
            sync_folder(folder)


def lines(folder: Path) -> Iterator[dict[str, Any]]:
    """The lines that are whole, each once it has been read; none where there is no journal."""
    file = folder / JOURNAL
    if not file.is_file():
        return
    for text in read_text(file, MOST_BYTES).splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and line.pop(DIGEST, None) == _digest(line):
            yield line


def _digest(line: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain(line), sort_keys=True).encode()).hexdigest()

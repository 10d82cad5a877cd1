"""How far files are believed that somebody else may have written, or that were damaged.

    read_text(file)             a small text file: a regular one, and no longer than it may be
    expanded(path)              a path as a user writes it
    resolved(path)              the same without links
    within(folder, name)        where something of that name goes in a folder
    inside(folder, name)        what has that name in a folder
    shown(text)                 text as a terminal can be shown it
    refuse_mistyped(name)       what was meant as a path is no name of something to download

Whatever a file says (a hookpoint, the name of a tensor or of a model, a folder) becomes a path only by `within` or
`inside`, and is said only as `shown`.
"""

from __future__ import annotations

import os
import stat
import unicodedata
from pathlib import Path

MOST_TEXT = 16 << 20
"""Bytes that a config or another record can have."""
SUFFIXES = (
    *(".safetensors", ".npz", ".npy", ".pt", ".pth", ".bin", ".gguf", ".h5", ".pkl", ".zip"),
    *(".json", ".jsonl", ".ndjson", ".yaml", ".yml", ".txt", ".md", ".csv", ".tsv", ".parquet", ".arrow"),
    *(".gz", ".bz2", ".xz", ".zst"),
)
"""Ends of names of files; a name on the Hub can have a dot too, as in Qwen2.5-0.5B."""
UNSEEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
"""Unicode's kinds of characters that steer a terminal, reorder what is around them, or are none."""
LAYOUT = "\n\t"


def read_text(file: Path, limit: int = MOST_TEXT, start: int = 0) -> str:
    """A text file in UTF-8, from the byte `start` on. ValueError for what is no regular file (a pipe, a device), or has
    more than `limit` bytes.

    Opened without waiting, so that a pipe does not stop it, and looked at only then, so that nothing changes between.
    """
    number = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise _not_regular(file)
    with os.fdopen(number, "rb") as opened:
        opened.seek(start)
        content = opened.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"{file} has more than {limit:,} bytes, which is too long for what it should be.")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no text in UTF-8: {error}") from None


def expanded(path: str | Path) -> Path:
    """A path with the home folder in place of ~. ValueError for a name that is no text, as libraries need it."""
    try:
        str(path).encode()
        return Path(path).expanduser()
    except UnicodeEncodeError:
        raise ValueError(f"{str(path)!r} is no name in UTF-8: rename it, or choose another.") from None
    except RuntimeError as error:
        raise ValueError(f"{str(path)!r}: {str(error).rstrip('.')}. Write the path in full.") from None


def resolved(path: str | Path) -> Path:
    """A path without ~ and links. ValueError for links that lead in a circle."""
    try:
        return expanded(path).resolve()
    except RuntimeError as error:
        raise ValueError(f"{str(path)!r} leads nowhere ({error}): choose another place.") from None


def check_regular(file: Path) -> None:
    """ValueError for what is no regular file, before a library opens it and waits."""
    if file.exists() and not file.is_file():
        raise _not_regular(file)


def _not_regular(file: Path) -> ValueError:
    return ValueError(f"{file} is no regular file but a pipe, a device or a folder. Give a file.")


def within(folder: Path, name: str) -> Path:
    """Where something of that name goes in `folder`; it may lie deeper. ValueError if it leads out, also by a link.

    Links to files are followed: caches of the Hub consist of them.
    """
    relative = Path(os.path.normpath(name))
    if relative.is_absolute() or relative.drive or os.pardir in relative.parts or "\0" in name:
        raise ValueError(f"{name!r} leads out of {folder}. Give something inside the folder.")
    at = place = folder / relative
    while not at.is_dir() and at != folder:
        at = at.parent
    if not at.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{name!r} leads out of {folder}, to {at.resolve()}. Give that folder itself.")
    return place


def inside(folder: Path, name: str) -> Path:
    """What has that name in `folder`; see `within`. ValueError if there is nothing."""
    found = within(folder, name)
    if not found.exists():
        raise ValueError(f"{folder} has no {name}.")
    return found


def shown(text: object, keep: str = LAYOUT) -> str:
    """Text with escapes in place of what steers a terminal; the characters in `keep` stay as they are."""
    unseen = {c for c in set(str(text)) - set(keep) if unicodedata.category(c) in UNSEEN}
    return "".join(c.encode("unicode_escape").decode() if c in unseen else c for c in str(text))


def refuse_mistyped(name: str, what: str) -> None:
    """ValueError if `name`, at which nothing lies, can only have been meant as a path: so it never is a download.

    It can if it is written like one, has the suffix of a file, or has a folder here for its first part.
    """
    parts = name.replace("\\", "/").split("/")
    like_path = name.startswith(("/", "~")) or "\\" in name or parts[0] in (".", "..") or parts[-1] == ""
    if like_path or parts[-1].lower().endswith(SUFFIXES):
        raise ValueError(f"{name!r} does not exist. Check the path, or give {what}.")
    if len(parts) > 1 and Path(parts[0]).is_dir():
        raise ValueError(
            f"{name!r} does not exist, and {parts[0]} is a folder here. Check the path; if {what} of that name is "
            "meant, run this in another folder."
        )

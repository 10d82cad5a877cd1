"""A look into a file, to tell which library wrote it: names only, no weights, and nothing is ever executed or raised.

What cannot be read has no names; whoever then reads the file says what is wrong with it.
"""

from __future__ import annotations

import json
import pickle
import pickletools
import re
import struct
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

LONGEST = 100_000_000
"""Bytes of a header or a pickle that are worth a look."""
PLAIN = re.compile(r"^([\w-]+):[ \t]+('[^'\n]*'|\"[^\"\n]*\"|[^\s#][^\n#]*?)[ \t]*(?:#.*)?$", re.MULTILINE)
PICKLES = 5
"""torch.save of before 1.6 wrote this many one after the other; the fourth holds the names, and so may the last."""


def names_in(file: Path) -> frozenset[str]:
    """Names of the tensors of a .safetensors or .npz; every string in the pickle of a .pt or .pth, keys among them."""
    try:
        if file.suffix == ".safetensors":
            return frozenset(_safetensors_header(file)) - {"__metadata__"}
        if file.suffix == ".npz":
            with zipfile.ZipFile(file) as archive:
                return frozenset(name.removesuffix(".npy") for name in archive.namelist())
        if file.suffix in (".pt", ".pth"):
            return frozenset(_pickled_words(file))
    except Exception:
        return frozenset()
    return frozenset()


def settings_in(file: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if there is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8")) if file.stat().st_size <= LONGEST else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def yaml_in(file: Path) -> dict[str, str]:
    """The plain values at the top of a YAML file (`name: value`), as strings; empty if there is none."""
    try:
        text = file.read_text(encoding="utf-8") if file.stat().st_size <= LONGEST else ""
    except (OSError, ValueError):
        return {}
    return {found[1]: found[2].strip("'\"") for found in PLAIN.finditer(text) if found[2] not in ("null", "~")}


def first_file(path: Path, patterns: Iterable[str]) -> Path | None:
    """`path` itself if it is a file that fits a pattern, or the first file of the folder `path` that does."""
    for pattern in patterns:
        if path.is_file() and path.match(pattern):
            return path
        if path.is_dir() and (found := next((f for f in sorted(path.glob(pattern)) if f.is_file()), None)):
            return found
    return None


def beside(path: Path, name: str) -> Path:
    """The file of that name in the folder `path`, or beside the file `path`; it need not exist."""
    return (path if path.is_dir() else path.parent) / name


def _safetensors_header(file: Path) -> dict[str, Any]:
    with file.open("rb") as f:
        (length,) = struct.unpack("<Q", f.read(8))
        return json.loads(f.read(length)) if length <= LONGEST else {}


def _pickled_words(file: Path) -> Iterator[str]:
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            entry = next(e for e in archive.infolist() if e.filename.endswith("data.pkl") and e.file_size <= LONGEST)
            with archive.open(entry) as stream:
                yield from _words(stream, 1)
    else:
        with file.open("rb") as stream:
            yield from _words(stream, PICKLES)


def _words(stream: IO[bytes], pickles: int) -> Iterator[str]:
    """Strings in pickles that follow each other, read as data: no instruction of theirs is carried out."""
    try:
        for _ in range(pickles):
            yield from (arg for code, arg, _ in pickletools.genops(stream) if "UNICODE" in code.name and arg)
    except (ValueError, pickle.UnpicklingError, EOFError):
        return  # what follows is no pickle

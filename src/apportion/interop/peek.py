"""A look into a file, to tell which library wrote it: names only, no weights, and nothing is ever executed or raised.

What cannot be read has no names; whoever then reads the file says what is wrong with it.
"""

from __future__ import annotations

import io
import json
import pickle
import pickletools
import re
import struct
import zipfile
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from apportion.disk import read_json
from apportion.trust import MOST_TEXT, check_regular, read_text

LONGEST = MOST_TEXT
"""Bytes of a header or a pickle that are worth a look."""
MOST_INSTRUCTIONS = 100_000
"""In a pickle, of which a state dict has some ten for each tensor."""
NAMED = re.compile(r"([\w-]+):([ \t].*)")
"""A value at the top of a YAML file."""
PICKLES = 5
"""torch.save of before 1.6 wrote this many one after the other; the fourth holds the names, and so may the last."""


def names_in(file: Path | None) -> frozenset[str]:
    """Names of the tensors of a .safetensors or .npz; every string in the pickle of a .pt or .pth, keys among them."""
    if file is None:
        return frozenset()
    try:
        check_regular(file)
        if file.suffix == ".safetensors":
            return frozenset(_safetensors_header(file)) - {"__metadata__"}
        if file.suffix == ".npz":
            with zipfile.ZipFile(file) as archive:
                return frozenset(name.removesuffix(".npy") for name in archive.namelist())
        if file.suffix in (".pt", ".pth"):
            instructions = islice(_instructions(file), MOST_INSTRUCTIONS)
            return frozenset(arg for code, arg in instructions if "UNICODE" in code.name and arg)
    except Exception:
        return frozenset()
    return frozenset()


def settings_in(file: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if there is none."""
    try:
        return read_json(file)
    except (OSError, ValueError):
        return {}


def yaml_in(file: Path) -> dict[str, str]:
    """The plain values at the top of a YAML file (`name: value`), as strings; empty if there is none."""
    try:
        lines = read_text(file).splitlines()
    except (OSError, ValueError):
        return {}
    found = {named[1]: _plain_value(named[2].strip(" \t")) for line in lines if (named := NAMED.fullmatch(line))}
    return {name: value for name, value in found.items() if value is not None}


def _plain_value(text: str) -> str | None:
    """A number, a word, or what is between quotes; None for null, for nothing, and for what goes on in other lines."""
    if text[:1] in ("'", '"'):
        value, end, rest = text[1:].partition(text[0])
        return value if end and (not rest.strip(" \t") or rest.strip(" \t").startswith("#")) else None
    value = text.partition("#")[0].strip(" \t")
    return None if value in ("", "null", "~") else value


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


def endless(file: Path) -> bool:
    """True for a .pt or .pth with more instructions than a state dict has; it would take minutes to read them."""
    return sum(1 for _ in islice(_instructions(file), MOST_INSTRUCTIONS)) == MOST_INSTRUCTIONS


def _instructions(file: Path) -> Iterator[tuple[pickletools.OpcodeInfo, Any]]:
    """What the pickles of a file say, read as data: no instruction is carried out."""
    if not zipfile.is_zipfile(file):
        with file.open("rb") as stream:
            yield from _of_pickles(stream, PICKLES)
        return
    with zipfile.ZipFile(file) as archive:
        for name in [name for name in archive.namelist() if name.endswith("data.pkl")][:1]:
            with archive.open(name) as stream:
                yield from _of_pickles(stream, 1)


def _of_pickles(stream: Any, pickles: int) -> Iterator[tuple[pickletools.OpcodeInfo, Any]]:
    """The instructions of pickles that follow each other, as far as they are worth a look."""
    beginning = io.BytesIO(stream.read(LONGEST))
    try:
        for _ in range(pickles):
            yield from ((code, arg) for code, arg, _ in pickletools.genops(beginning))
    except (ValueError, pickle.UnpicklingError, EOFError):
        return  # what follows is no pickle

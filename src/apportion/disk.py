"""What we write to disk appears whole or not at all, whatever goes wrong meanwhile; and JSON that anything can read.

    write_json(file, content)           a file: written beside, then renamed into place
    with replacing(file) as partial:    the same, for whoever writes it
    with whole_folder(out) as partial:  a folder

A folder that does not exist yet is written beside its place and renamed. One that exists (empty: a mount point, the
target of a link, the current directory) cannot be replaced by a rename; it gets a subfolder whose name says that it is
unfinished, and at the end the contents move up, what makes the folder valid last.

A full disk or a quota shows as `CannotWrite` with the name of the file, whatever a library makes of it.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from apportion.trust import MOST_TEXT, read_text

UNFINISHED = "unfinished"


class CannotWrite(OSError):
    """A file that could not be written; the message names it, the reason and what to do."""


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A path beside `file` to write to; at the end of the block it becomes `file`, after an exception it is removed."""
    partial = file.with_name(file.name + ".partial")
    try:
        with naming(file):
            yield partial
            partial.replace(file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def naming(file: Path) -> Iterator[None]:
    """Whatever a writer raises because the disk would not take it, as an error that names the file."""
    try:
        yield
    except CannotWrite:
        raise
    except (OSError, SafetensorError) as error:
        raise _cannot_write(file, error) from error
    except RuntimeError as error:  # torch.save's, from its writer in C++
        if "PytorchStreamWriter" in str(error) or "unexpected pos" in str(error):
            raise _cannot_write(file, error) from error
        raise


def _cannot_write(file: Path, error: Exception) -> CannotWrite:
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())
    return CannotWrite(
        f"{file} cannot be written ({reason}). What was there before is untouched; make room, or choose another place."
    )


@contextmanager
def whole_folder(target: str | Path, last: Iterable[str] = ()) -> Iterator[Path]:
    """A folder to write into; at the end of the block `target` has its contents, after an exception it has nothing.

    `target` does not exist, or is an empty folder. Of its entries those named in `last` appear last: without them the
    folder counts as unfinished.
    """
    target = Path(target).resolve()
    name = f"{UNFINISHED}-{uuid4().hex[:8]}"
    in_place = target.is_dir()
    partial = target / name if in_place else target.with_name(f"{target.name}.{name}")
    made = [folder for folder in partial.parents if not folder.exists()]
    try:
        partial.mkdir(parents=True)
        yield partial
        if in_place:
            move_up(partial, last)
        else:
            partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        for folder in made:  # from the inside out
            with suppress(OSError):
                folder.rmdir()
        raise
    shutil.rmtree(partial, ignore_errors=True)


def move_up(folder: Path, last: Iterable[str] = ()) -> None:
    """Move what a folder holds into the folder around it, entries named in `last` after all others."""
    after = list(last)
    for entry in sorted(folder.iterdir(), key=lambda e: (after.index(e.name) if e.name in after else -1, e.name)):
        entry.rename(folder.parent / entry.name)


def write_text(file: Path, content: str) -> None:
    """UTF-8; the old file or the new one, never a part of it."""
    with replacing(file) as partial:
        partial.write_text(content, encoding="utf-8")


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """NaN and infinity become null, numbers of numpy and torch plain numbers."""
    write_text(file, json_text(content))


def json_text(content: Mapping[str, Any]) -> str:
    return json.dumps(plain(content), indent=2, allow_nan=False) + "\n"


def plain(value: Any) -> Any:
    """As JSON has it: no NaN and no infinity (they become null), and no numbers or arrays of numpy and torch."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if not isinstance(value, float | int | str) and hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value


def read_json(file: Path, limit: int = MOST_TEXT) -> dict[str, Any]:
    """The JSON object in a file. ValueError for anything else, and for what is no regular file or too long."""
    text = read_text(file, limit)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} does not hold a JSON object.")
    return content


def write_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """A .safetensors file; the old one or the new one, never a part of it."""
    with replacing(file) as partial:
        save_file(dict(tensors), partial, metadata)


def all_finite(x: Tensor) -> bool:
    """Without a copy in the usual case, where even the sum is finite."""
    return bool(torch.isfinite(x.sum())) or bool(torch.isfinite(x).all())

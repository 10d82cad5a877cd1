"""What we write to disk appears whole or not at all, whatever goes wrong meanwhile; and JSON that anything can read.

    write_json(file, content)           a file: written elsewhere, made durable, renamed into place
    with replacing(file) as partial:    the same, for whoever writes it
    with whole_folder(out) as partial:  a folder

durable.py says how. A folder that does not exist yet is written beside its place and renamed. One that exists (empty: a
mount point, the target of a link, the current directory) cannot be replaced by a rename; it gets a subfolder whose name
says that it is unfinished, and at the end, that it is complete; then the contents move up, what makes the folder valid
last. If a crash comes between, whoever writes there next moves up the rest.

A full disk or a quota shows as `CannotWrite` with the name of the file, whatever a library makes of it.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from apportion.answers import REMEDIES, of_the_system, out_of_memory
from apportion.durable import complete, is_unfinished, make_durable, move_up, place_in, sweep, sync_folder
from apportion.locks import LOCK, Lock, lock_of
from apportion.trust import MOST_TEXT, read_text, resolved

OF_NOBODY = ("lost+found", LOCK)
"""What may lie in a folder that counts as empty: what the root folder of a disk has, and a lock."""
STANDARD = ("/dev/stdout", "/dev/stderr")
OF_THE_SYSTEM = {errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.EIO, errno.ENOMEM}
"""Errors that say nothing about what a file holds."""


class CannotWrite(OSError):
    """A file that could not be written; the message names it, the reason and what to do."""


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A path to write to; at the end of the block it becomes `file`, for good; after an exception it is gone.

    Within a folder that is itself unfinished nothing is made durable: that happens to all of it at the end. Of a link,
    what it leads to is replaced; a pipe or a device is written to, and so is what this process has open (/dev/stdout),
    after what it holds.
    """
    if (number := _open_here(file)) is not None:
        with naming(file), TemporaryDirectory() as place:
            yield (partial := Path(place) / file.name)
            sys.stdout.flush()
            with os.fdopen(number, "wb", closefd=False) as stream:
                stream.write(partial.read_bytes())
        return
    if file.exists() and not file.is_file() and not file.is_dir():
        with naming(file):
            yield file
        return
    file = resolved(file.absolute()) if file.is_symlink() else file
    with naming(file), place_in(file.parent, file.name) as place:
        partial = place / file.name
        yield partial
        final = not is_unfinished(file.parent)
        if final:
            make_durable(partial)
        partial.replace(file)
        if final:
            sync_folder(file.parent)


def check_may_write(file: Path) -> None:
    """CannotWrite if nothing can be made where `file` is to be written: said before the work, not after it."""
    if _open_here(file) is None and (file.is_file() or not file.exists()):
        with naming(file), place_in(existing(file.parent), file.name):
            pass


def existing(place: Path) -> Path:
    """`place`, or the nearest folder above it that exists."""
    return next((folder for folder in (place, *place.parents) if folder.exists()), place)


def _open_here(file: Path) -> int | None:
    """The number of what this process has open, of which `file` is the name."""
    if (name := str(file.absolute())) in STANDARD:
        return STANDARD.index(name) + 1
    found = re.fullmatch(r"/(?:dev|proc/self)/fd/(\d+)", name)
    return int(found[1]) if found else None


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
    remedy = REMEDIES.get(getattr(error, "errno", None) or 0, "make room, or choose another place")
    return CannotWrite(f"{file} cannot be written ({reason}). What was there before is untouched; {remedy}.")


@contextmanager
def whole_folder(target: str | Path, last: Iterable[str] = (), locked: bool = False) -> Iterator[Path]:
    """A folder to write into; at the end of the block `target` has its contents, after an exception it has nothing.

    `target` does not exist, or is an empty folder. Of its entries those named in `last` appear last: without them the
    folder counts as unfinished. If it is to be `locked`, ValueError where another process writes it.
    """
    target = Path(target).resolve()
    in_place = target.is_dir()
    parent = target if in_place else target.parent
    made = [folder for folder in (parent, *parent.parents) if not folder.exists()]
    try:
        with ExitStack() as until_then:
            with naming(target):
                parent.mkdir(parents=True, exist_ok=True)
                if locked:
                    until_then.enter_context(Lock(lock_of(target), str(target)))
                partial = until_then.enter_context(place_in(parent, "" if in_place else target.name))
            yield partial
            with naming(target):
                make_durable(partial)
                if in_place:
                    move_up(complete(partial), last)
                else:
                    partial.rename(target)
                for folder in (parent, *(folder.parent for folder in made)):
                    sync_folder(folder)
    except BaseException:
        for folder in made:  # from the inside out
            with suppress(OSError):
                folder.rmdir()
        raise


def occupied(place: Path) -> bool:
    """True for a file, and for a folder with more in it than the file system and processes that are gone left there."""
    sweep(place.parent)
    if not place.is_dir():
        return place.exists() or place.is_symlink()
    sweep(place)
    return any(entry.name not in OF_NOBODY for entry in place.iterdir())


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
    return parse_json(read_text(file, limit), str(file))


def parse_json(text: str, where: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{where} does not hold a JSON object.")
    return content


def read_record(file: Path, **fields: type | tuple[type, ...]) -> dict[str, Any]:
    """The JSON object in a file, in which these fields are of these kinds; a__b is the field b in a. ValueError if not.

    A field whose kinds include NoneType may be missing.
    """
    content = read_json(file)
    for name, kind in fields.items():
        value: Any = content
        for part in name.split("__"):
            value = value.get(part) if isinstance(value, dict) else None
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(
                f"{file} is damaged: {name.replace('__', '.')} is {'missing' if value is None else repr(value)[:80]}. "
                "Put back the file that apportion wrote, or make it anew."
            )
    return content


def check_may_open(file: Path) -> None:
    """OSError for a file that is there and cannot be opened (no permission, too many open ones): libraries say of such
    a one that it is damaged, or not there."""
    try:
        os.close(os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)))
    except OSError as error:
        if error.errno in OF_THE_SYSTEM:
            raise


def damaged(file: Path, error: Exception, what: str = "is damaged") -> ValueError:
    """What to raise where a library failed with `error` on what `file` holds. Raises itself, as what they are, a file
    that cannot be opened and too little memory."""
    check_may_open(file)
    system = of_the_system(error)
    if out_of_memory(error) or (system is not None and system.errno in OF_THE_SYSTEM):
        raise system or error
    return ValueError(f"{file} {what}: {next(iter(str(error).splitlines()), type(error).__name__)}")


def write_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """A .safetensors file; the old one or the new one, never a part of it."""
    with replacing(file) as partial:
        save_file(dict(tensors), partial, metadata)


def all_finite(x: Tensor) -> bool:
    """Without a copy in the usual case, where even the sum is finite."""
    return bool(torch.isfinite(x.sum())) or bool(torch.isfinite(x).all())

"""How a command answers: an exit code, and one line on stderr unless all went well.

    0      done
    2      not done; the line says what is wrong and what to do about it. Also for an error that nobody expected: its
           traceback then lies in a file that the line names
    3      done and on disk, but the result is of no use: training has diverged
    130    Ctrl-C

`--debug`, anywhere among the words, lets every error through with its traceback.
"""

from __future__ import annotations

import errno
import os
import platform
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from safetensors import SafetensorError

from apportion.extras import install
from apportion.interrupt import end_like_ctrl_c
from apportion.trust import shown

DEBUG = "--debug"
NOT_DONE, DIVERGED, STOPPED = 2, 3, 130

NO_MEMORY = (
    "out of memory", "allocate memory", "not enough memory", "bad_alloc", "unable to mmap", "can't start new thread",
    "Storage size calculation overflowed", "integer multiplication overflow",
)  # fmt: skip
"""What torch says where it has too little memory, or is asked for more than there can be."""

REMEDIES = {
    **dict.fromkeys((errno.EACCES, errno.EPERM), "ask whoever owns it for the permission, or choose another"),
    errno.EROFS: "choose a place that can be written to",
    errno.ENOSPC: "make room, or choose another place",
    errno.EDQUOT: "make room within the quota, or choose another place",
    errno.EFBIG: "raise the limit (ulimit -f), or choose another place",
    errno.EMFILE: "raise the limit (ulimit -n)",
    errno.ENFILE: "close other programs",
    errno.EIO: "check the disk",
    errno.ENAMETOOLONG: "give a shorter one",
}
"""What to do about an error of the operating system."""


def answered(
    name: str, command: Callable[[list[str]], int | None], argv: Sequence[str] | None = None, stopped: str = ""
) -> int:
    """Run `command` on the words of the command line and return the exit code; it may return one itself.

    `name` begins the line that tells of an error, `stopped` is said after Ctrl-C. SystemExit, by which a parser ends
    after --help and after words that it does not know, goes through.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    end_like_ctrl_c()
    try:
        return _run(command, [word for word in words if word != DEBUG])
    except KeyboardInterrupt:
        _say(f"{name}: {stopped}" if stopped else "")
        return STOPPED
    except SystemExit:
        raise
    except BaseException as error:  # also what Rust panics with
        if isinstance(error.__context__, KeyboardInterrupt):  # such as that the terminal, which was closed, is gone
            return STOPPED
        if DEBUG in words:
            raise
        _say(f"{name}: {one_line(error, words)}")
        _give_up(sys.stdout)
        return NOT_DONE


def _run(command: Callable[[list[str]], int | None], words: list[str]) -> int:
    """The command's exit code, once its output has left this process."""
    if sys.stdout is None:
        raise ValueError("The output is closed: send it to a file, or to /dev/null.")
    try:
        code = command(words) or 0
    except SystemExit:
        _flush()
        raise
    _flush()
    return code


def _flush() -> None:
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OSError(error.errno, error.strerror, "the output") from error


def one_line(error: BaseException, words: Sequence[str] = ()) -> str:
    """What is wrong and what to do, without line breaks and without characters that steer a terminal.

    The traceback of an error that nobody expected is written to a file; `words` are noted in it.
    """
    return shown(" ".join(_said(error, words).split()))


def _said(error: BaseException, words: Sequence[str]) -> str:
    error = of_the_system(error) or error
    if out_of_memory(error):
        return (
            f"There is not enough memory ({str(error).strip() or type(error).__name__}). Ask for less at a time "
            "(--batch-tokens, --batch-contexts), for fewer latents (--d-sae), or use a machine with more."
        )
    if isinstance(error, ImportError):
        return f"{error}. {install(error.name.split('.')[0])}" if error.name else str(error)
    if isinstance(error, BrokenPipeError) and error.filename is None:
        return "Whoever read the output has closed it before its end: send it to a file to have all of it."
    if isinstance(error, OSError) and error.strerror:
        where = "" if error.filename is None else f"{error.filename}: "
        remedy = REMEDIES.get(error.errno or 0)
        return f"{where}{error.strerror}{f': {remedy}' if remedy else ''}."
    if isinstance(error, ValueError | OSError):
        return str(error) or type(error).__name__
    if isinstance(error, SafetensorError):
        return f"A .safetensors file is damaged, or cannot be written ({error}). Check the disk, or make the file anew."
    first = next(iter(str(error).splitlines()), "")
    return f"Unexpected {type(error).__name__}: {first}. {_keep_traceback(error, words)}"


def of_the_system(error: BaseException) -> OSError | None:
    """The error of the operating system that torch tells of at the end of a RuntimeError: "...: Is full (28)"."""
    found = re.search(r": ([^:]+) \((\d+)\)$", str(error)) if isinstance(error, RuntimeError) else None
    if found is None or os.strerror(number := int(found[2])) != found[1]:
        return None
    return OSError(number, found[1])


def out_of_memory(error: BaseException) -> bool:
    """True for all the ways in which Python, torch and the operating system say so."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    said = str(error)
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in said for words in NO_MEMORY)
    )


def _keep_traceback(error: BaseException, words: Sequence[str]) -> str:
    """Where it lies: in a file that only its owner can read."""
    import torch

    try:
        number, file = tempfile.mkstemp(prefix="apportion-error-", suffix=".txt")
        with os.fdopen(number, "w", encoding="utf-8", errors="backslashreplace") as opened:
            opened.write(f"{list(words)}\nPython {platform.python_version()}, torch {torch.__version__}\n\n")
            traceback.print_exception(error, file=opened)
    except OSError:
        return f"{DEBUG} shows where it comes from; please report it."
    return f"Where it comes from lies in {file}, and {DEBUG} shows it; please report it."


def _say(line: str) -> None:
    if sys.stderr is None:
        return
    with suppress(OSError):
        sys.stderr.write(f"{line}\n" if line else "")
    _give_up(sys.stderr)


def _give_up(stream: Any) -> None:
    """If it cannot be written, let nothing be written at exit, which would fail again and change the exit code."""
    if stream is None:
        return
    try:
        stream.flush()
    except OSError:
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())

"""One line and an exit code, whatever happens."""

from __future__ import annotations

import errno
import os
import re
import stat
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from apportion.answers import answered
from apportion.cli import main
from apportion.recipes import command


def raising(error: BaseException):
    def command(words: list[str]) -> int:
        raise error

    return command


def system(number: int, file: str | None = None) -> OSError:
    return OSError(number, os.strerror(number), *([] if file is None else [file]))


EXPECTED = {
    "a mistake": (ValueError("k = 3 is odd.\n Take 4."), "k = 3 is odd. Take 4."),
    "full disk": (system(errno.ENOSPC, "a.txt"), "a.txt: No space left on device: make room"),
    "quota": (system(errno.EDQUOT, "a.txt"), "a.txt: Disk quota exceeded: make room within the quota"),
    "read-only": (system(errno.EROFS, "a.txt"), "a.txt: Read-only file system: choose a place"),
    "no permission": (system(errno.EACCES, "a.txt"), "a.txt: Permission denied: ask whoever owns it"),
    "files": (system(errno.EMFILE), "Too many open files: raise the limit (ulimit -n)."),
    "not there": (system(errno.ENOENT, "a.txt"), "a.txt: No such file or directory."),
    "our own words": (PermissionError("a.txt must not be read"), "a.txt must not be read"),
    "no words": (ValueError(), "ValueError"),
    "closed": (system(errno.EPIPE), "closed it before its end: send it to a file"),
    "tensors": (SafetensorError("I/O error"), "A .safetensors file is damaged, or cannot be written (I/O error)"),
    "memory": (MemoryError(), "There is not enough memory (MemoryError). Ask for less"),
    "memory of the system": (system(errno.ENOMEM), "There is not enough memory"),
    "memory of torch": (RuntimeError("DefaultCPUAllocator: can't allocate memory: you"), "There is not enough memory"),
    "memory of a GPU": (torch.OutOfMemoryError("CUDA out of memory. Tried"), "There is not enough memory (CUDA out"),
    "files of torch": (
        RuntimeError(f"unable to open file <a> in read-only mode: {os.strerror(errno.EMFILE)} ({errno.EMFILE})"),
        "Too many open files: raise the limit",
    ),
    "threads": (RuntimeError("can't start new thread"), "There is not enough memory"),
    "escapes": (ValueError("a\x1b[2Jb\u202ec"), r"a\x1b[2Jb\u202ec"),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_one_line_with_what_is_wrong_and_what_to_do(name, capsys) -> None:
    error, expected = EXPECTED[name]
    assert answered("it", raising(error), []) == 2
    said = capsys.readouterr().err
    assert said.startswith("it: ") and said.count("\n") == 1 and expected in said
    assert "Unexpected" not in said and "apportion-error" not in said


@pytest.mark.parametrize("size", [(10**17, 32), (10**18, 10**18), (10**14,)], ids=str)
def test_sizes_that_torch_cannot_make_are_missing_memory(size, capsys) -> None:
    assert answered("it", lambda words: torch.empty(*size), []) == 2
    assert "There is not enough memory" in capsys.readouterr().err


class Panic(BaseException):
    """As those that come out of Rust: no Exception."""


@pytest.mark.parametrize(
    "error", [KeyError("shards"), RuntimeError("a bug\nin two lines"), RecursionError(), Panic("x")]
)
def test_the_traceback_of_what_nobody_expected_lies_in_a_file(error, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for _ in range(2):
        assert answered("it", raising(error), ["train", "x"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    files = [Path(re.search(r"lies in (\S+),", line)[1]) for line in lines]  # pyright: ignore[reportOptionalSubscript]
    assert len(set(files)) == 2 and set(files) == set(tmp_path.iterdir())
    for line, file in zip(lines, files, strict=True):
        assert line.startswith(f"it: Unexpected {type(error).__name__}") and "--debug" in line
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        text = file.read_text()
        assert "['train', 'x']" in text and "Traceback" in text and type(error).__name__ in text


def test_without_a_temporary_folder_it_is_still_one_line(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    assert answered("it", raising(KeyError("a")), []) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "--debug shows" in said


@pytest.mark.parametrize("words", [["--debug", "a", "b"], ["a", "--debug", "b"], ["a", "b", "--debug"]])
def test_debug_lets_errors_through_and_is_no_word_of_the_command(words) -> None:
    given = []

    def command(words: list[str]) -> int:
        given.append(words)
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        answered("it", command, words)
    assert given == [["a", "b"]]


@pytest.mark.parametrize("code", [None, 0, 3])
def test_a_command_says_how_it_ended(code) -> None:
    assert answered("it", lambda words: code, []) == (code or 0)


def test_ctrl_c(capsys) -> None:
    assert answered("it", raising(KeyboardInterrupt()), [], stopped="kept.") == 130
    assert answered("it", raising(KeyboardInterrupt()), []) == 130
    assert capsys.readouterr().err == "it: kept.\n"


@pytest.mark.parametrize("error", [ValueError("a"), KeyError("a")])
def test_nothing_comes_out_where_stderr_is_closed(error, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(sys, "stderr", None)
    assert answered("it", raising(error), []) == 2


def test_a_closed_output_is_seen_before_the_work(monkeypatch, capsys) -> None:
    done = []
    monkeypatch.setattr(sys, "stdout", None)
    assert answered("it", done.append, []) == 2
    assert not done and "The output is closed" in capsys.readouterr().err


@dataclass(frozen=True)
class Broken:
    """A recipe."""

    n: int = 0

    def run(self) -> None:
        raise [ValueError("mine"), KeyError("theirs"), KeyboardInterrupt()][self.n]


def test_recipes_answer_in_the_same_way(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert [command.main(Broken, "compare", None, ["--n", str(n)]) for n in range(3)] == [2, 2, 130]
    mistake, unexpected, stopped = capsys.readouterr().err.splitlines()
    assert mistake == "compare: mine" and "Unexpected KeyError" in unexpected
    assert stopped == "compare: stopped; what was finished is kept."
    with pytest.raises(KeyError):
        command.main(Broken, "compare", None, ["--n", "1", "--debug"])


def test_the_command_line_has_debug(capsys) -> None:
    with pytest.raises(ValueError, match="nothing-here"):
        main(["info", "nothing-here", "--debug"])
    with pytest.raises(SystemExit) as asked:
        main(["--help"])
    assert asked.value.code == 0 and "--debug" in capsys.readouterr().out

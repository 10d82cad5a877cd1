"""Files that are none, that are endless, or that unpack to anything: answered at once, whosever format it is."""

from __future__ import annotations

import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from trials import trials

import apportion as ap
from apportion.interop.peek import names_in, yaml_in
from apportion.rows import ActivationStore
from apportion.trust import read_text

W = torch.eye(4, 8)
WEIGHTS = {"W_enc": W, "W_dec": W.T.contiguous(), "b_enc": torch.zeros(8), "b_dec": torch.zeros(4)}
SECONDS = 15
"""An answer takes a moment; a pipe or 110 MB of JSON took for ever, or minutes."""


def ours(folder: Path) -> Path:
    ap.create("topk", d_in=4, d_sae=8, k=2, seed=0).save(folder)
    return folder / "config.json"


def sae_lens(folder: Path) -> Path:
    folder.mkdir(parents=True)
    save_file(WEIGHTS, folder / "sae_weights.safetensors")
    config = folder / "cfg.json"
    config.write_text(json.dumps({"architecture": "topk", "k": 2, "d_in": 4, "d_sae": 8}))
    return config


def cache(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    return folder / "manifest.json"


def bound_socket(file: Path) -> None:
    os.chdir(file.parent)  # addresses of sockets are short
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(file.name)


def circle(file: Path) -> None:
    file.symlink_to(file.with_name("other"))
    file.with_name("other").symlink_to(file)


CONTENTS: list[tuple[str, Callable[[Path], Any]]] = [
    ("a pipe", os.mkfifo),
    ("/dev/zero", lambda file: file.symlink_to("/dev/zero")),
    ("/dev/urandom", lambda file: file.symlink_to("/dev/urandom")),
    ("a folder", Path.mkdir),
    ("a socket", bound_socket),
    ("links in a circle", circle),
    ("a link to nothing", lambda file: file.symlink_to("nothing")),
    ("110 MB of JSON", lambda file: file.write_bytes(b'{"a": [' + b"{}," * 37_000_000 + b"{}]}")),
    ("1 TB of nothing", lambda file: file.write_bytes(b"{}") and os.truncate(file, 10**12)),
    ("JSON 100,000 deep", lambda file: file.write_bytes(b'{"a":' * 100_000)),
    ("a number of a million digits", lambda file: file.write_bytes(b'{"format": ' + b"9" * 10**6 + b"}")),
    ("no JSON", lambda file: file.write_bytes(b"\x00\xff" * 100)),
]
ATTACKS = [(f"{made.__name__}: {name}", made, change) for name, change in CONTENTS for made in (ours, sae_lens, cache)]


def answers(function: str, path: Path) -> str:
    """What a fresh process says, with 4 GB to live in, and not longer than `SECONDS`."""
    code = (
        "import resource, sys, torch; from pathlib import Path; import apportion as ap; from apportion.rows "
        "import ActivationStore\nresource.setrlimit(resource.RLIMIT_DATA, (4 << 30, 4 << 30))\n"
        f"try: {function}(Path(sys.argv[1]))\nexcept (ValueError, OSError) as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=SECONDS, check=True
    )
    return done.stdout.rstrip("\n")


@pytest.mark.fault("file attacks")
@pytest.mark.parametrize("attack", trials(ATTACKS, short=14))
def test_what_is_no_small_text_file_is_refused_at_once(
    attack: tuple[str, Callable[[Path], Path], Callable[[Path], Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    time_limit: None,
) -> None:
    monkeypatch.chdir(tmp_path)
    _, make, change = attack
    config = make(tmp_path / "sae")
    config.unlink()
    change(config)
    read = ActivationStore if make is cache else ap.load
    with pytest.raises((ValueError, OSError)) as raised:
        read(config.parent)
    assert "\n" not in str(raised.value) and str(config.parent) in str(raised.value)


class Late(BaseException):
    """Caught by nobody who catches every Exception."""


@pytest.fixture
def time_limit() -> Iterator[None]:
    """An error in place of waiting."""

    def late(*_: object) -> None:
        raise Late(f"no answer after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def opcodes(file: Path) -> None:
    """60 MB of: push None."""
    file.write_bytes(b"\x80\x02" + b"N" * 60_000_000 + b".")


def opcodes_in_zip(file: Path) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + b"N" * 60_000_000 + b".")
        archive.writestr("archive/version", b"3\n")


def zip_bomb(file: Path) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}, 2))
        archive.writestr("archive/data/0", bytes(200 << 20))


def npz_bomb(file: Path) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold"):
            archive.writestr(f"{name}.npy", bytes(100 << 20))


def long_string(file: Path) -> None:
    file.write_bytes(b"\x80\x02X" + (2**31 - 1).to_bytes(4, "little") + b"a" * 100)


def long_header(file: Path) -> None:
    file.write_bytes((2**62).to_bytes(8, "little") + b"{}")


def much_header(file: Path) -> None:
    file.write_bytes((90 << 20).to_bytes(8, "little") + b" " * (90 << 20))


WEIGHT_FILES = [
    ("60 MB of opcodes", "ae.pt", opcodes),
    ("60 MB of opcodes in a zip", "ae.pt", opcodes_in_zip),
    ("a zip bomb", "ae.pt", zip_bomb),
    ("a bomb of arrays", "params.npz", npz_bomb),
    ("a string of 2 GB", "ae.pt", long_string),
    ("a header of 2^62 bytes", "sae_weights.safetensors", long_header),
    ("a header of 90 MB", "model.safetensors", much_header),
    ("weights from a pipe", "ae.pt", os.mkfifo),
    ("weights from /dev/zero", "sae_weights.safetensors", lambda file: file.symlink_to("/dev/zero")),
]


@pytest.mark.few(3)
@pytest.mark.fault("file attacks")
@pytest.mark.parametrize("attack", trials(WEIGHT_FILES, short=5))
@pytest.mark.parametrize("format", [None, "dictionary_learning"])
def test_weights_that_are_none_are_refused_at_once(
    attack: tuple[str, str, Callable[[Path], Any]], format: str | None, tmp_path: Path, time_limit: None
) -> None:
    _, name, make = attack
    make(tmp_path / name)
    for path in (tmp_path, tmp_path / name):
        with pytest.raises((ValueError, OSError)) as raised:
            ap.load(path, format=format)
        assert "\n" not in str(raised.value) and str(tmp_path) in str(raised.value)


@pytest.mark.slow
@pytest.mark.fault("file attacks")
@pytest.mark.parametrize(
    "attack",
    trials(
        [("JSON", ours, CONTENTS[7][1]), ("zeros", ours, CONTENTS[1][1]), ("lens", sae_lens, CONTENTS[1][1])], short=1
    ),
)
def test_memory_stays_small(attack: tuple[str, Callable[[Path], Path], Callable[[Path], Any]], tmp_path: Path) -> None:
    _, make, change = attack
    config = make(tmp_path / "sae")
    config.unlink()
    change(config)
    said = answers("ap.load", config.parent)
    assert "config.json" in said or "cfg.json" in said


@pytest.mark.fault("file attacks")
@pytest.mark.parametrize(
    "line",
    trials([("spaces", "a: x" + " " * 10**7 + "y"), ("quotes", "a: '" + "x" * 10**7), ("colons", "a:" * 10**6)]),
)
def test_long_lines_are_read_in_one_go(line: tuple[str, str], tmp_path: Path, time_limit: None) -> None:
    """A regular expression for them would go back again and again."""
    (tmp_path / "config.yaml").write_text(f"model_name: gpt2  # small\n{line[1]}\nk: '3'\nnone: null\n")
    found = yaml_in(tmp_path / "config.yaml")
    assert (found["model_name"], found["k"]) == ("gpt2", "3") and "none" not in found


@pytest.mark.fault("file attacks")
@pytest.mark.parametrize("name", trials(["a pipe", "/dev/zero", "a folder"]))
def test_what_is_no_regular_file_is_called_so(name: str, tmp_path: Path, time_limit: None) -> None:
    dict(CONTENTS)[name](tmp_path / "a")
    with pytest.raises(ValueError, match="no regular file"):
        read_text(tmp_path / "a")


@pytest.mark.fault("file attacks")
@pytest.mark.parametrize("size", trials([200 << 20]))
def test_a_look_into_a_packed_pickle_is_a_short_one(size: int, tmp_path: Path) -> None:
    """A string of any length, in a file of a thousandth of it."""
    with zipfile.ZipFile(tmp_path / "ae.pt", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02X" + size.to_bytes(4, "little") + bytes(size) + b".")
    tracemalloc.start()
    names_in(tmp_path / "ae.pt")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 << 20


def test_the_limit_itself(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"a" * 1000)
    assert len(read_text(file, 1000)) == 1000
    with pytest.raises(ValueError, match="more than 999 bytes"):
        read_text(file, 999)

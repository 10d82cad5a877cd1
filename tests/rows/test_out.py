"""Where a cache is written, what is refused before the work, and what a stop or a full disk leaves."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from apportion.disk import CannotWrite
from apportion.interrupt import GivenUp, Interrupted, Interrupts
from apportion.language import collect as collect_module
from apportion.language.collect import _Shard, collect
from apportion.language.model import load_model
from apportion.rows import out as out_module
from apportion.rows import writer as writer_module
from apportion.rows.store import ActivationStore, read_manifest
from apportion.rows.writer import CacheWriter, check_free_disk, check_out, size_text

TEXT = ["the cat sat on the mat and looked at the dog by the sea " * 20]


@pytest.fixture(scope="module")
def lm(tiny_model_dir: Path) -> tuple[Any, Any]:
    return load_model(tiny_model_dir)


def tiny_collect(lm: tuple[Any, Any], out: Path | str, **settings: Any) -> dict[str, Any]:
    return collect(
        *lm, "model.layers.1", TEXT, out=out, **{"tokens": 96, "context_tokens": 8, "batch_contexts": 2} | settings
    )


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


CACHE = ["manifest.json", "model.layers.1", "tokens-00000.safetensors"]


def to_empty(tmp: Path) -> str:
    (tmp / "scratch").mkdir()
    (tmp / "acts").symlink_to(tmp / "scratch")
    return str(tmp / "acts")


def to_missing(tmp: Path) -> str:
    (tmp / "acts").symlink_to(tmp / "not" / "there")
    return str(tmp / "acts")


def through_a_link(tmp: Path) -> str:
    (tmp / "scratch").mkdir()
    (tmp / "link").symlink_to(tmp / "scratch")
    return str(tmp / "link" / "acts")


def own_disk(tmp: Path) -> str:
    (tmp / "acts" / "lost+found").mkdir(parents=True)
    return str(tmp / "acts")


PLACES: dict[str, Any] = {
    "the current folder": lambda tmp: ".",
    "the current folder, absolute": lambda tmp: str(tmp),
    "a relative path": lambda tmp: "acts",
    "a trailing slash": lambda tmp: "acts/",
    "a path with ..": lambda tmp: (tmp / "a").mkdir() or "a/../acts",
    "the folder above": lambda tmp: (tmp / "a").mkdir() or os.chdir(tmp / "a") or "../acts",
    "home": lambda tmp: "~/acts",
    "below what is missing": lambda tmp: "a/b/acts",
    "a link to an empty folder": to_empty,
    "a link to nothing": to_missing,
    "below a link": through_a_link,
    "the root folder of a disk": own_disk,
}


@pytest.mark.parametrize("place", PLACES)
def test_places(place: str, lm: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    out = PLACES[place](tmp_path)
    before = {p for p in tmp_path.rglob("*") if p.is_symlink()}
    tiny_collect(lm, out)
    assert {p for p in tmp_path.rglob("*") if p.is_symlink()} == before
    folder = Path(out).expanduser()
    assert [n for n in names(folder) if n != "lost+found"] == CACHE
    assert not list(tmp_path.rglob("*unfinished*"))
    store = ActivationStore(out)
    store.verify()
    assert store.rows == read_manifest(out)["rows"] == 96
    with pytest.raises(ValueError, match="exists already"):
        tiny_collect(lm, out)


@pytest.mark.parametrize("place", PLACES)
def test_a_failure_leaves_every_place_as_it_was(
    place: str, lm: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    out = PLACES[place](tmp_path)
    before = sorted(p for p in tmp_path.rglob("*") if p.name not in ("a", "b", "not"))
    monkeypatch.setattr(CacheWriter, "write", lambda *a, **how: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tiny_collect(lm, out)
    assert sorted(p for p in tmp_path.rglob("*") if p.name not in ("a", "b", "not")) == before


def occupied(tmp: Path) -> Path:
    (tmp / "acts").mkdir()
    (tmp / "acts" / "x").write_text("")
    return tmp / "acts"


def a_file(tmp: Path) -> Path:
    (tmp / "acts").write_text("")
    return tmp / "acts"


def a_circle(tmp: Path) -> Path:
    (tmp / "acts").symlink_to(tmp / "other")
    (tmp / "other").symlink_to(tmp / "acts")
    return tmp / "acts"


REFUSED: dict[str, tuple[Any, str]] = {
    "something is there": (occupied, "exists already"),
    "a file": (a_file, "exists already"),
    "below a file": (lambda tmp: a_file(tmp) / "deep" / "acts", "Not a directory"),
    "links in a circle": (a_circle, "acts'"),
    "nobody's home": (lambda tmp: "~nobody-of-this-name/acts", "Write the path in full"),
    "too long a name": (lambda tmp: tmp / ("x" * 250), "File name too long"),
    "where nobody can write": (lambda tmp: "/proc/acts", "cannot be made"),
}


@pytest.mark.parametrize("place", REFUSED)
def test_what_cannot_work_is_refused_before_the_model_runs(
    place: str, lm: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where, message = REFUSED[place]
    out = where(tmp_path)
    before = names(tmp_path)
    monkeypatch.setattr(collect_module, "run_contexts", lambda *a: pytest.fail("the model ran"))
    with pytest.raises(ValueError, match=message) as refused:
        tiny_collect(lm, out)
    assert str(out)[:20] in str(refused.value)
    assert names(tmp_path) == before


def test_space_is_looked_up_where_the_rows_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a link, which may lead to another disk, and at the folder above what does not exist yet."""
    asked: list[Path] = []

    def usage(folder: Path) -> Any:
        asked.append(Path(folder))
        return type("Usage", (), {"free": 10**7})()

    monkeypatch.setattr(writer_module.shutil, "disk_usage", usage)
    (tmp_path / "scratch").mkdir()
    (tmp_path / "acts").symlink_to(tmp_path / "scratch")
    check_free_disk(tmp_path / "acts", 10**6)
    check_free_disk(tmp_path / "acts" / "a" / "b", 10**6)
    assert asked == [tmp_path / "scratch"] * 2
    with pytest.raises(ValueError, match=r"needs 2\.0 GB but its disk has 10\.0 MB free"):
        check_free_disk(tmp_path, 2 * 10**9)
    assert [size_text(n) for n in (999, 5_300_000, 999_999_999, 10**9)] == ["1.0 kB", "5.3 MB", "1000.0 MB", "1.0 GB"]


MOUNTED = """
import sys
from apportion.language.model import load_model
from apportion.language.collect import _Shard, collect
lm = load_model(sys.argv[1])
collect(*lm, "model.layers.1", ["the cat sat on the mat " * 50], tokens=96, context_tokens=8, out=sys.argv[2])
"""


@pytest.mark.slow
def test_a_mount_point(tiny_model_dir: Path, tmp_path: Path) -> None:
    """A disk of its own, which no rename can replace and none can reach."""
    own = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-ec"]
    (tmp_path / "disk").mkdir()
    mount = f"mount -t tmpfs -o size=4m none {tmp_path}/disk"
    if shutil.which("unshare") is None or subprocess.run([*own, mount], capture_output=True).returncode:
        pytest.skip("no mount point can be made here")
    run = f'"{sys.executable}" -c "$0" "{tiny_model_dir}" {tmp_path}/disk'
    done = subprocess.run(
        [*own, f"{mount}; {run}; ls {tmp_path}/disk; rm -r {tmp_path}/disk/*; mount -o remount,ro {tmp_path}/disk; "
         f"! {run} 2>&1", MOUNTED], capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:3] == CACHE
    assert f"{tmp_path}/disk' cannot be made (Read-only file system)" in done.stdout


LIMITED = """
import resource, signal, sys
from apportion.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.few(1)
@pytest.mark.parametrize(("limit", "exists"), [(100, False), (4000, True), (20_000, False)])
def test_a_full_disk_is_one_line_and_leaves_nothing(
    limit: int, exists: bool, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """The limit on the size of files stands for the disk: it is met in rows, in labels or in the manifest."""
    (tmp_path / "text.txt").write_text(TEXT[0] * 3)
    if exists:
        (tmp_path / "acts").mkdir()
    before = names(tmp_path)
    words = ["collect", str(tiny_model_dir), "--hookpoint", "model.layers.1", "--text", str(tmp_path / "text.txt")]
    words += ["--tokens", "500", "--context-tokens", "16", "--out", str(tmp_path / "acts")]
    done = subprocess.run([sys.executable, "-c", LIMITED, str(limit), *words], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("apportion: ") and done.stderr.count("\n") == 1
    assert "cannot be written (" in done.stderr and "File too large" in done.stderr
    assert names(tmp_path) == before and not (exists and names(tmp_path / "acts"))


def test_the_manifest_is_written_last_and_with_care(
    lm: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: Path, content: Any) -> None:
        raise CannotWrite(f"{file} cannot be written (No space left on device)")

    monkeypatch.setattr(out_module, "write_json", full)
    with pytest.raises(CannotWrite, match=r"manifest\.json"):
        tiny_collect(lm, tmp_path / "acts")
    assert not names(tmp_path)


def stopping(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, at: int, *signals: int) -> None:
    """Send signals to this process at the call number `at` of a function."""
    function, calls = getattr(module, name), 0

    def wrapped(*args: Any, **settings: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            for s in signals:
                os.kill(os.getpid(), s)
                for _ in range(100):  # so that it arrives here
                    pass
        return function(*args, **settings)

    monkeypatch.setattr(module, name, wrapped)


def first_contexts(lm: tuple[Any, Any], tmp_path: Path, contexts: int) -> torch.Tensor:
    tiny_collect(lm, tmp_path / "whole")
    store = ActivationStore(tmp_path / "whole")
    return store.gather(torch.arange(contexts * 8))


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("module", "function", "at", "contexts"),
    [
        (collect_module, "run_contexts", 5, 6),  # the first call finds the widths
        (collect_module, "check_finite", 3, 6),  # what is computed is written before it stops
        (_Shard, "add", 3, 6),
        (_Shard, "add", 1, 2),
    ],
)
def test_what_is_collected_is_kept(
    sent: int, module: Any, function: str, at: int, contexts: int, lm: tuple[Any, Any], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    expected = first_contexts(lm, tmp_path, contexts)
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    stopping(monkeypatch, module, function, at, sent)
    with pytest.raises(
        Interrupted, match=rf"{contexts * 8} of 96 tokens are kept in .*acts, a whole cache.*collect again"
    ):
        tiny_collect(lm, tmp_path / "acts")
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    store = ActivationStore(tmp_path / "acts")
    store.verify()
    assert torch.equal(store.gather(torch.arange(store.rows)), expected)
    assert (store.manifest["ended"], store.manifest["text_ended_early"]) == ("interrupted", False)
    assert store.manifest["contexts"] == contexts and names(tmp_path) == ["acts", "whole"]


@pytest.mark.slow
def test_a_stop_while_the_text_is_waited_for(lm: tuple[Any, Any], tmp_path: Path) -> None:
    def slow() -> Any:
        yield from TEXT * 40
        os.kill(os.getpid(), signal.SIGINT)
        threading.Event().wait(60)
        pytest.fail("it went on waiting")

    with pytest.raises(Interrupted):
        collect(
            *lm, "model.layers.1", slow(), tokens=100_000, context_tokens=8, out=tmp_path / "acts", batch_contexts=2
        )
    assert ActivationStore(tmp_path / "acts").rows > 0


@pytest.mark.parametrize(
    ("module", "function", "at", "signals"),
    [
        (collect_module, "run_contexts", 2, [signal.SIGINT]),
        (CacheWriter, "write", 1, [signal.SIGINT, signal.SIGINT]),
        (_Shard, "add", 2, [signal.SIGTERM, signal.SIGINT]),
    ],
    ids=["before the first context", "twice at the end", "twice in the middle"],
)
def test_nothing_is_left(
    module: Any, function: str, at: int, signals: list[int], lm: tuple[Any, Any], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    stopping(monkeypatch, module, function, at, *signals)
    with pytest.raises(KeyboardInterrupt) as stopped:
        tiny_collect(lm, tmp_path / "acts")
    assert isinstance(stopped.value, GivenUp if len(signals) == 2 else Interrupted)
    assert len(signals) == 2 or "nothing is left at" in str(stopped.value)
    assert not names(tmp_path)


def test_a_stop_at_the_very_end_comes_after_the_cache(
    lm: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopping(monkeypatch, CacheWriter, "finish", 1, signal.SIGINT)
    with pytest.raises(Interrupted, match="96 of 96 tokens are kept"):
        tiny_collect(lm, tmp_path / "acts")
    assert ActivationStore(tmp_path / "acts").manifest["ended"] == "complete"


def test_signals_that_are_ignored_stay_so_and_other_threads_are_left_alone(lm: tuple[Any, Any], tmp_path: Path) -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as under nohup
    try:
        with Interrupts() as interrupts:
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
            os.kill(os.getpid(), signal.SIGTERM)
        assert not interrupts.arrived and signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
    thread = threading.Thread(target=tiny_collect, args=(lm, tmp_path / "acts"))
    thread.start()
    thread.join()
    assert ActivationStore(tmp_path / "acts").rows == 96


def test_a_text_that_ends_says_so(lm: tuple[Any, Any], tmp_path: Path) -> None:
    assert tiny_collect(lm, tmp_path / "a")["ended"] == "complete"
    manifest = tiny_collect(lm, tmp_path / "b", tokens=10**6)
    assert (manifest["ended"], manifest["text_ended_early"]) == ("text", True)
    assert json.loads((tmp_path / "b" / "manifest.json").read_text()) == manifest


def test_the_check_of_a_place_leaves_no_trace(tmp_path: Path) -> None:
    assert check_out(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert not names(tmp_path)

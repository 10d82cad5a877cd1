"""Two processes, and what is left of one: at most one of them writes a run, a cache or an SAE."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from children import FAILED, end_of, orphans, start
from small_run import Watched, contents, newest_step, train

import apportion as ap
from apportion import locks
from apportion.disk import whole_folder, write_json
from apportion.durable import place_in, sweep
from apportion.language.collect import collect, load_model
from apportion.locks import LOCK, Lock, host_name, this_process

pytestmark = pytest.mark.fault("two processes on one folder")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert end_of(start(lambda: train(folder))) == 0
    return contents(folder)


def wait_for(file: Path) -> None:
    deadline = time.monotonic() + 60
    while not file.exists():
        assert time.monotonic() < deadline, f"{file} did not come"
        time.sleep(0.005)


class Living:
    """A run in another process that stands still at batch 8 until it is let go."""

    def __init__(self, folder: Path) -> None:
        self.out, self.stands, self.go = folder / "run", folder / "stands", folder / "go"
        self.pid = start(lambda: train(self.out, Watched(self._stand)))
        wait_for(self.stands)

    def _stand(self, number: int) -> None:
        if number == 8:
            self.stands.touch()
            wait_for(self.go)

    def end(self) -> int:
        self.go.touch()
        return end_of(self.pid)


def test_a_run_that_lives_is_left_alone(tmp_path: Path, whole: dict[str, Any]) -> None:
    living = Living(tmp_path)
    before = contents(living.out)
    with pytest.raises(ValueError, match=rf"is being written by another process \({living.pid} on .*Wait for it"):
        train(living.out)
    assert contents(living.out) == before
    assert living.end() == 0
    assert contents(living.out) == whole and not orphans(tmp_path)


def test_of_two_that_resume_at_once_one_does(tmp_path: Path, whole: dict[str, Any]) -> None:
    living = Living(tmp_path)
    os.kill(living.pid, signal.SIGKILL)
    living.end()
    pids = [start(lambda: train(living.out, Watched(lambda number: time.sleep(0.01)))) for _ in range(3)]
    assert sorted(end_of(pid) for pid in pids) == [0, FAILED, FAILED]
    assert contents(living.out) == whole and not orphans(tmp_path)


def test_of_two_that_begin_at_once_one_does(tmp_path: Path, whole: dict[str, Any]) -> None:
    out = tmp_path / "run"
    pids = [start(lambda: train(out, Watched(lambda number: time.sleep(0.01)))) for _ in range(3)]
    assert sorted(end_of(pid) for pid in pids) == [0, FAILED, FAILED]
    assert contents(out) == whole


def test_a_cache_is_collected_once(tiny_model_dir: Path, tmp_path: Path) -> None:
    """The second is refused before its work, not after it."""
    lm, out = load_model(tiny_model_dir), tmp_path / "acts"

    def work() -> None:
        with whole_folder(out, locked=True) as partial:
            (tmp_path / "stands").touch()
            wait_for(tmp_path / "go")
            (partial / "manifest.json").write_text("{}")

    pid = start(work)
    wait_for(tmp_path / "stands")
    with pytest.raises(ValueError, match=r"acts.*is being written by another process"):
        collect(*lm, "model.layers.0", ["the cat sat on the mat"] * 9, tokens=32, out=out, context_tokens=16)
    (tmp_path / "go").touch()
    assert end_of(pid) == 0 and (out / "manifest.json").exists() and not orphans(tmp_path)


def test_an_export_is_written_once(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "sae", locked=True), pytest.raises(ValueError, match="being written"):
        ap.export(ap.create("topk", d_in=4, d_sae=8, k=2).eval(), tmp_path / "sae", "sae_lens")


def test_who_stood_still_too_long_stops_before_it_writes(tmp_path: Path, whole: dict[str, Any]) -> None:
    """Another process took it for gone: the one that wakes up must not mix its files with the other's."""
    living = Living(tmp_path)
    lock = living.out / LOCK
    os.utime(lock, (0, 0))
    lock.unlink()  # as the other does that no lock of the kernel reaches
    assert end_of(start(lambda: train(living.out))) == 0
    done = contents(living.out)
    assert living.end() == FAILED
    assert contents(living.out)["model.safetensors"] == whole["model.safetensors"] == done["model.safetensors"]
    assert newest_step(living.out) == 0


def test_what_a_living_process_is_writing_is_not_swept_away(tmp_path: Path) -> None:
    def work() -> None:
        with place_in(tmp_path, "a.json") as place:
            (place / "a.json").touch()
            (tmp_path / "stands").touch()
            wait_for(tmp_path / "go")
            (place / "a.json").replace(tmp_path / "a.json")

    pid = start(work)
    wait_for(tmp_path / "stands")
    sweep(tmp_path)
    write_json(tmp_path / "b.json", {})
    assert [name for name in orphans(tmp_path) if name.startswith("a.json.unfinished")]
    (tmp_path / "go").touch()
    assert end_of(pid) == 0 and not orphans(tmp_path)
    assert (tmp_path / "a.json").exists()


@pytest.mark.parametrize(
    ("host", "silent_s", "stays"), [(None, 0, False), ("0badc0de", 5, True), ("0badc0de", 700, False)]
)
def test_a_place_that_was_left(host: str | None, silent_s: float, stays: bool, tmp_path: Path) -> None:
    """Locks may not reach from machine to machine: what another one began a moment ago may be alive."""
    place = tmp_path / f"a.json.unfinished-{host or host_name()}-0123abcd"
    place.mkdir()
    (place / "a.json").touch()
    os.utime(place, (time.time() - silent_s,) * 2)
    write_json(tmp_path / "b.json", {})
    assert place.exists() == stays


US = this_process()
LEFT: dict[str, tuple[dict[str, Any], float, bool]] = {
    "killed": ({**US, "pid": 999_999_999}, 0, False),
    "another process has its number now": ({**US, "start": "1"}, 0, False),
    "before the machine was started again": ({**US, "boot": "another"}, 0, False),
    "a container that is gone": ({**US, "space": "pid:[1]", "pid": 7}, 0, False),
    "a container of another name that is gone": ({**US, "host": "another", "space": "pid:[1]"}, 0, False),
    "another machine, still alive": ({**US, "host": "another", "boot": "another"}, 30, True),
    "another machine, silent for long": ({**US, "host": "another", "boot": "another"}, 700, False),
    "killed before it said who it was": ({}, 0, False),
    "nonsense": ({"pid": "x"}, 0, True),
    "nonsense, silent for long": ({"pid": "x"}, 700, False),
}
"""What a lock says, how long ago it was touched, and whether it holds."""


@pytest.mark.parametrize("name", LEFT)
def test_a_lock_that_was_left(name: str, tmp_path: Path, whole: dict[str, Any]) -> None:
    says, silent_s, holds = LEFT[name]
    (tmp_path / "run").mkdir()
    lock = tmp_path / "run" / LOCK
    lock.write_text(json.dumps(says) if says else "")
    os.utime(lock, (time.time() - silent_s,) * 2)
    if holds:
        with pytest.raises(ValueError, match="is being written by another process"):
            train(tmp_path / "run")
        assert lock.exists() and len(list(lock.parent.iterdir())) == 1
    else:
        train(tmp_path / "run")
        assert contents(tmp_path / "run") == whole and not orphans(tmp_path)


@pytest.mark.parametrize(
    ("says", "silent_s", "holds"),
    [
        ({"host": "another", "boot": "another"}, 5, True),
        ({"host": "another", "boot": "another"}, 700, False),
        ({}, 700, True),
        ({"start": "1"}, 0, False),
        ({"pid": 999_999_999}, 0, False),
    ],
)
def test_where_the_file_system_has_no_locks(
    says: dict[str, Any], silent_s: float, holds: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then what the lock says decides alone."""
    monkeypatch.setattr(locks, "fcntl", None)
    (lock := tmp_path / LOCK).write_text(json.dumps(US | says))
    os.utime(lock, (time.time() - silent_s,) * 2)
    if holds:
        with pytest.raises(ValueError, match="being written"):
            Lock(lock, "it").__enter__()
    else:
        with Lock(lock, "it"), pytest.raises(ValueError, match="being written"):
            Lock(lock, "it").__enter__()  # we ourselves are alive


def test_a_child_that_outlives_its_parent_holds_nothing(tmp_path: Path) -> None:
    """A worker that was forked has the lock of its parent, which is dead."""

    def work() -> None:
        Lock(tmp_path / LOCK, "it").__enter__()
        child = start(lambda: wait_for(tmp_path / "go"))
        (tmp_path / "child").write_text(str(child))
        os.kill(os.getpid(), signal.SIGKILL)

    assert end_of(start(work)) == -signal.SIGKILL
    with Lock(tmp_path / LOCK, "it") as lock:
        lock.check()
    (tmp_path / "go").touch()


def test_who_stands_still_on_this_machine_keeps_its_lock(tmp_path: Path) -> None:
    living = Living(tmp_path)
    os.utime(living.out / LOCK, (0, 0))
    with pytest.raises(ValueError, match="is being written by another process"):
        train(living.out)
    assert living.end() == 0


def test_a_lock_that_could_not_be_removed_is_open_to_its_own_process(tmp_path: Path) -> None:
    """The disk was read-only at that moment."""
    with Lock(tmp_path / LOCK, "it"):
        (tmp_path / LOCK).rename(tmp_path / "kept")
    (tmp_path / "kept").rename(tmp_path / LOCK)
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    with Lock(tmp_path / LOCK, "it"):
        pass


def test_a_dead_process_that_nobody_has_buried_holds_nothing(tmp_path: Path) -> None:
    """Its number is still taken: containers without an init process collect such ones."""

    def work() -> None:
        Lock(tmp_path / LOCK, "it").__enter__()
        os.kill(os.getpid(), signal.SIGKILL)

    pid = start(work)
    deadline = time.monotonic() + 60
    while ") Z" not in Path(f"/proc/{pid}/stat").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with Lock(tmp_path / LOCK, "it"):
        pass
    end_of(pid)


def test_the_holder_says_that_it_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "TOUCHED_EVERY_S", 0.02)
    with Lock(tmp_path / LOCK, "it"):
        os.utime(tmp_path / LOCK, (0, 0))
        deadline = time.monotonic() + 20
        while (tmp_path / LOCK).stat().st_mtime < 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert time.time() - (tmp_path / LOCK).stat().st_mtime < 30
    assert not (tmp_path / LOCK).exists()


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    """A folder from elsewhere can have one, to anything that its user may write."""
    (precious := tmp_path / "precious").write_text("mine")
    (tmp_path / "run").mkdir()
    for folder in (tmp_path / "run", tmp_path):
        (link := folder / f"x{LOCK}").symlink_to(precious)
        with pytest.raises(OSError), Lock(link, "the run"):
            pass
        assert precious.read_text() == "mine"
        sweep(folder)
        assert precious.read_text() == "mine"

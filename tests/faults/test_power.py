"""Power cuts: a run on an ext4 of its own, whose disk is copied at a random moment with nothing but what was on it.

The process is killed and the image of the disk copied at once, so that all that lay in memory only is missing; mounted
again, the journal is replayed as after a cut. No method is left out: what was not synced is lost. (That it is lost is
tried as well: without fsync hardly a run survives.) Needs root and a loop device.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from children import end_of, orphans, start
from small_run import EVERY, Watched, cache, collect_small, contents, newest_step, train
from trials import trials

from apportion import durable
from apportion.language.model import load_model
from apportion.rows.manifest import read_manifest
from apportion.training import run as run_module


def shell(*words: str | Path) -> None:
    subprocess.run([str(word) for word in words], check=True, capture_output=True)


class Disk:
    """An ext4 in a file."""

    def __init__(self, folder: Path) -> None:
        self.image, self.place = folder / "image", folder / "disk"
        self.place.mkdir()

    def make(self) -> None:
        with self.image.open("wb") as file:
            file.truncate(24 << 20)
        shell("mkfs.ext4", "-q", self.image)
        self.mount()

    def mount(self) -> None:
        # Nothing reaches the disk unless somebody asks for it: by itself ext4 would write every five seconds.
        shell("mount", "-o", "loop,commit=600", self.image, self.place)

    def cut_power(self) -> None:
        """Go back to what was on the disk at this moment."""
        after = self.image.with_name("after")
        shutil.copyfile(self.image, after)
        shell("umount", self.place)
        after.replace(self.image)
        self.mount()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    made = Disk(tmp_path)
    try:
        made.make()
    except (subprocess.CalledProcessError, OSError):
        pytest.skip("no loop device can be mounted here")
    yield made
    subprocess.run(["umount", "-l", str(made.place)], capture_output=True, check=False)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], float]:
    folder = tmp_path_factory.mktemp("whole") / "run"
    begun = time.perf_counter()
    assert end_of(start(lambda: slow_run(folder, folder.parent / "note"))) == 0
    return contents(folder), time.perf_counter() - begun


def slow_run(out: Path, note: Path, before: Callable[[], None] = lambda: None) -> None:
    """As `train`, with pauses; the last step whose checkpoint was said to be safe is noted elsewhere."""
    before()
    save = run_module.RunFolder.save_checkpoint

    def noted(self: Any, trainer: Any, source: Any) -> None:
        save(self, trainer, source)
        note.with_name("new").write_text(str(trainer.steps))
        note.with_name("new").replace(note)  # at once: it may be killed here too

    run_module.RunFolder.save_checkpoint = noted  # type: ignore[method-assign]
    train(out, Watched(lambda number: time.sleep(0.01)))


def without_fsync() -> None:
    durable._sync = lambda *_: None


def cut(disk: Disk, note: Path, wait: Callable[[], None], before: Callable[[], None] = lambda: None) -> None:
    """Begin a run, wait, and cut the power."""
    pid = start(lambda: slow_run(disk.place / "run", note, before))
    wait()
    os.kill(pid, signal.SIGKILL)
    end_of(pid)
    disk.cut_power()


@pytest.mark.fault("power cuts")
@pytest.mark.parametrize("seed", trials(range(50), short=3))
def test_power_is_cut(seed: int, disk: Disk, tmp_path: Path, whole: tuple[dict[str, Any], float]) -> None:
    wanted, seconds = whole
    note, out = tmp_path / "note", disk.place / "run"
    cut(disk, note, lambda: time.sleep(random.Random(seed).uniform(0.1, 1.0) * seconds))
    safe = int(note.read_text()) if note.exists() else 0
    finished = (out / "finished.json").exists()
    assert finished or newest_step(out) >= safe, "a checkpoint that was said to be on the disk is not"
    assert end_of(start(lambda: train(out))) == 0
    assert contents(out) == wanted
    assert not orphans(disk.place)


def test_without_fsync_the_method_loses_runs(disk: Disk, tmp_path: Path) -> None:
    """Else nothing above would mean anything."""
    note, deadline = tmp_path / "note", time.monotonic() + 60

    def a_checkpoint() -> None:
        while not note.exists() and time.monotonic() < deadline:
            time.sleep(0.01)

    cut(disk, note, a_checkpoint, without_fsync)
    assert int(note.read_text()) >= EVERY
    assert newest_step(disk.place / "run") < int(note.read_text())


@pytest.mark.fault("power cuts")
@pytest.mark.parametrize("seed", trials(range(20), short=2))
def test_power_is_cut_in_a_collection(seed: int, disk: Disk, tmp_path: Path, tiny_model_dir: Path) -> None:
    lm, chance, rows = load_model(tiny_model_dir), random.Random(seed), 0
    begun = time.perf_counter()
    assert end_of(start(lambda: collect_small(tmp_path, lm))) == 0
    wanted, seconds = cache(tmp_path), time.perf_counter() - begun
    for _ in range(2):
        pid = start(lambda: collect_small(disk.place, lm))
        time.sleep(chance.uniform(0.1, 1.0) * seconds)
        os.kill(pid, signal.SIGKILL)
        end_of(pid)
        there = disk.place / "acts" / "manifest.json"
        rows = max(rows, read_manifest(there.parent)["rows"] if there.exists() else 0)
        disk.cut_power()
        left = read_manifest(there.parent)["rows"] if there.exists() else 0
        # What lies there may be one shard younger than what was synced: the last line of the journal.
        assert left >= rows - 32, "whole shards are gone"
    assert end_of(start(lambda: collect_small(disk.place, lm))) == 0
    assert cache(disk.place) == wanted
    assert not orphans(disk.place)

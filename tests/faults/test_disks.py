"""Disks that are full, without inodes or read-only, and limits of the system.

Of every trial: one line and exit code 2; what was there is as it was, and nothing half is left; when there is room
again the same command does its work (`train` goes on with --resume where a run was begun).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from shutil import which
from typing import Any

import pytest
from commands import assert_one_line, environment, without_privileges
from trials import trials

import apportion as ap
from apportion.cli import main


class Confined:
    """A process with mounts of its own, in which commands run; `disk` is the folder of its disk."""

    def __init__(self, disk: Path) -> None:
        self.disk = disk
        disk.mkdir()
        spaces = ["unshare", "-m"] if os.getuid() == 0 else ["unshare", "-Urm"]
        words = [*spaces, sys.executable, str(Path(__file__).with_name("confined.py"))]
        self.process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def mount(self, options: str) -> None:
        """A new disk with these options of tmpfs, and a file of somebody's in it."""
        script = f"umount {self.disk} 2>/dev/null; mount -t tmpfs -o size=64m tmpfs {self.disk} && cd {self.disk} && "
        done = self.ask(script=f"{script}echo mine > mine.txt && mount -o remount,{options} {self.disk}")
        if done["code"]:
            pytest.skip(f"no disks can be mounted here: {done['said']}")

    def remount(self, options: str) -> None:
        assert self.ask(script=f"mount -o remount,{options} {self.disk}")["code"] == 0

    def run(self, argv: list[str], **more: Any) -> tuple[int, str]:
        done = self.ask(argv=argv, **more)
        return done["code"], done["said"]

    @property
    def files(self) -> dict[str, str]:
        return self.ask(files=str(self.disk))


@pytest.fixture(scope="module")
def confined(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Confined]:
    if which("unshare") is None:
        pytest.skip("there is no unshare")
    made = Confined(tmp_path_factory.mktemp("confined") / "disk")
    yield made
    made.process.communicate(timeout=30)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a cache, an SAE trained on it, and another SAE."""
    folder = tmp_path_factory.mktemp("made")
    words = ["collect", "embedded", "--hookpoint", "model.layers.1", "--tokens", "4k", "--context-tokens", "32"]
    assert main([*words, "--out", str(folder / "acts")]) == 0
    assert main(["train", str(folder / "acts"), *TRAIN, "--out", str(folder / "run")]) in (0, 3)
    ap.create("topk", d_in=16, d_sae=32, k=2, seed=1).save(folder / "old")
    return folder


TRAIN = ["--k", "4", "--d-sae", "256", "--batch-tokens", "256", "--lr", "3e-3", "--checkpoint-every-tokens", "1024"]
COMMANDS = {
    "train": ["train", "{made}/acts", *TRAIN, "--out", "{disk}/run"],
    "collect": ["collect", "embedded", "--hookpoint", "model.layers.1", "--tokens", "4k", "--context-tokens", "32",
                "--out", "{disk}/acts"],
    "convert": ["convert", "{made}/run", "{disk}/sae", "--to", "sae_lens"],
    "save": ["save", "{made}/run", "{disk}/old"],
    "report": ["report", "{made}/run", "--ce-tokens", "0", "--tokens", "200", "--out", "{disk}/report"],
}  # fmt: skip
RESULT = {
    "train": "run/model.safetensors", "collect": "acts/manifest.json", "convert": "sae/cfg.json",
    "save": "old/model.safetensors", "report": "report/report.html",
}  # fmt: skip
SIZES = [8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024]
"""KiB."""


def words(name: str, confined: Confined, made: Path) -> list[str]:
    return [word.format(made=made, disk=confined.disk) for word in COMMANDS[name]]


def assert_nothing_lost(confined: Confined, name: str, before: dict[str, str]) -> None:
    """All that was there is as it was; of what is new no part is half."""
    now = confined.files
    assert {file: now.get(file) for file in before} == before
    new = [file for file in now if file not in before]
    if name == "collect" and "acts/journal.jsonl" in new:  # a shard that was committed stays
        shard = ("model.layers.1/00000.safetensors", "tokens-00000.safetensors")
        assert {*new} == {f"acts/{file}" for file in ("journal.jsonl", "manifest.json", *shard)}
    elif name != "train":  # a run that was begun stays, with its whole checkpoints
        assert not new
    assert not [file for file in new if "partial" in file or "unfinished" in file]


def assert_goes_on(confined: Confined, name: str, made: Path) -> None:
    begun = name == "train" and "run/run.json" in confined.files
    code, said = confined.run([*words(name, confined, made), *(["--resume"] if begun else [])])
    assert code in (0, 3), said
    assert RESULT[name] in confined.files
    if name in ("train", "save"):
        at = confined.files[RESULT[name].replace("config.json", "model.safetensors")]
        wanted = confined.ask(files=str(made))["run/model.safetensors"]
        assert name == "train" or at == wanted


def before_the_command(name: str, confined: Confined, made: Path) -> dict[str, str]:
    """What lies on the disk: of the SAE that is saved over there is an older one."""
    if name == "save":
        confined.ask(script=f"cp -r {made}/old {confined.disk}/")
    return confined.files


def try_it(confined: Confined, name: str, made: Path, options: str, room: str, *expected: str, **more: Any) -> None:
    """Run a command on a disk with these options; if it fails it is as said above."""
    confined.mount("size=64m")
    before = before_the_command(name, confined, made)
    confined.remount(options)
    code, said = confined.run(words(name, confined, made), **more)
    if code in (0, 3):
        assert RESULT[name] in confined.files
        pytest.skip("there was room enough")
    assert code == 2, said
    assert_one_line(said, *expected)
    assert_nothing_lost(confined, name, before)
    confined.remount(room)
    assert_goes_on(confined, name, made)


FULL = [(f"{name} on {size} KiB", name, size) for name in COMMANDS for size in SIZES]


@pytest.mark.fault("full disk")
@pytest.mark.parametrize("case", trials(FULL, 2))
def test_a_full_disk(case: tuple[str, str, int], confined: Confined, made: Path) -> None:
    _, name, size = case
    try_it(confined, name, made, f"size={size + (32 if name == 'save' else 0)}k", "size=64m")


@pytest.mark.fault("no inodes")
@pytest.mark.parametrize("case", trials([(f"{n}, {i}", n, i) for n in COMMANDS for i in range(2, 13, 2)], 3))
def test_no_inodes(case: tuple[str, str, int], confined: Confined, made: Path) -> None:
    _, name, inodes = case
    try_it(confined, name, made, f"nr_inodes={inodes + (3 if name == 'save' else 0)}", "nr_inodes=10k")


@pytest.mark.fault("read-only")
@pytest.mark.parametrize("name", trials(list(COMMANDS), 3))
def test_a_disk_that_is_read_only(name: str, confined: Confined, made: Path) -> None:
    try_it(confined, name, made, "ro", "rw", "Read-only file system")


@pytest.mark.fault("read-only")
@pytest.mark.parametrize("steps", trials([1, 2, 4, 5, 8, 9, 10, 13], 2))
def test_a_disk_that_becomes_read_only(steps: int, confined: Confined, made: Path) -> None:
    disk = confined.disk  # seen through another mount, because what is open for writing could not be made read-only
    then = [steps, f"mount --bind {disk} {disk} && mount -o remount,bind,ro {disk}"]
    try_it(confined, "train", made, "size=64m", "rw", "Read-only file system", then=then)


LIMITS = [(f"{name}, files of {n}", name, n) for name in COMMANDS for n in (100, 4000, 20_000, 100_000)]


@pytest.mark.fault("quotas")
@pytest.mark.parametrize("case", trials(LIMITS, 3))
def test_files_that_may_not_grow(case: tuple[str, str, int], confined: Confined, made: Path) -> None:
    _, name, size = case
    try_it(confined, name, made, "size=64m", "size=64m", "File too large", limits={"FSIZE": size})


OPEN = [(f"{name}, {n} open", name, n) for name in COMMANDS for n in (6, 8, 10, 12, 16)]


@pytest.mark.fault("quotas")
@pytest.mark.parametrize("case", trials(OPEN, 3))
def test_few_open_files(case: tuple[str, str, int], confined: Confined, made: Path) -> None:
    _, name, number = case
    try_it(confined, name, made, "size=64m", "size=64m", "Too many open files", limits={"NOFILE": number})


MEMORY = [(f"{d_sae} latents in {room} MiB", d_sae, room) for d_sae in (10**6, 10**8, 10**12) for room in (64, 256)]


@pytest.mark.fault("quotas")
@pytest.mark.parametrize("case", trials(MEMORY, 2))
def test_too_little_memory(case: tuple[str, int, int], confined: Confined, made: Path) -> None:
    _, d_sae, room = case
    confined.mount("size=64m")
    before = confined.files
    argv = [*words("train", confined, made), "--d-sae", str(d_sae)]
    code, said = confined.run(argv, limits={"AS": room << 20})
    assert code == 2
    assert_one_line(said, "There is not enough memory", "--d-sae")
    assert_nothing_lost(confined, "train", before)


SECRET = {"cache": "acts/model.layers.1/00000.safetensors", "tokens": "acts/tokens-00000.safetensors",
          "manifest": "acts/manifest.json", "weights": "run/model.safetensors", "config": "run/config.json",
          "run": "run", "folder": "acts"}  # fmt: skip


@pytest.mark.slow
@pytest.mark.fault("read-only")
@pytest.mark.parametrize("name", trials(list(SECRET), 1))
def test_what_may_not_be_read_is_not_called_damaged(name: str, made: Path) -> None:
    secret = made / SECRET[name]
    mode = secret.stat().st_mode
    secret.chmod(0)
    try:
        done = without_privileges(f"$A eval {made}/run --acts {made}/acts")
    finally:
        secret.chmod(mode)
    assert done.returncode == 2
    assert_one_line(done.stderr, str(secret), "ermission denied", "ask whoever owns it")
    assert "damaged" not in done.stderr


@pytest.mark.fault("read-only")
@pytest.mark.parametrize("words", [
    ["eval", "nowhere", "--json", "/proc/a.json"], ["eval", "nowhere", "--plots", "/proc/plots"],
    ["report", "{sae}", "--out", "/proc/report"],
], ids=["eval --json", "eval --plots", "report"])  # fmt: skip
def test_where_results_cannot_go_is_said_before_the_work(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ap.create("topk", d_in=4, d_sae=8, k=2).save(tmp_path / "sae")
    assert main([word.format(sae=tmp_path / "sae") for word in words]) == 2
    assert_one_line(capsys.readouterr().err, "/proc/", "cannot be written")

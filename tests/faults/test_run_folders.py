"""One damaged or stray file in a run folder: the run goes on from what is whole, or says in one line why it cannot."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from children import end_of, orphans, start
from safetensors.torch import load_file, save_file
from small_run import Watched, contents, newest_step, train
from trials import trials

import apportion as ap
from apportion.training import checkpoint

pytestmark = pytest.mark.fault("damaged run folders")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert end_of(start(lambda: train(folder))) == 0
    return folder


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Killed at step 8, with checkpoints of steps 3 and 6."""
    folder = tmp_path_factory.mktemp("begun") / "run"

    def die(number: int) -> None:
        if number == 9:
            os.kill(os.getpid(), signal.SIGKILL)

    assert end_of(start(lambda: train(folder, Watched(die)))) == -signal.SIGKILL
    assert newest_step(folder) == 6 and (folder / "checkpoint-3").exists()
    return folder


def edit(file: Path, change: Callable[[Any], Any]) -> None:
    content = json.loads(file.read_text())
    file.write_text(json.dumps(change(content) or content))


def without(file: Path, *names: str) -> None:
    tensors = load_file(file)
    save_file({name: t for name, t in tensors.items() if name not in names}, file)


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 16
    file.write_bytes(content)


def unsigned(folder: Path) -> None:
    """A checkpoint of an older version, which noted no checksums."""
    edit(folder / "trainer.json", lambda c: c.pop("crc32") and None)


NEWEST = "checkpoint-6"
DAMAGE: dict[str, Callable[[Path], Any]] = {
    "trainer.json is missing": lambda f: (f / "trainer.json").unlink(),
    "trainer.json is empty": lambda f: (f / "trainer.json").write_bytes(b""),
    "trainer.json is zeros": lambda f: (f / "trainer.json").write_bytes(bytes(300)),
    "trainer.json is no object": lambda f: (f / "trainer.json").write_text("[1]"),
    "trainer.json has another step": lambda f: edit(f / "trainer.json", lambda c: c.update(steps=7)),
    "weights are missing": lambda f: (f / "model.safetensors").unlink(),
    "weights are empty": lambda f: (f / "model.safetensors").write_bytes(b""),
    "weights are cut off": lambda f: os.truncate(f / "model.safetensors", 900),
    "one bit of a weight": lambda f: flip(f / "model.safetensors", -30),
    "one bit of Adam": lambda f: flip(f / "trainer.safetensors", -30),
    "config is missing": lambda f: (f / "config.json").unlink(),
    "config of another SAE": lambda f: edit(f / "config.json", lambda c: c["settings"].update(k=4)),
    "Adam is missing": lambda f: (f / "trainer.safetensors").unlink(),
    "Adam is zeros": lambda f: (f / "trainer.safetensors").write_bytes(bytes(5000)),
    "a folder in place of a file": lambda f: (f / "config.json").unlink() or (f / "config.json").mkdir(),
    "all of it is missing": lambda f: shutil.rmtree(f) or f.mkdir(),
    "unsigned, without Adam of W_enc": lambda f: (
        unsigned(f), without(f / "trainer.safetensors", "0.adam.W_enc.exp_avg", "0.adam.W_enc.exp_avg_sq",
                             "0.adam.W_enc.step")
    ),
    "unsigned, without one average": lambda f: (
        unsigned(f), without(f / "trainer.safetensors", "0.adam.W_dec.exp_avg")
    ),
    "unsigned, without counters": lambda f: (unsigned(f), without(f / "trainer.safetensors", "0.activity.average")),
    "unsigned, with something more": lambda f: (
        unsigned(f), save_file(load_file(f / "trainer.safetensors") | {"0.adam.b.exp_avg": torch.ones(1)},
                               f / "trainer.safetensors")
    ),
    "unsigned, without the steps": lambda f: (unsigned(f), edit(f / "trainer.json", lambda c: c.pop("steps") and None)),
    "unsigned, with words for steps": lambda f: (unsigned(f), edit(f / "trainer.json", lambda c: c.update(steps="6"))),
    "unsigned, of another SAE": lambda f: (
        unsigned(f), ap.create("topk", d_in=8, d_sae=32, k=3).save(f)
    ),
}  # fmt: skip


@pytest.mark.few(6)
@pytest.mark.parametrize("name", trials(list(DAMAGE), short=12))
def test_a_damaged_newest_checkpoint(
    name: str, begun: Path, whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The one before it is taken, which is said."""
    out = Path(shutil.copytree(begun, tmp_path / "run"))
    DAMAGE[name](out / NEWEST)
    first = []
    with caplog.at_level("WARNING"):
        train(out, Watched(first.append))
    assert "checkpoint-6 is damaged" in caplog.text and caplog.text.count("\n") == 1
    assert first == list(range(1, 12)), "eleven steps were left"
    assert contents(out) == contents(whole) and not orphans(tmp_path)


def test_a_damaged_checkpoint_does_not_count_as_one_of_two(begun: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(begun, tmp_path / "run"))
    (out / NEWEST / "trainer.json").unlink()

    def die(number: int) -> None:
        if number == 5:
            os.kill(os.getpid(), signal.SIGKILL)

    assert end_of(start(lambda: train(out, Watched(die)))) == -signal.SIGKILL
    assert sorted(p.name for p in out.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-6"]
    assert (out / NEWEST / "trainer.json").exists()


def line(text: bytes) -> Callable[[Path], Any]:
    def add(out: Path) -> None:
        with (out / "metrics.jsonl").open("ab") as file:
            file.write(text)

    return add


STRAY: dict[str, Callable[[Path], Any]] = {
    "a line of the log that is no JSON": line(b"garbage\n"),
    "a byte of the log that is no text": line(b'{"step": 9, "\xff\xfe": 1}\n\xff\n'),
    "half a character in the log": line(b'{"step": 3, "x": "\xed\xa0\x80"}\n'),
    "zeros at the end of the log": line(bytes(4096)),
    "a line that is cut off": line(b'{"step": 9, "lo'),
    "a line without a step": line(b'{"loss": 1}\n[1]\n7\n{"step": "9"}\n{"step": null}\n'),
    "a stray folder": lambda out: (out / "checkpoint-x").mkdir(),
    "a stray file": lambda out: (out / "checkpoint-99").write_text("x"),
    "an empty checkpoint": lambda out: (out / "checkpoint-99").mkdir(),
    "what an older version left": lambda out: (out / "checkpoint-9.partial").mkdir(),
    "the record half written": lambda out: (out / "run.json.partial").write_text("{"),
}


@pytest.mark.parametrize("name", STRAY)
def test_what_does_not_belong_there(name: str, begun: Path, whole: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(begun, tmp_path / "run"))
    STRAY[name](out)
    train(out)
    found = {k: v for k, v in contents(out).items() if not k.startswith(("checkpoint-", "run.json.partial"))}
    assert found == contents(whole)


@pytest.mark.parametrize("name", ["run.json is missing", "run.json is empty", "run.json lacks the source", "no whole"])
def test_what_cannot_be_mended_is_said(name: str, begun: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(begun, tmp_path / "run"))
    record, before = out / "run.json", newest_step(out)
    wanted = {
        "run.json is missing": (record.unlink, "is not a run of apportion"),
        "run.json is empty": (lambda: record.write_text(""), r"run\.json is not valid JSON"),
        "run.json lacks the source": (
            lambda: edit(record, lambda c: c.pop("source") and None), "damaged: source is missing"
        ),
        "no whole": (
            lambda: [(f / "trainer.json").unlink() for f in out.glob("checkpoint-*")], "no whole checkpoint to go on"
        ),
    }  # fmt: skip
    wanted[name][0]()
    with pytest.raises(ValueError, match=wanted[name][1]):
        train(out)
    assert newest_step(out) == before and not orphans(tmp_path)


def test_a_finished_run_whose_last_checkpoints_stayed(begun: Path, whole: Path, tmp_path: Path) -> None:
    """It was killed before it could remove them."""
    out = Path(shutil.copytree(whole, tmp_path / "run"))
    shutil.copytree(begun / NEWEST, out / NEWEST)
    handed_out: list[int] = []
    sae = train(out, Watched(handed_out.append))
    assert not handed_out and contents(out) == contents(whole)
    assert torch.equal(sae.W_dec, ap.load(whole).W_dec)  # type: ignore[attr-defined]


def test_a_finished_run_of_an_older_version(whole: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(whole, tmp_path / "run"))
    (out / "finished.json").unlink()
    handed_out: list[int] = []
    train(out, Watched(handed_out.append))
    assert not handed_out


def test_a_setting_that_an_older_run_lacks_means_its_default(begun: Path, whole: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(begun, tmp_path / "run"))
    record = json.loads((out / "run.json").read_text())
    del record["train"]["clip_ratio"], record["sae"]["settings"]["aux"]
    (out / "run.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"started with train clip_ratio = 2\.0, now it is 3\.0"):
        train(out, clip_ratio=3.0)
    train(out)
    assert {k: v for k, v in contents(out).items() if k != "run.json"} == {
        k: v for k, v in contents(whole).items() if k != "run.json"
    }


@pytest.mark.parametrize("error", [
    MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes"),
    OSError(errno.EMFILE, os.strerror(errno.EMFILE)),
], ids=["memory", "torch", "files"])  # fmt: skip
def test_what_this_machine_lacks_is_no_damage(
    error: Exception, begun: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To begin anew would be the wrong advice."""

    def lacking(file: Path) -> Any:
        raise error

    shutil.copytree(begun, tmp_path / "run")
    with monkeypatch.context() as patched, pytest.raises(type(error)):
        patched.setattr(checkpoint, "load_file", lacking)
        train(tmp_path / "run")
    train(tmp_path / "run")
    assert contents(tmp_path / "run") == contents(whole)


@pytest.mark.parametrize("missing", ["model.safetensors", "config.json"])
def test_a_finished_run_that_lacks_its_sae_is_not_said_to_go_on(missing: str, tmp_path: Path) -> None:
    """As after a copy that was broken off: --resume would say that it is finished."""
    train(tmp_path / "run")
    (tmp_path / "run" / missing).unlink()
    for read in (ap.load, train):
        with pytest.raises(ValueError, match=f"{missing} is missing"):
            read(tmp_path / "run")


def test_infinite_settings_are_the_same_when_a_run_goes_on(tmp_path: Path) -> None:
    saes = [train(tmp_path / "run", clip_ratio=float("inf")) for _ in range(2)]
    torch.testing.assert_close(saes[0].state_dict(), saes[1].state_dict(), rtol=0, atol=0)

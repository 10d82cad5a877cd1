"""Ctrl-C once and twice, and everything else that tells a run to end: nothing is lost, and the message is true."""

from __future__ import annotations

import os
import pty
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from children import end_of, orphans, start
from small_run import BATCH, STEPS, Watched, contents, newest_step, train
from trials import trials

import apportion as ap
from apportion import durable
from apportion.interrupt import Interrupted
from apportion.training import run as run_module

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGXCPU]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert end_of(start(lambda: train(folder))) == 0
    return contents(folder)


def said(work: Callable[[], Any], note: Path) -> str:
    """What a child says that is stopped; it ends as after Ctrl-C."""

    def child() -> None:
        signal.signal(signal.SIGINT, lambda *_: None)  # that of a program: on a busy machine the second comes late
        try:
            work()
        except Interrupted as stopped:
            note.write_text(str(stopped))
            raise

    assert end_of(start(child)) == 130
    return note.read_text()


def at_step(out: Path, send: Callable[[], None]) -> None:
    train(out, Watched(lambda number: send() if number == 8 else None))


def while_saving(out: Path, send: Callable[[], None]) -> None:
    write = run_module.write_checkpoint

    def interrupted(folder: Path, trainer: Any, source: Any) -> None:
        if trainer.steps == 6:
            send()
        write(folder, trainer, source)

    run_module.write_checkpoint = interrupted
    train(out)


def while_calibrating(out: Path, send: Callable[[], None]) -> None:
    train(out, Watched(held_out=send))


def at_the_end(out: Path, send: Callable[[], None]) -> None:
    finish = run_module.RunFolder.finish

    def interrupted(self: Any, trainer: Any) -> None:
        send()
        finish(self, trainer)

    run_module.RunFolder.finish = interrupted  # type: ignore[method-assign]
    train(out)


MOMENTS = {at_step: 8, while_saving: 6, while_calibrating: STEPS, at_the_end: None}
"""When the signal comes, and the step that is on the disk then."""


@pytest.mark.few(2)
@pytest.mark.fault("signals")
@pytest.mark.parametrize("trial", trials([(s.name, s, m) for s, m in product(SIGNALS, MOMENTS)], short=8))
def test_told_to_end(trial: tuple[str, signal.Signals, Callable[..., None]], tmp_path: Path, whole: dict) -> None:
    _, number, moment = trial
    out = tmp_path / "run"
    words = said(lambda: moment(out, lambda: os.kill(os.getpid(), number)), tmp_path / "said")
    step = MOMENTS[moment]  # type: ignore[index]
    if step is None:
        assert "finished" in words and contents(out) == whole
    else:
        assert f"step {step}, {step * BATCH:,} tokens, is on the disk" in words and newest_step(out) == step
    assert end_of(start(lambda: train(out))) == 0
    assert contents(out) == whole and not orphans(tmp_path)


def twice(delay: float) -> None:
    """Ctrl-C, and again so many seconds later."""
    threading.Timer(delay, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.fault("Ctrl-C twice")
@pytest.mark.parametrize("delay", trials([0.004 * i for i in range(20)], short=5))
def test_ctrl_c_twice(delay: float, tmp_path: Path, whole: dict[str, Any]) -> None:
    """The message names the step that is on the disk, whether the second came before, in or after the save."""
    out = tmp_path / "run"

    def slowly(path: Path) -> None:
        time.sleep(0.02)
        make_durable(path)

    from apportion import disk

    make_durable = durable.make_durable

    def work() -> None:
        disk.make_durable = slowly
        train(out, Watched(lambda number: twice(delay) if number == 8 else time.sleep(0.001)))

    words = said(work, tmp_path / "said")
    found = re.search(r"step (\d+), [\d,]+ tokens, is on the disk", words)
    assert found is not None, words
    assert int(found[1]) == newest_step(out)
    assert end_of(start(lambda: train(out))) == 0
    assert contents(out) == whole and not orphans(tmp_path)


@pytest.mark.fault("Ctrl-C twice")
def test_the_second_ctrl_c_waits_for_the_save_that_the_first_one_asked_for(tmp_path: Path) -> None:
    out, write = tmp_path / "run", run_module.write_checkpoint

    def interrupted(folder: Path, trainer: Any, source: Any) -> None:
        if trainer.steps == 8:
            os.kill(os.getpid(), signal.SIGINT)
        write(folder, trainer, source)

    def work() -> None:
        run_module.write_checkpoint = interrupted
        train(out, Watched(lambda number: os.kill(os.getpid(), signal.SIGINT) if number == 8 else None))

    assert "step 8," in said(work, tmp_path / "said") and newest_step(out) == 8


@pytest.mark.fault("Ctrl-C twice")
@pytest.mark.parametrize("first", [1, 2], ids=["once before", "twice before"])
def test_a_ctrl_c_breaks_off_no_last_words(first: int, tmp_path: Path) -> None:
    """It comes while what is left is looked up, after what ends the run has been raised."""
    out, left = tmp_path / "run", run_module.RunFolder.left

    def press(times: int) -> None:
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGINT)

    def interrupted(self: Any, trainer: Any) -> str:
        press(1)
        return left(self, trainer)

    def work() -> None:
        run_module.RunFolder.left = interrupted  # type: ignore[method-assign]
        train(out, Watched(lambda number: press(first) if number == 8 else None))

    words = said(work, tmp_path / "said")
    step = {1: 8, 2: 6}[first]
    assert f"step {step}," in words and newest_step(out) == step


@pytest.mark.fault("Ctrl-C twice")
def test_ctrl_c_twice_at_the_end_waits_for_it(tmp_path: Path, whole: dict[str, Any]) -> None:
    def both() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    assert "finished" in said(lambda: at_the_end(tmp_path / "run", both), tmp_path / "said")
    assert contents(tmp_path / "run") == whole


@pytest.mark.fault("signals")
def test_before_the_first_checkpoint_the_message_says_so(tmp_path: Path) -> None:
    """Twice at once: not even the step is finished."""

    def at_once(number: int) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    words = said(lambda: train(tmp_path / "run", Watched(at_once)), tmp_path / "said")
    assert "has no checkpoint yet" in words and newest_step(tmp_path / "run") == 0


@pytest.mark.few(1)
@pytest.mark.fault("signals")
@pytest.mark.parametrize("watched", [True, False], ids=["a bar is drawn", "no bar"])
def test_the_terminal_is_closed(watched: bool, tmp_path: Path) -> None:
    """What is closed is the only thing that its output could go to."""
    x = tmp_path / "x.pt"
    torch.save(torch.randn(60_000, 8), x)
    code = (
        "import os, torch, apportion as ap\n"
        "t = ap.Trainer(ap.create('topk', d_in=8, d_sae=64, k=2), ap.TrainConfig(batch_tokens=32, total_tokens=48_000,"
        " log_every_steps=1))\n"
        "try:\n"
        f"    t.fit(torch.load({str(x)!r}), {str(tmp_path / 'run')!r}, progress={watched})\n"
        "except KeyboardInterrupt:\n"
        "    os._exit(77)\n"
    )
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-c", code])
    log = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (log.exists() and log.read_bytes().count(b"\n") > 20):
        time.sleep(0.01)
    os.close(terminal)
    assert end_of(pid) == 77, "nothing but the interruption is raised"
    step = newest_step(tmp_path / "run")
    assert 20 < step < 1500
    assert ap.load(tmp_path / "run" / f"checkpoint-{step}").name == "topk"


@pytest.mark.fault("signals")
def test_time_alone_is_a_reason_to_save(tmp_path: Path) -> None:
    """A run that never comes to its twenty million tokens."""

    def die(number: int) -> None:
        time.sleep(0.02)
        if number == 10:
            os.kill(os.getpid(), signal.SIGKILL)

    settings = {"checkpoint_every_tokens": 10**9, "checkpoint_every_minutes": 0.05 / 60}
    assert end_of(start(lambda: train(tmp_path / "run", Watched(die), **settings))) == -signal.SIGKILL
    assert 5 <= newest_step(tmp_path / "run") <= 9
    assert ap.TrainConfig().checkpoint_every_minutes == 10

"""One process that does more than train once: it forks, changes its folder, has threads, is broken off and goes on."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from children import end_of, orphans, start
from small_run import EVERY, Watched, contents, train, trainer

from apportion.disk import whole_folder
from apportion.language.collect import collect, load_model
from apportion.rows import ActivationStore

pytestmark = pytest.mark.fault("one process")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(folder)
    return contents(folder)


def raise_error() -> None:
    raise ValueError("of the fork alone")


def forking(end: Callable[[], Any]) -> Callable[[int], None]:
    """At batch 8 a fork goes through every block that it is in, on its way out."""
    us = os.getpid()

    def act(number: int) -> None:
        if number == 8 and os.getpid() == us:
            if (pid := os.fork()) == 0:
                end()
            os.waitpid(pid, 0)

    return act


@pytest.mark.parametrize("end", [raise_error, sys.exit, lambda: os._exit(0)], ids=["error", "exit", "at once"])
def test_a_fork_that_ends_gives_nothing_up(end: Callable[[], Any], tmp_path: Path, whole: dict[str, Any]) -> None:
    us = os.getpid()
    try:
        train(tmp_path / "run", Watched(forking(end)))
    finally:
        if os.getpid() != us:
            os._exit(0)
    assert contents(tmp_path / "run") == whole


def test_a_fork_that_ends_leaves_what_is_unfinished(tmp_path: Path) -> None:
    us = os.getpid()
    try:
        with whole_folder(tmp_path / "out") as partial:
            (partial / "a").write_text("a")
            forking(raise_error)(8)
            (partial / "b").write_text("b")
    finally:
        if os.getpid() != us:
            os._exit(0)
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == ["a", "b"]
    assert not orphans(tmp_path)


def test_the_current_folder_may_change_meanwhile(tmp_path: Path, whole: dict[str, Any]) -> None:
    (tmp_path / "other").mkdir()

    def work() -> None:
        os.chdir(tmp_path)
        train(Path("run"), Watched(lambda number: os.chdir(tmp_path / "other")))

    assert end_of(start(work)) == 0
    assert contents(tmp_path / "run") == whole and not list((tmp_path / "other").iterdir())


def test_a_cache_is_found_from_another_folder(tiny_model_dir: Path, tmp_path: Path) -> None:
    lm: Any = load_model(tiny_model_dir)
    collect(*lm, "model.layers.0", ["the cat sat"] * 30, tokens=64, out=tmp_path / "acts", context_tokens=16)

    def work() -> None:
        os.chdir(tmp_path)
        store = ActivationStore("acts")
        os.chdir("/")
        store.verify()
        assert pickle.loads(pickle.dumps(store)).rows == store.rows

    assert end_of(start(work)) == 0


def test_a_trainer_broken_off_within_a_step_does_not_go_on(tmp_path: Path) -> None:
    """What it holds is no step of the run: with a checkpoint it goes back to that, without one it is of no use."""

    def twice(number: int) -> None:
        if number == at:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)

    whole = trainer().fit(Watched(), progress=False)
    for at in (2, 2 * EVERY):
        ours, out = trainer(), tmp_path / str(at)
        with pytest.raises(KeyboardInterrupt):
            ours.fit(Watched(twice), out, progress=False)
        if at < EVERY:
            with pytest.raises(ValueError, match="broken off within a step"):
                ours.fit(Watched(), out, resume=True, progress=False)
            ours = trainer()
        again = ours.fit(Watched(), out, resume=True, progress=False)
        torch.testing.assert_close(again.state_dict(), whole.state_dict(), rtol=0, atol=0)


def test_of_threads_that_begin_one_run_one_does(tmp_path: Path, whole: dict[str, Any], monkeypatch: Any) -> None:
    mkdir, all_there, waited = Path.mkdir, threading.Barrier(3), set()

    def together(folder: Path, *args: Any, **settings: Any) -> None:
        if threading.get_ident() not in waited:
            waited.add(threading.get_ident())
            all_there.wait(timeout=20)
        mkdir(folder, *args, **settings)

    monkeypatch.setattr(Path, "mkdir", together)
    ended: list[Any] = []

    def work() -> None:
        try:
            ended.append(train(tmp_path / "run", Watched(lambda number: time.sleep(0.02))))
        except ValueError as error:
            ended.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    refused = [one for one in ended if isinstance(one, str)]
    assert len(ended) == 3 and len(refused) == 2 and all("being written by another" in one for one in refused), ended
    assert contents(tmp_path / "run") == whole


def test_runs_in_threads_do_not_meet(tmp_path: Path, whole: dict[str, Any]) -> None:
    threads = [threading.Thread(target=train, args=(tmp_path / f"run-{i}",)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [contents(tmp_path / f"run-{i}") for i in range(2)] == [whole, whole]

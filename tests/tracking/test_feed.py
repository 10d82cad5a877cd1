"""Whatever a tracker does, the run is what it would be without it, and the others get their lines."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from tracked_runs import STEPS, Crash, Source, log, trainer

import apportion as ap
from apportion.cli import main
from apportion.interrupt import Interrupted
from apportion.tracking import TRACKERS, feed
from apportion.tracking.feed import Feeds
from apportion.tracking.tracker import TrackedRun


class Mine:
    """Keeps all that it is given; `begin` is one that it need not have."""

    def __init__(self) -> None:
        self.lines: list[tuple[int, dict[str, float]]] = []
        self.closed: list[dict[str, Any]] = []

    def log(self, step, values) -> None:
        self.lines.append((step, dict(values)))

    def close(self, figures) -> None:
        self.closed.append(dict(figures))


class Bad(Mine):
    """Does `act` whenever it is called in one of these ways."""

    def __init__(self, calls, act) -> None:
        super().__init__()
        self.calls, self.act, self.called = calls, act, []

    def does(self, call) -> None:
        self.called.append(call)
        if call in self.calls:
            self.act()

    def begin(self, run: TrackedRun) -> int:
        self.does("begin")
        return 0

    def log(self, step, values) -> None:
        self.does("log")

    def close(self, figures) -> None:
        self.does("close")


def fail():
    raise ConnectionError("the server is\n gone")


@pytest.fixture
def untracked(tmp_path) -> ap.SAE:
    return trainer().fit(Source(), tmp_path / "untracked", progress=False)


def fit(out, track, source=None, resume=False, **settings):
    return trainer(**settings).fit(source or Source(), out, resume=resume, progress=False, track=track)


def warnings(caplog) -> list[str]:
    return [record.message for record in caplog.records if record.levelname == "WARNING"]


def assert_same(one: ap.SAE, other: ap.SAE) -> None:
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())
    assert one.info == other.info


# An object of one's own


def test_it_gets_what_the_log_has_and_the_figures(tmp_path, untracked):
    sae = fit(tmp_path / "run", mine := Mine())
    assert_same(sae, untracked)
    for name, curve in log(tmp_path / "run").items():
        assert curve == [(step, values[name]) for step, values in mine.lines]
    (figures,) = mine.closed
    done = json.loads((tmp_path / "run" / "finished.json").read_text())
    assert done.items() <= figures.items() and figures["steps"] == STEPS
    assert figures["calibration_l0"] == sae.info["calibration"]["l0"] and figures["diverged"] is False


def test_a_poor_result_is_among_the_figures(tmp_path):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("apportion.training.trainer.verdict", lambda *_: ap.training.verdict.Verdict("lost", True))
        fit(tmp_path / "run", mine := Mine())
    assert mine.closed[0]["verdict"] == "lost" and mine.closed[0]["diverged"] is True


def test_a_run_that_does_not_end_has_no_figures_and_goes_on_with_new_lines(tmp_path):
    with pytest.raises(Crash):
        fit(tmp_path / "run", mine := Mine(), Source(14))
    assert mine.closed == [{}] and len(mine.lines) == 13
    fit(tmp_path / "run", mine := Mine(), resume=True)
    assert [step for step, _ in mine.lines] == list(range(11, STEPS + 1)) and mine.closed[0]


def test_begin_is_told_of_the_run_and_says_what_is_missing(tmp_path):
    class Kept(Mine):
        def begin(self, run):
            self.run = run
            return 4

    with pytest.raises(Crash):
        fit(tmp_path / "run", first := Kept(), Source(14))
    fit(tmp_path / "run", second := Kept(), resume=True)
    assert (first.run.steps, second.run.steps) == (0, 10) and first.run.id == second.run.id
    assert second.run.folder == tmp_path / "run" and second.run.name == "run"
    assert second.run.settings == json.loads((tmp_path / "run" / "run.json").read_text())
    assert [step for step, _ in second.lines] == list(range(5, STEPS + 1))
    assert all(values["tokens_per_s"] > 0 for _, values in second.lines), "also of lines from before"


def test_settings_are_flat():
    run = TrackedRun("id", Path("runs/a"), {"sae": {"name": "topk"}, "sites": [{"d": 1}], "none": None}, 0)
    assert run.flat() == {"sae.name": "topk", "sites": '[{"d": 1}]', "none": None}


def test_what_is_no_finite_number_is_left_out_and_the_rate_is_between_lines(tmp_path):
    with Feeds(mine := Mine()) as feeds:
        run = TrackedRun("id", tmp_path, {}, 2)
        damaged = [{"step": 1}, {"step": 1, "tokens": "x", "seconds": float("nan")}]
        feeds.begin(run, [*damaged, {"step": 2, "tokens": 20, "seconds": 1.0, "note": "x"}])
        feeds.log({"step": 3, "tokens": 40, "seconds": 5.0, "loss": float("nan"), "l0": 2.0})
        feeds.log({"step": 4, "tokens": 50, "seconds": 5.0, "loss": 1.0})
    third = (3, {"tokens": 40, "seconds": 5.0, "l0": 2.0, "tokens_per_s": 5.0})
    assert mine.lines == [third, (4, {"tokens": 50, "seconds": 5.0, "loss": 1.0})]


# Trackers that fail


@pytest.mark.parametrize("calls", [("begin",), ("log",), ("close",), ("begin", "log", "close")])
@pytest.mark.parametrize("act", [fail, sys.exit], ids=["error", "exit"])
def test_one_that_raises_is_left_out_with_one_warning(calls, act, tmp_path, untracked, caplog):
    sae = fit(tmp_path / "run", [bad := Bad(calls, act), mine := Mine()])
    assert_same(sae, untracked)
    assert len(mine.lines) == STEPS and mine.closed[0]["steps"] == STEPS
    (said,) = warnings(caplog)
    error = "ConnectionError: the server is gone" if act is fail else "SystemExit"
    assert said.startswith(f"Bad is left out from now on ({error}") and said.endswith("metrics.jsonl")
    assert bad.called == ["begin", *["log"] * (STEPS if calls == ("close",) else 1), "close"][: len(bad.called)]
    assert bad.called[-1] == calls[0], "it is not called again"


@pytest.mark.parametrize("call", ["begin", "log", "close"])
def test_one_that_hangs_is_not_waited_for(call, tmp_path, untracked, caplog, monkeypatch):
    monkeypatch.setattr(feed, "WAIT_S", 1.0)
    released = Event()
    try:
        sae = fit(tmp_path / "run", [bad := Bad((call,), released.wait), mine := Mine()])
        (thread,) = [one for one in threading.enumerate() if one.name == "tracker Bad"]
        assert thread.daemon, "nor does it keep the process from ending"
    finally:
        released.set()
    assert_same(sae, untracked)
    assert len(mine.lines) == STEPS and mine.closed
    begun = ["Bad has not begun after 1 s; training does not wait for it"] * (call == "begin")
    why = "it has not begun" if begun else "it has not taken all figures after 1 s"
    assert warnings(caplog)[:-1] == begun and f"left out from now on ({why})" in warnings(caplog)[-1]
    assert bad.called[-1] == call


def test_a_step_does_not_wait(tmp_path):
    """The tracker is busy with the first line until the last step begins."""
    last_step = Event()

    class Slow(Mine):
        def log(self, step, values):
            assert last_step.wait(20)
            super().log(step, values)

    fit(tmp_path / "run", slow := Slow(), Source(STEPS, last_step.set))
    assert len(slow.lines) == STEPS and slow.closed


def test_one_that_is_far_behind_is_left_out(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(feed, "MOST_LINES", 3)
    monkeypatch.setattr(feed, "WAIT_S", 1.0)
    released = Event()
    fit(tmp_path / "run", bad := Bad(("log",), released.wait))
    released.set()
    (said,) = warnings(caplog)
    assert "it is 3 lines behind" in said and bad.called == ["begin", "log"]


def test_ctrl_c_ends_the_waiting_for_one_that_hangs_at_the_end(tmp_path):
    released = Event()

    def hang():
        time.sleep(0.3)  # by now it is waited for
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)  # any thread may get it
        released.wait()

    started = time.monotonic()
    with pytest.raises(Interrupted, match=r"when the run in .* was finished"):
        fit(tmp_path / "run", Bad(("close",), hang))
    released.set()
    assert time.monotonic() - started < feed.WAIT_S / 2 and ap.load(tmp_path / "run")


def test_ctrl_c_ends_the_waiting_for_one_that_hangs_at_the_beginning(tmp_path):
    released = Event()

    def hang():
        time.sleep(0.3)  # by now it is waited for
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)  # any thread may get it
        released.wait()

    started = time.monotonic()
    with pytest.raises(Interrupted):
        fit(tmp_path / "run", Bad(("begin",), hang))
    released.set()
    assert time.monotonic() - started < feed.WAIT_S / 2


def test_a_second_ctrl_c_waits_for_nobody(tmp_path):
    def twice():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    released = Event()
    started = time.monotonic()
    with pytest.raises(Interrupted):
        fit(tmp_path / "run", Bad(("log",), released.wait), Source(8, twice))
    released.set()
    assert time.monotonic() - started < feed.WAIT_S / 2


def test_a_damaged_id_makes_a_new_record(tmp_path, caplog):
    with pytest.raises(Crash):
        fit(tmp_path / "run", Mine(), Source(14))
    (tmp_path / "run" / "tracked.json").write_text("{")
    fit(tmp_path / "run", mine := Mine(), resume=True)
    assert mine.lines and len(json.loads((tmp_path / "run" / "tracked.json").read_text())["id"]) == 12
    assert any("Trackers begin a new record" in said for said in warnings(caplog))


# Mistakes


class Unfinished:
    def log(self, step, values):
        pass


@pytest.mark.parametrize(
    ("track", "said"),
    [
        ("wanb", "There is no tracker named 'wanb'; did you mean wandb?"),
        ("", None),
        (["csv"], "There is no tracker named 'csv'; known are: wandb, trackio, tensorboard, mlflow."),
        ([3], r"track = 3 is no tracker: give names \(wandb, .*\), or objects with log\(step, values\) and close"),
        ([Mine], "Mine'> is no tracker"),
        ([Unfinished()], "is no tracker"),
    ],
)
def test_what_is_no_tracker_is_said_before_anything_is_done(track, said, tmp_path):
    if said is None:
        fit(tmp_path / "run", track)
        assert not (tmp_path / "run" / "tracked.json").exists()
        return
    with pytest.raises(ValueError, match=said):
        fit(tmp_path / "run", track)
    assert not (tmp_path / "run").exists()


def test_there_has_to_be_a_run_folder():
    with pytest.raises(ValueError, match="give `out`"):
        trainer().fit(Source(), track=Mine())


@pytest.mark.parametrize("name", TRACKERS)
def test_a_service_that_is_not_installed_is_said_with_the_remedy(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, name, None)
    assert main(["train", str(tmp_path / "nothing.npy"), "--out", str(tmp_path / "run"), "--track", name]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"Tracking with {name} needs {name}" in said and f"[{name}]" in said
    assert not list(tmp_path.iterdir())


def test_a_folder_that_a_service_made_here_is_not_its_package(tmp_path, monkeypatch):
    for name in ("wandb", "sqlalchemy"):
        monkeypatch.delitem(sys.modules, name, raising=False)
        (tmp_path / "here" / name).mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "here")])
    with pytest.raises(ValueError, match="needs wandb, not installed"):
        Feeds("wandb")


def test_mlflow_needs_a_database_only_where_there_is_no_server(monkeypatch):
    for name in ("sqlalchemy", "alembic"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "mlflow", sys)  # something that is there
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ValueError, match="needs sqlalchemy and alembic"):
        Feeds("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server")
    assert Feeds("mlflow")


def test_the_option_names_all_trackers():
    from apportion.cli.train import TrainBase
    from apportion.settings import meanings

    assert all(name in meanings(TrainBase)["track"] for name in TRACKERS)


def test_the_command_tracks(tmp_path, monkeypatch):
    from tracking_services import TensorBoardStandIn

    service = TensorBoardStandIn(tmp_path, monkeypatch)
    import numpy as np

    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(400, 6)).astype("f4"))
    words = f"train {tmp_path}/x.npy --out {tmp_path}/run --sae topk --k 2 --d-sae 24 --batch-tokens 32 --track"
    assert main([*words.split(), "tensorboard"]) == 0
    ((curves, _, ended),) = service.records().values()
    assert curves["loss"] == log(tmp_path / "run")["loss"] and ended

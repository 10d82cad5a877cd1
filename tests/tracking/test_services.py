"""Each service has the curves of the run folder, one record for a run, and no step twice, whatever happened between."""

from __future__ import annotations

import os
import signal
from types import SimpleNamespace

import pytest
from tracked_runs import STEPS, Crash, Source, log, trainer
from tracking_services import (
    REAL,
    STAND_INS,
    MLflowStandIn,
    Service,
    TensorBoardStandIn,
    TrackioStandIn,
    WandBStandIn,
)

from apportion.tracking.mlflow import MLflow
from apportion.tracking.tensorboard import TensorBoard
from apportion.tracking.tracker import PROJECT, TrackedRun

pytestmark = pytest.mark.filterwarnings("default")  # of packages that are not ours
TIMES = {"seconds", "tokens_per_s"}


@pytest.fixture(autouse=True)
def nothing_is_left_out(caplog):
    yield
    assert not [one.message for one in caplog.get_records("call") if "left out" in one.message]


@pytest.fixture(params=[*STAND_INS, *REAL], ids=lambda kind: kind.__name__)
def service(request, tmp_path, monkeypatch) -> Service:
    if request.param in REAL:
        pytest.importorskip(request.param.package)
    return request.param(tmp_path, monkeypatch)


def fit(service, source=None, resume=False, out="run", **settings):
    return trainer(**settings).fit(
        source or Source(), service.folder / out, resume=resume, progress=False, track=service.package
    )


def assert_holds_the_log(service, times=True) -> None:
    ((curves, settings, ended),) = service.records().values()
    for name, curve in log(service.folder / "run").items():
        if times or name not in TIMES:
            assert [step for step, _ in curves[name]] == [step for step, _ in curve], name
            assert [value for _, value in curves[name]] == pytest.approx([value for _, value in curve], rel=1e-6), name
    assert len(curves["tokens_per_s"]) == STEPS and min(value for _, value in curves["tokens_per_s"]) > 0
    assert float(settings["train.lr"]) == 1e-2 and ended


def test_the_record_is_the_log(service):
    sae = fit(service)
    assert_holds_the_log(service)
    ((curves, _, _),) = service.records().values()
    if service.package != "wandb":
        assert curves["final/calibration_l0"] == [(STEPS, pytest.approx(sae.info["calibration"]["l0"]))]
        assert curves["final/diverged"] == [(STEPS, 0)]


@pytest.mark.parametrize("at", [3, 14])
def test_after_a_crash_it_is_one_record_without_a_step_twice(service, at):
    """At step 14 the run goes on from a checkpoint at 10, at step 3 it begins anew; later steps come again."""
    with pytest.raises(Crash):
        fit(service, Source(at))
    ((curves, _, ended),) = service.records().values()
    assert len(curves["loss"]) == at - 1 and not ended
    fit(service, resume=True)
    assert_holds_the_log(service, times=False)


def test_after_ctrl_c_it_is_one_record(service):
    with pytest.raises(KeyboardInterrupt):
        fit(service, Source(8, lambda: os.kill(os.getpid(), signal.SIGINT)))
    fit(service, resume=True)
    assert_holds_the_log(service, times=False)


def test_a_run_that_is_tracked_only_when_it_goes_on_has_its_whole_curve(service):
    with pytest.raises(Crash):
        trainer().fit(Source(14), service.folder / "run", progress=False)
    fit(service, resume=True)
    assert_holds_the_log(service)


def test_two_runs_are_two_records(tmp_path, monkeypatch):
    """Also if their folders have one name."""
    for kind in STAND_INS:
        service = kind(tmp_path / kind.package, monkeypatch)
        fit(service, out="a/run")
        fit(service, out="b/run")
        assert len(service.records()) == 2, kind.package


def test_several_saes_have_a_figure_each(tmp_path, monkeypatch):
    service = MLflowStandIn(tmp_path, monkeypatch)
    fit(service, num_saes=2)
    ((curves, _, _),) = service.records().values()
    assert {"final/sae-0/calibration_l0", "final/sae-1/calibration_l0"} <= curves.keys()


def test_a_finished_run_is_left_as_it_is(service):
    fit(service)
    before = service.records()
    fit(service, resume=True)
    assert service.records() == before


def test_what_trackio_says_is_no_result(tmp_path, monkeypatch, capsys):
    fit(TrackioStandIn(tmp_path, monkeypatch))
    said = capsys.readouterr()
    assert said.out == "" and "what it says" in said.err


def test_a_kill_loses_no_line_of_tensorboard(tmp_path, monkeypatch):
    service = TensorBoardStandIn(tmp_path, monkeypatch)
    (tmp_path / "run").mkdir()
    (tracker := TensorBoard()).begin(TrackedRun("id", tmp_path / "run", {"train": {"lr": 1}}, 0))
    tracker.log(1, {"loss": 2.0})
    ((curves, _, _),) = service.records().values()
    assert curves == {"loss": [(1, 2.0)]}


def test_mlflow_takes_any_number_of_settings_of_any_length(tmp_path, monkeypatch):
    service = MLflowStandIn(tmp_path, monkeypatch)
    MLflow().begin(TrackedRun("id", tmp_path / "run", {"sae": {str(n): "x" * 3 * n for n in range(205)}}, 0))
    ((_, settings, _),) = service.records().values()
    assert len(settings) == 205 and settings["sae.3"] == "x" * 9


# Weights & Biases: with an account, and without


@pytest.mark.parametrize(
    ("logged_in", "environment", "mode"),
    [
        (True, {}, "online"),
        (False, {}, "offline"),
        (RuntimeError("no network"), {}, "offline"),
        (True, {"WANDB_MODE": "offline"}, None),
        (True, {"WANDB_MODE": "disabled"}, None),
        (False, {"WANDB_MODE": "online"}, "offline"),
    ],
)
def test_wandb_is_offline_without_account_or_network(logged_in, environment, mode, tmp_path, monkeypatch, caplog):
    service = WandBStandIn(tmp_path, monkeypatch)
    service.logged_in = logged_in
    monkeypatch.delenv("WANDB_MODE", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    fit(service)
    (asked,) = service.asked
    assert asked["mode"] == mode and asked["project"] == "apportion" and asked["name"] == "run"
    assert ("no network" in caplog.text) == isinstance(logged_in, Exception)


def test_wandb_takes_the_project_that_is_given_and_leaves_another_run_alone(tmp_path, monkeypatch):
    service = WandBStandIn(tmp_path, monkeypatch)
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setattr("wandb.run", SimpleNamespace(settings=SimpleNamespace(mode="theirs")))
    fit(service)
    (asked,) = service.asked
    assert (asked["project"], asked["mode"], asked["reinit"]) == (None, "theirs", "create_new")
    assert asked["dir"] == str(tmp_path)


def test_wandb_lies_in_the_run_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_DIR", raising=False)
    fit(service := WandBStandIn(tmp_path, monkeypatch))
    assert service.asked[0]["dir"] == tmp_path / "run"


# MLflow: where


def test_mlflow_takes_the_experiment_that_is_given(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    fit(service := MLflowStandIn(tmp_path, monkeypatch))
    assert service.experiments == ["mine"]


@pytest.mark.parametrize("given", [None, "http://server"])
def test_mlflow_is_beside_the_run_unless_told_otherwise(given, tmp_path, monkeypatch):
    service = MLflowStandIn(tmp_path, monkeypatch)
    if given:
        monkeypatch.setattr("mlflow.is_tracking_uri_set", lambda: True)
        monkeypatch.setattr("mlflow.get_tracking_uri", lambda: given, raising=False)
    fit(service)
    assert service.experiments == [PROJECT]
    assert service.uris == [given or f"sqlite:///{tmp_path / 'mlflow.db'}"]

"""The services as tests see them: the packages themselves where they are installed, and stand-ins at their import.

A service says which curves and settings it holds of each run: `records` is {"name": (curves, settings, ended)}, with
curves {"loss": [(step, value)]}.
"""

from __future__ import annotations

import json
import os
import struct
import sys
import time
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

Curves = dict[str, list[tuple[int, float]]]
BLOCK = 32768


class Service:
    package = ""

    def __init__(self, folder: Path, patched: pytest.MonkeyPatch) -> None:
        """The service has all that it keeps in this folder, the one that run folders are made in."""
        self.folder, self.patched = folder, patched

    def records(self) -> dict[str, tuple[Curves, dict[str, Any], bool]]:
        raise NotImplementedError


class RealTensorBoard(Service):
    package = "tensorboard"

    def records(self):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        found = {}
        for folder in sorted(self.folder.glob("*/tensorboard")):
            events = EventAccumulator(str(folder), {"scalars": 0, "tensors": 0})
            events.Reload()
            curves = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
            text = events.Tensors("settings/text_summary")[0].tensor_proto.string_val[0].decode()
            ended = "final/calibration_l0" in curves
            found[folder.parent.name] = (curves, {"train.lr": json.loads(text)["train"]["lr"]}, ended)
        return found


class RealMLflow(Service):
    package = "mlflow"

    def records(self):
        from mlflow import MlflowClient

        client = MlflowClient(f"sqlite:///{self.folder / 'mlflow.db'}")
        found = {}
        for run in client.search_runs([client.get_experiment_by_name("apportion").experiment_id]):
            history = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
            curves = {name: sorted((one.step, one.value) for one in values) for name, values in history.items()}
            found[run.info.run_id] = (curves, run.data.params, run.info.status == "FINISHED")
        return found


class RealWandB(Service):
    """Offline: its files are a log of LevelDB, in blocks, of messages."""

    package = "wandb"

    def __init__(self, folder: Path, patched: pytest.MonkeyPatch) -> None:
        super().__init__(folder, patched)
        patched.setenv("WANDB_MODE", "offline")

    def records(self):
        found = {}
        for file in sorted(self.folder.glob("*/wandb/offline-run-*/run-*.wandb")):  # the newest of a run comes last
            curves: Curves = {}
            config, ended = {}, False
            for message in all_messages(file):
                kind = message.WhichOneof("record_type")
                for item in message.history.item if kind == "history" else ():
                    name = item.key or ".".join(item.nested_key)
                    curves.setdefault(name, []).append((message.history.step.num, json.loads(item.value_json)))
                if kind == "run":
                    config = {item.key: json.loads(item.value_json) for item in message.run.config.update}
                ended |= kind == "exit" and message.exit.exit_code == 0
            found[file.name] = (curves, {"train.lr": config["train"]["lr"]}, ended)
        return found


def all_messages(file: Path) -> list[Any]:
    """The process that writes them may do so for a moment after it was told to finish."""
    until = time.monotonic() + 20
    while True:
        found = [*messages(file.read_bytes())]
        if any(one.WhichOneof("record_type") == "exit" for one in found) or time.monotonic() > until:
            return found
        time.sleep(0.05)


def messages(data: bytes) -> Iterator[Any]:
    from wandb.proto.wandb_internal_pb2 import Record

    at, whole = 7, b""
    while at + 7 <= len(data):
        if (left := BLOCK - at % BLOCK) < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # all of a message, or its last part
            yield Record.FromString(whole)
            whole = b""


class RealTrackio(Service):
    package = "trackio"

    def __init__(self, folder: Path, patched: pytest.MonkeyPatch) -> None:
        super().__init__(folder, patched)
        from trackio import sqlite_storage, utils

        for module in (utils, sqlite_storage):  # read when it was imported, perhaps by an earlier test
            patched.setattr(module, "TRACKIO_DIR", folder / "trackio")

    def records(self):
        from trackio.sqlite_storage import SQLiteStorage

        found = {}
        for record in SQLiteStorage.get_run_records("apportion"):
            curves: Curves = {}
            for row in SQLiteStorage.get_logs("apportion", record["name"], run_id=record["id"]):
                for name, value in row.items():
                    if name not in ("step", "timestamp"):
                        curves.setdefault(name, []).append((row["step"], value))
            config = SQLiteStorage.get_run_config("apportion", record["name"], run_id=record["id"]) or {}
            found[record["name"]] = (curves, config, "final/calibration_l0" in curves)
        return found


class StandIn(Service):
    """What these packages are asked for, and what they do with it, in a few lines."""

    def __init__(self, folder: Path, patched: pytest.MonkeyPatch) -> None:
        super().__init__(folder, patched)
        self.runs: dict[str, Any] = {}
        for name, contents in self.modules().items():
            module = ModuleType(name)
            module.__spec__ = ModuleSpec(name, None, origin="stand-in")
            vars(module).update(contents)
            patched.setitem(sys.modules, name, module)

    def modules(self) -> dict[str, dict[str, Any]]:
        raise NotImplementedError

    def records(self):
        return {name: (run.curves, run.config, run.ended) for name, run in self.runs.items()}


class Record:
    def __init__(self, config: dict[str, Any]) -> None:
        self.curves: Curves = {}
        self.config, self.ended = config, False

    def add(self, values: dict[str, Any], step: int) -> None:
        assert all(type(value) in (int, float, str) for value in values.values()), values
        for name, value in values.items():
            self.curves.setdefault(name, []).append((step, value))

    @property
    def last(self) -> int:
        return max((step for curve in self.curves.values() for step, _ in curve), default=-1)


class WandBStandIn(StandIn):
    """Of somebody with an account."""

    package = "wandb"

    def modules(self):
        self.asked, self.logged_in = [], True
        return {"wandb": {"init": self.init, "login": self.login, "run": None, "Settings": SimpleNamespace}}

    def login(self, *, prompt: bool) -> bool:
        assert not prompt
        if isinstance(self.logged_in, Exception):
            raise self.logged_in
        return self.logged_in

    def init(self, *, id, resume, config, dir, settings, **asked):
        assert resume == "allow" and Path(dir).is_dir() and settings.console == "off" and settings.finish_timeout
        self.asked.append(asked | {"dir": dir})
        record = self.runs.setdefault(id, Record({"train.lr": config["train"]["lr"]}))
        last = record.last

        def log(values, step):
            assert step > last, "the service leaves out a step that it has"
            record.add(values, step)

        def finish(exit_code):
            assert (exit_code == 0) == bool(summary)
            record.ended = exit_code == 0

        summary: dict[str, Any] = {}
        where = SimpleNamespace(sync_dir="wandb/run")
        return SimpleNamespace(
            step=last + 1, log=log, finish=finish, summary=summary, url="there", offline=False, settings=where
        )


class TrackioStandIn(StandIn):
    package = "trackio"

    def modules(self):
        return {"trackio": {"init": self.init}}

    def init(self, project, name, resume, config, embed):
        assert (project, resume, embed) == ("apportion", "allow", False)
        print("what it says")  # noqa: T201
        record = self.runs.setdefault(name, Record(config))

        def finish():
            record.ended = "final/calibration_l0" in record.curves

        return SimpleNamespace(_next_step=record.last + 1, log=record.add, finish=finish)


class TensorBoardStandIn(StandIn):
    package = "tensorboard"

    def modules(self):
        return {"tensorboard": {}, "torch.utils.tensorboard": {"SummaryWriter": self.writer}}

    def writer(self, folder, purge_step):
        Path(folder).mkdir(exist_ok=True)
        (Path(folder) / "events.out.tfevents.1").touch()
        record = self.runs.setdefault(folder, Record({}))
        for curve in record.curves.values() if purge_step is not None else ():
            curve[:] = [(step, value) for step, value in curve if step < purge_step]

        def add_text(name, text, step):
            if name == "settings":
                record.config["train.lr"] = json.loads(text)["train"]["lr"]

        def flush():
            while pending:
                record.add(*pending.pop(0))

        def close():
            flush()
            record.ended = "final/calibration_l0" in record.curves

        pending: list[tuple[dict[str, float], int]] = []
        return SimpleNamespace(
            add_text=add_text,
            add_scalar=lambda name, value, step: pending.append(({name: value}, step)),
            flush=flush,
            close=close,
        )


class MLflowStandIn(StandIn):
    package = "mlflow"

    def modules(self):
        self.uris: list[str] = []
        self.experiments: list[str] = []
        self.tags: dict[str, str] = {}
        self.running: set[str] = set()
        entities = {"Metric": lambda *parts: parts, "Param": lambda *parts: parts}
        own = {"MlflowClient": self.client, "is_tracking_uri_set": lambda: False}
        return {"mlflow": own, "mlflow.entities": entities, "sqlalchemy": {}, "alembic": {}}

    def client(self, uri):
        self.uris.append(uri)
        return self

    def get_experiment_by_name(self, name):
        return SimpleNamespace(experiment_id=name) if self.runs else None

    def create_experiment(self, name):
        self.experiments.append(name)
        return name

    def search_runs(self, experiments, wanted):
        assert experiments == [os.environ.get("MLFLOW_EXPERIMENT_NAME", "apportion")]
        tag = wanted.removeprefix("tags.`apportion.id` = '").removesuffix("'")
        return [SimpleNamespace(info=SimpleNamespace(run_id=run)) for run, own in self.tags.items() if own == tag]

    def create_run(self, experiment, run_name, tags):
        self.runs[run := f"{run_name} {len(self.runs)}"] = Record({})
        self.tags[run] = tags["apportion.id"]
        self.running.add(run)
        return SimpleNamespace(info=SimpleNamespace(run_id=run))

    def update_run(self, run, status):
        assert status == "RUNNING" and run in self.runs
        self.running.add(run)

    def get_metric_history(self, run, name):
        return [SimpleNamespace(step=step) for step, _ in self.runs[run].curves.get(name, ())]

    def log_batch(self, run, metrics=(), params=()):
        assert len(params) <= 100 and all(isinstance(v, str) and len(v) <= 500 for _, v in params)
        self.runs[run].config |= dict(params)
        for name, value, when, step in metrics:
            assert isinstance(when, int) and run in self.running
            self.runs[run].add({name: value}, step)

    def set_tag(self, run, name, value):
        pass

    def set_terminated(self, run, status):
        assert status in ("FINISHED", "KILLED")
        self.running.remove(run)
        self.runs[run].ended = status == "FINISHED"


STAND_INS = (WandBStandIn, TrackioStandIn, TensorBoardStandIn, MLflowStandIn)
REAL = (RealTensorBoard, RealMLflow, RealTrackio, RealWandB)

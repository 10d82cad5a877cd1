"""MLflow: the server or store that MLFLOW_TRACKING_URI names; else mlflow.db in the folder that holds the run folder, a
database, which `mlflow ui --backend-store-uri sqlite:///runs/mlflow.db` shows.

A run is found again by a tag. The service keeps all that it is sent, so only steps after its last are sent.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from apportion.tracking.tracker import PROJECT, TrackedRun, numbers

TAG = "apportion.id"
MOST_PARAMS, MOST_CHARACTERS = 100, 500
"""What one request takes, and of one setting."""
CURVE = "tokens"
"""What every line has."""


class MLflow:
    def packages(self) -> tuple[str, ...]:
        """A server needs no more than the client; a database does."""
        return ("mlflow",) if "MLFLOW_TRACKING_URI" in os.environ else ("mlflow", "sqlalchemy", "alembic")

    def begin(self, run: TrackedRun) -> int:
        mlflow = import_module("mlflow")
        self._of = import_module("mlflow.entities")
        beside = f"sqlite:///{run.folder.parent / 'mlflow.db'}"
        self._client = mlflow.MlflowClient(mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else beside)
        experiment = self._experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
        if found := self._client.search_runs([experiment], f"tags.`{TAG}` = '{run.id}'"):
            self._id = found[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return max((one.step for one in self._client.get_metric_history(self._id, CURVE)), default=0)
        self._id = self._client.create_run(experiment, run_name=run.name, tags={TAG: run.id}).info.run_id
        params = [self._of.Param(name, str(value)[:MOST_CHARACTERS]) for name, value in run.flat().items()]
        for start in range(0, len(params), MOST_PARAMS):
            self._client.log_batch(self._id, params=params[start : start + MOST_PARAMS])
        return 0

    def _experiment(self, name: str) -> str:
        found = self._client.get_experiment_by_name(name)
        return self._client.create_experiment(name) if found is None else found.experiment_id

    def log(self, step: int, values: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        self._client.log_batch(self._id, metrics=[self._of.Metric(*one, now, step) for one in values.items()])

    def close(self, figures: Mapping[str, Any]) -> None:
        if figures:
            self.log(figures["steps"], numbers(figures))
        if "verdict" in figures:
            self._client.set_tag(self._id, "verdict", figures["verdict"])
        self._client.set_terminated(self._id, "FINISHED" if figures else "KILLED")

"""Trackio: a database on this machine (in TRACKIO_DIR, or the cache of Hugging Face), which `trackio show` shows; or a
Space, if TRACKIO_SPACE_ID names one. The run is found again by its name, and only steps after its last are sent.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from importlib import import_module
from typing import Any

from apportion.tracking.tracker import PROJECT, TrackedRun, numbers


class Trackio:
    def packages(self) -> tuple[str, ...]:
        return ("trackio",)

    def begin(self, run: TrackedRun) -> int:
        trackio = import_module("trackio")
        with redirect_stdout(sys.stderr):  # results go to stdout
            name = f"{run.name}-{run.id}"
            self._run = trackio.init(PROJECT, name=name, resume="allow", config=run.flat(), embed=False)
        return getattr(self._run, "_next_step", run.steps + 1) - 1

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self, figures: Mapping[str, Any]) -> None:
        if figures:
            self._run.log({**numbers(figures), "verdict": figures.get("verdict", "")}, step=figures["steps"])
        with redirect_stdout(sys.stderr):
            self._run.finish()

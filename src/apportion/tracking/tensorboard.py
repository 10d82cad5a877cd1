"""TensorBoard: event files in the folder `tensorboard` of the run; `tensorboard --logdir runs` shows all runs there.

A run that goes on tells the reader to forget what was written of later steps.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from apportion.tracking.tracker import TrackedRun, numbers

logger = logging.getLogger(__name__)


class TensorBoard:
    def packages(self) -> tuple[str, ...]:
        return ("tensorboard",)

    def begin(self, run: TrackedRun) -> int:
        folder = run.folder / "tensorboard"
        before = any(folder.glob("events.out.tfevents.*"))
        writer = import_module("torch.utils.tensorboard").SummaryWriter
        logger.info("tensorboard --logdir %s", run.folder)
        self._writer = writer(str(folder), purge_step=run.steps + 1 if before else None)
        if not before:
            settings = json.dumps(run.settings, indent=2)
            self._writer.add_text("settings", "\n".join(f"    {line}" for line in settings.splitlines()), 0)
        return run.steps if before else 0

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self, figures: Mapping[str, Any]) -> None:
        for name, value in numbers(figures).items():
            self._writer.add_scalar(name, value, figures["steps"])
        if "verdict" in figures:
            self._writer.add_text("verdict", figures["verdict"], figures["steps"])
        self._writer.close()

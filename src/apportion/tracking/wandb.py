"""Weights & Biases. Without an account or a network the record lies in the run folder, for `wandb sync`.

Its variables count (WANDB_MODE, WANDB_PROJECT, WANDB_ENTITY, WANDB_DIR). Of a run that goes on, the service says which
step is its last, and only later ones are sent. Offline nobody knows: every part of the run then has the curve from its
beginning, and the newest is the one to sync.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from apportion.tracking.tracker import PROJECT, TrackedRun

logger = logging.getLogger(__name__)

FINISH_S = 30
"""So long the last figures may take to be sent; afterwards they lie on the disk."""


class WandB:
    def packages(self) -> tuple[str, ...]:
        return ("wandb",)

    def begin(self, run: TrackedRun) -> int:
        wandb = import_module("wandb")
        mode = self._mode(wandb)
        self._run = wandb.init(
            id=run.id,
            resume="allow",
            name=run.name,
            project=None if "WANDB_PROJECT" in os.environ else PROJECT,
            dir=os.environ.get("WANDB_DIR", run.folder),
            config=dict(run.settings),
            mode=mode,
            reinit="create_new",  # a program may have a run of its own
            settings=wandb.Settings(console="off", silent=True, finish_timeout=FINISH_S),
        )
        logger.info("%s", f"wandb sync {self._run.settings.sync_dir}" if self._run.offline else self._run.url)
        return self._run.step - 1

    def _mode(self, wandb: Any) -> str | None:
        """Offline unless there is an account and its server answers; nobody is asked for one."""
        if os.environ.get("WANDB_MODE", "online") not in ("online", "run", "shared"):
            return None
        if wandb.run is not None:
            return wandb.run.settings.mode
        try:
            return "online" if wandb.login(prompt=False) else "offline"
        except Exception as error:
            logger.warning("wandb: offline (%s)", " ".join(str(error).split()))
            return "offline"

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self, figures: Mapping[str, Any]) -> None:
        self._run.summary.update(dict(figures))
        self._run.finish(exit_code=0 if figures else 1)

"""Where else the curves of a run are shown: services with which people watch and compare runs.

trainer.fit(rows, "runs/a", track="wandb,tensorboard")    by name, one or several
trainer.fit(rows, "runs/a", track=[Mine(), "mlflow"])     what has log(step, values) and close(figures), see tracker.py

A tracker of the table is one file and one line. Nothing of the service is imported before a run asks for it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from apportion.extras import need
from apportion.settings import nearest
from apportion.tracking.mlflow import MLflow
from apportion.tracking.tensorboard import TensorBoard
from apportion.tracking.tracker import TrackedRun as TrackedRun
from apportion.tracking.tracker import Tracker as Tracker
from apportion.tracking.trackio import Trackio
from apportion.tracking.wandb import WandB

TRACKERS = {"wandb": WandB, "trackio": Trackio, "tensorboard": TensorBoard, "mlflow": MLflow}
"""By the name of the option."""


def given(track: str | Tracker | Iterable[Any]) -> list[tuple[str, Tracker]]:
    """What is asked for, with the name of each. ValueError for a name that there is not, for what is not installed, and
    for what is no tracker."""
    if isinstance(track, str):
        track = [word.strip() for word in track.split(",") if word.strip()]
    several = track if isinstance(track, Iterable) else [track]
    return [_tracker(one) for one in dict.fromkeys(several)]


def _tracker(one: Any) -> tuple[str, Tracker]:
    if isinstance(one, str):
        if one not in TRACKERS:
            raise ValueError(f"There is no tracker named {one!r}; {nearest(one, TRACKERS)}")
        tracker = TRACKERS[one]()
        need(f"Tracking with {one}", *tracker.packages())
        return one, tracker
    if isinstance(one, type) or not isinstance(one, Tracker):
        raise ValueError(
            f"track = {one!r} is no tracker: give names ({', '.join(TRACKERS)}), or objects with log(step, values) and "
            "close(figures)."
        )
    return type(one).__name__, one

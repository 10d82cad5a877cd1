"""Several runs on one stream: its batches are read once, and every run takes a step on each.

Each run is exactly what it would be alone, in a folder of its own, with its own log and checkpoints: it can be
resumed, finished or looked at without the others. Runs that are behind (after a crash their checkpoints are not of the
same step) catch up first. One that fails is said and left; the others go on.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

from apportion.interrupt import GivenUp, Interrupted, Interrupts
from apportion.progress import progress_bar
from apportion.rows.batch import Source
from apportion.rows.shared import Shared
from apportion.torch_state import usual
from apportion.tracking.feed import Feeds
from apportion.training.trainer import Trainer

logger = logging.getLogger(__name__)


@usual(learning=True)
def fit_together(
    trainers: Mapping[str, Trainer],
    source: Source,
    out: str | Path,
    *,
    resume: bool = False,
    progress: bool = True,
    track: Any = (),
) -> dict[str, Exception]:
    """Train each on the batches of `source`, in the folder of its name below `out`; the errors of those that failed.

    `resume`, `track` and Ctrl-C are as of `Trainer.fit`: each run saves a checkpoint, and `Interrupted` is raised.
    ValueError if two trainers are one, or the batches that they want differ.
    """
    if len({id(trainer) for trainer in trainers.values()}) < len(trainers):
        raise ValueError("One trainer was given twice: each run needs its own.")
    if len(sizes := {trainer.config.batch_tokens for trainer in trainers.values()}) > 1:
        raise ValueError(f"Runs on one stream take the same batches, got batch_tokens = {sorted(sizes)}.")
    shared, failed, stopped = Shared(source), dict[str, Exception](), dict[str, str]()
    total = sum(t.config.total_steps or 0 for t in trainers.values()) * max(sizes, default=0)
    with Interrupts() as interrupts, progress_bar(f"training {len(trainers)}", total, show=progress) as show:
        running = {
            name: trainer.steps_of_fit(
                shared.view(), Path(out) / name, interrupts, Feeds(track), resume=resume, progress=False
            )
            for name, trainer in trainers.items()
        }
        try:
            while running:
                behind = min(trainers[name].tokens for name in running)
                for name in list(running):
                    if trainers[name].tokens == behind or interrupts.arrived:
                        _step(name, running, failed, stopped, interrupts)
                show(sum(trainer.tokens for trainer in trainers.values()))
        finally:
            for going in running.values():
                going.close()
        if stopped:
            raise Interrupted(
                f"stopped: {len(stopped)} of {len(trainers)} runs in {out} are not finished, and go on with --resume"
            )
    return failed


def _step(
    name: str,
    running: dict[str, Generator[None]],
    failed: dict[str, Exception],
    stopped: dict[str, str],
    interrupts: Interrupts,
) -> None:
    """One step of a run; it is no longer running if it was the last, in whatever way."""
    try:
        next(running[name])
        return
    except StopIteration:
        pass
    except GivenUp:
        raise
    except KeyboardInterrupt as how:
        stopped[name] = str(how)
        interrupts.caught()
    except Exception as error:
        failed[name] = error
        logger.warning("%s failed, the others go on: %s", name, error)
    del running[name]

"""Several runs on one stream: its batches are read once, and every run takes a step on each.

There may be several streams, such as the hookpoints of a model, whose passes feed all (language/captured.py): then
the runs of all go on together.

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

INDEX = "sweep.json"
"""What a sweep or a suite writes beside its runs: which there are, and what came of them."""

logger = logging.getLogger(__name__)


@usual(learning=True)
def fit_together(
    trainers: Mapping[str, Trainer],
    source: Source | Mapping[str, Source],
    out: str | Path,
    *,
    resume: bool = False,
    progress: bool = True,
    track: Any = (),
) -> dict[str, Exception]:
    """Train each on the batches of `source`, in the folder of its name below `out`; the errors of those that failed.

    `source` is one for all, or the source of each, where several may have the same.

    `resume`, `track` and Ctrl-C are as of `Trainer.fit`: each run saves a checkpoint, and `Interrupted` is raised.
    ValueError if two trainers are one, or the batches that they want differ.
    """
    if len({id(trainer) for trainer in trainers.values()}) < len(trainers):
        raise ValueError("One trainer was given twice: each run needs its own.")
    sources = source if isinstance(source, Mapping) else dict.fromkeys(trainers, source)
    streams = _streams(trainers, sources)
    shared = {name: one for one, names in streams for name in names}
    for one, _ in streams:
        getattr(one.source, "join", lambda: None)()
    failed, stopped = dict[str, Exception](), dict[str, str]()
    total = sum((t.config.total_steps or 0) * t.config.batch_tokens for t in trainers.values())
    with Interrupts() as interrupts, progress_bar(f"training {len(trainers)}", total, show=progress) as show:
        running = {
            name: trainer.steps_of_fit(
                shared[name].view(), Path(out) / name, interrupts, Feeds(track), resume=resume, progress=False
            )
            for name, trainer in trainers.items()
        }
        try:
            while running:
                behind = min(trainers[name].tokens for name in running)
                for name in list(running):
                    if trainers[name].tokens == behind or interrupts.arrived:
                        _step(name, running, failed, stopped, interrupts)
                streams = [stream for stream in streams if _is_read(*stream, running)]
                show(sum(trainer.tokens for trainer in trainers.values()))
        finally:
            for going in running.values():
                going.close()
        if stopped:
            raise Interrupted(
                f"stopped: {len(stopped)} of {len(trainers)} runs in {out} are not finished, and go on with --resume"
            )
    return failed


def _streams(trainers: Mapping[str, Trainer], sources: Mapping[str, Source]) -> list[tuple[Shared, list[str]]]:
    """Each source with the runs on it."""
    found: dict[int, tuple[Shared, list[str]]] = {}
    for name in trainers:
        found.setdefault(id(sources[name]), (Shared(sources[name]), []))[1].append(name)
    for _, names in found.values():
        if len(sizes := {trainers[name].config.batch_tokens for name in names}) > 1:
            raise ValueError(f"Runs on one stream take the same batches, got batch_tokens = {sorted(sizes)}.")
    return list(found.values())


def _is_read(shared: Shared, names: list[str], running: Mapping[str, Any]) -> bool:
    """Whether any run on it goes on; else the source is told, if it wants to know."""
    if any(name in running for name in names):
        return True
    getattr(shared.source, "leave", lambda: None)()
    return False


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

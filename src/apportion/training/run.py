"""The folder of a training run.

run.json            the whole configuration: SAE, training, source, versions
metrics.jsonl       one line every few steps
checkpoint-<step>/  everything to go on from there; the last two are kept
config.json, model.safetensors    the finished SAE: ap.load(folder); of several, each in its folder sae-<i>
finished.json       comes last: the run is over
tracked.json        by what name trackers know the run, if it has any
.apportion.lock     while a process writes here

At every moment there is a whole checkpoint that survives a power cut, once there has been one: an older one goes when
two newer ones are on the disk. A run goes on from the newest that is whole, whatever happened to others.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import sys
import uuid
from contextlib import ExitStack, suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apportion.answers import out_of_memory
from apportion.architectures import SAE
from apportion.architectures.loading import load
from apportion.disk import naming, occupied, plain, read_json, read_record, write_json, write_text
from apportion.durable import remove, sweep, sync_folder
from apportion.locks import LOCK, Lock
from apportion.rows.batch import Source
from apportion.tracking.feed import Feeds
from apportion.tracking.tracker import TrackedRun
from apportion.training.checkpoint import Checkpoint, read_checkpoint, subfolders, write_checkpoint
from apportion.training.same import check_same
from apportion.training.verdict import Verdict
from apportion.trust import expanded

if TYPE_CHECKING:
    from apportion.training.trainer import Trainer

logger = logging.getLogger(__name__)

KEPT = 2
"""Checkpoints that a run keeps: if the disk damages one, there is another."""
NOT_THEIRS = {errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE}
"""Errors of reading a checkpoint that have nothing to do with it; an older one would meet them too."""
RUN, LOG, FINISHED, TRACKED = "run.json", "metrics.jsonl", "finished.json", "tracked.json"


def read_run(folder: Path) -> dict[str, Any]:
    """run.json; ValueError if it lacks what every run has."""
    objective = (dict, type(None))
    return read_record(folder / RUN, sae__name=str, sae__settings=dict, train=dict, source=dict, objective=objective)


class RunFolder:
    """A run that this process writes, while entered; ValueError if another does, or if it is not the run described."""

    def __init__(
        self,
        folder: Path,
        description: dict[str, Any],
        resume: bool,
        defaults: dict[str, dict[str, Any]],
        feeds: Feeds | None = None,
    ) -> None:
        folder = expanded(folder).absolute()  # whatever becomes of the current directory meanwhile
        self.folder, self.description, self.resume, self.defaults = folder, description, resume, defaults
        self._feeds = feeds or Feeds()
        self._lock = Lock(self.folder / LOCK, f"the run in {folder}")
        self._kept: list[Path] = []
        self._saved_tokens: int | None = None

    def __enter__(self) -> RunFolder:
        record = self.folder / RUN
        if not record.exists() and occupied(self.folder):
            raise ValueError(f"{self.folder} exists and is not a run of apportion. Choose another folder.")
        if record.exists() and not self.resume:
            raise ValueError(f"{self.folder} already holds a run. Resume it (--resume) or choose another folder.")
        with ExitStack() as if_it_fails:
            with naming(self.folder):
                if not self.folder.exists():
                    self.folder.mkdir(parents=True, exist_ok=True)
                    sync_folder(self.folder.parent)
                    if_it_fails.callback(_remove_if_empty, self.folder)
                if_it_fails.enter_context(self._lock)
            self._claim(record)
            if_it_fails.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._lock.__exit__()

    def _claim(self, record: Path) -> None:
        sweep(self.folder)
        if record.exists():
            check_same(self.folder, read_run(self.folder), self.description, self.defaults)
            return
        versions = {name: version(name) for name in ("apportion", "torch")} | {"python": sys.version.split()[0]}
        write_json(record, {**self.description, "versions": versions})

    def log(self, values: dict[str, float]) -> None:
        lines = self.folder / LOG
        with naming(lines), lines.open("a", encoding="utf-8") as file:
            file.write(json.dumps(plain(values)) + "\n")
        self._feeds.log(values)

    def track(self, steps: int) -> None:
        """Have the trackers begin, or go on with their records; they get the lines of the log that these lack."""
        if self._feeds:
            run = TrackedRun(self._tracked_as(), self.folder, read_run(self.folder), steps)
            self._feeds.begin(run, read_log(self.folder))

    def _tracked_as(self) -> str:
        """The id of the run for its trackers, made when it is first tracked."""
        file = self.folder / TRACKED
        if file.exists():
            try:
                return read_record(file, id=str)["id"]
            except ValueError as error:
                logger.warning("%s Trackers begin a new record.", error)
        write_json(file, {"id": (new := uuid.uuid4().hex[:12])})
        return new

    def save_checkpoint(self, trainer: Trainer, source: Source) -> None:
        """Write a new checkpoint, then remove all but the last two."""
        self._lock.check()
        if (log := self.folder / LOG).exists():
            with naming(log), log.open("a") as file:
                os.fsync(file.fileno())
        final = self.folder / f"checkpoint-{trainer.steps}"
        if final.exists():  # it is damaged: the run went on from an older one
            remove(final)
        write_checkpoint(final, trainer, source)
        self._kept, self._saved_tokens = [*self._kept, final][-KEPT:], trainer.tokens
        for folder in checkpoints(self.folder):
            if folder not in self._kept:
                remove(folder)

    def begin(self, trainer: Trainer, source: Source) -> bool:
        """Restore trainer, SAEs and source to where the run is; False if there is nothing left to do."""
        if is_finished(self.folder):
            for sae, name in zip(trainer.saes, subfolders(trainer), strict=True):
                restore(sae, load(self.folder / name))
            done = read_json(file) if (file := self.folder / FINISHED).is_file() else [{}, *read_log(self.folder)][-1]
            trainer.steps, trainer.tokens, trainer.seconds = (done.get(n, 0) for n in ("steps", "tokens", "seconds"))
            if done.get("verdict"):
                trainer.verdict = Verdict(done["verdict"], done.get("diverged", False))
            self._tidy(trainer)
            return False
        found, damaged = checkpoints(self.folder), []
        for folder in reversed(found):
            if (checkpoint := self._whole(folder, trainer, source)) is not None:
                trainer.restore(checkpoint)
                self._kept, self._saved_tokens = [f for f in found if f not in damaged][-KEPT:], trainer.tokens
                logger.info("resuming %s at step %d", self.folder, trainer.steps)
                break
            damaged.append(folder)
        else:
            if damaged:
                raise ValueError(
                    f"{self.folder} has no whole checkpoint to go on from ({damaged[0].name}, the newest, is damaged). "
                    "Begin anew in another folder."
                )
        self._cut_log(trainer.steps)
        return True

    def _whole(self, folder: Path, trainer: Trainer, source: Source) -> Checkpoint | None:
        """A checkpoint that fits this trainer, with the source put to its position; None, and a word in the log, for a
        damaged one. ValueError if it is of another source."""
        try:
            checkpoint = read_checkpoint(folder, trainer)
        except Exception as error:  # whatever damage makes of reading
            if out_of_memory(error) or (isinstance(error, OSError) and error.errno in NOT_THEIRS):
                raise
            problem = str(error)
        else:
            try:
                source.load_state_dict(checkpoint.values["source"])
                return checkpoint
            except (LookupError, TypeError, AttributeError):
                problem = "the position of the source is incomplete"
        logger.warning("%s is damaged (%s); trying an older one", folder, " ".join(problem.split()))
        return None

    def _cut_log(self, steps: int) -> None:
        """Forget lines after the checkpoint, which will be written again, and what is no line of ours."""
        file = self.folder / LOG
        if file.is_symlink():
            raise ValueError(
                f"{file} is a link, and would be written to: put the file itself in its place, or remove it."
            )
        if not file.is_file():
            return
        lines = file.read_bytes().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith(b"\n") and isinstance(step_of(line), int)]
        if len(lines) - len(whole) > 1:
            logger.warning("%s: left out %d damaged lines", file, len(lines) - len(whole))
        kept = [line for line in whole if step_of(line) <= steps]  # type: ignore[operator]
        if len(kept) < len(lines):
            write_text(file, b"".join(kept).decode())

    def finish(self, trainer: Trainer) -> None:
        """The finished SAE replaces the checkpoints, unless there is something wrong with it: then they stay."""
        self._lock.check()
        for sae, name in zip(trainer.saes, subfolders(trainer), strict=True):
            sae.save(self.folder / name)
        done: dict[str, Any] = {"steps": trainer.steps, "tokens": trainer.tokens, "seconds": trainer.seconds}
        if trainer.verdict is not None:
            done |= {"verdict": trainer.verdict.text, "diverged": trainer.verdict.diverged}
        write_json(self.folder / FINISHED, done)
        self._feeds.figures = done | calibrated(trainer)
        self._tidy(trainer)

    def _tidy(self, trainer: Trainer) -> None:
        for folder in () if trainer.verdict else checkpoints(self.folder):
            remove(folder)

    def left(self, trainer: Trainer) -> str:
        """What an interruption left, in words."""
        if is_finished(self.folder):
            return f"stopped when the run in {self.folder} was finished"
        if self._saved_tokens is None:
            return (
                f"stopped at step {trainer.steps}; {self.folder} has no checkpoint yet, and begins anew with --resume"
            )
        step = self._kept[-1].name.removeprefix("checkpoint-")
        at = "" if int(step) == trainer.steps else f" (it was at step {trainer.steps})"
        saved = f"step {step}, {self._saved_tokens:,} tokens, is on the disk"
        return f"stopped: {saved}{at}; everything is in {self.folder}. Go on with --resume"


def calibrated(trainer: Trainer) -> dict[str, Any]:
    """What was measured at the end, of several SAEs with the name of each."""
    return {
        "diverged": trainer.verdict is not None and trainer.verdict.diverged,
        **{
            f"{name}/calibration_{figure}".removeprefix("./"): value
            for sae, name in zip(trainer.saes, subfolders(trainer), strict=True)
            for figure, value in sae.info["calibration"].items()
        },
    }


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, whole or not, the newest last."""
    found = [p for p in folder.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdecimal() and p.is_dir()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("checkpoint-")))


def is_finished(folder: Path) -> bool:
    """Whether the run in this folder is over; older versions left no word but the absence of checkpoints."""
    if (folder / FINISHED).is_file():
        return True
    saved = (folder / "config.json").is_file() or (folder / "sae-0" / "config.json").is_file()
    return saved and (folder / RUN).is_file() and not checkpoints(folder)


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that are whole; values that were no finite number are None."""
    file = folder / LOG
    lines = file.read_bytes().splitlines() if file.is_file() else []
    return [json.loads(line) for line in lines if isinstance(step_of(line), int)]


def step_of(line: bytes) -> int | None:
    """The step of a line of the log; None if it is none of ours."""
    try:
        found = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    step = found.get("step") if isinstance(found, dict) else None
    return step if isinstance(step, int) else None


def restore(sae: SAE, saved: SAE) -> None:
    """Give an SAE the weights and the info of one that was saved."""
    sae.load_state_dict(saved.state_dict())
    sae.info |= saved.info

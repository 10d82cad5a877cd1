"""The parent's side: starts a worker for each subject of a case and has them make one step each in turns.

Nothing runs at the same time as a step that is being timed. Every round begins with another subject, so that nobody
always follows the same one, and the unit is measured in every round like all others.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict
from multiprocessing import Pipe
from pathlib import Path
from statistics import median, quantiles
from tempfile import TemporaryFile
from typing import IO, Any, Protocol

from benchmarks.cases import UNIT, Case, Subject, Task, counterparts

ROOT = Path(__file__).resolve().parents[1]
QUIET = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}
LAST_WORDS = 300
"""Characters of a dead worker's log that are shown."""


class Failed(Exception):
    """A worker cannot go on; the message says why."""


class Worker:
    """One subject in a process of its own. `close` ends the process, whatever it is doing."""

    def __init__(self, task: Task, python: str, log: IO[bytes]) -> None:
        self.log = log
        self.connection, theirs = Pipe()
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        threads = {} if task.threads is None else {"OMP_NUM_THREADS": str(task.threads)}
        self.process = subprocess.Popen(
            [python, "-m", "benchmarks.worker", str(theirs.fileno())],
            pass_fds=(theirs.fileno(),),
            env={**os.environ, **QUIET, **threads, "PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C is for the parent alone, who then ends the workers
        )
        theirs.close()
        self.connection.send(asdict(task))

    def reply(self) -> Any:
        """The next answer. Failed if there will be none."""
        try:
            kind, value = self.connection.recv()
        except (EOFError, ConnectionError):
            raise Failed(self._last_words()) from None
        if kind == "failed":
            raise Failed(value)
        return value

    def ask(self, command: str, argument: Any = None) -> Any:
        try:
            self.connection.send((command, argument))
        except ConnectionError:
            raise Failed(self._last_words()) from None
        return self.reply()

    def close(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.wait()

    def _last_words(self) -> str:
        code = self.process.wait()
        self.log.seek(0)
        words = " ".join(self.log.read().decode(errors="replace").split())
        return f"its process ended with {code}: ...{words[-LAST_WORDS:]}"


class Report(Protocol):
    """Told what is going on, and that so many rounds are done, for whoever waits."""

    def __call__(self, text: str, advance: int = 0) -> None: ...


def run_case(
    case: Case, make_task: Callable[[Subject, Case], Task], python_of: Callable[[str], str], report: Report
) -> dict[str, Any]:
    """Measure one case. Subjects that cannot run are listed with the reason; without the unit there is no result."""
    skipped: dict[Subject, str] = {}
    with ExitStack() as stack:
        workers = {}
        for subject in (UNIT, *case.subjects):
            log = stack.enter_context(TemporaryFile())
            task, python = make_task(subject, case), python_of(subject.library)
            workers[subject] = stack.enter_context(closing(Worker(task, python, log)))
        measured = _Measured(workers, skipped)
        measured.begin(report)
        for number in range(case.warmup + case.steps):
            measured.round(number, number >= case.warmup)
            report(f"round {number + 1} of {case.warmup + case.steps}", advance=1)
        measured.finish(report)
    summaries = {s: _summary(s, measured, case) for s in workers if s not in skipped}
    return {
        "case": case.name,
        **asdict(case.shape),
        "warmup": case.warmup,
        "steps": case.steps,
        "subjects": list(summaries.values()),
        "comparisons": _comparisons(summaries),
        "unit_cpu_share": _cpu_share(summaries[UNIT]),
        "skipped": [{"name": s.name, "label": s.label, "reason": reason} for s, reason in skipped.items()],
    }


class _Measured:
    """What has been measured so far of the workers that still run."""

    def __init__(self, workers: Mapping[Subject, Worker], skipped: dict[Subject, str]) -> None:
        self.workers, self.skipped = dict(workers), skipped
        self.about: dict[Subject, dict[str, Any]] = {}
        self.at_start: dict[Subject, float | None] = {}
        self.seconds: dict[Subject, list[float]] = {subject: [] for subject in workers}
        self.cpu_seconds: dict[Subject, list[float]] = {subject: [] for subject in workers}
        self.at_end: dict[Subject, dict[str, Any]] = {}

    @contextmanager
    def _while_running(self, subject: Subject) -> Iterator[None]:
        """A worker that fails is left out from here on."""
        try:
            yield
        except Failed as error:
            if subject == UNIT:
                raise ValueError(f"The encoder product, the unit of everything, cannot run: {error}") from None
            self.skipped[subject] = str(error)
            self.workers.pop(subject).close()

    def begin(self, report: Report) -> None:
        for subject, worker in list(self.workers.items()):
            report(f"starting {subject.label}")
            with self._while_running(subject):
                self.about[subject] = worker.reply()
                self.at_start[subject] = worker.ask("fvu")

    def round(self, number: int, timed: bool) -> None:
        order = list(self.workers.items())
        first = number % len(order)
        for subject, worker in order[first:] + order[:first]:
            with self._while_running(subject):
                seconds, cpu_seconds = worker.ask("step", number)
                if timed:
                    self.seconds[subject].append(seconds)
                    self.cpu_seconds[subject].append(cpu_seconds)

    def finish(self, report: Report) -> None:
        for subject, worker in list(self.workers.items()):
            report(f"evaluating {subject.label}")
            with self._while_running(subject):
                self.at_end[subject] = {key: worker.ask(key) for key in ("memory", "fvu", "missed")}


def _summary(subject: Subject, measured: _Measured, case: Case) -> dict[str, Any]:
    seconds, unit = measured.seconds[subject], measured.seconds[UNIT]
    about, end = measured.about[subject], measured.at_end[subject]
    step, by_round = median(seconds), [a / b for a, b in zip(seconds, unit, strict=True)]
    return {
        "name": subject.name,
        "label": subject.label,
        **asdict(subject),
        "median_s": step,
        "quartiles_s": _quartiles(seconds),
        "tokens_per_s": case.shape.batch / step,
        "ratio": step / median(unit),
        "ratio_by_round": median(by_round),
        "ratio_quartiles": _quartiles(by_round),
        "peak_bytes": end["memory"],
        "peak_beyond_16_bytes_a_parameter": end["memory"] - 16 * about["parameters"],
        "fvu_before": measured.at_start[subject],
        "fvu_after": end["fvu"],
        "steps_done": case.warmup + case.steps,
        "missed": end["missed"],
        "about": about,
        "seconds": seconds,
        "cpu_seconds": measured.cpu_seconds[subject],
    }


def _comparisons(summaries: Mapping[Subject, dict[str, Any]]) -> dict[str, float]:
    """How many times as long each subject takes as its counterparts."""
    pairs = ((subject, other) for subject in summaries for other in counterparts(subject))
    return {
        f"{a.label} / {b.label}": summaries[a]["median_s"] / summaries[b]["median_s"]
        for a, b in pairs
        if b in summaries
    }


def _cpu_share(unit: dict[str, Any]) -> float:
    """How much of its threads' time the product was computing: clearly below 1 if something else took the cores."""
    shares = [cpu / wall for cpu, wall in zip(unit["cpu_seconds"], unit["seconds"], strict=True)]
    return median(shares) / unit["about"]["threads"]


def _quartiles(values: list[float]) -> tuple[float, float]:
    if len(values) == 1:
        return values[0], values[0]
    q1, _, q3 = quantiles(values, n=4, method="inclusive")
    return q1, q3

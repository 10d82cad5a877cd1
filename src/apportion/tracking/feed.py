"""The lines of a run on their way to its trackers. Nothing that a tracker does stops the run, or makes it wait.

    with Feeds(track) as feeds:
        feeds.begin(run, logged)      each tracker in a thread of its own; waited for, but not long
        feeds.log(line)               as metrics.jsonl has it
        feeds.figures = {...}         once the run is finished
                                      at the end they are waited for, but not long

A tracker that raises is left out from then on, with one warning; so is one that is far behind, and at the end one that
has not begun or does not finish.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from itertools import chain
from queue import SimpleQueue
from threading import Event, Thread
from time import monotonic
from typing import Any

from apportion.interrupt import GivenUp
from apportion.tracking import Tracker, given
from apportion.tracking.tracker import TrackedRun

logger = logging.getLogger(__name__)

Line = tuple[int, dict[str, float]]

WAIT_S = 30.0
"""So long trackers may take to begin before training does, and to end before `fit` returns."""
LOOK_S = 0.1
"""So long a Ctrl-C may go unnoticed while they are waited for."""
MOST_LINES = 100_000
"""A tracker that is so far behind will not catch up, and its lines fill the memory."""


class Feeds:
    """All trackers of one run; ValueError for what is none, see `given`."""

    def __init__(self, track: str | Tracker | Iterable[Any] = ()) -> None:
        self._trackers = given(track)
        self._feeds: list[Feed] = []
        self._before = (0, 0.0)
        self._ended = False
        self.figures: dict[str, Any] = {}
        """Of a finished run."""

    def __bool__(self) -> bool:
        return bool(self._trackers)

    def __enter__(self) -> Feeds:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self.end(patient=kind is not GivenUp)

    def begin(self, run: TrackedRun, logged: Iterable[Mapping[str, Any]]) -> None:
        """Start with a run, of which these lines are logged already."""
        lines = [self._line(values) for values in logged if _number(values.get("tokens"), values.get("seconds"))]
        self._feeds = [Feed(name, tracker, run, lines) for name, tracker in self._trackers]
        for feed in _late([(feed, feed.begun) for feed in self._feeds], WAIT_S):
            logger.warning("%s has not begun after %g s; training does not wait for it", feed.name, WAIT_S)

    def log(self, values: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl: step, tokens, seconds, and more."""
        line = self._line(values)
        for feed in self._feeds:
            feed.put(line)

    def _line(self, values: Mapping[str, Any]) -> Line:
        """Its step, its finite numbers, and the rate of tokens since the line before it."""
        found = {name: value for name, value in values.items() if _number(value) and name != "step"}
        tokens, seconds = self._before
        self._before = found["tokens"], found["seconds"]
        passed = found["seconds"] - seconds
        rate = {"tokens_per_s": (found["tokens"] - tokens) / passed} if passed > 0 else {}
        return values["step"], found | rate

    def end(self, patient: bool = True) -> None:
        """Tell all that it is over, once, and wait for them if `patient`."""
        if self._ended:
            return
        self._ended = True
        for feed in self._feeds:
            feed.end(self.figures)
            if not feed.begun.is_set():
                feed.leave_out("it has not begun")
        wait_s = WAIT_S if patient else 0.0
        for feed in _late([(feed, feed.ended) for feed in self._feeds], wait_s):
            feed.leave_out(f"it has not taken all figures after {wait_s:g} s")


class Feed:
    """One tracker at work."""

    def __init__(self, name: str, tracker: Tracker, run: TrackedRun, logged: list[Line]) -> None:
        self.name, self._tracker, self._run, self._logged = name, tracker, run, logged
        self.begun, self.ended = Event(), Event()
        self._queue: SimpleQueue[Line | None] = SimpleQueue()
        self._figures: Mapping[str, Any] = {}
        Thread(target=self._work, name=f"tracker {name}", daemon=True).start()

    def put(self, line: Line) -> None:
        if self._queue.qsize() > MOST_LINES:
            self.leave_out(f"it is {MOST_LINES:,} lines behind")
        elif not self.ended.is_set():
            self._queue.put(line)

    def end(self, figures: Mapping[str, Any]) -> None:
        self._figures = figures
        self._queue.put(None)

    def leave_out(self, why: str) -> None:
        """From now on; said once."""
        if not self.ended.is_set():
            words = "%s is left out from now on (%s); the run goes on, and its log is %s"
            logger.warning(words, self.name, " ".join(why.split()), self._run.folder / "metrics.jsonl")
            self.ended.set()

    def _work(self) -> None:
        try:
            last = self._tracker.begin(self._run) if hasattr(self._tracker, "begin") else self._run.steps  # type: ignore
            self.begun.set()
            for step, values in chain(self._logged, iter(self._queue.get, None)):
                if self.ended.is_set():
                    return
                if step > last:
                    self._tracker.log(step, values)
            self._tracker.close(self._figures)
            self.ended.set()
        except BaseException as error:  # whatever a service does, also sys.exit
            self.leave_out(f"{type(error).__name__}: {error}")
        finally:
            self.begun.set()


def _number(*values: Any) -> bool:
    """Whether all are, and finite; a file may hold anything."""
    return all(isinstance(value, int | float) and math.isfinite(value) for value in values)


def _late(events: list[tuple[Feed, Event]], wait_s: float) -> list[Feed]:
    """Those that have not set their event after so long, all together."""
    until = monotonic() + wait_s
    for _, event in events:
        while monotonic() < until and not event.wait(LOOK_S):
            pass
    return [feed for feed, event in events if not event.is_set()]

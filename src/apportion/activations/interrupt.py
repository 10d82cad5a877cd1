"""Ctrl-C (or being told to end, SIGTERM) in long work whose result so far can be kept.

    with Interrupts() as interrupts:
        while True:
            with interrupts.let_through():     long, and lost if it is broken off: KeyboardInterrupt at once
                rows = compute()
            write(rows)                        short, and must be whole: the signal waits until the next `let_through`

A second signal gives up, wherever it comes: `GivenUp`. Outside the main thread, and where the signals are ignored,
nothing is changed.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any


class Interrupted(KeyboardInterrupt):
    """What a Ctrl-C left; the message says it."""


class GivenUp(KeyboardInterrupt):
    """The second Ctrl-C."""


class Interrupts:
    """While this is entered, SIGINT and SIGTERM are taken here."""

    def __init__(self) -> None:
        self.arrived = False
        self._through = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            taken = (s for s in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(s) not in (signal.SIG_IGN, None))
            self._before = {s: signal.signal(s, self._take) for s in taken}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for s, handler in self._before.items():
            signal.signal(s, handler)

    def _take(self, signum: int, frame: FrameType | None) -> None:
        if self.arrived:
            raise GivenUp
        self.arrived = True
        if self._through:
            raise KeyboardInterrupt

    @contextmanager
    def let_through(self) -> Iterator[None]:
        """A block that a signal ends at once; one that has arrived before does so at its beginning."""
        self._through = True
        try:
            if self.arrived:
                raise KeyboardInterrupt
            yield
        finally:
            self._through = False

"""Ctrl-C, and being told to end, in long work that keeps what it has.

    with Interrupts() as interrupts:
        while not interrupts.arrived:
            with interrupts.let_through():     lost if it is broken off, so at once: KeyboardInterrupt
                rows = compute()
            train(rows)                        is finished first; a second Ctrl-C ends it at once: `GivenUp`
            with interrupts.held():            is finished in any case
                save()

What ends the work is raised once: a Ctrl-C on its way out neither replaces it nor breaks off what is cleaned up and
said then. Who catches it and goes on says so (`caught`).

Told to end means SIGTERM, SIGHUP (the terminal was closed), SIGUSR1 (Slurm, before the time is up) and SIGXCPU (the CPU
time is up). They say it once or often; only Ctrl-C said twice means at once. Signals that are ignored (nohup) stay so,
and so do handlers that a program has put on others than SIGINT and SIGTERM. Outside the main thread nothing changes.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

TOLD = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGXCPU") if hasattr(signal, name)]
"""What tells a process to end, as far as this system has it."""


class Interrupted(KeyboardInterrupt):
    """What a Ctrl-C left; the message says it."""


class GivenUp(KeyboardInterrupt):
    """The second Ctrl-C."""


class Interrupts:
    """While this is entered, the signals are taken here."""

    def __init__(self) -> None:
        self.arrived = False
        self._through = self._holding = self._given_up = self._ending = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        self._before = {s: signal.signal(s, self._take) for s in _to_take()}
        return self

    def __exit__(self, *error: object) -> None:
        for s, handler in self._before.items():
            signal.signal(s, handler)

    def _take(self, signum: int, frame: FrameType | None) -> None:
        again, self.arrived = self.arrived and signum == signal.SIGINT, True
        self._given_up |= again
        if self._holding or self._ending:
            return
        if again:
            self.end(GivenUp)
        if self._through:
            self.end()

    def end(self, kind: type[KeyboardInterrupt] = KeyboardInterrupt) -> NoReturn:
        """Raise what ends the work."""
        self._ending = True
        raise kind

    def caught(self) -> None:
        """Go on after it, unless a second Ctrl-C came meanwhile."""
        self.arrived, self._ending = True, False
        if self._given_up:
            self.end(GivenUp)

    @contextmanager
    def let_through(self) -> Iterator[None]:
        """A block that a signal ends at once; one that has arrived before does so at its beginning."""
        self._through = True
        try:
            if self.arrived:
                self.end()
            yield
        finally:
            self._through = False

    @contextmanager
    def held(self) -> Iterator[None]:
        """A block that no signal ends; a second Ctrl-C that came meanwhile ends the work after it."""
        self._holding = True
        try:
            yield
        finally:
            self._holding = False
        if self._given_up:
            self.end(GivenUp)


def _to_take() -> list[int]:
    """The signals that may be taken here."""
    if threading.current_thread() is not threading.main_thread():
        return []
    usual = (signal.SIG_DFL, signal.default_int_handler)
    always = (signal.SIGINT, signal.SIGTERM)
    found = {s: signal.getsignal(s) for s in (signal.SIGINT, *TOLD)}
    return [s for s, was in found.items() if was in usual or (s in always and was not in (signal.SIG_IGN, None))]


def end_like_ctrl_c() -> None:
    """From now on being told to end is like Ctrl-C: what is under way cleans up."""
    for s in _to_take():
        signal.signal(s, signal.default_int_handler)

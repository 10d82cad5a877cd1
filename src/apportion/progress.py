"""The progress of long work: share done, rate, time left, and the numbers one watches.

A bar on stderr for terminals; for everyone else a line in the log every 30 seconds.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from time import perf_counter
from typing import Any

logger = logging.getLogger(__name__)

LOG_EVERY_S = 30


class _Unbothered:
    """Text written to it that nobody can take any more, because the terminal was closed, is lost; nothing is raised."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> None:
        with suppress(OSError):
            self._stream.write(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()


@contextmanager
def progress_bar(what: str, total: int, done: int = 0, *, show: bool = True) -> Iterator[Callable[..., None]]:
    """Yields update(done, **numbers), where `done` counts tokens out of `total`."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console = Console(file=_Unbothered(sys.stderr))  # type: ignore[arg-type]
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TextColumn("{task.fields[watched]}", markup=False),
        TimeRemainingColumn(),
    )
    begun = done
    started = logged = perf_counter()
    drawn = show and console.is_terminal
    with Progress(*columns, console=console, disable=not drawn, transient=True) as progress:
        task = progress.add_task(what, total=total, completed=done, watched="")

        def update(done: int, **numbers: float | str) -> None:
            nonlocal logged
            now = perf_counter()
            rate = (done - begun) / max(now - started, 1e-9)
            texts = (f"{name} {value if isinstance(value, str) else f'{value:.4g}'}" for name, value in numbers.items())
            watched = "  ".join([f"{rate:,.0f} tokens/s", *texts])
            progress.update(task, completed=done, watched=watched)
            if show and not drawn and now - logged > LOG_EVERY_S:
                logged = now
                left = (total - done) / rate if rate else 0
                logger.info("%s: %d of %d tokens, %s, %.0f s left", what, done, total, watched, left)

        yield update

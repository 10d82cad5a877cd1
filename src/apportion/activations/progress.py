"""The progress bar of long work: share done, rate, time left, and the numbers one watches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(what: str, total: int, done: int = 0, *, show: bool = True) -> Iterator[Callable[..., None]]:
    """Yields update(done, **numbers); drawn on stderr, and only on a terminal."""
    from rich.console import Console  # not at the top: `import apportion` stays light
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rate]}"),
        TextColumn("{task.fields[numbers]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not (show and console.is_terminal)) as progress:
        task = progress.add_task(what, total=total, completed=done, rate="", numbers="")

        def update(done: int, **numbers: float | str) -> None:
            speed = progress.tasks[0].speed
            texts = (f"{name} {value if isinstance(value, str) else f'{value:.4g}'}" for name, value in numbers.items())
            rate = f"{speed:,.0f} tokens/s" if speed else ""
            progress.update(task, completed=done, numbers="  ".join(texts), rate=rate)

        yield update

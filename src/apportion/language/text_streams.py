"""Rows of a stream that may fail for a moment: read on from where it was, a few times, with growing waits.

A stream over the network fails now and then in hours of work. It is opened again and the rows that were read are
skipped. When it fails again and again at one place, the text ends there: `Reading.stopped` says why, and what was read
is kept.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

from apportion.language.documents import Reading
from apportion.language.text_files import Row

WAITS_S = (1.0, 5.0, 30.0, 120.0)

log = logging.getLogger(__name__)


def steady_rows(
    opened: Callable[[], Iterable[Any]], name: str, reading: Reading, *, again: bool = True
) -> Iterator[Row]:
    """The rows of `opened()`, which is called anew after a failure unless `again` is False."""
    number, failures = 0, 0
    while True:
        try:
            for row in _from_row(opened(), number):
                number, failures = number + 1, 0
                yield f"{name}, row {number}", row
            return
        except Exception as error:  # every transport has its own kinds
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            if not again or failures == len(WAITS_S):
                reading.stopped = f"{name} failed at row {number + 1} ({reason})"
                return
            log.warning("%s failed at row %d (%s); once more in %g s", name, number + 1, reason, WAITS_S[failures])
            time.sleep(WAITS_S[failures])
            failures += 1


def _from_row(rows: Iterable[Any], number: int) -> Iterable[Any]:
    """`rows` without the first `number`."""
    if not number:
        return rows
    skip = getattr(rows, "skip", None)
    return islice(rows, number, None) if skip is None else skip(number)

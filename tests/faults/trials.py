"""What is tried against apportion, counted.

A test here carries the mark of its family, and every case of it counts as one trial:

    @pytest.mark.fault("damaged caches")
    @pytest.mark.parametrize("damage", trials(DAMAGES, short=6))
    def test_...(damage): ...

A test that makes many at once says how many with `record_property("trials", count)`.

`trials` leaves `short` cases, evenly spaced, and marks the others as slow. With `--faults-json FILE` the outcomes of
every family are written down, from which tools/reliability.py makes the table in docs/reliability.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest


def trials(cases: Sequence[Any], short: int | None = None) -> list[Any]:
    """Cases for `parametrize`, all but `short` of them marked as slow."""
    short = len(cases) if short is None else short
    chosen = {round(i * (len(cases) - 1) / max(1, short - 1)) for i in range(short)}
    return [
        pytest.param(case, id=name_of(case, i), marks=[] if i in chosen else [pytest.mark.slow])
        for i, case in enumerate(cases)
    ]


def name_of(case: Any, i: int) -> str:
    first = case[0] if isinstance(case, tuple) and case else case
    return str(first) if isinstance(first, str | int | float) else getattr(first, "__name__", str(i))

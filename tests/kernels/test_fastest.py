"""Which precision matches are found in: the fastest that was measured, if it gains something."""

from __future__ import annotations

import pytest
import torch

from apportion.kernels import fastest as module
from apportion.kernels.fastest import fastest, screens

CPU = torch.device("cpu")


def clock(monkeypatch, taken):
    """Time passes only while something is searched for, and for each screen as given."""
    now = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(module, "screens", lambda device: [*taken])
    asked = []

    def search(screen):
        asked.append(screen)
        now[0] += taken[screen] * (10 if asked.count(screen) == 1 and screen == "bfloat16" else 1)

    return search, asked


@pytest.mark.parametrize(
    ("taken", "wanted"),
    [
        ({None: 1.0, "bfloat16": 0.5, "int8": 0.4}, "int8"),
        ({None: 1.0, "bfloat16": 0.5, "int8": 0.6}, "bfloat16"),
        ({None: 1.0, "bfloat16": 2.0, "int8": 3.0}, None),
        ({None: 1.0, "bfloat16": 0.97, "int8": 3.0}, None),
        ({None: 1.0, "bfloat16": 0.5}, "bfloat16"),
    ],
)
def test_the_fastest_is_taken_if_it_gains_something(taken, wanted, monkeypatch):
    """The first time of each does not count: something may be made ready then."""
    search, _ = clock(monkeypatch, taken)
    best, times = fastest(search, CPU)
    assert best == wanted and times == pytest.approx(taken)


def test_screens_take_turns_and_long_searches_are_made_twice(monkeypatch):
    search, asked = clock(monkeypatch, {None: 0.001, "bfloat16": 0.002})
    fastest(search, CPU)
    assert asked == (1 + module.ROUNDS) * [None, "bfloat16"]
    search, asked = clock(monkeypatch, {None: 9.0, "bfloat16": 2.0})
    fastest(search, CPU)
    assert asked == 2 * [None, "bfloat16"]


def test_a_machine_without_products_of_whole_numbers(monkeypatch):
    def fails(a, b):
        raise RuntimeError("not here")

    monkeypatch.setattr(torch, "_int_mm", fails)
    assert screens(CPU) == [None, "bfloat16"]
    monkeypatch.undo()
    assert screens(torch.device("cuda")) == [None, "bfloat16"]

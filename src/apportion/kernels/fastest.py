"""In which precision this machine finds matches fastest: measured, at the shape at hand (kernels/select.py).

The whole search is timed, with every screen in turns: the product is a part of it that a screen makes cheaper, and what
has to be done besides may cost more than that.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from apportion.allocation import Screen

ROUNDS, SECONDS = 5, 0.5
"""Of measuring, at most, the first not counted; no further one begins after so many seconds, but for the second."""
GAIN = 0.95
"""A screen takes at most this share of the time without one."""


def fastest(search: Callable[[Screen], Any], device: torch.device) -> tuple[Screen, dict[Screen, float]]:
    """The screen to take, and seconds that the search takes with each. It may get faster from one call to the next, as
    bounds of the last batch become known."""
    taken: dict[Screen, list[float]] = {screen: [] for screen in screens(device)}
    for number in range(1 + ROUNDS):
        if number > 1 and sum(map(sum, taken.values())) > SECONDS:
            break
        for screen, times in taken.items():
            times.append(_seconds(search, screen, device))
    found: dict[Screen, float] = {screen: min(times[1:]) for screen, times in taken.items()}
    best = min(found, key=lambda screen: found[screen])
    return (best if found[best] < GAIN * found[None] else None), found


def screens(device: torch.device) -> list[Screen]:
    """Those that work on a device."""
    found: list[Screen] = [None, "bfloat16"]
    return [*found, "int8"] if device.type == "cpu" and _multiplies_whole_numbers() else found


def _multiplies_whole_numbers() -> bool:
    a = torch.ones(32, 32, dtype=torch.int8)
    try:
        return bool((torch._int_mm(a, a.T) == 32).all())
    except (RuntimeError, AttributeError):
        return False


def _seconds(search: Callable[[Screen], Any], screen: Screen, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    search(screen)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started

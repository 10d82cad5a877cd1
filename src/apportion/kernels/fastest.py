"""In which precision this machine looks for candidates fastest: measured, at the shape at hand (kernels/select.py).

A piece of the product is made in each, and what belongs to it is added: rounding the weights, and computing the codes
of what was found again. Below LEAST_WORK nothing is measured and full precision is taken: there the product is not
what takes the time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from apportion.allocation import Screen
from apportion.kernels.product import Precision, Product

LEAST_WORK = 2**28
"""Multiplications and additions of a step's product."""
ROWS, COLUMNS, MATCHES = 2**9, 2**12, 2**13
"""Of what is timed, at most."""
GAIN = 0.95
"""A screen takes at most this share of the time without one."""


def fastest(
    x: Float[Tensor, "tokens d_in"], W_enc: Float[Tensor, "d_sae d_in"], matches: int, share: float = 1.0
) -> tuple[Screen, dict[Screen, float]]:
    """The screen to take, and seconds that a product of these takes with each; `matches` is how many are to be found,
    `share` that of the latents that a token may have. float32 only."""
    if x.dtype != torch.float32 or 2 * len(x) * W_enc.numel() * share < LEAST_WORK:
        return None, {}
    found: dict[Screen, float] = {screen: seconds(x, W_enc, matches, share, screen) for screen in screens(x.device)}
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


@torch.no_grad()
def seconds(x: Tensor, W_enc: Tensor, matches: int, share: float, screen: Screen) -> float:
    rows, columns = x[:ROWS], W_enc[:COLUMNS]
    product = Product(rows, columns, columns.new_zeros(len(columns)))
    precision: Precision = {None: x.dtype, "bfloat16": torch.bfloat16, "int8": "int8"}[screen]
    rounding = _timed(lambda: Product(rows, columns, product.b_enc).whole_numbers, x) if precision == "int8" else 0.0
    total = len(W_enc) / len(columns) * rounding
    piece = len(x) * len(W_enc) * share / (len(rows) * len(columns))
    total += piece * _timed(lambda: [None for _ in product.blocks(precision)], x)
    if screen is not None:
        n = min(MATCHES, matches)
        at = torch.arange(n, device=x.device) * len(rows) // n, torch.arange(n, device=x.device) % len(columns)
        total += matches / n * _timed(lambda: product.at(*at), x)
    return total


def _timed(work: Callable[[], Any], like: Tensor) -> float:
    """The least of a few times, after one that warms up."""
    taken = []
    for _ in range(4):
        if like.is_cuda:
            torch.cuda.synchronize(like.device)
        started = time.perf_counter()
        work()
        if like.is_cuda:
            torch.cuda.synchronize(like.device)
        taken.append(time.perf_counter() - started)
    return min(taken[1:])

"""The unit: the one dense product that no SAE can do without, x W_enc^T, as fast as torch makes it on this machine."""

from __future__ import annotations

from itertools import product
from time import perf_counter

import torch
from torch import Tensor

from benchmarks.gate import Gate

ROWS, COLUMNS = (2**8, 2**10, 2**12), (2**9, 2**11, 2**14)
"""Shapes of the blocks to choose from."""
TRIALS = 3


def run(gate: Gate) -> None:
    """In blocks into one buffer, so that no page is faulted in on the way; in which blocks is tried before."""
    shape, dtype = gate.task.shape, getattr(torch, gate.task.subject.precision)
    W = torch.randn(shape.d_sae, shape.d_in, device=gate.device).to(dtype)
    x = torch.randn(shape.batch, shape.d_in, device=gate.device).to(dtype)
    sizes = {(min(r, shape.batch), min(c, shape.d_sae)) for r, c in product(ROWS, COLUMNS)}
    times = {size: min(_seconds(x, W, *size) for _ in range(TRIALS)) for size in sorted(sizes)}
    rows, columns = min(times, key=lambda size: times[size])
    out = torch.empty(rows, columns, device=gate.device, dtype=dtype)
    gate.begin()
    gate.describe(0, blocks=f"{rows} x {columns}")
    for x in gate:
        multiply(x.to(dtype), W, out)


def multiply(x: Tensor, W: Tensor, out: Tensor) -> None:
    """In blocks as large as `out`, which holds the last one in the end."""
    for block in x.split(len(out)):
        for part in W.split(out.shape[1]):
            torch.mm(block, part.T, out=out[: len(block), : len(part)])


def _seconds(x: Tensor, W: Tensor, rows: int, columns: int) -> float:
    out = torch.empty(rows, columns, device=x.device, dtype=x.dtype)
    started = perf_counter()
    multiply(x, W, out)
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return perf_counter() - started

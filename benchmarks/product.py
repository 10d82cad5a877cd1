"""The unit: the one dense product that no SAE can do without, x W_enc^T + b_enc."""

from __future__ import annotations

import torch

from benchmarks.gate import Gate

BLOCK_ENTRIES = {"product": 2**20, "large_blocks": 2**24}
"""The unit is `product`; larger blocks are more efficient where rows are long, and are there for orientation."""


def run(gate: Gate) -> None:
    """In row blocks into one buffer, so that no page is faulted in on the way."""
    shape, dtype = gate.task.shape, getattr(torch, gate.task.subject.precision)
    W = torch.randn(shape.d_sae, shape.d_in, device=gate.device).to(dtype)
    b = torch.zeros(shape.d_sae, device=gate.device, dtype=dtype)
    size = max(1, min(shape.batch, BLOCK_ENTRIES[gate.task.subject.method] // shape.d_sae))
    out = torch.empty(size, shape.d_sae, device=gate.device, dtype=dtype)
    gate.begin()
    gate.describe(0)
    for x in gate:
        for block in x.to(dtype).split(size):
            torch.addmm(b, block, W.T, out=out[: len(block)])

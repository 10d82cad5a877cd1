"""Whether training has come to anything: measured on held-out rows in eval mode, which is how the SAE will be used."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from apportion.activations.batch import Batch
from apportion.architectures import SAE
from apportion.metrics import FVU

ROWS = 8192
"""Held-out rows on which FVU is measured."""
FAR = 2.0
"""L0 is far from k above this many times k, and below k divided by it."""


@torch.no_grad()
def verdict(sae: SAE, held_out: Iterable[Batch], reconstructs: bool = True) -> str | None:
    """What makes a calibrated SAE useless, in a sentence; None if nothing does.

    An FVU above 1 counts only if it is to reconstruct its rows, an L0 only if it has a k.
    """
    found = []
    fvu = _fvu(sae, held_out) if reconstructs else 0.0
    if fvu is not None and not fvu <= 1:
        found.append(f"held-out FVU is {fvu:.3g}, worse than the mean row")
    l0 = sae.info["calibration"]["l0"]
    if sae.k is not None and not sae.k / FAR <= l0 <= sae.k * FAR:
        found.append(f"held-out L0 is {l0:.3g}, far from k = {sae.k:g}")
    return f"{sae.name}: {' and '.join(found)}" if found else None


def _fvu(sae: SAE, held_out: Iterable[Batch]) -> float | None:
    """None where all rows are equal, so that there is nothing to explain."""
    fvu = FVU()
    with sae.in_eval_mode():
        for batch in held_out:
            rows = batch.rows()
            fvu.add(rows.x if rows.target is None else rows.target, sae(rows.x))
    return None if fvu.equal else fvu.value()

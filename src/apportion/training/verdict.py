"""Whether training has come to anything: measured on held-out rows in eval mode, which is how the SAE will be used."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch

from apportion.architectures import SAE
from apportion.metrics import FVU
from apportion.rows.batch import Batch

ROWS = 8192
"""Held-out rows on which FVU is measured."""
FAR, LOST = 2.0, 10.0
"""L0 is far from k above FAR times k and below k / FAR; below k / LOST hardly anything fires."""
WORSE = 10.0
"""An FVU above this does not come from training too short."""


class Verdict(NamedTuple):
    """What is wrong with an SAE, in a sentence; `diverged` if it is of no use, which more steps will not change."""

    text: str
    diverged: bool


@torch.no_grad()
def verdict(sae: SAE, held_out: Iterable[Batch], reconstructs: bool = True) -> Verdict | None:
    """What is wrong with a calibrated SAE; None if nothing is.

    An FVU above 1 counts only if it is to reconstruct its rows, an L0 only if it has a k.
    """
    found, diverged = [], False
    fvu = _fvu(sae, held_out) if reconstructs else 0.0
    if fvu is not None and not fvu <= 1:
        found.append(f"held-out FVU is {fvu:.3g}, worse than the mean row")
        diverged = not fvu <= WORSE
    l0 = sae.info["calibration"]["l0"]
    if sae.k is not None and not sae.k / FAR <= l0 <= sae.k * FAR:
        found.append(f"held-out L0 is {l0:.3g}, far from k = {sae.k:g}")
        diverged |= not l0 >= sae.k / LOST
    return Verdict(f"{sae.name}: {' and '.join(found)}", diverged) if found else None


def _fvu(sae: SAE, held_out: Iterable[Batch]) -> float | None:
    """None where all rows are equal, so that there is nothing to explain."""
    fvu = FVU()
    with sae.in_eval_mode():
        for batch in held_out:
            rows = batch.rows()
            fvu.add(rows.x if rows.target is None else rows.target, sae(rows.x))
    return None if fvu.equal else fvu.value()

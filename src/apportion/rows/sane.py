"""Rows that would spoil a run, found before it: NaN, infinity, and rows larger than any model makes them.

One row of 1e30 among a million decides the scale of the input, and makes zeros of all others.
"""

from __future__ import annotations

import logging

import torch
from jaxtyping import Float
from torch import Tensor

from apportion.rows.batch import Batch

logger = logging.getLogger(__name__)

LARGE, ABSURD = 1e3, 1e6
"""Times the usual norm: from where a row is pointed out, as attention sinks without the token filter are; and from
where it is refused. Of the models we know none has a row ten thousand times as large as its median row."""
USUAL = 0.9
"""The norm that so many rows do not exceed is the usual one: what is larger in every tenth row is no outlier."""


class SaneRows:
    """Compares rows with the first ones; those have to be many enough to tell what is usual."""

    def __init__(self, sample: Batch, what: str = "The training rows") -> None:
        self.usual = [_usual(_norms(part)) for part in _parts(sample)]
        self._pointed_out = False
        self.check(sample, what)

    def check(self, rows: Batch, what: str) -> None:
        """ValueError naming the first row of `rows` that holds NaN or infinity, or is absurdly large. A row is named
        by its place in the source, if the batch has it."""
        for part, usual in zip(_parts(rows), self.usual, strict=True):
            norms = _norms(part)
            if not len(norms) or bool(norms.amax() <= LARGE * usual):  # false for NaN too
                continue
            worst = int(norms.nan_to_num(torch.inf).argmax())
            where = what if rows.index is None else f"{what} (row {int(rows.index[worst])} of the source)"
            if not bool(norms[worst].isfinite()):
                raise ValueError(f"{where} hold NaN or infinity. Leave such rows out.")
            norm, times = norms[worst].item(), (norms[worst] / usual).item()
            found = f"a row whose norm {norm:.3g} is {times:.3g} times the usual one"
            if times > ABSURD:
                raise ValueError(f"{where} have {found}. Leave it out: the input scale would be that of one row.")
            if not self._pointed_out:
                self._pointed_out = True
                logger.warning("%s have %s; the token filter (norm_outlier) would leave it out", where, found)


def _parts(rows: Batch) -> list[Tensor]:
    rows = rows.rows()
    return [part for part in (rows.x, rows.target) if part is not None]


def _norms(x: Float[Tensor, " n *row"]) -> Float[Tensor, " n"]:
    """Euclidean, of whole rows, in float64 only where float32 would overflow."""
    x = x.flatten(1)
    norms = torch.linalg.vector_norm(x, dim=1)
    return norms if bool(norms.isfinite().all()) else torch.linalg.vector_norm(x, dim=1, dtype=torch.float64)


def _usual(norms: Float[Tensor, " n"]) -> Tensor:
    """Of finite rows that are not zero; infinite if there is none, so that nothing counts as large beside it."""
    norms = norms[(norms > 0) & norms.isfinite()]
    return norms.kthvalue(1 + int(USUAL * (len(norms) - 1))).values if len(norms) else torch.tensor(torch.inf)

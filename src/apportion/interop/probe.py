"""Do an SAE and what it was converted into compute the same? Both encode and decode a few random rows.

Rows are as large as the SAE expects them: its mean and scale where it has them, else its decoder bias and unit
variance, and more if hardly anything fires on that.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from apportion.architectures import SAE
from apportion.interop.export import OURS, unit

ROWS = 64
LOUDER = 4.0
LOUDEST = 4.0**8


@dataclass(frozen=True)
class Difference:
    """Largest differences, relative to the largest entry."""

    latents: float
    reconstructions: float
    l0: float
    rows: int


@torch.no_grad()
def difference(before: SAE, after: SAE, format: str) -> Difference:
    """Between `before` and `after`, which was written from it in this format and read again; both in eval mode."""
    if before.allocation.batch_coupled and bool(before.allocation.threshold.isnan().any()):
        before, after = before.train(), after.train()  # no thresholds in either
    x = probe(before)
    z, found = before.encode(x), after.encode(x)
    wanted = z.dense() if format == OURS else z.dense() * unit(before)
    return Difference(
        latents=relative(found.dense(), wanted),
        reconstructions=relative(after.decode(found, x), before.decode(z, x)),
        l0=z.nnz / ROWS,
        rows=ROWS,
    )


def probe(sae: SAE) -> Float[Tensor, " rows *row"]:
    """The same rows each time, on which at least one latent a row is active if that is possible."""
    noise = torch.randn(ROWS, *sae.row_shape, generator=torch.Generator().manual_seed(0)).to(sae.mean)
    centre, loudness = sae.mean, 1.0
    bias = getattr(sae, "b_dec", None)
    if sae.input.kind == "none" and bias is not None and bias.shape == centre.shape:
        centre = bias.detach()
    while True:
        x = centre + noise * loudness / sae.scale[..., None]
        if loudness >= LOUDEST or sae.encode(x).nnz >= ROWS:
            return x
        loudness *= LOUDER


def relative(found: Tensor, wanted: Tensor) -> float:
    largest = wanted.abs().max().clamp_min(torch.finfo(wanted.dtype).tiny)
    return ((found.double() - wanted.double()).abs().max() / largest).item()

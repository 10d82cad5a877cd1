"""FVU against L0: what an SAE does when it is given more or less than the budget it was trained for.

The SAE is not trained again: TopK gets another k, thresholds are divided by a common factor.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from apportion.architectures import SAE
from apportion.metrics import FVU

GENEROSITY = (0.25, 0.35, 0.5, 0.7, 0.85, 1.0, 1.2, 1.4, 2.0, 2.8, 4.0)
CHUNK = 4096


@torch.inference_mode()
def sweep(
    sae: SAE, x: Float[Tensor, " n *row"], target: Float[Tensor, "n d_out"] | None = None
) -> list[tuple[float, float]]:
    """(L0, FVU) at several budgets around the trained one, L0 within [k / 4, 4 k] and rising.

    On raw, filtered rows; FVU is of what is reconstructed: x, or the target of a transcoder.
    """
    points = []
    for factor in GENEROSITY:
        with sae.in_eval_mode():
            rule = sae.allocation.relaxed(factor)
        fvu, matches = FVU(), 0
        for part, y in zip(x.split(CHUNK), (x if target is None else target).split(CHUNK), strict=True):
            latents = sae.encode_scaled(sae.input.apply_to(part), sae.selection(rule=rule))
            fvu.add(y, sae.decode(latents, part))
            matches += latents.nnz
        points.append((matches / len(x), fvu.value()))
    trained = points[GENEROSITY.index(1.0)]
    k = sae.k or trained[0]
    return sorted(p for p in set(points) if p == trained or k / 4 <= p[0] <= 4 * k)

"""Rows that were left out of training for their norm, in tools that have no such filter: they pass through unchanged.

An attention sink has a norm a hundred times that of other tokens, and an SAE that never saw one reconstructs it anyhow:
spliced in, that breaks the model, and one such row outweighs all others in a variance. As `ap.splice` does, `encode`
gives rows above the limit (norm_outlier times the median norm, in the token filter of training) no codes, and `decode`
returns them as they were.

`decode` sees codes only. It goes by the rows that were encoded last: one that was above the limit there, and has no
codes now, is put back. Codes of other rows, or of another number of rows, are decoded as ever.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass
class Outliers:
    """Keeps of the rows that were encoded last those above the limit."""

    limit: float | None
    """None: no row is above it."""
    above: Bool[Tensor, " rows"] = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    x: Float[Tensor, "above d_in"] = field(default_factory=lambda: torch.zeros(0, 0))

    def silence(self, x: Tensor, codes: Float[Tensor, "*lead d_sae"]) -> Float[Tensor, "*lead d_sae"]:
        """The codes of `x`, with none for rows above the limit; a row may have several dimensions (heads)."""
        if self.limit is None:
            return codes
        rows = x.reshape(codes.shape[:-1].numel(), -1)
        self.above = rows.float().norm(dim=1) > self.limit
        self.x = rows[self.above]
        return codes.masked_fill(self.above.view(*codes.shape[:-1], 1), 0)

    def put_back(self, codes: Float[Tensor, "*lead d_sae"], x_hat: Tensor) -> Tensor:
        """The reconstruction, with rows above the limit as they were."""
        rows = codes.reshape(-1, codes.shape[-1])
        if self.limit is None or len(rows) != len(self.above) or not len(self.x):
            return x_hat
        still = ~rows[self.above].any(dim=1)
        flat = x_hat.reshape(len(rows), -1).clone()
        flat[self.above.nonzero().squeeze(1)[still]] = self.x[still].to(flat)
        return flat.view_as(x_hat)

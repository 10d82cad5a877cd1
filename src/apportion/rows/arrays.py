"""Rows of an array in memory, to evaluate on: like a cache, but without tokens, model or file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from apportion.about import About
from apportion.architectures.inputs import as_tensor
from apportion.rows.batch import Batch


class ArrayStore:
    """Rows [n, d_in] (or [n, num_sites, d_in]) that all take part unless `mask` says which do; for a transcoder with
    the `target` of each. Every row counts as a context of its own."""

    folder = Path("memory")
    hookpoint = "an array"

    def __init__(
        self,
        x: Float[Tensor, " n *sites d_in"] | Any,
        mask: Bool[Tensor, " n"] | None = None,
        target: Float[Tensor, "n d_out"] | Any = None,
    ) -> None:
        self.x = as_tensor(x)
        if self.x.ndim < 2:
            raise ValueError(f"x has shape {tuple(self.x.shape)}: give rows [n, d_in], or [n, num_sites, d_in].")
        self.target = None if target is None else as_tensor(target)
        self.rows, self.d_in = len(self.x), self.x.shape[-1]
        self.mask = torch.ones(self.rows, dtype=torch.bool) if mask is None else mask.cpu()
        for name, column in (("mask", self.mask), ("target", self.target)):
            if column is not None and len(column) != self.rows:
                raise ValueError(f"x has {self.rows} rows, {name} {len(column)}; each row needs its own.")
        self.contexts = torch.arange(self.rows)

    def gather(self, indices: Int[Tensor, " n"]) -> Float[Tensor, "n *sites d_in"]:
        return self.x[indices.to(self.x.device)].float()

    def batch(self, indices: Int[Tensor, " n"]) -> Batch:
        target = None if self.target is None else self.target[indices.to(self.target.device)].float()
        return Batch(self.gather(indices), target)

    def describe(self) -> About:
        return About(kind="array", rows=self.rows, d_in=self.d_in)

"""How a cache holds activations: as numbers of float32, bfloat16 or float16, or of 8 bits with a scale for each row.

    int8     acts int8 [rows, d_in], scale float32 [rows]; a number is scale * int8, scale = max |x| of the row / 127

What 8 bits cost is measured as it is written and stands in the manifest: `precision_fvu`, the squared error over the
variance of the rows that take part.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from apportion.rows.layout import DTYPES
from apportion.rows.shards import Column

LEVELS = 127


def columns_of(dtype: str, d_in: int) -> dict[str, Column]:
    """What a file of activations has of each row."""
    scale = {"scale": Column((), torch.float32)} if dtype == "int8" else {}
    return {"acts": Column((d_in,), DTYPES[dtype]), **scale}


def row_bytes(dtype: str, d_in: int) -> int:
    return sum(prod(column.shape) * column.dtype.itemsize for column in columns_of(dtype, d_in).values())


def stored(x: Shaped[Tensor, "n d_in"], dtype: str) -> dict[str, Tensor]:
    """The columns that hold these rows."""
    if dtype != "int8":
        return {"acts": x.to(DTYPES[dtype])}
    x = x.float()
    scale = (x.abs().amax(1) / LEVELS).clamp(min=torch.finfo(torch.float32).tiny)
    return {"acts": (x / scale[:, None]).round_().clamp_(-LEVELS, LEVELS).to(torch.int8), "scale": scale}


def restored(columns: Mapping[str, Tensor]) -> Float[Tensor, "n d_in"]:
    """The rows that these columns hold, in float32."""
    x = columns["acts"].float()
    return x if "scale" not in columns else x.mul_(columns["scale"][:, None])


def lost(x: Shaped[Tensor, "n d_in"], columns: Mapping[str, Tensor]) -> tuple[float, float]:
    """Sums over rows: the squared error of what is held, and the squared distance from their mean."""
    x = x.float()
    error = (restored(columns) - x).square().sum(dtype=torch.float64)
    return float(error), float((x - x.mean(0)).square().sum(dtype=torch.float64)) if len(x) else 0.0

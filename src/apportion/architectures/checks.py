"""What the files of a saved SAE can say: settings that decide what it computes, and numbers that are possible."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from math import inf
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from apportion.about import About
from apportion.architectures.inputs import SCALES
from apportion.disk import all_finite
from apportion.fields import check_fields

if TYPE_CHECKING:
    from apportion.architectures.base import SAE

DECIDING = ("input_norm", "subtract_b_dec", "affinity", "allocation", "k")
"""Settings that decide codes and leave no trace in the shapes of tensors. Every version wrote them, so where one is
missing the file is damaged; of a setting that came later, an older file means the default."""

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
UNSET = ("allocation.threshold", "allocation.density", "coefficient.log_first")
"""Tensors that are NaN or infinite until they are set."""
RANGES = {
    "scale": SCALES,
    "site_scale": SCALES,
    "threshold": (0.0, inf),
    "density": (0.0, 1.0),
    "bandwidth": (1e-15, 1e15),
    "p": (0.0, 1.0),
    "compensation": (0.0, inf),
    "value": (0.0, inf),
}
"""Between what the entries of a tensor lie, by the last part of its name."""

INFO: dict[str, Any] = {"source": dict, "calibration": dict, "training": dict, "format": str | None}


def check_info(info: Any) -> None:
    """ValueError, naming it, for what an SAE says of its origin and cannot be so."""
    check_fields({"info": info}, {"info": dict}, {})
    check_fields(info, {}, INFO, "info")
    About.from_json(info.get("source", {}), "info.source")
    check_fields(info.get("calibration", {}), {}, {"tokens": int, "l0": float}, "info.calibration")


def check_tensors(sae: SAE, tensors: Mapping[str, Tensor]) -> torch.dtype:
    """The coarsest dtype that holds all of these tensors as they are. ValueError unless they are those of `sae`."""
    wanted = sae.state_dict()
    if wrong := sorted(wanted.keys() ^ tensors.keys()):
        raise ValueError(f"does not fit its config: missing or unexpected {', '.join(wrong)}.")
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, its config says {list(wanted[name].shape)}.")
        if tensor.dtype not in FLOATS:
            raise ValueError(f"{name} holds {tensor.dtype}, and can hold {', '.join(map(str, FLOATS))}.")
        if name not in UNSET and not all_finite(tensor):
            raise ValueError(f"{name} holds NaN or infinity.")
        _check_range(name, tensor, sae)
    return reduce(torch.promote_types, (tensor.dtype for tensor in tensors.values()))


def _check_range(name: str, tensor: Tensor, sae: SAE) -> None:
    kind = name.rpartition(".")[2]
    if kind not in RANGES or (kind == "threshold" and not sae.allocation.batch_coupled):
        return
    low, high = RANGES[kind]
    if bool(((tensor < low) | (tensor > high)).any()):  # NaN is neither
        raise ValueError(f"{name} holds {tensor.min():g} to {tensor.max():g}, and can hold {low:g} to {high:g}.")

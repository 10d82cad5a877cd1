"""Which implementation of the primitives runs: chosen by where the tensors lie, can be overruled, says why.

with kernels.use("torch"): ...            or the environment variable APPORTION_KERNELS=torch
apportion info --kernels
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from apportion.devices import as_on_gpu

Backend = Literal["torch", "triton"]
VARIABLE = "APPORTION_KERNELS"
TRITON_DTYPES = (torch.float32, torch.float64, torch.bfloat16)
"""Those that the Triton kernels take; tensors of others run on torch in any case."""

DENSE_SHARE = 0.2
"""Share of active entries above which dense row blocks are faster than lists of matches (benchmarks/dense_share.py)."""
_forced: Backend | None = None


@contextmanager
def use(backend: Backend) -> Iterator[None]:
    """Within the block, all primitives run on this backend: Triton's also on a CPU, interpreted, as on a GPU."""
    global _forced
    before = _forced
    _forced = _checked(backend)
    try:
        with as_on_gpu(backend == "triton"):
            yield
    finally:
        _forced = before


def backend_for(*tensors: Tensor) -> Backend:
    """The backend of primitives on these tensors, which lie on one device."""
    backend, _ = _choice(tensors[0].device.type)
    return backend if all(t.dtype in TRITON_DTYPES for t in tensors) else "torch"


def _choice(device: str) -> tuple[Backend, str]:
    if _forced is not None:
        return _forced, "asked for by use()"
    if os.environ.get(VARIABLE):
        return _checked(os.environ[VARIABLE]), f"{VARIABLE} is set"
    if device != "cuda":
        return "torch", "Triton is for GPUs"
    if find_spec("triton") is None:
        return "torch", "Triton is not installed"
    return "triton", "a GPU, and Triton is installed"


def _checked(name: str) -> Backend:
    if name not in ("torch", "triton"):
        raise ValueError(f"There are no {name!r} kernels; use torch or triton.")
    if name == "triton" and find_spec("triton") is None:
        raise ValueError("The triton kernels were asked for, but Triton is not installed: pip install triton")
    return name


def explain() -> list[str]:
    """What runs where, in lines to print."""
    lines = []
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        backend, why = _choice(device)
        lines.append(f"{device}: weighted sums, dot products and selection by {backend} ({why})")
        pays = "pays:" if _multiplies_bfloat16(device) else "does not pay: no"
        lines.append(f'{device}: screen="bfloat16" {pays} bfloat16 products in hardware')
    lines.append(f"codes with more than {DENSE_SHARE:.0%} of their entries active are multiplied in dense row blocks")
    return lines


def _multiplies_bfloat16(device: str) -> bool:
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in checks)

"""Whether a tensor is worked on behind the host's back, as on a GPU, where looking at a value means waiting.

What is written for that can be followed without a GPU: within `as_on_gpu` all tensors count as if they were on one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

_as_on_gpu = False


def on_gpu(t: Tensor) -> bool:
    return t.is_cuda or _as_on_gpu


@contextmanager
def as_on_gpu(pretend: bool = True) -> Iterator[None]:
    global _as_on_gpu
    before, _as_on_gpu = _as_on_gpu, pretend
    try:
        yield
    finally:
        _as_on_gpu = before


def marked(mask: Bool[Tensor, " n"], count: int | None = None) -> Int[Tensor, " marks"]:
    """mask.nonzero() of a flat mask; numpy finds the marks many times faster than torch where there are many.

    A GPU is not waited for if it is known how many they are.
    """
    if on_gpu(mask):
        if count is None:
            return mask.nonzero().squeeze(-1)
        places = torch.where(mask, mask.cumsum(0) - 1, count)  # all others into one entry too many
        numbers = torch.arange(len(mask), device=mask.device)
        return numbers.new_empty(count + 1).scatter_(0, places, numbers)[:count]
    return torch.from_numpy(np.flatnonzero(mask.numpy()))

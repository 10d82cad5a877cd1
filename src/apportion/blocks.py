"""How many rows of a dense matrix are worked on together, so that it is never held whole."""

from __future__ import annotations

from torch import Tensor

BLOCK_ENTRIES = 2**22
"""Entries of a dense row block on a CPU: many enough for an efficient product, few enough to stay near the cache."""
MIN_BLOCK_ROWS = 256
"""Rows of such a block, however wide: the other factor is read anew for every block."""
CUDA_BLOCK_BYTES = 2**29
"""Bytes of a dense row block on a GPU, where the other factor of the product is read anew for every block."""


def block_rows(width: int, like: Tensor) -> int:
    """Rows of a dense block [rows, width] of the dtype and on the device of `like`; at least one."""
    if like.is_cuda:
        return max(1, CUDA_BLOCK_BYTES // like.element_size() // max(width, 1))
    return max(MIN_BLOCK_ROWS, BLOCK_ENTRIES // max(width, 1))

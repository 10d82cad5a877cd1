"""How many rows of a dense matrix are worked on together, so that it is never held whole."""

from __future__ import annotations

from torch import Tensor

from apportion.devices import on_gpu

BLOCK_ENTRIES = 2**22
"""Entries of a dense row block on a CPU: many enough for an efficient product, few enough to stay near the cache."""
MIN_BLOCK_ROWS = 256
"""Rows of such a block, however wide: the other factor is read anew for every block."""
CUDA_BLOCK_BYTES = 2**29
"""Bytes of a dense row block on a GPU, where the other factor of the product is read anew for every block."""


def block_rows(width: int, like: Tensor) -> int:
    """Rows of a dense block [rows, width] of the dtype and on the device of `like`; at least one."""
    if on_gpu(like):
        return max(1, CUDA_BLOCK_BYTES // like.element_size() // max(width, 1))
    return max(MIN_BLOCK_ROWS, BLOCK_ENTRIES // max(width, 1))


TILE_ROWS, TILE_COLUMNS = 2**10, 2**11
"""Of a product on a CPU, at most: both factors of a tile stay near the cache, whatever the width of the other tiles."""
GROUP = 32
"""Columns that are looked at together (kernels/scan.py); tiles are a multiple of it wide, but for the last."""


def tile_shape(rows: int, width: int, like: Tensor) -> tuple[int, int]:
    """Rows and columns of the tiles of a dense product [rows, width] of the dtype and on the device of `like`.

    Tiles are as equal as can be, so that none is too small for an efficient product.
    """
    if on_gpu(like):
        return block_rows(width, like), max(width, 1)
    columns = -(-width // max(1, -(-width // TILE_COLUMNS)))
    return _even(rows, TILE_ROWS), max(1, columns if columns == width else -(-columns // GROUP) * GROUP)


def _even(n: int, most: int) -> int:
    """The length of n when it is cut into as few equal parts as none of which is longer than `most`."""
    return max(1, -(-n // max(1, -(-n // most))))

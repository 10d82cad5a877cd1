"""Rows of an array: in memory, or in a .npy file, which is mapped and never read whole."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from apportion.about import About
from apportion.architectures.inputs import as_tensor
from apportion.disk import check_may_open
from apportion.rows.batch import Batch
from apportion.trust import check_regular, expanded

SAMPLED_ROWS = 64
"""Rows, evenly spread, by which the content of a file is known again."""


class ArrayStore:
    """Rows [n, d_in] (or [n, num_sites, d_in]), which all take part unless `mask` says which do.

    `target` has for each row what a transcoder is to predict. `labels` are columns of anything that is known about rows
    (a batch, a cell type, a time). Rows of equal number in `groups` belong together and are held out together; by
    default every row is on its own. ValueError for columns of another length.
    """

    hookpoint = None

    def __init__(
        self,
        x: Float[Tensor, " n *sites d_in"] | Any,
        mask: Bool[Tensor, " n"] | Any = None,
        target: Float[Tensor, "n d_out"] | Any = None,
        *,
        labels: Mapping[str, Any] | None = None,
        groups: Int[Tensor, " n"] | Any = None,
    ) -> None:
        self.x: Tensor | np.ndarray = x if isinstance(x, np.memmap) else as_tensor(x)
        if self.x.ndim < 2:
            raise ValueError(f"x has shape {tuple(self.x.shape)}: give rows [n, d_in], or [n, num_sites, d_in].")
        self.target = None if target is None else as_tensor(target)
        self.rows, self.d_in = len(self.x), self.x.shape[-1]
        self.file: Path | None = None
        """Where a mapped array lies."""
        self.mask = torch.ones(self.rows, dtype=torch.bool) if mask is None else torch.as_tensor(mask).cpu()
        if self.mask.dtype != torch.bool:
            raise ValueError(f"mask says of each row whether it takes part, True or False; got {self.mask.dtype}.")
        self.labels = dict(labels or {})
        self.groups = torch.arange(self.rows)
        if groups is not None:  # whatever they are called: numbers from 0 on
            self.groups = torch.from_numpy(np.unique(np.asarray(groups), return_inverse=True)[1])
        columns = {"mask": self.mask, "target": self.target, "groups": self.groups, **self.labels}
        for name, column in columns.items():
            if column is not None and len(column) != self.rows:
                raise ValueError(f"x has {self.rows} rows, {name} {len(column)}; each row needs its own.")
        if self.x.ndim == 3:
            self.num_sites = self.x.shape[1]

    @property
    def folder(self) -> Path:
        """Where the rows lie, for messages."""
        return self.file or Path("memory")

    def __reduce__(self) -> tuple[Any, ...]:
        """A file is sent as its path: the process that gets it opens it again."""
        if self.file is not None:
            return open_array, (self.file,)
        return super().__reduce__()  # type: ignore[return-value]

    def gather(self, indices: Int[Tensor, " n"]) -> Float[Tensor, "n *sites d_in"]:
        if isinstance(self.x, np.ndarray):
            return torch.from_numpy(np.asarray(self.x[indices.cpu().numpy()], dtype=np.float32))
        return self.x[indices.to(self.x.device)].float()

    def batch(self, indices: Int[Tensor, " n"]) -> Batch:
        target = None if self.target is None else self.target[indices.to(self.target.device)].float()
        return Batch(self.gather(indices), target)

    def describe(self) -> About:
        about = About(kind="array", rows=self.rows, d_in=self.d_in, dtype=str(self.x.dtype).removeprefix("torch."))
        if self.file is None:
            return about
        return replace(about, folder=str(self.file.resolve()), content_sha256=self._digest())

    def _digest(self) -> str:
        """Of shape, dtype and some rows."""
        some = np.linspace(0, self.rows - 1, min(SAMPLED_ROWS, self.rows)).astype(np.int64)
        found = hashlib.sha256(repr((tuple(self.x.shape), str(self.x.dtype))).encode())
        found.update(np.ascontiguousarray(self.x[some]).tobytes())
        return found.hexdigest()


def open_array(file: str | Path) -> ArrayStore:
    """The rows of a .npy file, mapped into memory. ValueError for one that holds no rows of numbers."""
    file = expanded(file)
    check_may_open(file)
    check_regular(file)
    try:
        x = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{file} is no .npy file of numbers ({error}): write it with numpy.save.") from error
    if not np.issubdtype(x.dtype, np.floating) and not np.issubdtype(x.dtype, np.integer):
        raise ValueError(f"{file} holds {x.dtype}: rows of activations are numbers, best float32 or float16.")
    if x.ndim < 2 or not x.size:
        raise ValueError(f"{file} has shape {x.shape}: rows are [n, d_in], or [n, num_sites, d_in].")
    store = ArrayStore(x)
    store.file = file
    return store

"""Reading files that somebody else wrote: whole, of the right shape, finite, and without executing anything.

Every failure is one ValueError that names the file and what is wrong with it. Those who parse a file that may hold
anything raise anything, so that here, and only here, every Exception is caught. `recognises` asks peek.py instead.
"""

from __future__ import annotations

import math
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from apportion.disk import all_finite, damaged
from apportion.interop.peek import MOST_INSTRUCTIONS, endless
from apportion.trust import check_regular, inside

WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""What an SAE can be kept in; what is coarser becomes float32."""
MOST_UNPACKED = 100
"""How many times as large as its file the contents of an archive may be; those of weights are hardly larger."""


def file_in(folder: Path, name: str) -> Path:
    """The file of that name in `folder`; see `inside`."""
    file = inside(folder, name)
    if not file.is_file():
        raise ValueError(f"{file} is not a file.")
    return file


def only_file(path: Path, pattern: str) -> Path:
    """`path` itself if it is a file, else what fits in the folder `path`. ValueError if nothing does, or several do."""
    found = [path] if path.is_file() else sorted(file for file in path.glob(pattern) if file.is_file())
    if len(found) != 1:
        names = ", ".join(file.name for file in found[:12])
        raise ValueError(f"{path} has {f'several files: {names}. Give one of them' if found else f'no {pattern}'}.")
    return found[0]


def cross_layer(file: Path) -> ValueError:
    """Of all libraries such files are refused."""
    return ValueError(
        f"{file} is part of a cross-layer transcoder, which writes to several layers; there is none here."
    )


def read_safetensors(file: Path) -> dict[str, Tensor]:
    check_regular(file)
    try:
        return load_file(file)
    except Exception as error:
        raise damaged(file, error) from None


def read_npz(file: Path) -> dict[str, Tensor]:
    """Arrays of numbers; arrays of Python objects, which would have to be unpickled, are refused."""
    check_regular(file)
    try:
        _check_archive(file)
        with np.load(file, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(np.ascontiguousarray(arrays[name])) for name in arrays.files}
    except Exception as error:
        raise damaged(file, error, "cannot be read as arrays of numbers") from None


def read_pt(file: Path, trust: bool = False) -> Any:
    """What torch.save wrote, tensors and plain containers only.

    With `trust` other Python objects are unpickled as well, which can execute anything that the file's author wants.
    """
    check_regular(file)
    try:
        if zipfile.is_zipfile(file):
            _check_archive(file)
        if not trust and endless(file):
            raise ValueError(f"it has more than {MOST_INSTRUCTIONS:,} instructions, and a state dict has some hundred")
        return torch.load(file, map_location="cpu", weights_only=not trust)
    except ImportError as error:
        raise ValueError(f"{file} holds objects of {error.name}, which is not installed.") from None
    except pickle.UnpicklingError as error:
        if trust:
            raise ValueError(f"{file} is damaged: {error}") from None
        raise ValueError(
            f"{file} holds more than tensors. Reading it would execute code from the file. If you trust whoever wrote "
            "it, call load(..., trust=True)."
        ) from None
    except Exception as error:
        raise damaged(file, error) from None


def _check_archive(file: Path) -> None:
    """ValueError for a zip that would fill the memory, or that is a program (TorchScript)."""
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        unpacked, packed = sum(entry.file_size for entry in entries), file.stat().st_size
        if unpacked > MOST_UNPACKED * packed:
            raise ValueError(f"it has {packed:,} bytes, and unpacked it would have {unpacked:,}")
        if any(entry.filename.endswith("/constants.pkl") for entry in entries):
            raise ValueError("it is a program (TorchScript)")
        for entry in entries:
            if entry.filename.endswith(".npy"):
                with archive.open(entry) as array:
                    _check_array(array, entry)


def _check_array(array: Any, entry: zipfile.ZipInfo) -> None:
    """ValueError for an array that is not as large as its header says; numpy would make room for it first."""
    versions = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(array)
    if version not in versions:
        raise ValueError(f"{entry.filename} has the version {version}")
    shape, _, dtype = versions[version](array)
    if not dtype.hasobject and math.prod(shape) * dtype.itemsize != entry.file_size - array.tell():
        raise ValueError(f"{entry.filename} claims the shape {list(shape)}, which is not the size that it has")


def tensor_dict(content: Any, file: Path) -> dict[str, Tensor]:
    """The tensors of a state dict; ValueError if `content` is something else."""
    if not isinstance(content, Mapping):
        raise ValueError(f"{file} holds a {type(content).__name__}, not a state dict.")
    return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}


class Tensors:
    """Tensors of a file, each taken once, with its shape checked.

    `take("W_enc", "d_in", "d_sae")` names dimensions: the first use of a name fixes its size, later ones must agree.
    Tensors come in float32 at least, so that scales can be folded into them; `dtype` says what they were stored in.
    """

    def __init__(self, tensors: Mapping[str, Tensor], file: Path, **sizes: Any) -> None:
        self.left, self.file, self.names = dict(tensors), file, sorted(tensors)
        self.sizes = {name: size for name, size in sizes.items() if size is not None}
        self.dtype: torch.dtype | None = None
        """The finest of those taken."""

    def __contains__(self, name: str) -> bool:
        return name in self.left

    def take(self, name: str, *shape: str | int) -> Tensor:
        """The tensor of that name as float32 or float64. ValueError if it is missing, misshapen or not finite."""
        if name not in self.left:
            raise ValueError(f"{self.file}: {name} is missing; it has {', '.join(self.names) or 'no tensors'}.")
        tensor = self._plain(name)
        wanted = [self.sizes.get(size, "?") if isinstance(size, str) else size for size in shape]
        fits = tensor.ndim == len(shape) and all(w in ("?", n) for w, n in zip(wanted, tensor.shape, strict=True))
        if not fits:
            raise ValueError(f"{self.file}: {name} has shape {list(tensor.shape)}, expected {wanted} ({list(shape)}).")
        for size, n in zip(shape, tensor.shape, strict=True):
            if isinstance(size, str):
                self.sizes[size] = n
        stored = tensor.dtype if tensor.dtype in WEIGHT_DTYPES else torch.float32
        self.dtype = stored if self.dtype is None else torch.promote_types(self.dtype, stored)
        tensor = tensor if tensor.dtype == torch.float64 else tensor.float()
        if not all_finite(tensor):
            raise ValueError(f"{self.file}: {name} holds NaN or infinity.")
        return tensor.contiguous()

    def weights(self, *names: str | None, d_out: str = "d_in") -> dict[str, Any]:
        """W_enc, W_dec, b_enc, b_dec of `Parts` by their names in the file; "x.T": stored transposed, None: zeros."""
        shapes = {"W_enc": ("d_sae", "d_in"), "W_dec": ("d_sae", d_out), "b_enc": ("d_sae",), "b_dec": (d_out,)}
        found: dict[str, Tensor] = {}
        for name, (ours, shape) in zip(names, shapes.items(), strict=True):
            if name is None:
                found[ours] = found["W_enc"].new_zeros([self.sizes[size] for size in shape])
            elif name.endswith(".T"):
                found[ours] = self.take(name.removesuffix(".T"), *reversed(shape)).T.contiguous()
            else:
                found[ours] = self.take(name, *shape)
        return found

    def _plain(self, name: str) -> Tensor:
        """That tensor, if it is what it seems to be: other kinds can claim any size without having the numbers."""
        tensor = self.left.pop(name).detach()
        if tensor.layout != torch.strided or tensor.device.type == "meta" or not tensor.is_floating_point():
            raise ValueError(
                f"{self.file}: {name} holds {tensor.dtype} ({tensor.layout}), expected plain float numbers."
            )
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ValueError(f"{self.file}: {name} claims the shape {list(tensor.shape)}, and has fewer numbers.")
        return tensor

    def number(self, name: str) -> float:
        """The only entry of a tensor. ValueError if it is missing, has several or is not finite."""
        tensor = self.left.pop(name, None)
        if tensor is None or tensor.numel() != 1 or not math.isfinite(tensor.item()):
            found = "missing" if tensor is None else f"{tensor.tolist() if tensor.numel() < 5 else list(tensor.shape)}"
            raise ValueError(f"{self.file}: {name} should be one number, and is {found}.")
        return tensor.item()

    def drop(self, *names: str) -> None:
        """Tensors that are known and not needed."""
        for name in names:
            self.left.pop(name, None)

    def finish(self) -> torch.dtype | None:
        """The dtype of the file. ValueError for tensors that nobody took: they mean something that we would ignore."""
        if self.left:
            raise ValueError(f"{self.file}: unexpected {', '.join(sorted(self.left))}.")
        return self.dtype

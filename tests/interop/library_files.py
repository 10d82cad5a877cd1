"""What the tests of formats share: numbers by formula, files that are damaged, and files that would execute code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from naive import D_IN, assert_computes
from torch import Tensor

import apportion as ap

TOKENS = 31


def wave(*shape: int, seed: float, size: float = 1.0) -> Tensor:
    """Numbers between -size and size that follow no pattern one would see; the same everywhere."""
    i = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return (size * torch.sin(seed + 1.7 * i + 0.37 * i * i)).float().reshape(shape)


def rows(d_in: int = D_IN) -> Tensor:
    """Raw activations: not centred, of different lengths."""
    return wave(TOKENS, d_in, seed=0.5, size=2) * (1 + torch.arange(TOKENS)[:, None] % 5) + wave(d_in, seed=9)


def standardised(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each row with mean 0 and standard deviation 1, and what it was."""
    mean = x.mean(-1, keepdim=True)
    std = x.std(-1, keepdim=True)
    return (x - mean) / (std + 1e-5), mean, std


def check(sae: ap.SAE, x: Tensor, z: Tensor, y_hat: Tensor, tmp_path: Path) -> None:
    """Codes and reconstructions are those given, and remain so when the SAE is saved and loaded."""
    assert_computes(sae, x, z, y_hat)
    sae.save(tmp_path / "ours")
    again = ap.load(tmp_path / "ours").train(sae.training)
    assert (again.info, again.hookpoint) == (sae.info, sae.hookpoint)
    assert torch.equal(again.encode(x).dense(), sae.encode(x).dense()) and torch.equal(again(x), sae(x))


def broken(tensors: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The same tensors with one fault: missing, longer, of integers, with a NaN, infinite."""
    for name, tensor in tensors.items():
        others = {n: t for n, t in tensors.items() if n != name}
        yield others
        if tensor.is_floating_point() and tensor.ndim:
            yield others | {name: torch.cat([tensor, tensor[:1]])}
            yield others | {name: tensor[None]}
            yield others | {name: tensor.long()}
            for bad in (torch.nan, torch.inf):
                flawed = tensor.clone()
                flawed.view(-1)[-1] = bad
                yield others | {name: flawed}


def refused(path: Path, *, names: str = "", **options: Any) -> None:
    """One ValueError, which speaks of the file, or of `names`, whether the format is told or has to be recognised."""
    told = options.pop("format")
    for format in (told, None):
        with pytest.raises(ValueError, match=names or None) as error:
            ap.load(path, format=format, **options)
        assert names or path.name in str(error.value), error.value


def refused_if_damaged(
    write: Callable[[dict[str, Tensor]], Path], tensors: dict[str, Tensor], format: str, **options: Any
) -> None:
    """`write` puts tensors into a file and returns its path; what is loaded is that file, or its folder."""
    for damaged in broken(tensors):
        refused(write(damaged), format=format, **options)
    file = write(tensors)
    ap.load(file, format=format, **options)
    whole = file.read_bytes()
    for length in (0, 7, len(whole) // 2, len(whole) - 9):
        file.write_bytes(whole[:length])
        refused(file, format=format, **options)


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def refused_if_it_would_execute(content: dict[str, Any], file: Path, format: str, **options: Any) -> None:
    """A .pt with an object beside the tensors: refused without trust, and nothing happens; with trust, it is on you."""
    marker = file.parent / "executed"
    torch.save(content | {"extra": Bomb(marker)}, file)
    refused(file, format=format, names="execute code", **options)
    assert not marker.exists()
    ap.load(file, format=format, trust=True, **options)
    assert marker.exists()

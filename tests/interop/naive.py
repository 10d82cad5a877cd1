"""What the tests of formats share: numbers to write, and how close an SAE must come to a library's formula."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

import apportion as ap

D_IN, D_SAE, K, TOKENS = 6, 20, 3, 11
CLOSE = 1e-5
"""Relative to the largest entry."""


def rand(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(d_in: int = D_IN) -> Tensor:
    return rand(TOKENS, d_in, seed=99, scale=2) + 0.5


def keep_largest(z: Tensor, k: int) -> Tensor:
    """The k largest of each row; zero elsewhere."""
    best = z.topk(k, dim=-1)
    return torch.zeros_like(z).scatter(-1, best.indices, best.values)


def keep_best_of_batch(z: Tensor, k: float) -> Tensor:
    best = z.flatten().topk(int(k * len(z)))
    return torch.zeros_like(z).flatten().scatter(0, best.indices, best.values).view_as(z)


def differs(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape
    return ((found.double() - wanted.double()).abs().max() / wanted.double().abs().max()).item()


def assert_computes(sae: ap.SAE, x: Tensor, latents: Tensor, y: Tensor) -> None:
    assert bool((latents != 0).any()) and bool((latents == 0).any()), "the test itself tests something"
    found = sae.encode(x)
    assert differs(found.dense(), latents) < CLOSE
    assert torch.equal(found.dense() != 0, latents != 0)
    assert differs(sae.decode(found, x), y) < CLOSE
    assert differs(sae(x), y) < CLOSE


def assert_loads_as(path: Path, x: Tensor, latents: Tensor, y: Tensor, tmp: Path, **how: object) -> ap.SAE:
    """`path` loads in eval mode, computes this, and does so again after saving in our format."""
    sae = ap.load(path, **how)
    assert not sae.training
    assert_computes(sae, x, latents, y)
    sae.save(tmp / "ours")
    again = ap.load(tmp / "ours")
    assert again.info == sae.info and again.hookpoint == sae.hookpoint
    assert torch.equal(again.encode(x).dense(), sae.encode(x).dense()) and torch.equal(again(x), sae(x))
    return sae

"""The SAE under test: made by its factory, with rows, targets and batches of the kind that it takes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from apportion.architectures import SAE
from apportion.rows.batch import Batch

D_IN, D_SAE, K = 16, 32, 4
"""Sizes that the factory is asked for. d_sae = 2 d_in, which suits a basis with both signs too."""
NUM_FEATURES = 24
"""Features that the rows are made of: more than d_in, fewer than d_sae; each is active on K of NUM_FEATURES rows."""
RATIO = 0.1
"""By how much parameters are shaken, relative to their mean size."""


class Subject:
    """Fresh SAEs by one factory, and data for them. Everything follows from fixed seeds."""

    def __init__(self, factory: Callable[..., SAE]) -> None:
        self.factory = factory
        sae = self.fresh()
        self.row_shape = sae.row_shape
        self.out_shape: tuple[int, ...] | None = None
        """Shape of a target; None where rows are reconstructed to themselves."""
        if sae.needs_target:
            x = torch.ones(1, *self.row_shape)
            self.out_shape = tuple(sae.train().decode(sae.encode(x), x).shape[1:])

    def fresh(self) -> SAE:
        """As the factory makes it, always under the same seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.factory(d_in=D_IN, d_sae=D_SAE, k=K)

    def fitted(self, dtype: torch.dtype = torch.float32) -> SAE:
        """In train mode, input description fitted, parameters shaken: nothing hides behind a zero or a symmetry."""
        sae = self.fresh().to(dtype).train()
        batch = self.batch(1000, seed=1)
        sae.fit_input(batch.x, batch.target)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for p in sae.parameters():
                if p.requires_grad:
                    size = p.abs().mean() if bool(p.any()) else p.new_ones(())
                    p.add_(RATIO * size * torch.randn(p.shape, generator=generator).to(p))
        sae.constrain()
        return sae

    def ready(self, dtype: torch.dtype = torch.float32) -> SAE:
        """In eval mode, fitted and calibrated."""
        sae = self.fitted(dtype)
        sae.calibrate(self.rows(2000, seed=3).to(dtype))
        return sae.eval()

    def rows(self, n: int, seed: int = 0) -> Float[Tensor, " n *row"]:
        return self.batch(n, seed).x

    def batch(self, n: int, seed: int = 0) -> Batch:
        """Rows, with a target if one is needed: sparse sums of fixed directions, noise, an offset."""
        g = torch.Generator().manual_seed(seed)
        active = torch.rand(n, NUM_FEATURES, generator=g) < K / NUM_FEATURES
        codes = active * (0.5 + torch.rand(n, NUM_FEATURES, generator=g))
        target = None if self.out_shape is None else 2 * made_of(codes, self.out_shape, seed=8, noise=g) - 1
        return Batch(3 * made_of(codes, self.row_shape, seed=7, noise=g) + 1, target)


def made_of(
    codes: Float[Tensor, "n f"], shape: tuple[int, ...], seed: int, noise: torch.Generator
) -> Float[Tensor, " n *shape"]:
    directions = torch.randn(codes.shape[1], *shape, generator=torch.Generator().manual_seed(seed))
    directions /= directions.norm(dim=-1, keepdim=True)
    return torch.tensordot(codes, directions, 1) + 0.02 * torch.randn(len(codes), *shape, generator=noise)


def require(holds: bool, otherwise: str) -> None:
    """AssertionError with a reason. (`assert` would be gone under python -O.)"""
    if not holds:
        raise AssertionError(otherwise)


def difference(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest entry of `b`."""
    require(a.shape == b.shape, f"shapes differ: {list(a.shape)} and {list(b.shape)}")
    if not b.numel():
        return 0.0
    return ((a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-300)).item()


def snapshot(sae: SAE) -> dict[str, Tensor]:
    """A copy of all that is saved of an SAE."""
    return {name: t.detach().clone() for name, t in sae.state_dict().items()}


def changed(before: dict[str, Tensor], sae: SAE) -> list[str]:
    """Names of tensors that are not bit for bit what they were (NaN equals NaN)."""
    now = snapshot(sae)
    return [n for n in before.keys() | now.keys() if n not in now or n not in before or not same(before[n], now[n])]


def same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.nan_to_num(-7.0), b.nan_to_num(-7.0))

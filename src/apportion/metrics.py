"""How good an SAE is: definitions in one place, as streaming sums. Every one has a test with a closed form.

FVU        sum ||x - x_hat||^2 / sum ||x - mean x||^2   sums over all evaluated tokens; 0 perfect, 1 as the mean
L0         active latents per token
density    share of tokens a latent is active on
dead       active on none of the evaluated tokens: always state how many those were
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int, Real
from torch import Tensor

from apportion.latents import Latents

ROUNDING = 64
"""Sums and products of many numbers are off by so many times the precision of their dtype, relative to the numbers."""


def no_spread(spread: Float[Tensor, "*n"], size: Float[Tensor, "*n"]) -> Bool[Tensor, "*n"]:
    """True where a sum of squares about a mean is no more than rounding leaves of equal rows, the sum of whose own
    squares is `size`: a ratio to it would mean nothing."""
    return spread <= (ROUNDING * torch.finfo(spread.dtype).eps) ** 2 * size


def variance(mean: Float[Tensor, "*n"], mean_square: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """From two moments; 0 where it is no more than rounding leaves."""
    found = mean_square - mean.square()
    return torch.where(found <= ROUNDING * torch.finfo(found.dtype).eps * mean_square, 0, found)


def batch_fvu(x: Float[Tensor, "n d"], x_hat: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """FVU within one batch (its own mean): for the progress bar, not for a table. NaN if all rows are equal."""
    error, size, spread = (torch.linalg.vector_norm(t).square() for t in (x - x_hat, x, x - x.mean(0)))
    return error / torch.where(no_spread(spread, size), torch.nan, spread)


class FVU:
    """Fraction of variance unexplained over everything that was added, in float64."""

    def __init__(self) -> None:
        self.error = torch.zeros((), dtype=torch.float64)
        self.tokens = 0
        self.mean = torch.zeros((), dtype=torch.float64)
        self.spread = torch.zeros((), dtype=torch.float64)

    def add(self, x: Float[Tensor, " n *d"], x_hat: Float[Tensor, " n *d"]) -> None:
        if not len(x):
            return
        x, x_hat = x.detach().double().cpu(), x_hat.detach().double().cpu()
        self.error += (x - x_hat).square().sum()
        # Chan's update: the sum of squares about the mean, stable even when the mean is far from zero.
        mean = x.mean(0)
        total = self.tokens + len(x)
        between = (mean - self.mean).square().sum() * self.tokens * len(x) / total
        self.spread += (x - mean).square().sum() + between
        self.mean = self.mean + (mean - self.mean) * len(x) / total
        self.tokens = total

    @property
    def equal(self) -> bool:
        """True if all tokens so far are equal, so that there is nothing to explain."""
        return bool(no_spread(self.spread, self.tokens * self.mean.square().sum()))

    def value(self) -> float:
        """NaN if nothing was added or all tokens are equal."""
        return float("nan") if self.equal else (self.error / self.spread).item()


class Activations:
    """L0, densities and dead latents over everything that was added."""

    def __init__(self, d_sae: int) -> None:
        self.counts = torch.zeros(d_sae, dtype=torch.int64)
        self.l0s: list[Int[Tensor, " n"]] = []

    def add(self, latents: Latents) -> None:
        self.counts += latents.counts().cpu()
        self.l0s.append(latents.l0().flatten().cpu())

    @property
    def tokens(self) -> int:
        return sum(len(l0) for l0 in self.l0s)

    def l0(self) -> Int[Tensor, " tokens"]:
        """Active latents of each token, in the order added."""
        return torch.cat(self.l0s) if self.l0s else torch.zeros(0, dtype=torch.int64)

    def mean_l0(self) -> float:
        return int(self.counts.sum()) / self.tokens if self.tokens else float("nan")

    def density(self) -> Float[Tensor, " d_sae"]:
        return self.counts.double() / max(self.tokens, 1)

    def dead(self) -> float:
        """Share of latents that fired on none of the tokens."""
        return (self.counts == 0).double().mean().item()


def correlation(a: Real[Tensor, " n"], b: Real[Tensor, " n"]) -> float:
    """Pearson's r; NaN if either is constant."""
    x, y = a.double() - a.double().mean(), b.double() - b.double().mean()
    if no_spread(x @ x, a.double().square().sum()) or no_spread(y @ y, b.double().square().sum()):
        return float("nan")
    return (x @ y / (x.norm() * y.norm())).item()


def known(value: float) -> float | None:
    """None for NaN, which is no figure: of rows that are all equal there is nothing to explain."""
    return None if value != value else value


def recovered(ce: float, ce_clean: float, ce_ablated: float) -> float:
    """Share of the loss increase of an ablation that the reconstruction avoids: 1 perfect, 0 as bad as the ablation.

    Zero ablation of a residual stream is so destructive that almost anything recovers 0.98 of it; give delta-CE too.
    """
    nothing = math.isclose(ce_ablated, ce_clean, rel_tol=1e-9)
    return float("nan") if nothing else (ce_ablated - ce) / (ce_ablated - ce_clean)


def load(labels: Int[Tensor, "*lead"], num: int) -> Float[Tensor, " num"]:
    """Share of each of `num` labels (of the tokens sent to each expert, say); NaN without any."""
    return torch.bincount(labels.flatten(), minlength=num).double() / labels.numel()


def entropy(shares: Float[Tensor, " num"]) -> float:
    """In nats: log num if all shares are equal, 0 if one is 1; its exponential is the number that is in effect used."""
    return -torch.special.xlogy(shares, shares).sum().item()

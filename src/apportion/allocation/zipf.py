"""Zipf-shaped densities, and whole-number budgets that sum exactly.

Sorted firing densities of SAE latents roughly follow a shifted power law (Zipf-Mandelbrot),

    density(r) = C / (r + beta)^alpha        r = 1, 2, ...  the rank of the latent

This file fits that curve to measured densities, makes densities from it, and turns densities into budgets.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Real
from torch import Tensor

NOISE_SHARE = 0.01
"""Latents that fire less often than this share of the mean latent are left out of a fit: their densities are noise."""
COARSE = 12
"""Of the betas one in so many is tried first, and then those about the best of them."""
MAX_ALPHA = 20.0
"""Densities that fall faster than any power law would be fitted by ever larger exponents; this one is steep enough."""


@dataclass(frozen=True)
class ZipfFit:
    """density(r) = 10^log10_scale / (r + beta)^alpha.

    `error` is the root mean square error of log10 density (decades) over the `ranks` most frequent latents that the
    fit used, `r2` its coefficient of determination there.
    """

    alpha: float
    beta: float
    log10_scale: float
    error: float
    r2: float
    ranks: int

    def curve(self, ranks: Real[Tensor, " n"]) -> Float[Tensor, " n"]:
        """The fitted density at each of these ranks (1, 2, ...)."""
        return 10 ** (self.log10_scale - self.alpha * (ranks.double() + self.beta).log10())


def fit_zipf(
    densities: Float[Tensor, " d_sae"],
    *,
    alpha: float | None = None,
    beta: float | None = None,
    min_density: float = 0.0,
) -> ZipfFit:
    """Fit the curve to measured densities by least squares on log density; a given alpha or beta is kept.

    Ranks are spaced evenly on a log scale, so that head and tail count alike. Latents at or below `min_density`
    (10 firings in the measured tokens, say) are left out: their densities are noise. Raises ValueError if fewer than
    three remain.
    """
    ranked = densities.detach().double().cpu().sort(descending=True).values
    ranked = ranked[ranked > min_density]
    if ranked.numel() < 3:
        raise ValueError(
            f"A Zipf fit needs three latents with a density above {min_density:g}, got {ranked.numel()}. "
            "Measure over more tokens."
        )
    n = ranked.numel()
    at = torch.unique(torch.logspace(0, torch.log10(torch.tensor(float(n))), min(n, 500), dtype=torch.float64).round())
    at = at.clamp(1, n).long()
    y = ranked[at - 1].log10()
    betas = torch.tensor([beta]) if beta is not None else torch.cat([torch.zeros(1), torch.logspace(-1, 4, 201)])
    middle = COARSE * int(_lines(at, y, betas[::COARSE], alpha)[2].argmin())
    betas = betas[max(0, middle - COARSE) : middle + COARSE + 1]
    slopes, levels, errors = _lines(at, y, betas, alpha)
    best = int(errors.argmin())
    r2 = 1 - errors[best] / (y - y.mean()).square().mean().clamp_min(1e-30)
    return ZipfFit(
        alpha=slopes[best].item(),
        beta=float(betas[best]),
        log10_scale=levels[best].item(),
        error=errors[best].sqrt().item(),
        r2=r2.item(),
        ranks=n,
    )


def _lines(at: Tensor, y: Tensor, betas: Tensor, alpha: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """Slope, level and mean square error of the line that fits y best for each beta, with slope `alpha` if given."""
    u = -(at + betas.double()[:, None]).log10()  # one row for each beta; in each, y is linear in u
    u_mean, y_mean = u.mean(1, keepdim=True), y.mean()
    fitted = ((u - u_mean) * (y - y_mean)).sum(1) / (u - u_mean).square().sum(1)
    slopes = fitted.clamp_max(MAX_ALPHA) if alpha is None else torch.full_like(fitted, alpha)
    levels = y_mean - slopes * u_mean.squeeze(1)
    return slopes, levels, (y - slopes[:, None] * u - levels[:, None]).square().mean(1)


def zipf_densities(d_sae: int, k: float, alpha: float, beta: float, floor: float = 0.0) -> Float[Tensor, " d_sae"]:
    """Densities by rank, summing to k, each between `floor` and 1.

    The floor (one token per batch) is granted first; the rest is shared in proportion to (r + beta)^-alpha, and what a
    latent cannot take (no latent can fire on more than every token) goes to the others.
    """
    steps = torch.arange(d_sae, dtype=torch.float64) / (1 + beta)
    weights = (-alpha * steps.log1p()).exp()  # ((r + beta) / (1 + beta))^-alpha, which cannot underflow as a whole
    floor = floor if floor * d_sae <= k else 0.0
    return floor + _water_fill(weights, k - floor * d_sae, torch.full_like(weights, 1 - floor))


def _water_fill(weights: Float[Tensor, " n"], total: float, cap: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Share `total` in proportion to `weights`, none above its cap."""
    if total > float(cap.sum()) * (1 + 1e-9) + 1e-9:
        raise ValueError(f"A total of {total:g} does not fit under caps that sum to {float(cap.sum()):g}.")
    free = torch.ones_like(weights, dtype=torch.bool)
    while True:
        left = total - float(cap[~free].sum())
        shares = torch.where(free, left * weights / weights[free].sum().clamp_min(1e-300), cap)
        over = free & (shares > cap)
        if not bool(over.any()):
            return shares
        free &= ~over


def integer_budgets(
    densities: Float[Tensor, " d_sae"], total: int, *, floor: int = 0, cap: int | Int[Tensor, " d_sae"] | None = None
) -> Int[Tensor, " d_sae"]:
    """Whole numbers proportional to `densities`, each in [floor, cap], summing exactly to min(total, sum of caps).

    Largest remainder: everyone gets the whole part, then the largest fractional parts get one more (earlier latents
    first among ties). Raises ValueError if the floors alone exceed the total.
    """
    d_sae = densities.numel()
    caps = torch.as_tensor(total if cap is None else cap, device=densities.device).expand(d_sae)
    total = min(total, int(caps.sum()))
    if floor * d_sae > total or bool((caps < floor).any()):
        raise ValueError(f"A floor of {floor} for each of {d_sae} latents exceeds the total of {total}, or a cap.")
    weights = densities.double().clamp_min(1e-300)
    shares = floor + _water_fill(weights, total - floor * d_sae, (caps - floor).double())
    whole = torch.minimum(shares.floor().long(), caps).clamp_min(floor)
    missing = total - int(whole.sum())
    if missing > 0:
        # Rounded before sorting: a whole share must not win over a real fraction by a rounding error.
        rest = torch.where(whole < caps, ((shares - whole) * 2**32).round(), -1.0)
        whole[rest.argsort(descending=True, stable=True)[:missing]] += 1
    return whole

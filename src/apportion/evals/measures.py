"""What is measured of every SAE: reconstruction, sparsity, and what its L0 goes with.

`fvu_unfiltered` is over all rows, also those that the token filter leaves out.
"""

from __future__ import annotations

from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from apportion.allocation.zipf import fit_zipf
from apportion.architectures import SAE
from apportion.evals.measure import Measure, Seen, add_measure
from apportion.metrics import FVU, Activations, correlation, known

MIN_FIRINGS = 10
"""Latents that fired less often are left out of the Zipf fit: their measured densities are noise."""
QUANTILES = {"5%": 0.05, "25%": 0.25, "50%": 0.5, "75%": 0.75, "95%": 0.95}


@final
@add_measure
class Reconstruction(Measure):
    def __init__(self, sae: SAE) -> None:
        super().__init__(sae)
        self.filtered, self.unfiltered = FVU(), FVU()
        self.sites: list[FVU] = []

    def add(self, seen: Seen) -> None:
        y, y_hat, mask = seen.y, seen.y_hat, seen.mask
        self.unfiltered.add(y, y_hat)
        self.filtered.add(y[mask], y_hat[mask])
        if y.ndim == 3:
            self.sites = self.sites or [FVU() for _ in range(y.shape[1])]
            for site, fvu in enumerate(self.sites):
                fvu.add(y[mask, site], y_hat[mask, site])

    def result(self, activations: Activations) -> dict[str, Any]:
        sites = {"fvu_sites": [known(fvu.value()) for fvu in self.sites]} if self.sites else {}
        return {"fvu": known(self.filtered.value()), "fvu_unfiltered": known(self.unfiltered.value())} | sites


@final
@add_measure
class Sparsity(Measure):
    def add(self, seen: Seen) -> None:
        """The activations that everything here is about are kept by the Measurement."""

    def result(self, activations: Activations) -> dict[str, Any]:
        levels = torch.tensor(list(QUANTILES.values()), dtype=torch.float64)
        quantiles = torch.quantile(activations.l0().double()[:1_000_000], levels)
        return {
            "l0": activations.mean_l0(),
            "l0_quantiles": dict(zip(QUANTILES, quantiles.tolist(), strict=True)),
            "dead": activations.dead(),
            "dead_window_tokens": activations.tokens,
            "zipf": _zipf(activations),
        }


@final
@add_measure
class Difficulty(Measure):
    """Where the language model ran: do harder tokens take more latents?"""

    def __init__(self, sae: SAE) -> None:
        super().__init__(sae)
        self._parts: list[Tensor] = []

    def add(self, seen: Seen) -> None:
        if seen.difficulty is not None:
            self._parts.append(seen.difficulty.to(seen.mask.device)[seen.mask].cpu())

    def values(self) -> Float[Tensor, " n"] | None:
        """Of every token that took part; None if nobody said."""
        return torch.cat(self._parts) if self._parts else None

    def result(self, activations: Activations) -> dict[str, Any]:
        return {"l0_difficulty_correlation": _l0_against(activations, self.values())}


@final
@add_measure
class Distance(Measure):
    def __init__(self, sae: SAE) -> None:
        super().__init__(sae)
        self._parts: list[Tensor] = []

    def add(self, seen: Seen) -> None:
        self._parts.append((seen.x[seen.mask].float() - self.sae.mean).flatten(1).norm(dim=1).cpu())

    def result(self, activations: Activations) -> dict[str, Any]:
        return {"l0_distance_correlation": _l0_against(activations, torch.cat(self._parts))}


def _l0_against(activations: Activations, other: Float[Tensor, " n"] | None) -> float | None:
    if other is None:
        return None
    there = ~other.isnan()
    return known(correlation(activations.l0()[there].double(), other[there]))


def _zipf(activations: Activations) -> dict[str, float] | None:
    density, least = activations.density(), MIN_FIRINGS / activations.tokens
    if int((density > least).sum()) < 3:
        return None
    return vars(fit_zipf(density, min_density=least))

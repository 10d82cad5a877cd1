"""What is measured of one SAE on held-out activations, always in eval mode.

Figures are over the rows that pass the token filter; `fvu_unfiltered` beside them is over all rows, and the share of
rows left out is given, because a handful of attention-sink tokens can make every FVU look excellent.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from apportion.allocation.zipf import fit_zipf
from apportion.architectures import SAE
from apportion.latents import Latents
from apportion.metrics import FVU, Activations, correlation
from apportion.torch_state import usual

MIN_FIRINGS = 10
"""Latents that fired less often are left out of the Zipf fit: their measured densities are noise."""


class Measurement:
    """Streaming measurements of one SAE: `add` rows, then read `result`."""

    def __init__(self, sae: SAE) -> None:
        self.sae = sae
        self.filtered, self.unfiltered = FVU(), FVU()
        self.sites: list[FVU] = []
        self.activations = Activations(sae.d_sae)
        self.rows = 0
        self._distances: list[Tensor] = []
        self._difficulty: list[Tensor] = []

    @torch.inference_mode()
    def add(
        self,
        x: Float[Tensor, " n *row"],
        mask: Bool[Tensor, " n"],
        difficulty: Float[Tensor, " n"] | None = None,
        target: Float[Tensor, " n *out"] | None = None,
    ) -> Float[Tensor, " n *out"]:
        """Measure raw rows, of which `mask` take part; returns the reconstruction of all of them.

        Rows that do not take part may hold anything: those with NaN or infinity count nowhere, and are returned as 0.
        `difficulty` is the model's cross-entropy of the prediction made at each row (NaN where there is none);
        `target` is what is to be reconstructed, if not x.
        """
        if self.sae.needs_target and target is None:
            raise ValueError(f"{self.sae.name} predicts a target from x: it can only be measured against one.")
        x, mask = x.to(self.sae.device), mask.to(self.sae.device)
        y = x if target is None else target.to(x.device)
        usable = mask | (finite_rows(x) & finite_rows(y))
        if not bool(usable.all()):
            y_hat = torch.zeros_like(y)
            y_hat[usable] = self.add(
                x[usable],
                mask[usable],
                None if difficulty is None else difficulty[usable.to(difficulty.device)],
                None if target is None else y[usable],
            )
            self.rows += int((~usable).sum())
            return y_hat
        with self.sae.in_eval_mode():
            latents = self.sae.encode(x)
            y_hat = self.sae.decode(latents, x)
        self.record(x, mask, latents, y, y_hat, difficulty)
        return y_hat

    def record(
        self,
        x: Float[Tensor, " n *row"],
        mask: Bool[Tensor, " n"],
        latents: Latents,
        y: Float[Tensor, " n *out"],
        y_hat: Float[Tensor, " n *out"],
        difficulty: Float[Tensor, " n"] | None = None,
    ) -> None:
        """Take note of rows that have been encoded (in eval mode) and decoded already."""
        mask = mask.to(x.device)
        self.unfiltered.add(y, y_hat)
        self.filtered.add(y[mask], y_hat[mask])
        if y.ndim == 3:
            self.sites = self.sites or [FVU() for _ in range(y.shape[1])]
            for site, fvu in enumerate(self.sites):
                fvu.add(y[mask, site], y_hat[mask, site])
        self.activations.add(latents[mask])
        self.rows += len(x)
        self._distances.append((x[mask].float() - self.sae.mean).flatten(1).norm(dim=1).cpu())
        if difficulty is not None:
            self._difficulty.append(difficulty.to(mask.device)[mask].cpu())

    def l0_of_tokens(self) -> Tensor:
        """Active latents of every token that took part."""
        return self.activations.l0()

    def difficulty(self) -> Float[Tensor, " n"] | None:
        return torch.cat(self._difficulty) if self._difficulty else None

    @usual()
    def result(self) -> dict[str, Any]:
        """JSON-able; `None` where a figure does not exist (a correlation with a constant L0, say)."""
        acts, tokens = self.activations, self.activations.tokens
        if not tokens:
            raise ValueError("Nothing to evaluate: no row passed the token filter. Give more text.")
        l0 = acts.l0().double()
        quantiles = torch.quantile(l0[:1_000_000], torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.float64))
        return {
            "sae": self.sae.name,
            "k": self.sae.k,
            "d_sae": self.sae.d_sae,
            "mode": "eval (per-token top-k)" if not self.sae.allocation.batch_coupled else "eval (thresholds)",
            "tokens": tokens,
            "filtered_share": 1 - tokens / self.rows,
            "fvu": self.filtered.value(),
            "fvu_unfiltered": self.unfiltered.value(),
            **({"fvu_sites": [fvu.value() for fvu in self.sites]} if self.sites else {}),
            "l0": acts.mean_l0(),
            "l0_quantiles": dict(zip(("5%", "25%", "50%", "75%", "95%"), quantiles.tolist(), strict=True)),
            "dead": acts.dead(),
            "dead_window_tokens": tokens,
            "zipf": self._zipf(),
            "l0_difficulty_correlation": self._l0_against(self.difficulty()),
            "l0_distance_correlation": self._l0_against(torch.cat(self._distances)),
        }

    def _l0_against(self, other: Tensor | None) -> float | None:
        if other is None:
            return None
        known = ~other.isnan()
        r = correlation(self.activations.l0()[known].double(), other[known])
        return None if r != r else r

    def _zipf(self) -> dict[str, float] | None:
        density, least = self.activations.density(), MIN_FIRINGS / self.activations.tokens
        if int((density > least).sum()) < 3:
            return None
        return vars(fit_zipf(density, min_density=least))


def finite_rows(x: Float[Tensor, " n *row"]) -> Bool[Tensor, " n"]:
    return x.flatten(1).isfinite().all(1)

"""At which layers the latents of one SAE for all layers are active (MLSAE, arXiv 2409.04185).

The SAE (`create("mlsae", ...)`) is that of architectures/mlsae.py.

    P(l | j)             sum of the codes z_j at layer l / sum at all layers ("mass"); or of firings ("counts")
    Var(L)               of the layer, all latents and tokens together
    E_j Var(L | j)       how far a latent is spread over layers, all tokens together
    E_jt Var(L | j, t)   how far it is spread on a single token

Layers are numbered from 0. A latent that never fired, and a pair of latent and token that is active nowhere, has no
distribution over layers: it is left out of the means, not counted with variance 0. A mean over latents or pairs counts
each of them once ("each") or as much as it is active ("activity"); in the latter case no step of

    Var(L) >= E_j Var(L | j) >= E_jt Var(L | j, t)

can fail (law of total variance).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from apportion.architectures import SAE
from apportion.evals.measure import Measurement, Seen
from apportion.latents import Latents
from apportion.metrics import variance
from apportion.progress import progress_bar
from apportion.rows.sites import SitesStore
from apportion.torch_state import usual

By = Literal["mass", "counts"]
Weights = Literal["each", "activity"]
CHUNK = 4096
"""Rows (tokens times layers) that are encoded together."""


class LayerStatistics:
    """Streaming: `add` the codes of some tokens at all layers, then read."""

    def __init__(self, num_layers: int, d_sae: int) -> None:
        self.num_layers, self.d_sae = num_layers, d_sae
        self._layers = torch.arange(num_layers, dtype=torch.float64)
        self._total = {by: torch.zeros(d_sae, num_layers, dtype=torch.float64) for by in ("mass", "counts")}
        self._pairs = {(by, w): [0.0, 0.0] for by in ("mass", "counts") for w in ("each", "activity")}

    def add(self, latents: Latents) -> None:
        """Codes with the leading shape [tokens, num_layers]."""
        if len(latents.shape) != 2 or latents.shape[1] != self.num_layers:
            raise ValueError(f"Expected codes of [tokens, {self.num_layers}] rows, got {list(latents.shape)}.")
        rows, ids = latents.rows().cpu(), latents.indices.cpu()
        token, layer = rows.div(self.num_layers, rounding_mode="floor"), rows % self.num_layers
        values = latents.values.detach().cpu().double()
        pair = (token * self.d_sae + ids).unique(return_inverse=True)[1]
        for by, weights in (("mass", values), ("counts", torch.ones_like(values))):
            flat = torch.bincount(ids * self.num_layers + layer, weights, minlength=self._total[by].numel())
            self._total[by] += flat.view_as(self._total[by])
            size = torch.bincount(pair, weights)
            variance = _variance(size, *(torch.bincount(pair, weights * layer**power) for power in (1, 2)))
            for mean, count in (("each", torch.ones_like(size)), ("activity", size)):
                sums = self._pairs[by, mean]
                sums[0] += (variance * count).sum().item()
                sums[1] += count.sum().item()

    def distribution(self, by: By = "mass") -> Float[Tensor, "d_sae num_layers"]:
        """P(l | j), float64; NaN for latents that never fired."""
        total = self._total[by]
        return total / total.sum(1, keepdim=True)

    def mean_layer(self, by: By = "mass") -> Float[Tensor, " d_sae"]:
        """NaN for latents that never fired."""
        return self.distribution(by) @ self._layers

    def variance(self, by: By = "mass") -> Float[Tensor, " d_sae"]:
        """Var(L | j); NaN for latents that never fired."""
        P, layers = self.distribution(by), self._layers
        return _variance(P.sum(1), P @ layers, P @ layers.square())

    def variances(self, by: By = "mass", mean: Weights = "each") -> dict[str, float]:
        """var, var_latent, var_pair: the three variances; rel_latent, rel_pair: each as a share of the one before."""
        total, layers = self._total[by], self._layers
        alive = total.sum(1) > 0
        if not bool(alive.any()):
            raise ValueError("No latent has fired: there are no layers to tell of.")
        pooled = total.sum(0)
        var = _variance(pooled.sum(), pooled @ layers, pooled @ layers.square()).item()
        weights = total.sum(1)[alive] if mean == "activity" else alive[alive].double()
        var_latent = ((self.variance(by)[alive] * weights).sum() / weights.sum()).item()
        sums = self._pairs[by, mean]
        var_pair = sums[0] / sums[1]
        return {
            "var": var,
            "var_latent": var_latent,
            "var_pair": var_pair,
            "rel_latent": var_latent / var if var else float("nan"),
            "rel_pair": var_pair / var_latent if var_latent else float("nan"),
        }

    def result(self) -> dict[str, Any]:
        """JSON-able: the variances in every variant, and how many latents they are over."""
        return {
            "num_layers": self.num_layers,
            "latents_alive": int((self._total["counts"].sum(1) > 0).sum()),
            "mass": {"each": self.variances("mass", "each"), "activity": self.variances("mass", "activity")},
            "counts": {"each": self.variances("counts", "each"), "activity": self.variances("counts", "activity")},
        }


def _variance(size: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """From the sums of w, w l and w l^2."""
    return variance(first / size, second / size)


@dataclass(frozen=True)
class LayersResult:
    """`pooled` over all (token, layer) rows, `layers` by hookpoint, and where the latents are active."""

    pooled: Measurement
    layers: dict[str, Measurement]
    statistics: LayerStatistics


@usual()
@torch.inference_mode()
def evaluate_layers(
    sae: SAE,
    store: SitesStore,
    rows: Int[Tensor, " n"] | None = None,
    *,
    max_tokens: int | None = None,
    progress: bool = True,
) -> LayersResult:
    """Measure one SAE for all layers on tokens of a cache (all by default), in eval mode.

    Tokens that any layer's filter leaves out count in the unfiltered figures only.
    """
    rows = (torch.arange(store.rows) if rows is None else rows)[:max_tokens]
    names = [one.hookpoint for one in store.stores]
    pooled, layers = Measurement(sae), {name: Measurement(sae) for name in names}
    statistics = LayerStatistics(len(names), sae.d_sae)
    with progress_bar("evaluating", len(rows), show=progress) as show, sae.in_eval_mode():
        done = 0
        for indices in rows.split(max(1, CHUNK // len(names))):
            x, mask = store.gather(indices).to(sae.device), store.mask[indices].to(sae.device)
            latents = sae.encode(x)
            x_hat = sae.decode(latents, x)
            flat = x.flatten(0, 1)
            each = mask.repeat_interleave(len(names))
            pooled.record(Seen(flat, each, replace(latents, shape=(latents.tokens,)), flat, x_hat.flatten(0, 1)))
            for number, measurement in enumerate(layers.values()):
                here = x[:, number]
                measurement.record(Seen(here, mask, latents[:, number], here, x_hat[:, number]))
            statistics.add(latents[mask])
            done += len(indices)
            show(done)
    return LayersResult(pooled, layers, statistics)

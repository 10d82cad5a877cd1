"""Evaluation inside the language model: what it loses when reconstructions replace its activations.

    clean      the model as it is                 zero, mean     the activations replaced by zero, or by their mean
    spliced    the activations replaced by the SAE's reconstruction
    delta_ce   spliced - clean, in nats per predicted token
    recovered  (ablated - spliced) / (ablated - clean), against each of the two ablations

A transcoder is measured where it predicts: its target is what is replaced, by what it makes of its own hookpoint.
Rows that the token filter leaves out stay untouched everywhere, in the ablations too. The rows seen on the way are
measured like those of a cache. Cross-entropy is over all predictions within a context.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from apportion.activations.filter import TokenFilter
from apportion.activations.hookpoints import hooked
from apportion.activations.progress import progress_bar
from apportion.architectures import SAE
from apportion.evals.measure import Measurement
from apportion.metrics import recovered


@dataclass
class CrossEntropies:
    """Mean cross-entropy, in nats per predicted token, of each variant of the model."""

    sums: dict[str, float] = field(default_factory=dict)
    predictions: dict[str, int] = field(default_factory=dict)

    def add(self, variant: str, losses: Float[Tensor, "n pos"]) -> None:
        self.sums[variant] = self.sums.get(variant, 0.0) + losses.double().sum().item()
        self.predictions[variant] = self.predictions.get(variant, 0) + losses.numel()

    def mean(self, variant: str) -> float:
        return self.sums[variant] / self.predictions[variant]

    def of(self, sae: str) -> dict[str, float]:
        """Everything about one SAE."""
        clean, spliced, zero, mean = (self.mean(v) for v in ("clean", f"sae:{sae}", "zero", "mean"))
        return {
            "ce_clean": clean,
            "ce_spliced": spliced,
            "delta_ce": spliced - clean,
            "ce_zero_ablation": zero,
            "ce_mean_ablation": mean,
            "recovered_zero": recovered(spliced, clean, zero),
            "recovered_mean": recovered(spliced, clean, mean),
            "predictions": self.predictions["clean"],
        }


@torch.inference_mode()
def evaluate_model(
    saes: Mapping[str, SAE],
    model: Any,
    contexts: Int[Tensor, "n context_tokens"],
    token_filter: TokenFilter,
    *,
    hookpoint: str,
    target: tuple[str, TokenFilter] | None = None,
    batch_contexts: int = 4,
    progress: bool = True,
) -> tuple[dict[str, Measurement], CrossEntropies]:
    """Measure SAEs of one hookpoint on `contexts`; clean and ablated passes are shared by all of them.

    For transcoders `target` is the hookpoint they predict and its token filter; rows have to pass both filters.
    """
    replaced = hookpoint if target is None else target[0]
    measurements = {name: Measurement(sae) for name, sae in saes.items()}
    entropies = CrossEntropies()
    total = _Sum()
    masks: list[Bool[Tensor, "n context_tokens"]] = []
    done, passes = 0, contexts.numel() * (len(saes) + 3)
    with progress_bar("evaluating", passes, show=progress) as show:
        for ids in contexts.split(batch_contexts):
            (x, *others), losses = _clean(model, ids, [hookpoint] if target is None else [hookpoint, replaced])
            positions = torch.arange(ids.shape[1]).expand_as(ids)
            mask = token_filter.mask(x, ids.to(x.device), positions.to(x.device))
            y = x
            if target is not None:
                y = others[0]
                mask &= target[1].mask(y, ids.to(x.device), positions.to(x.device))
            masks.append(mask)
            entropies.add("clean", losses)
            total.add(y[mask])
            difficulty = F.pad(losses, (0, 1), value=torch.nan)
            for name, measurement in measurements.items():
                y_hat = measurement.add(
                    x.flatten(0, 1), mask.flatten(), difficulty.flatten(), None if target is None else y.flatten(0, 1)
                )
                entropies.add(f"sae:{name}", _replaced(model, ids, replaced, mask, y_hat.reshape(y.shape)))
            done += ids.numel() * (len(saes) + 1)
            show(done)
        mean = total.mean()
        for ids, mask in zip(contexts.split(batch_contexts), masks, strict=True):
            for name, vector in (("zero", torch.zeros_like(mean)), ("mean", mean)):
                entropies.add(name, _replaced(model, ids, replaced, mask, vector))
            done += 2 * ids.numel()
            show(done)
    return measurements, entropies


class _Sum:
    """Mean of rows, summed in float64."""

    def __init__(self) -> None:
        self.rows = 0
        self.sum: Tensor | float = 0.0

    def add(self, x: Float[Tensor, "n d"]) -> None:
        self.sum, self.rows = self.sum + x.double().sum(0), self.rows + len(x)

    def mean(self) -> Float[Tensor, " d"]:
        if not self.rows or not isinstance(self.sum, Tensor):
            raise ValueError("Nothing to evaluate: no row passed the token filter. Give more text.")
        return (self.sum / self.rows).float()


def _clean(
    model: Any, ids: Tensor, hookpoints: list[str]
) -> tuple[list[Float[Tensor, "n pos d"]], Float[Tensor, "n pos_minus_1"]]:
    """Activations at the hookpoints and losses of the untouched model."""
    seen: dict[str, Tensor] = {}

    def look(hookpoint: str, x: Tensor) -> None:
        seen[hookpoint] = x.float().clone()

    with hooked(model, {name: partial(look, name) for name in hookpoints}):
        losses = token_losses(model, ids)
    return [seen[name] for name in hookpoints], losses


def _replaced(model: Any, ids: Tensor, hookpoint: str, mask: Tensor, new: Tensor) -> Float[Tensor, "n pos_minus_1"]:
    """Losses with the rows of `mask` replaced by those of `new` (or by one vector)."""
    with hooked(model, {hookpoint: lambda x: torch.where(mask[..., None], new.to(x), x)}):
        return token_losses(model, ids)


def token_losses(model: Any, ids: Int[Tensor, "n pos"]) -> Float[Tensor, "n pos_minus_1"]:
    """Cross-entropy in nats of each next token."""
    device = next(model.parameters()).device
    ids = ids.long().to(device)
    logits = model(input_ids=ids, use_cache=False).logits
    pairs = zip(logits, ids, strict=True)
    return torch.stack([F.cross_entropy(one[:-1].float(), target[1:], reduction="none") for one, target in pairs])

"""End-to-end training: what the language model does with the reconstruction is minimised (arXiv 2405.12241).

    x_hat in place of x at the hookpoint, everything above it anew:  logits -> logits_sae,  h_l -> h_l_sae

    e2e      w_out KL(p || p_sae)  (or the cross-entropy of p_sae)    mean over all tokens of the contexts, in nats
    e2e_ds   + w_ds mean_l s^2 mean ||h_l_sae - h_l||^2 / d           later layers l, rows that pass the token filter
    local    w_local reconstruction at the hookpoint                  instead, or besides

and the SAE's own terms (auxiliary, sparsity) as always; the auxiliary losses look at the local error. s is the scale of
the SAE's input description, so that downstream errors are in the units of the local loss: the published weights are for
s = 1, raw activations. Rows that the token filter leaves out stay as they are, and the SAE never sees them.

The model is frozen. A step takes one pass for x (the source), and above the hookpoint a clean pass, a spliced one and
its backward pass, which makes no gradients of weights; `UpperLayers` says when the layers below run again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from apportion import losses
from apportion.architectures import SAE
from apportion.group import Group
from apportion.language.upper import Above, UpperLayers
from apportion.rows.batch import Batch
from apportion.settings import settle
from apportion.training.objective import Objective, TrainingContext, add_terms


@dataclass(frozen=True, kw_only=True)
class EndToEndConfig:
    loss: Literal["kl", "ce"] = "kl"
    """What the model's output is held to: its own distribution without the SAE (kl), or the text (ce)."""
    output_weight: float = 1.0
    """Weight of that loss, in nats per token."""
    downstream_weight: float = 0.0
    """Weight of the mean reconstruction error of later layers, in units of the SAE's scaled input."""
    local_weight: float = 0.0
    """Weight of the reconstruction at the hookpoint itself."""
    later: tuple[str, ...] | None = None
    """Which later hookpoints count as downstream; None: the outputs of all later layers (the paper: of all but
    the last)."""

    def __post_init__(self) -> None:
        settle(self)
        weights = {n: getattr(self, n) for n in ("output_weight", "downstream_weight", "local_weight")}
        if min(weights.values()) < 0 or not any(weights.values()):
            raise ValueError(f"The weights must not be negative, and one of them must be positive; got {weights}.")


PRESETS = {
    "local": EndToEndConfig(output_weight=0.0, local_weight=1.0),
    "e2e": EndToEndConfig(),
    "e2e_ds": EndToEndConfig(output_weight=0.5, downstream_weight=1.0),
}
"""The three objectives of the paper; the weights of e2e_ds are ours."""


class EndToEnd(Objective):
    """The objective for SAEs at `hookpoint` of `model`; needs batches of whole contexts (`ContextSource`).

    batch_tokens and total_tokens then count all tokens of the contexts, also those that the token filter leaves out.
    The model is in eval mode without trainable parameters, as `load_model` returns it; ValueError otherwise.
    """

    whole_contexts = True
    name = "end_to_end"
    config: EndToEndConfig

    def __init__(self, model: Any, hookpoint: str, config: EndToEndConfig | str = "e2e") -> None:
        if isinstance(config, str):
            if config not in PRESETS:
                raise ValueError(f"There is no end-to-end objective {config!r}; known are {', '.join(PRESETS)}.")
            config = PRESETS[config]
        if model.training or any(p.requires_grad for p in model.parameters()):
            raise ValueError("End-to-end training needs a frozen model: call model.eval().requires_grad_(False) first.")
        self.config = config
        self.upper = UpperLayers(model, hookpoint, config.later if config.downstream_weight else ())
        if config.downstream_weight and not self.upper.later:
            raise ValueError(f"There is no layer above {hookpoint!r}: use downstream_weight = 0.")

    @classmethod
    def of(cls, config: EndToEndConfig, source: Any) -> EndToEnd:
        return cls(source.model, source.hookpoint, config)

    @property
    def reconstructs(self) -> bool:
        return self.config.local_weight > 0

    def __call__(self, saes: Sequence[SAE], batch: Batch, context: TrainingContext) -> dict[str, Tensor]:
        rows, length = batch.rows(), context_length(batch)
        clean = self._clean(batch, length)
        total: dict[str, Tensor] = {}
        for sae, own in zip(saes, context.each, strict=True):
            x, y = sae.prepare(rows.x, rows.target)
            made = sae.forward_scaled(x, own)
            context.observe(made.latents, y, made.y_hat)
            if self.config.local_weight:
                local = self.config.local_weight * sae.reconstruction_loss(y, made, context.group)
                add_terms(total, {"reconstruction": local})
            if self.config.output_weight or self.config.downstream_weight:
                x_hat = sae.undo(made.y_hat, rows.x.to(made.y_hat))
                add_terms(total, self._through_the_model(batch, length, x_hat, clean, sae.scale, context.group))
            add_terms(total, sae.own_terms(x, y, made, own))
        return total

    @torch.no_grad()
    def _clean(self, batch: Batch, length: int) -> Above | None:
        """What the model does without an SAE, if any loss wants to know."""
        config = self.config
        if not config.downstream_weight and (config.loss == "ce" or not config.output_weight):
            return None
        return self.upper(*in_contexts(batch, batch.x, length))

    def _through_the_model(
        self,
        batch: Batch,
        length: int,
        x_hat: Float[Tensor, "rows d_in"],
        clean: Above | None,
        scale: Float[Tensor, ""],
        group: Group,
    ) -> dict[str, Tensor]:
        """Losses of the model with the reconstruction `x_hat` [rows that take part, d_in] in it, in raw units."""
        mask = batch.mask
        x = x_hat if mask is None else batch.x.index_put((mask,), x_hat.to(batch.x))
        ids, x = in_contexts(batch, x, length)
        spliced = self.upper(ids, x)
        terms = {}
        if self.config.output_weight:
            terms[self.config.loss] = self.config.output_weight * self._output_loss(ids, spliced, clean, group)
        if self.config.downstream_weight:
            assert clean is not None
            errors = []
            for name, h in spliced.later.items():
                error = (h.float() - clean.later[name].float()).flatten(0, 1)
                error = error if mask is None else error[mask.to(error.device)]
                errors.append(group.mean(error.square().mean(), len(error)))
            terms["downstream"] = self.config.downstream_weight * scale.square() * torch.stack(errors).mean()
        return terms

    def _output_loss(
        self, ids: Int[Tensor, "n pos"], spliced: Above, clean: Above | None, group: Group
    ) -> Float[Tensor, ""]:
        if self.config.loss == "kl":
            assert clean is not None
            return losses.kl_divergence(clean.logits, spliced.logits, group)
        predictions = spliced.logits[:, :-1].flatten(0, 1).float()
        loss = F.cross_entropy(predictions, ids[:, 1:].flatten().long().to(predictions.device))
        return group.mean(loss, len(predictions))

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"hookpoint": self.upper.hookpoint, "later": list(self.upper.later)}


def context_length(batch: Batch) -> int:
    """Positions in each context of a batch of whole contexts; ValueError if it is none."""
    positions = batch.positions
    if positions is not None and batch.tokens is not None and len(positions):
        length = int(positions[-1]) + 1
        if len(positions) % length == 0:
            expected = torch.arange(length, device=positions.device)
            if bool((positions.view(-1, length) == expected).all()):
                return length
    raise ValueError("End-to-end training needs whole contexts of tokens, in order: train on a ContextSource.")


def in_contexts(batch: Batch, x: Float[Tensor, "n d"], length: int) -> tuple[Tensor, Tensor]:
    """Tokens [contexts, positions] of a batch of whole contexts, and its rows `x` in the same layout."""
    assert batch.tokens is not None, "checked by context_length"
    return batch.tokens.view(-1, length), x.view(-1, length, x.shape[-1])

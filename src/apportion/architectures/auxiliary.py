"""Gradients for latents that hardly ever win a match: they reconstruct what the others left over.

`aux_k` does so for latents silent for the whole dead window (arXiv 2406.04093), `aux_zipf` also for those whose density
lies below c times the Zipf curve at their rank (arXiv 2411.02124; losses.underutilised). The loss reaches W_enc, b_enc
and W_dec of these latents and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log2
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from apportion import losses
from apportion.allocation import Rule, Selection, StepContext, TokenChoice
from apportion.allocation.zipf import NOISE_SHARE, fit_zipf, zipf_densities
from apportion.architectures.affine import Affine, LearnedConfig
from apportion.architectures.base import Pass
from apportion.devices import marked
from apportion.kernels import decode_matches, rows_of
from apportion.latents import Latents

FIT_ALWAYS, FIT_STEPS = 64, 16
"""Steps in each of which the Zipf curve is fitted to the measured densities; afterwards that is done once in so many,
for densities are averages over many more."""
MIN_RANKS = 16
"""With fewer latents above the noise no curve is fitted, and only dead latents count as underutilised."""


@dataclass(frozen=True, kw_only=True)
class AuxiliaryConfig(LearnedConfig):
    aux: Literal["none", "aux_k", "aux_zipf"] = "aux_k"
    """Auxiliary loss for silent latents: none, aux_k (dead ones), aux_zipf (dead and underutilised ones)."""
    aux_weight: float = 1 / 32
    """Weight of the auxiliary loss."""
    k_aux: int | None = None
    """Silent latents per token in the auxiliary reconstruction; None: d_in / 2, rounded to a power of two."""
    aux_c: float = 0.5
    """aux_zipf: a latent is underutilised below this share of the density expected at its rank; 0 is aux_k."""
    aux_zipf_alpha: float | None = None
    """aux_zipf: exponent of the expected densities; None fits it to the measured ones, in every step at first, in every
    sixteenth later."""
    aux_zipf_beta: float | None = None
    """aux_zipf: offset of the expected densities; None fits it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k_aux is not None and self.k_aux < 1:
            raise ValueError(f'k_aux must be at least 1, got {self.k_aux}. For no auxiliary loss use aux="none".')
        if not 0 <= self.aux_c <= 1:
            raise ValueError(f"aux_c is a share between 0 and 1, got {self.aux_c}.")

    @property
    def aux_matches(self) -> int:
        """k_aux with its default filled in."""
        return self.k_aux or 2 ** round(log2(max(self.d_in / 2, 1)))


class AffineWithAuxiliary(Affine):
    """Base of the affine architectures that revive silent latents."""

    config: AuxiliaryConfig  # type: ignore[assignment]
    constants = dict.fromkeys(("aux_k", "aux_zipf"), ("made", "b_dec"))

    def __init__(self, config: AuxiliaryConfig, allocation: Rule, out_shape: tuple[int, ...] | None = None) -> None:
        super().__init__(config, allocation, out_shape)
        self._curve: Tensor | None = None
        """The densities by rank that aux_zipf expects."""
        if config.aux == "aux_zipf" and self.k is None:
            raise ValueError(
                "aux_zipf compares densities with a curve that sums to k, and this SAE has no k. Use aux_k, or none."
            )

    def own_terms(
        self, x: Float[Tensor, " tokens *row"], y: Float[Tensor, " tokens *out"], made: Pass, context: StepContext
    ) -> dict[str, Tensor]:
        return self.auxiliary_terms(x, y - made.y_hat, context)

    def auxiliary_terms(
        self, x: Float[Tensor, " tokens *row"], error: Float[Tensor, " tokens *out"], context: StepContext
    ) -> dict[str, Tensor]:
        """The weighted auxiliary loss, if any latent is silent. `error` is the target less its reconstruction."""
        selection = context.selection
        marks = self._silent(context) if selection is None or selection.aside is None else selection.aside
        silent = None if marks is None else marked(marks, None if selection is None else selection.num_aside)
        if silent is None or not silent.numel():
            return {}
        limit = self.config.aux_matches
        rule = TokenChoice(TokenChoice.Config(k=min(limit, silent.numel())), silent.numel())
        # Not screened: with few columns the full product costs less than looking twice.
        chosen = self.encode_silent(x, Selection(rule, group=context.group, padded=True), silent)
        error_hat = decode_matches(chosen, rows_of(self.W_dec, silent).flatten(1))
        size, share = x.detach().square().mean(), min(1.0, silent.numel() / limit)
        term = losses.auxiliary(error.flatten(1), error_hat, share, size, context.group)
        return {self.config.aux: self.config.aux_weight * term}

    def carried(self) -> dict[str, Tensor]:
        return {} if self._curve is None else {"curve": self._curve}

    def carry_on(self, tensors: dict[str, Tensor]) -> None:
        self._curve = tensors.get("curve")

    def encode_silent(
        self, x: Float[Tensor, " tokens *row"], selection: Selection, silent: Int[Tensor, " n"]
    ) -> Latents:
        """Codes of these latents (ascending) alone, by their places among these; gradients reach their W_enc and b_enc
        and nothing else."""
        return self.encode_centred(self.centred(x).detach(), selection, silent)

    def begin_step(self, context: StepContext) -> None:
        super().begin_step(context)
        if context.selection is not None:
            context.selection.aside = self._silent(context)

    def _silent(self, context: StepContext) -> Bool[Tensor, " d_sae"] | None:
        """Marks the latents that the auxiliary loss is for."""
        if self.config.aux == "none" or not self.config.aux_weight or context.dead is None:
            return None
        if self.config.aux == "aux_k":
            return context.dead
        assert context.density is not None
        if self._curve is None or context.steps < FIT_ALWAYS or context.steps % FIT_STEPS == 0:
            self._curve = self._expected_densities(context.density)
        return losses.underutilised(context.density, context.dead, self._curve, self.config.aux_c)

    def _expected_densities(self, measured: Float[Tensor, " d_sae"]) -> Float[Tensor, " d_sae"]:
        """By rank: what the rule hands out, or else a Zipf curve that sums to k."""
        decided = self.allocation.expected_densities()
        if decided is not None:
            return decided
        k, alpha, beta = self.k, self.config.aux_zipf_alpha, self.config.aux_zipf_beta
        assert k is not None, "checked when the SAE was created"
        if alpha is None or beta is None:
            noise = NOISE_SHARE * k / self.d_sae
            if int((measured > noise).sum()) < MIN_RANKS:
                return torch.zeros_like(measured)
            fit = fit_zipf(measured, alpha=alpha, beta=beta, min_density=noise)
            alpha, beta = fit.alpha, fit.beta
        return zipf_densities(self.d_sae, k, alpha, beta).to(measured)

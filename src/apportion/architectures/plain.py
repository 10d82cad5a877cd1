"""The plain sparse autoencoder: one affine encoder, one affine decoder with unit rows.

    z     = relu(W_enc (x - b_dec) + b_enc)        x prepared by the input description
    x_hat = (z restricted to the matches that the rule chose) W_dec + b_dec

With a rule it becomes TopK (arXiv 2406.04093), Mutual Choice or Feature Choice (arXiv 2411.02124; Mutual Choice has
BatchTopK's forward pass, arXiv 2412.06410).

Latents that hardly ever win a match get a gradient from an auxiliary loss: they reconstruct what the others left over
(losses.auxiliary). `aux_k` does so for latents silent for the whole dead window, `aux_zipf` also for those whose
density lies below c times the Zipf curve at their rank (losses.underutilised). It reaches W_enc, b_enc and W_dec of
these latents and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from apportion import losses
from apportion.allocation import Rule, StepContext, TokenChoice, WarmStart
from apportion.allocation.token_choice import TokenChoiceConfig
from apportion.allocation.zipf import NOISE_SHARE, fit_zipf, zipf_densities
from apportion.architectures.base import SAE, SAEConfig
from apportion.kernels import choose, decode_matches, encode_matches
from apportion.latents import Latents, from_matches

MIN_RANKS = 16
"""With fewer latents above the noise no curve is fitted, and only dead latents count as underutilised."""


@dataclass(frozen=True, kw_only=True)
class PlainConfig(SAEConfig):
    subtract_b_dec: bool = True
    """Subtract the decoder bias from the encoder's input."""
    aux: Literal["none", "aux_k", "aux_zipf"] = "aux_k"
    """Auxiliary loss for silent latents: none, aux_k (dead ones), aux_zipf (dead and underutilised ones)."""
    aux_weight: float = 1 / 32
    """Weight of the auxiliary loss."""
    k_aux: int | None = None
    """Silent latents per token in the auxiliary reconstruction; None: d_in / 2, rounded to a power of two."""
    aux_c: float = 0.5
    """aux_zipf: a latent is underutilised below this share of the density expected at its rank; 0 is aux_k."""
    aux_zipf_alpha: float | None = None
    """aux_zipf: exponent of the expected densities; None fits it to the measured ones at every step."""
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
        return self.k_aux or 2 ** round(torch.tensor(max(self.d_in / 2, 1)).log2().item())


@final
class Plain(SAE):
    Config = PlainConfig
    config: PlainConfig

    def __init__(self, config: PlainConfig, allocation: Rule) -> None:
        super().__init__(config, allocation)
        if config.aux == "aux_zipf" and allocation.k is None:
            raise ValueError("aux_zipf compares densities with a curve that sums to k, and this rule has no k.")
        generator = None if config.seed is None else torch.Generator().manual_seed(config.seed)
        rows = torch.randn(config.d_sae, config.d_in, generator=generator)
        rows /= rows.norm(dim=1, keepdim=True)
        self.W_dec = nn.Parameter(rows)
        self.W_enc = nn.Parameter(rows.clone())
        self.b_enc = nn.Parameter(torch.zeros(config.d_sae))
        self.b_dec = nn.Parameter(torch.zeros(config.d_in))

    def encode_scaled(self, x: Float[Tensor, "tokens d_in"], warm: WarmStart | None = None) -> Latents:
        return self.encode_scaled_by(self.allocation.in_force(), x, warm)

    def encode_scaled_by(self, rule: Rule, x: Float[Tensor, "tokens d_in"], warm: WarmStart | None) -> Latents:
        return self._encode(rule, self._centred(x), warm)

    def _centred(self, x: Tensor) -> Tensor:
        return x - self.b_dec if self.config.subtract_b_dec else x

    def _encode(self, rule: Rule, x: Tensor, warm: WarmStart | None, ids: Int[Tensor, " n"] | None = None) -> Latents:
        """Choose among all latents, or among `ids` (ascending) only; gradients to x, W_enc and b_enc."""
        W, b = (self.W_enc, self.b_enc) if ids is None else (self.W_enc[ids], self.b_enc[ids])
        norms = None
        if self.config.affinity == "code_times_decoder_norm":
            norms = (self.W_dec if ids is None else self.W_dec[ids]).norm(dim=1)
        screen = self.screen if ids is None else None  # few columns: the full product costs less than looking twice
        m = choose(x, W, b, rule, norms=norms, warm=warm, screen=screen)
        latents = m.latents if ids is None else ids[m.latents]
        matches = from_matches(m.rows, latents, m.values, self.d_sae, (x.shape[0],))
        return encode_matches(x, self.W_enc, self.b_enc, matches)

    def decode_scaled(self, latents: Latents) -> Float[Tensor, "tokens d_in"]:
        return decode_matches(latents, self.W_dec) + self.b_dec

    def affinities(self, latents: Latents) -> Float[Tensor, " nnz"]:
        values = latents.values.detach()
        if self.config.affinity == "code":
            return values
        return values * self.W_dec.detach().norm(dim=1)[latents.indices]

    def own_terms(self, x: Tensor, x_hat: Tensor, latents: Latents, context: StepContext) -> dict[str, Tensor]:
        silent = self._silent(context)
        if silent is None or not silent.numel():
            return {}
        limit = self.config.aux_matches
        rule = TokenChoice(TokenChoiceConfig(k=min(limit, silent.numel())), silent.numel())
        chosen = self._encode(rule, self._centred(x).detach(), None, silent)
        error_hat = decode_matches(chosen, self.W_dec)
        term = losses.auxiliary(x - x_hat, error_hat, share=min(1.0, silent.numel() / limit))
        return {self.config.aux: self.config.aux_weight * term}

    def _silent(self, context: StepContext) -> Int[Tensor, " n"] | None:
        """The latents that the auxiliary loss is for."""
        if self.config.aux == "none" or not self.config.aux_weight or context.dead is None:
            return None
        if self.config.aux == "aux_k":
            return context.dead.nonzero().squeeze(-1)
        assert context.density is not None
        expected = self._expected_densities(context.density)
        low = losses.underutilised(context.density, context.dead, expected, self.config.aux_c)
        return low.nonzero().squeeze(-1)

    def _expected_densities(self, measured: Float[Tensor, " d_sae"]) -> Float[Tensor, " d_sae"]:
        """By rank: what the rule hands out, or else a Zipf curve that sums to k."""
        decided = self.allocation.expected_densities()
        if decided is not None:
            return decided
        k, alpha, beta = self.allocation.k, self.config.aux_zipf_alpha, self.config.aux_zipf_beta
        assert k is not None, "checked when the SAE was created"
        if alpha is None or beta is None:
            noise = NOISE_SHARE * k / self.d_sae
            if int((measured > noise).sum()) < MIN_RANKS:
                return torch.zeros_like(measured)
            fit = fit_zipf(measured, alpha=alpha, beta=beta, min_density=noise)
            alpha, beta = fit.alpha, fit.beta
        return zipf_densities(self.d_sae, k, alpha, beta).to(measured)

    def unit_rows(self) -> list[nn.Parameter]:
        return [self.W_dec]

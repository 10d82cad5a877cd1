"""Baselines without anything to learn: the codes are coordinates in a fixed orthonormal basis, positive and negative.

    V         [d_in, d_in], one direction per row: principal components (pca) or the axes themselves (neurons)
    W_enc   = W_dec = [V; -V]             d_sae = 2 d_in: codes are never negative, so each direction has two latents
    z         = relu(W_enc (x~ - b_dec))  on the matches that the rule chose
    x~_hat    = z W_dec + b_dec           with all positive matches kept, x~ itself

`fit_input` sets the basis, besides mean and scale: components from the covariance of the prepared rows, most variance
first, and b_dec their mean, so that codes are of centred rows under every input description. For neurons b_dec stays 0:
rows are centred by the input description, unless that is none. Until then a PCA has the neurons' basis.

The rule gives each token its own k coordinates. So the PCA here is better than the usual one, which spends its k
numbers on the same k components for every token; the two agree once k = d_in.

When to use it: as a control, for what one gets without training anything.

Cost: nothing is trained; for pca one eigendecomposition of [d_in, d_in]. A code is one product with [d_in, 2 d_in].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from apportion.allocation import Rule
from apportion.architectures.affine import Affine, AffineConfig


@dataclass(frozen=True, kw_only=True)
class FixedBasisConfig(AffineConfig):
    basis: Literal["pca", "neurons"] = "pca"
    """Principal components, or the axes of the activations themselves."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.d_sae != 2 * self.d_in:
            raise ValueError(
                f"A fixed basis has 2 d_in = {2 * self.d_in} latents, each direction with both signs, "
                f"got d_sae = {self.d_sae}. Leave d_sae out, or set it to {2 * self.d_in}."
            )


@final
class FixedBasis(Affine):
    Config = FixedBasisConfig
    config: FixedBasisConfig  # type: ignore[assignment]
    form = "affine"

    def __init__(self, config: FixedBasisConfig, allocation: Rule) -> None:
        super().__init__(config, allocation)
        self._set(torch.eye(config.d_in))
        self.requires_grad_(False)

    @classmethod
    def d_sae_for(cls, d_in: int) -> int:
        return 2 * d_in

    @property
    def needs_fit(self) -> bool:
        unset = self.config.basis == "pca" and torch.equal(self.W_dec[: self.d_in], torch.eye(self.d_in).to(self.W_dec))
        return unset or super().needs_fit

    @torch.no_grad()
    def fit_input(self, x: Any, target: Any = None) -> None:
        """Estimate mean and scale of the input description and the basis from raw, filtered activations."""
        super().fit_input(x, target)
        if self.config.basis == "pca":
            rows = self.input.apply_to(self.finite_rows(x)).double()
            self.b_dec.copy_(rows.mean(0))
            self._set(principal_components(rows))
        if not self.config.subtract_b_dec:
            self.b_enc.copy_(-self.W_enc @ self.b_dec)

    @torch.no_grad()
    def _set(self, basis: Float[Tensor, "d_in d_in"]) -> None:
        for W in (self.W_enc, self.W_dec):
            W.copy_(torch.cat([basis, -basis]))

    def unit_rows(self) -> list[nn.Parameter]:
        return []


def principal_components(rows: Float[Tensor, "n d"]) -> Float[Tensor, "d d"]:
    """Eigenvectors of the covariance as rows, largest variance first; the largest entry of each is positive."""
    centred = rows - rows.mean(0)
    components = torch.linalg.eigh(centred.T @ centred).eigenvectors.T.flip(0)
    largest = components.gather(1, components.abs().argmax(1, keepdim=True))
    return components * largest.sign()

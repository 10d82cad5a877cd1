"""Matryoshka: nested prefixes of the latents, each of which reconstructs the input on its own. arXiv 2503.17547.

    prefixes   F_1 < ... < F_G = d_sae; group g holds the latents F_{g-1} ... F_g - 1
    x_hat_0  = b_dec
    x_hat_g  = x_hat_{g-1} + (z of group g) W_dec of group g
    loss     = mean over g = 1 .. G of ||x - x_hat_g||^2 / d

Early latents serve every prefix and so learn what is general; late ones refine it. The rule chooses among all latents
at once (the paper's is Mutual Choice), so an inner prefix has no budget of its own. Encoding, decoding and files are
those of a plain SAE, and the reconstruction at inference is x_hat_G. Under `allocation="feature_choice"` with Zipf
budgets the first latents, which is the inner prefixes, get the largest densities.

With `detach` prefix g trains only group g: x_hat_g = sg(x_hat_{g-1}) + ..., where sg stops the gradient. Then a latent
learns from one loss, that of the smallest prefix it belongs to; b_dec learns from the first.

The loss is a mean over prefixes, so it is as large as a plain reconstruction loss and the auxiliary loss, on the error
of the whole SAE, weighs what it weighs elsewhere. x_hat_0 is not counted: it would train b_dec alone.

A match is decoded once, with its group, and x_hat_g is the running sum. Backwards, too, it is met once: what reaches it
is the sum of the error gradients of all prefixes that hold its latent.

When to use it: where general features are wanted beside special ones; it is meant against general features that fall
apart into special ones as SAEs grow. The price is some reconstruction, because inner prefixes have fewer latents.

Cost: one dense product and k matches per token, as in a plain SAE, and a reconstruction [tokens, d_in] for each prefix.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from apportion import losses
from apportion.allocation import Rule, StepContext
from apportion.architectures.auxiliary import AffineWithAuxiliary, AuxiliaryConfig
from apportion.architectures.base import Pass
from apportion.group import ALONE, Group
from apportion.kernels import decode_matches
from apportion.latents import Latents


@dataclass(frozen=True, kw_only=True)
class MatryoshkaConfig(AuxiliaryConfig):
    prefix_shares: tuple[float, ...] = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
    """Share of the latents that each prefix holds, ascending; the last is 1."""
    detach: bool = False
    """Stop each prefix's gradient at the smaller prefixes, so that it trains only the latents it adds to them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        shares = self.prefix_shares
        numbers = isinstance(shares, list | tuple) and all(isinstance(share, int | float) for share in shares)
        if not numbers or not shares or shares[-1] != 1:
            raise ValueError(f"prefix_shares are ascending numbers that end with 1, the whole SAE, got {shares!r}.")
        object.__setattr__(self, "prefix_shares", tuple(shares))  # a list, where it was read from a file
        sizes = [0, *self.prefixes]
        if any(later <= earlier for earlier, later in pairwise(sizes)):
            raise ValueError(
                f"prefix_shares = {self.prefix_shares} of d_sae = {self.d_sae} are prefixes of {sizes[1:]} latents; "
                "each must hold more than the one before. Use fewer prefixes or raise d_sae."
            )

    @property
    def prefixes(self) -> tuple[int, ...]:
        """F_1 ... F_G: how many latents each prefix holds."""
        return tuple(round(share * self.d_sae) for share in self.prefix_shares)


@dataclass(frozen=True)
class NestedPass(Pass):
    nested: list[Tensor]
    """The reconstruction of each prefix."""


@final
class Matryoshka(AffineWithAuxiliary):
    Config = MatryoshkaConfig
    config: MatryoshkaConfig  # type: ignore[assignment]
    form = "affine"

    def __init__(self, config: MatryoshkaConfig, allocation: Rule) -> None:
        super().__init__(config, allocation)
        self.prefixes = config.prefixes
        """F_1 ... F_G: how many latents each prefix holds."""

    def forward_scaled(self, x: Float[Tensor, "tokens d_in"], context: StepContext) -> Pass:
        latents = self.encode_scaled(x, self.selection(context))
        sizes = [later - earlier for earlier, later in pairwise([0, *self.prefixes])]
        groups = zip(split_latents(latents, sizes), self.W_dec.split(sizes), strict=True)
        added = [decode_matches(part, W_dec) for part, W_dec in groups]
        nested = list(accumulate(added[1:], initial=added[0] + self.b_dec))
        y_hat = nested[-1]
        if self.config.detach:
            nested[1:] = [smaller.detach() + more for smaller, more in zip(nested, added[1:], strict=False)]
        return NestedPass(latents, y_hat, nested)

    def reconstruction_loss(
        self, y: Float[Tensor, "tokens d_in"], made: Pass, group: Group = ALONE
    ) -> Float[Tensor, ""]:
        """Mean over the prefixes."""
        assert isinstance(made, NestedPass)
        return torch.stack([losses.reconstruction(y, y_hat, group) for y_hat in made.nested]).mean()

    def decode_prefix(
        self, latents: Latents, prefix: int, x: Float[Tensor, "*lead d_in"] | None = None
    ) -> Float[Tensor, "*lead d_in"]:
        """Reconstruction in raw units from the first F_g latents alone, g = `prefix` = 1 .. G; the G-th is `decode`.

        Raises ValueError for another number, and as `decode` does.
        """
        if prefix not in range(1, len(self.prefixes) + 1):
            raise ValueError(f"prefix must be a number from 1 to {len(self.prefixes)}, got {prefix!r}.")
        return self.decode(latents.where(latents.indices < self.prefixes[prefix - 1]), x)


def split_latents(latents: Latents, sizes: list[int]) -> list[Latents]:
    """The matches of consecutive groups of latents, of these sizes, renumbered from 0; gradients flow to all values."""
    ends = torch.tensor(sizes, device=latents.indices.device).cumsum(0)
    group = torch.bucketize(latents.indices, ends, right=True)
    order = group.argsort(stable=True)
    l0 = ends.new_zeros(len(sizes) * latents.tokens)
    l0.scatter_add_(0, group * latents.tokens + latents.rows(), torch.ones_like(group))
    l0 = l0.view(len(sizes), latents.tokens)
    counts = l0.sum(1).tolist()
    offsets = torch.cat([l0.new_zeros(len(sizes), 1), l0.cumsum(1)], dim=1)
    indices = (latents.indices - (ends - ends.new_tensor(sizes))[group])[order]
    parts = zip(latents.values[order].split(counts), indices.split(counts), offsets, sizes, strict=True)
    return [Latents(values, ids, starts, size, latents.shape) for values, ids, starts, size in parts]

"""What a crosscoder tells about its sites: which latents they share, and which only one of them has.

    norm of latent j at site l     ||W_dec_j^l||, on scaled data: sites with large activations do not win by that
    share of site l in latent j    its norm / the sum of norms over all sites
    relative norm (two sites)      the share of the first, A: 0 only B, 1/2 both alike, 1 only A

Norms are all there is to it: a latent that the budget keeps alive at A by accident has its norm there as well, so look
at how often a latent fires before believing that a model "has" it. Latents with rows of zeros have no shares.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from apportion.architectures.crosscoder import Crosscoder


def site_shares(sae: Crosscoder) -> Float[Tensor, "d_sae num_sites"]:
    """Share of each site in each latent; rows sum to 1, or are NaN if the decoder rows are zero."""
    norms = sae.site_norms()
    return norms / norms.sum(1, keepdim=True)


def relative_norms(sae: Crosscoder) -> Float[Tensor, " d_sae"]:
    """||W^A|| / (||W^A|| + ||W^B||) of a crosscoder with two sites, A the first; ValueError for more sites."""
    if sae.config.num_sites != 2:
        raise ValueError(
            f"Relative norms compare two sites, and this crosscoder has {sae.config.num_sites}. Use site_shares."
        )
    return site_shares(sae)[:, 0]


def direction_cosines(sae: Crosscoder) -> Float[Tensor, " d_sae"]:
    """Cosine between the decoder rows of the first two sites: do both write in one direction?

    It means something where both sites live in the same space, such as one layer of a model and of its fine-tuned twin.
    """
    W = sae.W_dec.detach()
    return torch.cosine_similarity(W[:, 0], W[:, 1], dim=1)


@dataclass(frozen=True)
class ModelDiff:
    """Each latent in exactly one class; masks [d_sae]."""

    only_a: Bool[Tensor, " d_sae"]
    only_b: Bool[Tensor, " d_sae"]
    shared: Bool[Tensor, " d_sae"]
    between: Bool[Tensor, " d_sae"]
    """Neither exclusive nor evenly shared."""
    dead: Bool[Tensor, " d_sae"]

    def counts(self) -> dict[str, int]:
        return {name: int(mask.sum()) for name, mask in vars(self).items()}


def model_diff(
    sae: Crosscoder, alive: Bool[Tensor, " d_sae"] | None = None, *, exclusive: float = 0.9, shared: float = 0.6
) -> ModelDiff:
    """Classify the latents of a crosscoder with two sites, A and B, by relative norm r.

    only A: r >= exclusive; only B: r <= 1 - exclusive; shared: neither site has more than the share `shared`. `alive`
    marks latents that fire (on some stated number of tokens); the others, whose norms mean nothing, come under dead.
    """
    if not 0.5 <= shared <= exclusive <= 1:
        raise ValueError(f"0.5 <= shared <= exclusive <= 1 must hold, got shared = {shared}, exclusive = {exclusive}.")
    r = relative_norms(sae)
    dead = r.isnan() if alive is None else r.isnan() | ~alive.to(r.device)
    only_a, only_b = (r >= exclusive) & ~dead, (1 - r >= exclusive) & ~dead
    even = (torch.maximum(r, 1 - r) <= shared) & ~dead & ~only_a & ~only_b
    return ModelDiff(only_a, only_b, even, ~(only_a | only_b | even | dead), dead)

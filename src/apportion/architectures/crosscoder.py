"""Crosscoders: one code for the activations of a token at several sites (layers, or the same layer of two models).

    z          = relu(sum_l W_enc^l x~^l + b_enc)       x~^l: site l, centred and scaled by itself
    x~_hat^l   = z W_dec^l + b_dec^l                    the same z for every site
    loss       = mean over l of ||x~^l - x~_hat^l||^2 / d, and the auxiliary loss on the error of all sites
    affinity   = z_j * sum_l ||W_dec_j^l||

(Anthropic, "Sparse Crosscoders for Cross-Layer Features and Model Diffing", October 2024.) Decoder rows have no fixed
norm, because the norms say at which sites a latent is at home; that is why matches compete by code times norm. Of the
two norms in use we take the sum over sites, which is the weight of a code in the original's L1 penalty, rather than the
norm of the joined row: it favours latents that several sites share, which is what a crosscoder is for. With one scale
per site every site counts the same in code and loss, however large its activations are. Initial weights: joined rows of
W_enc are random unit directions, those of W_dec the same with norm 0.1, so that an untrained crosscoder reconstructs
next to nothing, rather than noise as large as the activations.

Scales differ, so `folded` cannot have the codes of one site's units: codes, thresholds and affinities become 1 / s
times as large, s the geometric mean of the scales, and `site_scale` keeps each site's scale relative to s, so that
norms stay comparable between sites.

A cross-layer transcoder (each latent is read at one layer and written to the MLP outputs of that layer and all above)
is not here. The contract of rows and targets has a place for it: x [num_sites, d_in], target [num_sites, d_out], and
each latent belongs to one site. What it would take: one selection over several products, because `kernels.choose` scans
one x W_enc^T and a rule with densities or thresholds per latent cannot be asked about a part of the latents; and a
decoder of triangular shape, because a full one, [d_sae, num_sites, d_out], is half zeros.

To compare two models, say a base model and what became of it by fine-tuning, collect the same hookpoint of both from
the same text with the same tokenizer, and put the caches side by side:

    import apportion as ap
    from apportion.rows import ActivationStore, CacheSource, SitesStore
    from apportion.evals import evaluate_rows, held_out_rows, model_diff

    sites = SitesStore([ActivationStore("acts-base", "model.layers.8"), ActivationStore("acts-chat", "model.layers.8")])
    source = CacheSource(sites)
    sae = ap.create("crosscoder", d_in=sites.d_in, num_sites=2, d_sae=16_384, k=32)
    sae = ap.Trainer(sae, ap.TrainConfig(total_tokens=source.num_rows)).fit(source, "runs/diff")

    measured = evaluate_rows({"diff": sae}, sites, held_out_rows(sites, source.held_out_share))["diff"]
    diff = model_diff(sae, alive=measured.activations.counts > 0)
    diff.counts()                                   # latents that are only_a, only_b, shared, between, dead
    only_chat = diff.only_b.nonzero().squeeze(1)    # those that write to the second model alone

When to use it: to find out which features layers share, or what a model has that another one has not
(evals/model_diff.py). Needs the same tokens at every site.

Cost: that of a plain SAE as many times as there are sites, in parameters and in the product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from apportion.allocation import Rule
from apportion.architectures.auxiliary import AffineWithAuxiliary, AuxiliaryConfig

INITIAL_NORM = 0.1
"""Of the joined rows of W_dec."""


@dataclass(frozen=True, kw_only=True)
class CrosscoderConfig(AuxiliaryConfig):
    num_sites: int = 2
    """Sites that share one code; x is [..., num_sites, d_in]."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.num_sites, int) or self.num_sites < 2:
            raise ValueError(
                f"num_sites must be a whole number of at least 2, got {self.num_sites!r}. For one site use topk."
            )


@final
class Crosscoder(AffineWithAuxiliary):
    Config = CrosscoderConfig
    config: CrosscoderConfig  # type: ignore[assignment]
    row_kind = "sites"
    initial_norm = INITIAL_NORM
    site_scale: Tensor

    def __init__(self, config: CrosscoderConfig, allocation: Rule) -> None:
        super().__init__(config, allocation)
        self.register_buffer("site_scale", torch.ones(config.num_sites))

    @property
    def row_shape(self) -> tuple[int, ...]:
        return (self.config.num_sites, self.d_in)

    def unit_rows(self) -> list[torch.nn.Parameter]:
        return []

    def site_norms(self) -> Float[Tensor, "d_sae num_sites"]:
        """||W_dec_j^l||, on scaled data: how strongly latent j writes to site l. No gradients."""
        return self.W_dec.detach().norm(dim=2) * self.site_scale

    def decoder_norms(self) -> Float[Tensor, " d_sae"]:
        return self.site_norms().sum(1)

    def fold_in(self, mean: Float[Tensor, "num_sites d_in"], scale: Float[Tensor, " num_sites"]) -> None:
        typical = scale.log().mean().exp()
        relative = scale / typical
        self.site_scale.mul_(relative)
        self.W_enc.mul_(relative[:, None])
        self.W_dec.div_(relative[:, None])
        self.b_dec.div_(scale[:, None]).add_(mean)
        self.b_enc.div_(typical)
        if not self.config.subtract_b_dec:
            self.b_enc.sub_(self.W_enc.flatten(1) @ mean.flatten())
        self.allocation.rescale(1 / typical.item())

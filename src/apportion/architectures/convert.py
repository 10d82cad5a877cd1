"""A trained SAE in JumpReLU form, with the codes that it had. Llama Scope's post-processing, arXiv 2410.20526.

    z = a 1[affinity > theta]        ->        z = a 1[a > theta_j]        a = W_enc (x - b_dec) + b_enc

In JumpReLU form latents do not depend on each other, so that any subset can be evaluated alone, and other libraries
read it. Weights stay as they are and only thresholds are found:

    Mutual Choice, Feature Choice    those of their eval mode: codes are equal
    TopK                             one for all latents, which the k * tokens largest affinities of a sample exceed:
                                     tokens then differ in L0, and its mean is k

A TopK SAE so loses the codes of some tokens and gives others more latents than it has learned to use. L0 is kept, FVU
may rise: measure it. Multi-TopK has learned to use more.

Where affinity is code_times_decoder_norm, theta is found on affinities, and latent j gets theta / ||W_dec_j||. (Llama
Scope folds the norms into encoder and decoder instead; the matches are the same, the codes ||W_dec_j|| as large.)
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import fields

import torch
from jaxtyping import Float
from torch import Tensor

from apportion.allocation import LearnedThreshold, MutualChoice
from apportion.architectures.affine import Affine, AffineConfig
from apportion.architectures.base import SAE
from apportion.architectures.jumprelu import JumpReLU, JumpReLUConfig


@torch.no_grad()
def to_jumprelu(sae: SAE, xs: Float[Tensor, "*lead d_in"] | Iterable[Tensor] | None = None) -> JumpReLU:
    """A copy of `sae` in JumpReLU form, in eval mode, with equal weights and input description.

    `xs` are raw, filtered activations as for `calibrate`. TopK needs them; for the others None keeps the thresholds of
    `sae`. Raises ValueError for TopK without `xs`, for thresholds that were never calibrated, and for SAEs of another
    form.
    """
    rule = sae.allocation
    if not isinstance(sae, Affine) or sae.form != "affine" or sae.needs_target or not (rule.k and rule.eval_form):
        raise ValueError(
            f"to_jumprelu is for SAEs with one affine encoder, one decoder and a budget k (topk, mutual_choice, "
            f"feature_choice, multi_topk, matryoshka), got {sae.extra_repr()}."
        )
    source = deepcopy(sae).eval()
    if rule.eval_form == "topk":
        if xs is None:
            raise ValueError("A TopK SAE has no thresholds: call to_jumprelu(sae, xs) with some 100,000 activations.")
        by_threshold = MutualChoice(MutualChoice.Config(k=rule.k), source.d_sae)
        source.allocation = by_threshold.to(source.mean).eval()
    if xs is not None:
        source.calibrate(xs)
    return _with_thresholds(source, _thresholds(source))


def _thresholds(source: Affine) -> Float[Tensor, " d_sae"]:
    """What codes have to exceed in eval mode; positive and finite, for JumpReLU keeps their logarithm."""
    theta = source.allocation.in_force().threshold.expand(source.d_sae)
    if source.config.affinity == "code_times_decoder_norm":
        theta = theta / source.decoder_norms()
    info = torch.finfo(theta.dtype)
    return theta.clamp(2 * info.tiny, info.max / 2)


def _log_from_below(theta: Float[Tensor, " d_sae"]) -> Float[Tensor, " d_sae"]:
    """log theta, lowered by what log and exp may round: a threshold may lie only just below the smallest match."""
    rounding = 2 * (1 + theta.log().abs()) * torch.finfo(theta.dtype).eps
    return (theta * (1 - rounding)).log()


def _with_thresholds(source: Affine, theta: Float[Tensor, " d_sae"]) -> JumpReLU:
    shared = {f.name: getattr(source.config, f.name) for f in fields(AffineConfig)}
    init = getattr(source.config, "init", "random")
    config = JumpReLUConfig(**shared | {"affinity": "code", "k": source.k, "init": init})
    sae = JumpReLU(config, LearnedThreshold(LearnedThreshold.Config(), source.d_sae))
    sae.name = "jumprelu"
    sae.to(source.device, source.dtype)
    for part in ("W_enc", "b_enc", "W_dec", "b_dec"):
        getattr(sae, part).copy_(getattr(source, part))
    sae.input.load_state_dict(source.input.state_dict())
    sae.log_threshold.copy_(_log_from_below(theta))
    sae.info = deepcopy(source.info) | {"converted_from": {"sae": source.name, "settings": source.settings()}}
    return sae.eval()

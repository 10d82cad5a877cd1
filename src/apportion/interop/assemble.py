"""Parts into one of our SAEs, and one of ours into Parts.

Both go by the equations of parts.py: in eval mode the SAE that is made has the codes and reconstructions of the parts,
and the parts that are made those of the SAE, in raw units (`folded`). The way out, with one affine encoder and decoder:

    rule                                  kind
    TopK                                  topk
    Mutual Choice, Feature Choice         jumprelu, with the thresholds of eval mode: only once calibrated
    Threshold, learned thresholds         jumprelu; relu where they are all zero
    others                                none

Where affinity is code_times_decoder_norm, latent j has the threshold theta / ||W_dec_j||. TopK cannot be told so in
other formats: there the norms go into the encoder, and codes become ||W_dec_j|| as large.
"""

from __future__ import annotations

from copy import deepcopy
from functools import reduce
from math import inf
from numbers import Real
from typing import Any, TypeGuard

import torch
from jaxtyping import Float
from torch import Tensor

from apportion.about import About
from apportion.allocation import LearnedThreshold, Rule
from apportion.architectures import SAE, rebuild
from apportion.architectures.affine import Affine, blank_weights
from apportion.architectures.inputs import PER_TOKEN
from apportion.architectures.transcoder import Transcoder
from apportion.disk import all_finite
from apportion.interop.parts import Parts

TINY = 1e-30
"""Thresholds that are not positive cut nothing; their logarithm is that of this number."""
WEIGHTS = ("W_enc", "W_dec", "b_enc", "b_dec")


def assemble(parts: Parts, dtype: torch.dtype | None = None) -> SAE:
    """The SAE of ours that computes what `parts` say, in eval mode; it takes over their tensors.

    Its weights are of `dtype`, or else of that of the file.
    """
    settings = {
        "d_in": parts.W_enc.shape[1],
        "d_sae": parts.W_enc.shape[0],
        "input_norm": parts.input_norm,
        "hookpoint": parts.hookpoint,
        **_rule(parts),
    }
    if not parts.transcoder:
        settings["subtract_b_dec"] = parts.subtract_b_dec
    if parts.by_norm:
        settings["affinity"] = "code_times_decoder_norm"
    with blank_weights():
        sae = rebuild(_name(parts), **settings)
    names = (*WEIGHTS, "W_skip") if parts.W_skip is not None else WEIGHTS
    weights = {name: getattr(parts, name) for name in names} | parts.router
    if parts.kind == "gated":
        weights |= {"b_enc": parts.gate["b_gate"], "r_mag": parts.gate["r_mag"], "b_mag": parts.gate["b_mag"]}
    dtype = dtype or parts.dtype or reduce(torch.promote_types, (w.dtype for w in weights.values()))
    for name, tensor in weights.items():
        _put(sae, name, tensor, dtype)
    sae.to(dtype)
    _set_threshold(sae.allocation, parts)
    sae.info = deepcopy(parts.info)
    if parts.source != About():
        sae.source = parts.source
    return sae.eval()


def _name(parts: Parts) -> str:
    if parts.transcoder:
        return "transcoder" if parts.W_skip is None else "skip_transcoder"
    if parts.every_layer:
        return "mlsae"
    return "mutual_choice" if parts.kind == "batch_topk" else parts.kind


def _rule(parts: Parts) -> dict[str, Any]:
    """The settings that say which matches are kept."""
    if parts.kind == "batch_topk":
        rule: dict[str, Any] = {"k": _k(parts)}
    elif parts.kind in ("topk", "switch"):
        rule = {"k": _whole(_k(parts))}
    elif parts.transcoder:
        rule = {}
    else:  # a target for training on; nothing now depends on it
        rule = {"k": min(_k(parts), len(parts.W_enc)) if is_count(parts.k) else None}
    if parts.kind == "switch":
        rule["num_experts"] = len(parts.router["W_router"])
    if parts.transcoder:
        if parts.kind not in ALLOCATIONS:
            raise ValueError(
                f"A transcoder of kind {parts.kind} has no counterpart here; there is one of: {', '.join(ALLOCATIONS)}."
            )
        rule |= {"allocation": ALLOCATIONS[parts.kind], "d_out": parts.W_dec.shape[1]}
        rule |= {"skip": parts.W_skip is not None, "target_hookpoint": parts.target_hookpoint}
        if parts.kind == "jumprelu":
            rule["per_latent"] = True
    elif parts.W_skip is not None:
        raise ValueError("Only transcoders have a skip here.")
    return rule


ALLOCATIONS = {"relu": "threshold", "jumprelu": "threshold", "topk": "topk", "batch_topk": "mutual_choice"}
"""Of transcoders."""


def _k(parts: Parts) -> float:
    if not is_count(parts.k):
        raise ValueError(
            f"How many latents a token has is not known (k = {parts.k!r}). Say it: load(..., config={{'k': 32}})."
        )
    return int(parts.k) if parts.k == int(parts.k) else float(parts.k)


def is_count(k: object) -> TypeGuard[float]:
    """Could it be a number of active latents? Numbers of numpy are numbers."""
    return isinstance(k, Real) and not isinstance(k, bool) and 0 < float(k) < inf


def _whole(k: float) -> int:
    if k != int(k):
        raise ValueError(f"A TopK checkpoint needs a whole number of active latents, got k = {k}.")
    return int(k)


def _put(sae: SAE, name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """The tensor itself, in that dtype, becomes the parameter, so that big weights are not copied."""
    parameter, cast = sae.get_parameter(name), tensor.to(dtype)
    if dtype == torch.float16 and not all_finite(cast):
        raise ValueError(f"{name} has numbers that float16 does not hold: load(..., dtype=torch.float32).")
    if parameter.shape != tensor.shape:
        raise ValueError(f"{name} has shape {list(tensor.shape)}, {list(parameter.shape)} is needed.")
    parameter.data = cast.contiguous()


@torch.no_grad()
def _set_threshold(rule: Rule, parts: Parts) -> None:
    if parts.threshold is None:
        return
    if isinstance(rule, LearnedThreshold):
        rule.log_threshold.copy_(parts.threshold.clamp_min(TINY).log())
    else:
        rule.threshold.copy_(parts.threshold)


@torch.no_grad()
def take_apart(sae: SAE) -> Parts:
    """What `sae` computes in eval mode, as Parts in raw units on the CPU. ValueError if no Parts can say it."""
    if sae.form is None:
        raise ValueError(f"No other library's format holds a {sae.name}; save it in ours with sae.save.")
    folded = (deepcopy(sae) if sae.input.kind in PER_TOKEN else sae.folded()).cpu().eval()
    assert isinstance(folded, Affine)
    if folded.needs_target and folded.input.kind in PER_TOKEN:
        if folded.decode_needs_x:
            raise ValueError(
                f"The skip of this SAE reads normalised tokens ({folded.input.kind}); no other format can. "
                "Save it in ours with sae.save."
            )
        folded.fold_in(folded.mean, folded.scale)  # 0 and 1: only the output's description is folded
    parts = _parts(folded)
    parts.hookpoint, parts.source, parts.info = sae.hookpoint, sae.source, deepcopy(sae.info)
    if isinstance(sae, Transcoder):
        parts.target_hookpoint = sae.target_hookpoint
    return parts


def _parts(folded: Affine) -> Parts:
    weights: dict[str, Any] = {name: p.detach() for name, p in folded.named_parameters()}
    parts = Parts(
        kind="relu",
        **{name: weights[name] for name in WEIGHTS},
        subtract_b_dec=folded.config.subtract_b_dec,
        k=folded.k,
        input_norm=folded.config.input_norm,
    )
    if folded.form == "gated":
        parts.kind, parts.b_enc = "gated", torch.zeros_like(parts.b_enc)
        b_gate = weights["b_enc"] - _thresholds(folded)
        parts.gate = {"b_gate": b_gate, "r_mag": weights["r_mag"], "b_mag": weights["b_mag"]}
        return parts
    if folded.needs_target:
        parts.transcoder, parts.W_skip = True, weights.get("W_skip")
    rule = folded.allocation
    if rule.eval_form == "topk":
        parts.kind, parts.k = "topk", rule.row_limit
        if folded.config.affinity == "code_times_decoder_norm":
            norms = folded.decoder_norms()
            parts.W_enc.mul_(norms[:, None])
            parts.b_enc.mul_(norms)
            parts.W_dec.div_(norms.clamp_min(TINY)[:, None])
    else:
        theta = _thresholds(folded)
        if bool((theta != 0).any()):
            parts.kind, parts.threshold = "jumprelu", theta
    if folded.form == "switch":
        if parts.kind != "topk":
            raise ValueError(
                "Of Switch SAEs other formats hold those with the rule topk only, "
                f"and this one has {folded.allocation_name}; save it in ours with sae.save."
            )
        parts.kind, parts.router = "switch", {name: weights[name] for name in ("W_router", "b_router")}
    return parts


def _thresholds(folded: Affine) -> Float[Tensor, " d_sae"]:
    """What codes have to exceed in eval mode; finite, for other libraries refuse what is not."""
    if folded.allocation.eval_form != "threshold":
        rule = type(folded.allocation).__name__
        raise ValueError(f"No other library's format holds the rule {rule}; save it in ours with sae.save.")
    theta = folded.allocation.in_force().threshold.expand(folded.d_sae)
    if folded.config.affinity == "code_times_decoder_norm":
        norms = folded.decoder_norms()
        theta = torch.where(norms > 0, theta / norms, torch.inf)
    return theta.clamp(0, torch.finfo(theta.dtype).max / 2).clone()

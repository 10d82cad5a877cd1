"""llamascopium (OpenMOSS, once lm-saes): config.json and sae_weights.safetensors or sae_weights.pt, of sae_type "sae".

    a     = f_in W_E x + b_E                                    nothing is subtracted from x
    h     = a ||W_D||, if sparsity_include_decoder_norm, else a
    z     = a where h > 0 (relu), h > theta (jumprelu), or h is among the k largest (topk, batchtopk) and h > 0
    y_hat = (z W_D + b_D) / f_out

W_E is [d_model, d_sae], W_D [d_sae, d_model]. With norm_activation "dataset-wise" f = sqrt(d_model) / (mean norm of the
activations), from dataset_average_activation_norm.{hook}; with "inference" f = 1, and with "token-wise" f_in = f_out =
sqrt(d_model) / ||x||. theta is per latent, stored as its logarithm. Codes are those of the library's `encode`, which
takes normalised activations. If hook_point_in is not hook_point_out, it is a transcoder.

Crosscoders, cross-layer transcoders, Lorsas and MOLTs (other sae_types), GLU encoders, batch-wise normalisation and
.dcp checkpoints are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite, sqrt
from pathlib import Path
from typing import Any

from torch import Tensor

from apportion.architectures.inputs import InputNorm
from apportion.disk import read_json
from apportion.interop.folding import SMALLEST_NORM
from apportion.interop.hook_names import origin
from apportion.interop.parts import Kind, Parts
from apportion.interop.peek import beside, first_file, settings_in
from apportion.interop.reading import Tensors, file_in, read_pt, read_safetensors, tensor_dict

FILES = ("sae_weights.safetensors", "sae_weights.pt", "checkpoints/final.safetensors", "checkpoints/final.pt")
KINDS: dict[str, Kind] = {"relu": "relu", "jumprelu": "jumprelu", "topk": "topk", "batchtopk": "batch_topk"}
LOG_THRESHOLD = "activation_function.log_jumprelu_threshold"
NORM = "dataset_average_activation_norm."


def recognises(path: Path) -> bool:
    settings = settings_in(beside(path, "config.json"))
    return "sae_type" in settings and "d_model" in settings


def read(path: Path, config: dict[str, Any], trust: bool) -> Parts:
    settings = read_json(file_in(path if path.is_dir() else path.parent, "config.json"))
    if settings.get("sae_type") != "sae":
        raise ValueError(f"{path}: a {settings.get('sae_type')!r} has no counterpart here; of llamascopium, 'sae' has.")
    file = path if path.is_file() else first_file(path, FILES)
    if file is None or file.suffix not in (".safetensors", ".pt"):
        raise ValueError(f"{path} has neither of {', '.join(FILES)}; save .dcp checkpoints as one of these first.")
    content = read_safetensors(file) if file.suffix == ".safetensors" else read_pt(file, trust)
    if isinstance(content, Mapping) and "sae" in content:
        content = content["sae"]
    return parts_of(settings, tensor_dict(content, file), file, config)


def parts_of(settings: dict[str, Any], stored: dict[str, Tensor], file: Path, config: dict[str, Any]) -> Parts:
    """Parts from a configuration and tensors under the names of today."""
    act_fn = check(settings, file)
    norms = {name.removeprefix(NORM): stored.pop(name) for name in list(stored) if name.startswith(NORM)}
    d_model, factor = settings.get("d_model"), settings.get("expansion_factor")
    d_sae = int(d_model * factor) if isinstance(d_model, int) and isinstance(factor, int | float) else None
    tensors = Tensors(stored, file, d_in=d_model, d_sae=d_sae)
    kind = KINDS[act_fn]
    parts = Parts(
        kind=kind,
        **tensors.weights("W_E.T", "W_D", "b_E", "b_D" if settings.get("use_decoder_bias", True) else None),
        subtract_b_dec=bool(settings.get("apply_decoder_bias_to_pre_encoder")),
        k=config.pop("k", settings.get("top_k")) if "topk" in act_fn else None,
        threshold=tensors.take(LOG_THRESHOLD, "d_sae").exp() if kind == "jumprelu" else None,
    )
    parts.dtype = tensors.finish()
    if settings.get("sparsity_include_decoder_norm", True):
        if parts.threshold is not None:
            parts.threshold = parts.threshold / parts.W_dec.norm(dim=1).clamp_min(SMALLEST_NORM)
        parts.by_norm = "topk" in act_fn
    describe(parts, settings)
    parts.input_norm, f_in, f_out = scales(parts, settings, _mean_norms(settings, norms), file, config)
    parts.W_enc.mul_(f_in)
    parts.W_dec.div_(f_out)
    parts.b_dec.div_(f_out)
    return parts


def check(settings: dict[str, Any], file: Path) -> str:
    """The activation function; ValueError for what has no counterpart here."""
    act_fn = str(settings.get("act_fn", "relu")).lower()
    if act_fn not in KINDS:
        raise ValueError(f"{file}: act_fn = {act_fn!r} has no counterpart here; {', '.join(KINDS)} have.")
    if settings.get("use_glu_encoder"):
        raise ValueError(f"{file} has a GLU encoder, for which there is no counterpart here.")
    if settings.get("apply_decoder_bias_to_pre_encoder") and is_transcoder(settings):
        raise ValueError(f"{file} is a transcoder that subtracts its output's bias from its input; there is none here.")
    return act_fn


def is_transcoder(settings: dict[str, Any]) -> bool:
    return settings.get("hook_point_out") not in (None, settings.get("hook_point_in"))


def _mean_norms(settings: dict[str, Any], norms: Mapping[str, Tensor]) -> dict[str, float]:
    """Mean norms of activations, "in" and "out", from those by hook."""
    into = str(settings.get("hook_point_in"))
    places = {"in": into, "out": str(settings.get("hook_point_out", into))}
    return {side: norms[hook].float().item() for side, hook in places.items() if hook in norms}


def scales(
    parts: Parts, settings: dict[str, Any], mean_norms: Mapping[str, Any], file: Path, config: dict[str, Any]
) -> tuple[InputNorm, float, float]:
    """What tokens are normalised by singly, and what inputs and outputs are multiplied by otherwise: f_in, f_out.

    `config={"norm_scaling_factor": f}` gives both where the file has no norms.
    """
    how, d_in = settings.get("norm_activation", "dataset-wise"), parts.W_enc.shape[1]
    if how == "inference":
        return "none", 1.0, 1.0
    if how == "token-wise" and not is_transcoder(settings):
        return "token_norm", 1.0, 1.0
    if how != "dataset-wise":
        raise ValueError(f"{file}: norm_activation = {how!r} of such an SAE depends on more than its input; refused.")
    given = config.pop("norm_scaling_factor", None)
    if given is not None:
        found = [given, given]
    else:
        into = mean_norms.get("in")
        out = mean_norms.get("out", None if is_transcoder(settings) else into)
        if into is None or out is None:
            raise ValueError(
                f"{file}: activations were scaled while training, and the file does not say by how much. Give "
                f'sqrt({d_in}) / (their mean norm): load(..., config={{"norm_scaling_factor": 8.2}}).'
            )
        found = [sqrt(d_in) / norm if _positive(norm) else norm for norm in (into, out)]
    if not all(_positive(f) for f in found):
        raise ValueError(f"{file}: norms and scales of activations must be positive numbers, got {found}.")
    return "none", float(found[0]), float(found[1])


def _positive(value: object) -> bool:
    return isinstance(value, int | float) and isfinite(value) and value > 0


def describe(parts: Parts, settings: dict[str, Any], model: object = None) -> None:
    parts.transcoder = is_transcoder(settings)
    parts.hookpoint, parts.source = origin(model, settings.get("hook_point_in"))
    if parts.transcoder:
        parts.target_hookpoint, _ = origin(model, settings.get("hook_point_out"))
    parts.info = {"original": settings}

"""Llama Scope (fnlp): hyperparams.json and checkpoints/final.safetensors, and the later release for R1-Distill.

Tensors are encoder.weight [d_sae, d_model], decoder.weight [d_model, d_sae] and biases. What SAE they mean comes out of
the authors' own transform, with f = sqrt(d_model) / dataset_average_activation_norm at the input and the output:

    b_enc / f_in,   b_dec / f_out,   W_dec f_in / f_out                 so that it takes and returns raw activations
    W_enc n, b_enc n, W_dec / n  with n = ||W_dec||                     if sparsity_include_decoder_norm
    z = relu(a) where a = W_enc x + b_enc > jump_relu_threshold         one number for all latents, in raw units

Nothing is subtracted from x unless apply_decoder_bias_to_pre_encoder. SAELens's codes are f_in times as large, and
without n. The release for R1-Distill (config.json, sae_weights.safetensors with log_jumprelu_threshold) has what
llamascopium.py computes, under these names of tensors; its codes are those of normalised activations.
"""

from __future__ import annotations

from math import isfinite
from pathlib import Path
from typing import Any

from apportion.disk import read_json
from apportion.interop import llamascopium
from apportion.interop.folding import fold_norms
from apportion.interop.parts import Parts
from apportion.interop.peek import first_file, names_in, settings_in
from apportion.interop.reading import Tensors, file_in, read_safetensors

WEIGHTS = {"encoder.weight", "encoder.bias", "decoder.weight"}
MODEL = "meta-llama/Llama-3.1-8B"
TODAY = {"encoder.bias": "b_E", "decoder.bias": "b_D", "log_jumprelu_threshold": llamascopium.LOG_THRESHOLD}
"""Names of tensors in the release for R1-Distill, and in llamascopium."""


def recognises(path: Path) -> bool:
    folder = _folder(path)
    if (folder / "hyperparams.json").is_file():
        return names_in(first_file(path, ["checkpoints/final.safetensors", "final.safetensors"])) >= WEIGHTS
    stored = names_in(first_file(path, ["sae_weights.safetensors"]))
    return stored >= WEIGHTS and "d_model" in settings_in(folder / "config.json")


def read(path: Path, config: dict[str, Any], trust: bool) -> Parts:
    folder = _folder(path)
    if not (folder / "hyperparams.json").is_file():
        return _read_distilled(folder, config)
    settings = read_json(folder / "hyperparams.json")
    file = path if path.is_file() else file_in(folder, "checkpoints/final.safetensors")
    act_fn = llamascopium.check(settings, file)
    tensors = Tensors(read_safetensors(file), file, d_in=settings.get("d_model"), d_sae=settings.get("d_sae"))
    W_dec = tensors.take("decoder.weight", "d_in", "d_sae").T.contiguous()
    has_bias = settings.get("use_decoder_bias", True)
    parts = Parts(
        kind=llamascopium.KINDS[act_fn],
        W_enc=tensors.take("encoder.weight", "d_sae", "d_in"),
        W_dec=W_dec,
        b_enc=tensors.take("encoder.bias", "d_sae"),
        b_dec=tensors.take("decoder.bias", "d_in") if has_bias else W_dec.new_zeros(len(W_dec[0])),
        subtract_b_dec=bool(settings.get("apply_decoder_bias_to_pre_encoder")),
        k=config.pop("k", settings.get("top_k")) if "topk" in act_fn else None,
    )
    parts.dtype = tensors.finish()
    mean_norms = settings.get("dataset_average_activation_norm") or {}
    parts.input_norm, f_in, f_out = llamascopium.scales(parts, settings, mean_norms, file, config)
    parts.b_enc.div_(f_in)
    parts.b_dec.div_(f_out)
    parts.W_dec.mul_(f_in / f_out)
    if settings.get("sparsity_include_decoder_norm", True):
        fold_norms(parts)
    if parts.kind == "jumprelu":
        parts.threshold = parts.b_enc.new_full(parts.b_enc.shape, _threshold(settings, file))
    model = settings_in(folder / "lm_config.json").get("model_name")
    llamascopium.describe(parts, settings, model or (MODEL if "Llama3_1-8B" in folder.resolve().as_posix() else None))
    return parts


def _folder(path: Path) -> Path:
    folder = path if path.is_dir() else path.parent
    return folder.parent if folder.name == "checkpoints" else folder


def _threshold(settings: dict[str, Any], file: Path) -> float:
    theta = settings.get("jump_relu_threshold")
    if not isinstance(theta, int | float) or not isfinite(theta):
        raise ValueError(f"{file}: jump_relu_threshold in hyperparams.json must be a number, got {theta!r}.")
    return theta


def _read_distilled(folder: Path, config: dict[str, Any]) -> Parts:
    settings, file = read_json(file_in(folder, "config.json")), file_in(folder, "sae_weights.safetensors")
    stored = {TODAY.get(name, name): tensor for name, tensor in read_safetensors(file).items()}
    for theirs, today in (("encoder.weight", "W_E"), ("decoder.weight", "W_D")):
        if theirs in stored and stored[theirs].ndim == 2:
            stored[today] = stored.pop(theirs).T
    return llamascopium.parts_of(settings, stored, file, config)

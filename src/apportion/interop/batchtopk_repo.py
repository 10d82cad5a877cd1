"""The BatchTopK repository (arXiv 2412.06410) and its successor for Matryoshka SAEs: sae.pt, and config.json beside it.

    x'         = (x - mean x) / (std x + 1e-5), each token on its own, if input_unit_norm; else x
    vanilla    z = relu(W_enc (x' - b_dec) + b_enc)
    topk       z = relu(W_enc (x' - b_dec)) on the k largest of each token; the stored b_enc is not used
    batchtopk  the same on the k * tokens largest of a batch. There are no thresholds: calibrate before eval mode
    batch-topk, global-matryoshka-topk: the same, and `threshold`, a running mean, is what codes exceed in eval mode
    jumprelu   z = relu(a) where a = W_enc x' + b_enc > exp(jumprelu.log_threshold); b_dec is not subtracted
    batchtopkjumprelu: the same with b_dec subtracted, as a batchtopk with thresholds that were found later computes
    x_hat      = z W_dec + b_dec, and the normalisation undone

W_enc is [d_in, d_sae], W_dec [d_sae, d_in]. sae_type says which; capitals, hyphens and underscores in it make no
difference. What decides between the two batchtopks is whether `threshold` is there. The groups of a Matryoshka SAE
matter in training only, and d_sae is their sum, whatever dict_size says.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from apportion.disk import read_json
from apportion.interop.centring import warn_of_processing
from apportion.interop.hook_names import origin
from apportion.interop.parts import Kind, Parts
from apportion.interop.peek import beside, first_file, names_in, settings_in
from apportion.interop.reading import Tensors, only_file, read_pt, tensor_dict

KINDS: dict[str, Kind] = {
    "vanilla": "relu",
    "topk": "topk",
    "batchtopk": "batch_topk",
    "globalmatryoshkatopk": "batch_topk",
    "jumprelu": "jumprelu",
    "batchtopkjumprelu": "jumprelu",
}
EARLY = {"use_encoder_bias": False, "tied_weights": False, "activation": "relu"}
"""Settings of early versions of the repository, with the values that became the rule."""


def recognises(path: Path) -> bool:
    file = first_file(path, ["sae.pt", "*.pt"])
    if file is None or not {"act_size", "dict_size"} <= settings_in(beside(file, "config.json")).keys():
        return False
    return {"W_enc", "W_dec", "b_enc", "b_dec"} <= names_in(file)


def read(path: Path, config: dict[str, Any], trust: bool) -> Parts:
    file = path / "sae.pt" if (path / "sae.pt").is_file() else only_file(path, "*.pt")
    settings = read_json(described) if (described := beside(file, "config.json")).is_file() else {}
    settings |= {name: config.pop(name) for name in ("sae_type", "k", "input_unit_norm") if name in config}
    sae_type = _sae_type(settings, described)
    kind, grouped = KINDS[sae_type], "matryoshka" in sae_type
    sizes = {"d_in": settings.get("act_size"), "d_sae": None if grouped else settings.get("dict_size")}
    tensors = Tensors(tensor_dict(read_pt(file, trust), file), file, **sizes)
    parts = Parts(
        kind=kind,
        **tensors.weights("W_enc.T", "W_dec", "b_enc", "b_dec"),
        subtract_b_dec=sae_type != "jumprelu",
        input_norm="token_standardise" if settings.get("input_unit_norm") else "none",
    )
    if kind in ("topk", "batch_topk"):
        parts.k = settings.get("k", settings.get("top_k"))
        parts.b_enc.zero_()
        if "threshold" in tensors and (theta := tensors.number("threshold")) > 0:
            parts.threshold = parts.b_enc.new_tensor(theta)
    elif kind == "jumprelu":
        parts.threshold = tensors.take("jumprelu.log_threshold", "d_sae").exp()
    parts.dtype = tensors.finish()
    model, hook = settings.get("model_name"), settings.get("hook_point")
    if "threshold" not in tensors.names:  # the successor loads models without processing
        warn_of_processing(parts, model, hook, file)
    parts.hookpoint, parts.source = origin(model, hook)
    parts.info = {"original": settings}
    return parts


def _sae_type(settings: dict[str, Any], described: Path) -> str:
    said = settings.get("sae_type")
    sae_type = str(said).lower().replace("-", "").replace("_", "")
    if sae_type not in KINDS:
        raise ValueError(f"{described}: sae_type = {said!r} is unknown; known are {', '.join(KINDS)}.")
    for name, usual in EARLY.items():
        if settings.get(name, usual) != usual:
            raise ValueError(f"{described}: {name} = {settings[name]!r} of an early version is not supported.")
    return sae_type

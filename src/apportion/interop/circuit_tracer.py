"""circuit-tracer: a transcoder for each layer, layer_N.safetensors, and config.yaml for all of them.

    z     = relu(a)                    a = W_enc x + b_enc; nothing is subtracted from x
            a where a > threshold      if the file has activation_function.threshold, one per latent
            the k largest a            if config.yaml says `activation: topk` (or the file has k)
    y_hat = z W_dec + b_dec (+ W_skip x)

W_enc and W_dec are [d_sae, d], W_skip [d, d]. config.yaml names the model and what is read and written in a block:
feature_input_hook (mlp.hook_in, hook_resid_mid), feature_output_hook (mlp.hook_out, hook_mlp_out). circuit-tracer runs
models without folding or centring anything. It keeps the k largest a even where they are negative; here such codes are
0, as in any SAE, which makes a difference only for tokens with fewer than k positive ones.

A folder usually holds all layers of a model; one of them has to be named. Cross-layer transcoders (W_enc_N.safetensors,
W_dec_N.safetensors) write to several layers and are refused.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from apportion.interop.hook_names import origin
from apportion.interop.parts import Parts
from apportion.interop.peek import beside, first_file, names_in, yaml_in
from apportion.interop.reading import Tensors, cross_layer, read_safetensors

FILE = re.compile(r"layer_(\d+)\.safetensors")
FILES = ("layer_*.safetensors", "W_enc_*.safetensors", "W_dec_*.safetensors")
WEIGHTS = {"W_enc", "W_dec", "b_enc", "b_dec"}
THRESHOLDS = ("activation_function.threshold", "threshold")


def recognises(path: Path) -> bool:
    file = first_file(path, FILES)
    return file is not None and (_is_cross_layer(file) or names_in(file) >= WEIGHTS)


def read(path: Path, config: dict[str, Any], trust: bool) -> Parts:
    file = _one_layer(path)
    settings = yaml_in(beside(file, "config.yaml"))
    if _is_cross_layer(file) or settings.get("model_kind") == "cross_layer_transcoder":
        raise cross_layer(file)
    tensors = Tensors(read_safetensors(file), file)
    skip = "W_skip" in tensors
    parts = Parts(
        kind="relu",
        **tensors.weights("W_enc", "W_dec", "b_enc", "b_dec", d_out="d_out"),
        subtract_b_dec=False,
        transcoder=True,
        W_skip=tensors.take("W_skip", "d_out", "d_in") if skip else None,
    )
    _set_activation(parts, tensors, settings, config)
    parts.dtype = tensors.finish()
    _describe(parts, file, settings)
    return parts


def _one_layer(path: Path) -> Path:
    """The file of one layer. ValueError, naming them, if a folder has several."""
    if path.is_file():
        return path
    files = sorted((f for p in FILES for f in path.glob(p) if f.is_file()), key=lambda f: (len(f.name), f.name))
    if not files:
        raise ValueError(f"{path} has no layer_N.safetensors.")
    if len(files) > 1 and not _is_cross_layer(files[0]):
        names = ", ".join(file.name for file in files[:4]) + (", ..." if len(files) > 4 else "")
        raise ValueError(
            f"{path} has transcoders of {len(files)} layers: {names}. Name one: load(..., subfolder={files[0].name!r})."
        )
    return files[0]


def _is_cross_layer(file: Path) -> bool:
    return re.fullmatch(r"W_(enc|dec)_\d+\.safetensors", file.name) is not None


def _set_activation(parts: Parts, tensors: Tensors, settings: dict[str, str], config: dict[str, Any]) -> None:
    said = config.pop("activation", settings.get("activation"))
    stored = int(tensors.number("k")) if "k" in tensors else None
    if said not in (None, "relu", "topk", "jump_relu", "jumprelu"):
        raise ValueError(
            f"{tensors.file}: the activation {said!r} has no counterpart here; relu, topk and jumprelu have."
        )
    for name in THRESHOLDS:
        if name in tensors:
            parts.kind, parts.threshold = "jumprelu", tensors.take(name, "d_sae")
    if said == "topk" or stored is not None:
        k = settings.get("k", "")
        parts.kind, parts.k = "topk", config.pop("k", stored or (int(k) if k.isdecimal() else None))
        parts.threshold = None


def _describe(parts: Parts, file: Path, settings: dict[str, str]) -> None:
    """The layer is in the name of the file, everything else in config.yaml."""
    layer, model = FILE.fullmatch(file.name), settings.get("model_name")
    places = {}
    for side in ("output", "input"):
        within = settings.get(f"feature_{side}_hook")
        places[side], parts.source = origin(model, f"blocks.{layer[1]}.{within}" if layer and within else None)
    parts.hookpoint, parts.target_hookpoint = places["input"], places["output"]
    parts.info = {"original": dict(settings)}

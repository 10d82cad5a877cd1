"""Gemma Scope (params.npz) and Gemma Scope 2 (params.safetensors, with config.json): JumpReLU SAEs and transcoders.

    z     = relu(a) where a = W_enc x + b_enc > threshold             nothing is subtracted from x
    y_hat = z W_dec + b_dec (+ W_skip x)                              in raw units: all scales are folded in

W_enc is [d_in, d_sae], W_dec [d_sae, d_out], affine_skip_connection [d_in, d_out]; Gemma Scope 2 has small letters.
A transcoder of Gemma Scope has the same arrays as an SAE: it is told by the name of its repository in the path, or by
config={"transcoder": True}; so are model, layer and place. SAEs of embeddings are read as they are stored (SAELens
divides W_enc by sqrt(d_in) and multiplies W_dec by it, for TransformerLens scales embeddings). Cross-layer transcoders,
whose w_dec writes to several layers, are refused.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from apportion.disk import read_json, write_json, write_tensors
from apportion.interop.folding import fold_b_dec
from apportion.interop.hook_names import about_model, origin
from apportion.interop.parts import Parts
from apportion.interop.peek import beside, first_file, names_in
from apportion.interop.reading import Tensors, cross_layer, read_npz, read_safetensors
from apportion.interop.writing import carried, check_fits, model_of, over, stored

FILES = ("params.npz", "params.safetensors", "*.npz", "*.safetensors")
ARRAYS = {"w_enc", "w_dec", "b_enc", "b_dec", "threshold"}
PLACES = {
    "res": ("hook_resid_post", None),
    "mlp": ("hook_mlp_out", None),
    "att": ("attn.hook_z", None),
    "transcoders": ("ln2.hook_normalized", "hook_mlp_out"),
}
"""What the repositories of Gemma Scope are called after, and TransformerLens's names of input and output."""
SIDES = {".output": "", ".input": ":in"}
"""Sides of a module in the configurations of Gemma Scope 2, and ours."""


def recognises(path: Path) -> bool:
    names = names_in(file := first_file(path, FILES))
    return ({name.lower() for name in names} if file is not None and file.suffix == ".npz" else names) >= ARRAYS


def read(path: Path, config: dict[str, Any], trust: bool) -> Parts:
    file = first_file(path, FILES)
    if file is None:
        raise ValueError(f"{path} has no params.npz and no params.safetensors.")
    settings = read_json(described) if (described := beside(file, "config.json")).is_file() else {}
    if re.fullmatch(r"layer_\d+", file.stem) or settings.get("type") == "clt":
        raise cross_layer(file)
    if settings.get("architecture", "jump_relu") != "jump_relu":
        raise ValueError(f"{described}: the architecture {settings['architecture']!r} is unknown; jump_relu is known.")
    stored = read_npz(file) if file.suffix == ".npz" else read_safetensors(file)
    width = settings.get("width")
    tensors = Tensors({n.lower(): t for n, t in stored.items()}, file, d_sae=width if isinstance(width, int) else None)
    if "w_dec" in tensors and tensors.left["w_dec"].ndim == 3:
        raise cross_layer(file)
    parts = _parts(tensors, bool(config.pop("transcoder", _is_transcoder(file, settings))))
    if settings.get("affine_connection") and parts.W_skip is None:
        raise ValueError(f"{file}: affine_skip_connection is missing, and {described} says that there is one.")
    _describe(parts, file, settings)
    return parts


def _parts(tensors: Tensors, transcoder: bool) -> Parts:
    skip = "affine_skip_connection" in tensors
    d_out = "d_out" if transcoder or skip else "d_in"
    if "scaling_factor" in tensors and bool((tensors.take("scaling_factor", "d_sae") != 1).any()):
        raise ValueError(f"{tensors.file}: scaling_factor is not 1, and nothing says how it is used.")
    return Parts(
        kind="jumprelu",
        **tensors.weights("w_enc.T", "w_dec", "b_enc", "b_dec", d_out=d_out),
        threshold=tensors.take("threshold", "d_sae"),
        subtract_b_dec=False,
        transcoder=transcoder or skip,
        W_skip=tensors.take("affine_skip_connection", "d_in", d_out).T.contiguous() if skip else None,
        dtype=tensors.finish(),
    )


def _is_transcoder(file: Path, settings: dict[str, Any]) -> bool:
    into, out = settings.get("hf_hook_point_in"), settings.get("hf_hook_point_out")
    named = re.search(r"gemma-scope-[\w-]+-transcoders|transcoder(_all)?/layer_\d", file.as_posix())
    return named is not None or settings.get("type") == "transcoder" or out not in (None, into)


def _describe(parts: Parts, file: Path, settings: dict[str, Any]) -> None:
    """Where it comes from: Gemma Scope 2 says so in config.json, Gemma Scope in the path."""
    place = file.as_posix()
    named = re.search(r"average_l0_(\d+)", place)
    l0 = float(named[1]) if named else settings.get("l0")
    parts.k = l0 if isinstance(l0, int | float) and l0 > 0 else None
    parts.info = {"original": settings}
    if settings:
        parts.hookpoint = _module(settings.get("hf_hook_point_in"))
        parts.target_hookpoint = _module(settings.get("hf_hook_point_out")) if parts.transcoder else None
        if isinstance(model := settings.get("model_name"), str):
            model = model.removeprefix("google/").replace("gemma-v3-", "gemma-3-")
            parts.source = about_model(f"google/{model}")
        return
    of, layer = re.search(r"gemma-scope-(\d+b)-(pt|it)-(\w+)", place), re.search(r"/layer_(\d+)/", place)
    if of and layer and of[3] in PLACES:
        model = f"gemma-2-{of[1]}{'-it' if of[2] == 'it' else ''}"
        into, out = (name and f"blocks.{layer[1]}.{name}" for name in PLACES[of[3]])
        parts.hookpoint, parts.source = origin(model, into)
        parts.target_hookpoint = origin(model, out)[0]


def _module(hook: object) -> str | None:
    for ending, side in SIDES.items():
        if isinstance(hook, str) and hook.endswith(ending):
            return hook.removesuffix(ending) + side
    return None


def write(parts: Parts, folder: Path) -> None:
    """SAEs as params.npz of Gemma Scope; transcoders in the files of Gemma Scope 2, which say that they are some."""
    check_fits(parts, "gemma_scope", ("relu", "jumprelu"))
    fold_b_dec(parts, False)
    threshold = parts.b_enc.new_zeros(()) if parts.threshold is None else parts.threshold
    tensors = {
        "W_enc": parts.W_enc.T,
        "W_dec": parts.W_dec,
        "b_enc": parts.b_enc,
        "b_dec": parts.b_dec,
        "threshold": threshold.expand(len(parts.W_enc)),
    }
    if not parts.transcoder:
        arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in stored(tensors).items()}
        np.savez(folder / "params.npz", **arrays)
        return
    tensors = {name.lower(): tensor for name, tensor in tensors.items()}
    if parts.W_skip is not None:
        tensors["affine_skip_connection"] = parts.W_skip.T
    settings = {
        "architecture": "jump_relu",
        "type": "transcoder",
        "width": len(parts.W_enc),
        "l0": parts.k,
        "affine_connection": parts.W_skip is not None,
        "model_name": model_of(parts)[0],
        "hf_hook_point_in": _hook(parts.hookpoint),
        "hf_hook_point_out": _hook(parts.target_hookpoint),
    }
    write_tensors(folder / "params.safetensors", stored(tensors))
    write_json(folder / "config.json", over(carried(parts, "gemma_scope"), settings))


def _hook(hookpoint: str | None) -> str | None:
    """The way back of `_module`."""
    if hookpoint is None:
        return None
    return f"{hookpoint.removesuffix(':in')}.input" if hookpoint.endswith(":in") else f"{hookpoint}.output"

"""sparsify (EleutherAI): cfg.json and sae.safetensors, in a folder that is named after the hookpoint.

    x'    = x - b_dec                               with `transcode` nothing is subtracted
    z     = the k largest of relu(W_enc x' + b_enc)
    y_hat = z W_dec + b_dec (+ W_skip x)            with `skip_connection`; in raw units throughout

encoder.weight is [d_sae, d_in], W_dec [d_sae, d_in], W_skip [d_in, d_in]. Folders are called layers.8.mlp, say, which
is a module of the model without its head. With several seeds there are folders seed0 and so on below. Above lies the
config.json of the run. A transcoder goes from that module's input to its output.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from apportion.disk import read_json, write_json, write_tensors
from apportion.interop.folding import fold_b_dec
from apportion.interop.hook_names import about_model, family_of
from apportion.interop.parts import Parts
from apportion.interop.peek import beside, first_file, settings_in
from apportion.interop.reading import Tensors, file_in, read_safetensors
from apportion.interop.writing import SAVE, carried, check_fits, over, stored
from apportion.language.hook_names import LAYERS

WEIGHTS, CONFIG = "sae.safetensors", "cfg.json"


def recognises(path: Path) -> bool:
    return first_file(path, [WEIGHTS]) is not None and beside(path, CONFIG).exists()


def read(path: Path, config: dict[str, Any], trust: bool) -> Parts:
    folder = path if path.is_dir() else path.parent
    file, settings = file_in(folder, WEIGHTS), read_json(file_in(folder, CONFIG))
    if settings.get("activation", "topk") != "topk" or settings.get("signed"):
        raise ValueError(
            f"{folder / CONFIG}: activation = {settings.get('activation')!r}, signed = {settings.get('signed', False)} "
            "has no counterpart here; unsigned topk has."
        )
    d_in = settings.get("d_in")
    d_sae = settings.get("num_latents") or (d_in and d_in * settings.get("expansion_factor", 32))
    tensors = Tensors(read_safetensors(file), file, d_in=d_in, d_sae=d_sae)
    transcode, skip = bool(settings.get("transcode")), bool(settings.get("skip_connection"))
    parts = Parts(
        kind="topk",
        **tensors.weights("encoder.weight", "W_dec", "encoder.bias", "b_dec"),
        subtract_b_dec=not transcode,
        k=config.pop("k", settings.get("k")),
        W_skip=tensors.take("W_skip", "d_in", "d_in") if skip else None,
        transcoder=transcode or skip,
        info={"original": settings},
    )
    parts.dtype = tensors.finish()
    if skip and parts.subtract_b_dec:
        parts.b_enc.sub_(parts.W_enc @ parts.b_dec)
        parts.subtract_b_dec = False
    _describe(parts, folder, transcode)
    return parts


def _describe(parts: Parts, folder: Path, transcode: bool) -> None:
    place = folder.parent if re.fullmatch(r"seed\d+", folder.name) else folder
    model = settings_in(place.parent / "config.json").get("model")
    if not isinstance(model, str):
        return
    parts.source = about_model(model)
    family = family_of(model)
    if family is None or not re.fullmatch(r"(layers|h)\.\d+[\w.]*", place.name):
        return
    module = f"{LAYERS[family].rsplit('.', 1)[0]}.{place.name}"
    parts.hookpoint = f"{module}:in" if transcode else module
    parts.target_hookpoint = module if transcode else None


def write(parts: Parts, folder: Path) -> None:
    """cfg.json and sae.safetensors. The folder should be called after the hookpoint, in one for the model."""
    check_fits(parts, "sparsify", ("topk",))
    (d_sae, d_in), d_out = parts.W_enc.shape, parts.W_dec.shape[1]
    if d_in != d_out:
        raise ValueError(f"sparsify's transcoders have one width, not d_in = {d_in} and d_out = {d_out}; {SAVE}.")
    fold_b_dec(parts, not parts.transcoder)
    tensors = {"encoder.weight": parts.W_enc, "encoder.bias": parts.b_enc, "W_dec": parts.W_dec, "b_dec": parts.b_dec}
    settings = {
        "activation": "topk",
        "expansion_factor": max(1, d_sae // d_in),
        "normalize_decoder": not parts.transcoder,
        "num_latents": d_sae,
        "k": parts.k,
        "multi_topk": False,
        "skip_connection": parts.W_skip is not None,
        "transcode": parts.transcoder,
        "d_in": d_in,
    }
    write_tensors(folder / WEIGHTS, stored(tensors | {"W_skip": parts.W_skip}))
    write_json(folder / CONFIG, over(carried(parts, "sparsify"), settings))

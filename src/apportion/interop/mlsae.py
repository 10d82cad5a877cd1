"""mlsae: config.json and model.safetensors, written by a mixin of the Hugging Face Hub. arXiv 2409.04185.

    x'    = (x - mean x) / (std x + 1e-5)             each vector on its own; x itself if not `standardize`
    z     = relu(W_enc (x' - pre_encoder_bias)) on the k largest of each vector; there is no encoder bias
    x_hat = z W_dec + pre_encoder_bias, and the standardisation undone

encoder.weight is [d_sae, d_in], decoder.weight [d_in, d_sae]. A vector is a token at a layer: x is [layer, batch, pos,
d_in], or whatever else ends with d_in. Repositories whose name ends in -tfm hold the transformer, too, and those with a
learned transform per layer (`lens`) compute something else: both are refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from apportion.disk import read_json
from apportion.interop.parts import Parts
from apportion.interop.peek import beside, first_file, names_in, settings_in
from apportion.interop.reading import Tensors, file_in, read_safetensors

WEIGHTS, CONFIG = "model.safetensors", "config.json"
WITH_TRANSFORMER = "autoencoder.pre_encoder_bias"


def recognises(path: Path) -> bool:
    names = names_in(first_file(path, [WEIGHTS]))
    return bool(names & {"pre_encoder_bias", WITH_TRANSFORMER}) and "k" in settings_in(beside(path, CONFIG))


def read(path: Path, config: dict[str, Any], trust: bool) -> Parts:
    folder = path if path.is_dir() else path.parent
    file, settings = file_in(folder, WEIGHTS), read_json(file_in(folder, CONFIG))
    names = names_in(file)
    if WITH_TRANSFORMER in names:
        raise ValueError(f"{file} holds the transformer as well. Load the repository of the same name without -tfm.")
    if settings.get("lens") or any("_lens." in name for name in names):
        raise ValueError(f"{file} has a transform for each layer (lens), for which there is no counterpart here.")
    tensors = Tensors(read_safetensors(file), file, d_in=settings.get("n_inputs"), d_sae=settings.get("n_latents"))
    tensors.drop("last_nonzero")
    return Parts(
        kind="topk",
        **tensors.weights("encoder.weight", "decoder.weight.T", None, "pre_encoder_bias"),
        subtract_b_dec=True,
        k=config.pop("k", settings.get("k")),
        input_norm="token_standardise" if settings.get("standardize", True) else "none",
        every_layer=True,
        info={"original": settings},
        dtype=tensors.finish(),
    )

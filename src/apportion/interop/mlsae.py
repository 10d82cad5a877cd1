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

from apportion.interop.parts import Parts
from apportion.interop.peek import beside, first_file, names_in, settings_in
from apportion.interop.reading import Tensors, file_in, read_safetensors, read_settings

WEIGHTS, CONFIG = "model.safetensors", "config.json"
WITH_TRANSFORMER = "autoencoder.pre_encoder_bias"


def recognises(path: Path) -> bool:
    file = first_file(path, [WEIGHTS])
    if file is None:
        return False
    return bool(names_in(file) & {"pre_encoder_bias", WITH_TRANSFORMER}) and "k" in settings_in(beside(path, CONFIG))


def read(path: Path, config: dict[str, Any], trust: bool) -> Parts:
    folder = path if path.is_dir() else path.parent
    file, settings = file_in(folder, WEIGHTS), read_settings(file_in(folder, CONFIG))
    names = names_in(file)
    if WITH_TRANSFORMER in names:
        raise ValueError(f"{file} holds the transformer as well. Load the repository of the same name without -tfm.")
    if settings.get("lens") or any("_lens." in name for name in names):
        raise ValueError(f"{file} has a transform for each layer (lens), for which there is no counterpart here.")
    tensors = Tensors(read_safetensors(file), file, d_in=settings.get("n_inputs"), d_sae=settings.get("n_latents"))
    tensors.drop("last_nonzero")
    W_enc = tensors.take("encoder.weight", "d_sae", "d_in")
    parts = Parts(
        kind="topk",
        W_enc=W_enc,
        W_dec=tensors.take("decoder.weight", "d_in", "d_sae").T.contiguous(),
        b_enc=W_enc.new_zeros(len(W_enc)),
        b_dec=tensors.take("pre_encoder_bias", "d_in"),
        subtract_b_dec=True,
        k=config.pop("k", settings.get("k")),
        input_norm="token_standardise" if settings.get("standardize", True) else "none",
        every_layer=True,
        info={"original": settings},
    )
    parts.dtype = tensors.finish()
    return parts

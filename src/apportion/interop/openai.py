"""OpenAI's sparse_autoencoder: one .pt with a state dict and the name of its activation function.

    x'    = x, or (x - mean x) / (std x + 1e-5)     each token on its own, if and only if the activation is TopK
    z     = relu(W_enc (x' - pre_bias) + latent_bias)                                   ReLU
            the same on the k largest of each token                                     TopK, with the postact ReLU
    x_hat = z W_dec + pre_bias, and the normalisation undone

encoder.weight is [d_sae, d_in], decoder.weight [d_in, d_sae]; a tied decoder is stored as decoder.linear.weight, which
is the encoder's once more. Keys that begin with "activation." repeat what activation_state_dict says; the library
writes them and cannot read them. Statistics of training are ignored. The released files lie in
{location}[_v4 | _v5_32k | _v5_128k]/autoencoders/{layer}.pt, which is where the hookpoint is taken from.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from apportion.interop.hook_names import origin
from apportion.interop.parts import Parts
from apportion.interop.peek import first_file, names_in
from apportion.interop.reading import Tensors, only_file, read_pt, tensor_dict
from apportion.interop.writing import dict_of

STATISTICS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")
LOCATIONS = {
    "resid_post_mlp": "hook_resid_post",
    "resid_post_attn": "hook_resid_mid",
    "resid_delta_mlp": "hook_mlp_out",
    "resid_delta_attn": "hook_attn_out",
    "mlp_post_act": "mlp.hook_post",
}
"""Their names of places in GPT-2 small, and TransformerLens's."""


def recognises(path: Path) -> bool:
    return names_in(first_file(path, ["*.pt"])) >= {"pre_bias", "latent_bias", "encoder.weight"}


def read(path: Path, config: dict[str, Any], trust: bool) -> Parts:
    file = only_file(path, "*.pt")
    content = read_pt(file, trust)
    stored = tensor_dict(content, file)
    tensors = Tensors({name: t for name, t in stored.items() if not name.startswith("activation.")}, file)
    tensors.drop(*STATISTICS)
    tied = "decoder.linear.weight" in tensors
    W_dec = "decoder.linear.weight" if tied else "decoder.weight.T"
    weights = tensors.weights("encoder.weight", W_dec, "latent_bias", "pre_bias")
    parts = Parts(kind="relu", **weights, subtract_b_dec=True, dtype=tensors.finish())
    if tied:
        _untie(parts, file)
    _set_activation(parts, content, config, file)
    hook = _hook(file)
    parts.hookpoint, parts.source = origin("gpt2-small" if hook else None, hook)
    parts.info = {"original": {"activation": content.get("activation", "ReLU")}}
    return parts


def _untie(parts: Parts, file: Path) -> None:
    if not bool((parts.W_dec == parts.W_enc).all()):
        raise ValueError(f"{file}: decoder.linear.weight of a tied decoder differs from encoder.weight.")
    parts.W_dec = parts.W_dec.clone()


def _set_activation(parts: Parts, content: Mapping[str, Any], config: dict[str, Any], file: Path) -> None:
    activation, settings = content.get("activation", "ReLU"), dict_of(content.get("activation_state_dict"))
    if activation == "TopK" and settings.get("postact_fn", "ReLU") == "ReLU":
        k = config.pop("k", settings.get("k"))
        parts.kind, parts.k = "topk", k.item() if isinstance(k, Tensor) else k
        parts.input_norm = "token_standardise"
    elif activation != "ReLU":
        after = f" followed by {settings['postact_fn']!r}" if "postact_fn" in settings else ""
        raise ValueError(
            f"{file}: the activation {activation!r}{after} has no counterpart here, for codes could be negative; "
            "ReLU has, and TopK followed by ReLU."
        )


def _hook(file: Path) -> str | None:
    found = re.search(r"(\w+?)(?:_v\d\w*)?/autoencoders/(\d+)\.pt$", file.as_posix())
    return f"blocks.{found[2]}.{LOCATIONS[found[1]]}" if found and found[1] in LOCATIONS else None

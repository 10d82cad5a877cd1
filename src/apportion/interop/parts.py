"""What the files of all libraries have in common: the parts of a sparse autoencoder, in one orientation and one scale.

    x' = x, or each token normalised (input_norm)          in raw units otherwise
    pre_acts = W_enc (x' - b_dec, if subtract_b_dec) + b_enc
    z by kind:
        relu        relu(pre_acts)
        topk        relu(pre_acts) on the k largest of each token
        batch_topk  relu(pre_acts) above one threshold; NaN: not calibrated yet
        jumprelu    relu(pre_acts) above a threshold per latent
        gated       relu(exp(r_mag) u + b_mag) where u + b_gate > 0, u = W_enc (x' - ...)
        switch      p relu(pre_acts) of the expert with the largest p = softmax(W_router (x' - b_router)), its k largest
    y_hat = z W_dec + b_dec                                and the normalisation undone
    y_hat = z W_dec + b_dec (+ W_skip x)                   of a transcoder, in raw units whatever x' is

Reading a foreign file makes Parts, and `assemble` makes one of our SAEs from them; `take_apart` makes Parts of one of
ours, and writing a foreign file starts from those. So n formats need n readers and n writers, not n^2 converters.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from apportion.about import About
from apportion.architectures.inputs import InputNorm

Kind = Literal["relu", "topk", "batch_topk", "jumprelu", "gated", "switch"]


@dataclass(kw_only=True)
class Parts:
    """A sparse autoencoder, latents at dimension 0 everywhere."""

    kind: Kind
    W_enc: Float[Tensor, "_d_sae _d_in"]
    W_dec: Float[Tensor, "_d_sae _d_out"]
    b_enc: Float[Tensor, " _d_sae"]
    """For kind gated this is zero."""
    b_dec: Float[Tensor, " _d_out"]
    subtract_b_dec: bool
    k: Any = None
    """Active latents per token (topk, batch_topk, switch); for the others their mean, where it is known. As a file says
    it: `assemble` looks whether it is a number."""
    threshold: Tensor | None = None
    """A scalar (batch_topk) or one per latent (jumprelu)."""
    by_norm: bool = False
    """topk, batch_topk: the largest pre_acts_j ||W_dec_j|| are kept, not the largest pre_acts. Codes stay pre_acts."""
    input_norm: InputNorm = "none"
    """none, token_standardise or token_norm; scalar scales are folded into the weights."""
    gate: dict[str, Tensor] = field(default_factory=dict)
    """kind gated: b_gate, r_mag, b_mag, each [d_sae]."""
    router: dict[str, Tensor] = field(default_factory=dict)
    """kind switch: W_router [num_experts, d_in], b_router [d_in]."""
    W_skip: Float[Tensor, "_d_out _d_in"] | None = None
    transcoder: bool = False
    """True if y_hat is something else than x."""
    every_layer: bool = False
    """True if rows are activations of all layers of a model, with one code for all (MLSAE)."""
    hookpoint: str | None = None
    """Where x comes from, as a module path of a transformers model where that is known."""
    target_hookpoint: str | None = None
    """Where y comes from, if it is something else than x."""
    dtype: torch.dtype | None = None
    """What the weights were stored in, where that is coarser than they are here; None: as they are."""
    source: About = field(default_factory=About)
    """What the file says of the rows that it was trained on: the model, hook names, the text."""
    info: dict[str, Any] = field(default_factory=dict)
    """What else it says (JSON-able)."""

"""Linear changes of what goes in and comes out, folded into the weights of Parts, in place.

What other libraries multiply activations by before an SAE sees them, or codes by afterwards, becomes part of the SAE:

    fold_scale      the SAE takes s x              W_enc s, W_dec / s, b_dec / s; codes stay
    fold_norms      codes times n = ||W_dec_j||    W_enc, biases and thresholds n, W_dec / n: rows of unit norm
    fold_whitening  the SAE takes (x - m) M        W_enc M', W_dec M^-1, b_dec M^-1 + m; codes stay
    fold_b_dec      b_dec subtracted or not        biases plus or minus W_enc b_dec; codes stay
    fold_centring   the SAE takes x - mean(x)      W_enc C, W_skip C with C = I - 11'/d_in; codes stay, the mean of
                                                   each token is not put back
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from apportion.interop.parts import Parts

SMALLEST_NORM = 1e-8
"""Decoder rows with a smaller norm are as good as zero."""
BLOCK = 4096
"""Rows of W_enc that are held in float64 at a time."""


def fold_scale(parts: Parts, scale: float) -> None:
    """From parts that take s x to parts that take x, with equal codes."""
    parts.W_enc.mul_(scale)
    parts.W_dec.div_(scale)
    parts.b_dec.div_(scale)


def fold_norms(parts: Parts) -> None:
    """Codes become ||W_dec_j|| as large and decoder rows 1; reconstructions stay, and matches above thresholds do."""
    norms = parts.W_dec.norm(dim=1).clamp_min(SMALLEST_NORM)
    parts.W_dec.div_(norms[:, None])
    parts.W_enc.mul_(norms[:, None])
    parts.b_enc.mul_(norms)
    if parts.threshold is not None:
        parts.threshold = parts.threshold * norms
    for name in ("b_gate", "b_mag"):
        if name in parts.gate:
            parts.gate[name].mul_(norms)


def fold_whitening(
    parts: Parts, mean: Float[Tensor, " d_in"], matrix: Float[Tensor, "d_in d_in"], inverse: Float[Tensor, "d_in d_in"]
) -> None:
    """From parts that take (x - mean) @ matrix to parts that take x, with equal codes; computed in float64."""
    mean, matrix, inverse = mean.double(), matrix.double(), inverse.double()
    W_enc = parts.W_enc.double() @ matrix.T
    if not parts.subtract_b_dec:
        _shift_biases(parts, -(W_enc @ mean))
    parts.W_enc = W_enc.to(parts.W_enc.dtype)
    parts.W_dec = (parts.W_dec.double() @ inverse).to(parts.W_dec.dtype)
    parts.b_dec = (parts.b_dec.double() @ inverse + mean).to(parts.b_dec.dtype)


def fold_b_dec(parts: Parts, subtract: bool) -> None:
    """To parts that subtract b_dec from x, or that do not; computed in float64."""
    if parts.subtract_b_dec == subtract:
        return
    blocks = parts.W_enc.split(BLOCK)
    shift = torch.cat([block.double() @ parts.b_dec.double() for block in blocks]) * (1 if subtract else -1)
    _shift_biases(parts, shift)
    parts.subtract_b_dec = subtract


def fold_centring(parts: Parts) -> None:
    """From parts that take each token less its mean over the width to parts that take it as it is, with equal codes.

    They reconstruct the centred token still: mean(x) 1 would be a skip of rank one. Computed in float64.
    """
    if parts.subtract_b_dec:
        _shift_biases(parts, -parts.W_enc.double().sum(dim=1) * parts.b_dec.double().mean())
    parts.W_enc = _without_row_means(parts.W_enc)
    if parts.W_skip is not None:
        parts.W_skip = _without_row_means(parts.W_skip)


def _without_row_means(weights: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_in"]:
    return (weights.double() - weights.double().mean(dim=1, keepdim=True)).to(weights.dtype)


def _shift_biases(parts: Parts, shift: Float[Tensor, " d_sae"]) -> None:
    """Add to what the encoder's product is compared with; in float64."""
    changes = [(parts.b_enc, shift)]
    if parts.kind == "gated":
        gain = parts.gate["r_mag"].double().exp()
        changes = [(parts.gate["b_gate"], shift), (parts.gate["b_mag"], gain * shift)]
    for bias, change in changes:
        bias.copy_(bias.double() + change)

"""SAEs of models that TransformerLens had processed: activations with a mean of 0 over the width.

LayerNorms do not see the mean of a token, so TransformerLens's `center_writing_weights` takes it from every weight that
writes to the residual stream: the SAE has seen C x, C = I - 11'/d, where a model of transformers still has x. In models
with RMSNorm it changes nothing. Where a file says so, C is folded into the encoder:

    W_enc C x + b_enc              codes are right on x, and on C x as well, for C C = C
    x_hat                          stays a reconstruction of C x

Putting the mean back, x_hat + mean(x) 1, would be a skip of rank one beside the codes, and `decode` would need x. What
comes behind does not notice: splicing, steering and cross-entropy are right as they are. Errors and FVU against x are
larger by the means; a warning says so at every load.
"""

from __future__ import annotations

import logging
from pathlib import Path

from apportion.interop.folding import fold_centring
from apportion.interop.hook_names import is_centred
from apportion.interop.parts import Parts

logger = logging.getLogger(__name__)


def centre(parts: Parts, model: object, hook_name: object, hook_name_out: object, file: Path) -> None:
    """Fold centring into the encoder of an SAE of such a model, and say what remains; if it cannot be, say that."""
    into, out = is_centred(hook_name, model), is_centred(hook_name_out, model)
    if parts.input_norm == "token_standardise" or (into is False and not out):
        return  # tokens lose their means and get them back by themselves, or there are none
    folds = into is not None and parts.input_norm == "none"
    if folds and into:
        fold_centring(parts)
    logger.warning(
        "%s: this SAE was trained on a model with centred writing weights (TransformerLens), where activations have a "
        "mean of 0 over the width. %s Reconstructions are centred as well: behind a LayerNorm that makes no "
        "difference, in errors and FVU each token's mean counts as not reconstructed.",
        file,
        "Centring is folded into the encoder, so that codes are right on the model of transformers."
        if folds
        else "It could not be folded into the encoder: give it centred activations (x - x.mean(-1, keepdim=True)).",
    )


def warn_of_processing(parts: Parts, model: object, hook_name: object, file: Path) -> None:
    """For libraries that load models with TransformerLens's from_pretrained, which centres, and whose files are silent.

    Others have run such a library on models of their own making, so that nothing is folded.
    """
    if parts.input_norm != "token_standardise" and is_centred(hook_name, model):
        logger.warning(
            "%s does not say how its model was loaded. The library does so by TransformerLens's from_pretrained, which "
            "takes from each token its mean over the width: if that was so, give it x - x.mean(-1, keepdim=True).",
            file,
        )

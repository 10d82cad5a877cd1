"""One SAE for all layers of a model: a plain SAE whose rows are tokens at layers (MLSAE, arXiv 2409.04185).

    x~      = (x - mean_d x) / (std_d x + 1e-5)         each row on its own, over its d_in entries
    z       = relu(W_enc (x~ - b_dec) + b_enc)          on the matches that the rule chose; the same for every layer
    x_hat   = (z W_dec + b_dec) std_d x + mean_d x
    loss    = mean ||x~ - x~_hat||^2 / d_in, and the auxiliary loss

Rows of all layers form one batch, shuffled. Each is standardised on its own, so that layers of large norm count no more
than others, and the SAE is not told which layer a row is from: a latent that is active at several layers stands for one
direction at all of them. `decode` needs x, to go back.

Unlike the paper's ours has an encoder bias, its loss is the plain mean square on standardised rows, not divided by a
layer's variance in the batch, and dead windows count rows, which are tokens times layers. The paper's rule is TopK.

When to use it: to follow features from layer to layer with one set of latents; evals/layers.py says at which layers
each is active. Needs a cache of several hookpoints, for instance of `collect --hookpoint model.layers.*`, and takes all
that the cache has, unless `--hookpoint` names some.

Cost: as TopK per row, with as many rows per token as there are layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from apportion.architectures.auxiliary import AffineWithAuxiliary, AuxiliaryConfig
from apportion.architectures.inputs import InputNorm


@dataclass(frozen=True, kw_only=True)
class MLSAEConfig(AuxiliaryConfig):
    input_norm: InputNorm = "token_standardise"
    """How inputs are prepared: token_standardise, or as other SAEs do it: dataset, token_norm, none."""


@final
class MLSAE(AffineWithAuxiliary):
    Config = MLSAEConfig
    form = "affine"
    row_kind = "layers"

"""The plain sparse autoencoder: one affine encoder, one affine decoder with unit rows, plain reconstruction.

    z     = relu(W_enc (x - b_dec) + b_enc)        x prepared by the input description
    x_hat = (z restricted to the matches that the rule chose) W_dec + b_dec

With a rule it becomes TopK (arXiv 2406.04093), Mutual Choice or Feature Choice (arXiv 2411.02124; Mutual Choice has
BatchTopK's forward pass, arXiv 2412.06410).
"""

from __future__ import annotations

from typing import final

from apportion.architectures.auxiliary import AffineWithAuxiliary, AuxiliaryConfig


@final
class Plain(AffineWithAuxiliary):
    Config = AuxiliaryConfig
    form = "affine"

"""Transcoders: sparse codes of what goes into a module predict what comes out of it. arXiv 2501.18823 for the skip.

    x~, y~     = input and target, each centred and scaled by a description of its own
    z          = relu(W_enc x~ + b_enc)              the matches that the rule chose; nothing is subtracted from x~
    y~_hat     = z W_dec + b_dec + W_skip x~          the last term with `skip` only
    loss       = mean ||y~ - y~_hat||^2 / d_out, and the auxiliary loss on the error y~ - y~_hat

In raw units y_hat = y~_hat / s_out + mu_out. With `skip` a dense linear map carries what is linear in the module, and
the latents only the rest; `decode` then needs x.

Rows of W_dec have no fixed norm and begin as random directions of norm 0.1, independent of W_enc, whose rows are random
unit directions; W_skip begins at 0. So an untrained transcoder predicts next to nothing, rather than noise as large as
the target. This is ours. sparsify begins with W_dec = 0; zero rows could not compete by code times norm.

A target that is normalised token by token could not be restored without knowing it: with such an `input_norm` (or with
dataset) the target's description is `dataset`, with none it is none.

A cross-layer transcoder, whose latents read one layer and write to the modules of all layers above, is not here: what
it would take is said with the [crosscoder](crosscoder.md) (architectures/crosscoder.py).

When to use it: to explain what a module computes rather than what it is given, for instance an MLP in a circuit; with
`skip` where a good part of the module is linear. Needs a cache, or batches, with both its input and its output.

Cost of `transcoder`: that of a plain SAE.

Cost of `skip_transcoder`: that of a plain SAE and one dense product with [d_in, d_out], forwards and for its gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from apportion.allocation import Rule
from apportion.architectures import affine
from apportion.architectures.auxiliary import AffineWithAuxiliary, AuxiliaryConfig
from apportion.architectures.inputs import InputDescription
from apportion.architectures.start import ridge
from apportion.kernels.sparse import sum_by_latent
from apportion.latents import Latents

INITIAL_NORM = 0.1
"""Of the rows of W_dec."""


@dataclass(frozen=True, kw_only=True)
class TranscoderConfig(AuxiliaryConfig):
    d_out: int | None = None
    """Width of the target; None: d_in."""
    skip: bool = False
    """Add a dense linear map from input to output beside the latents."""
    target_hookpoint: str | None = None
    """Where in the model the target comes from, e.g. model.layers.8.mlp where hookpoint is model.layers.8.mlp:in."""
    subtract_b_dec: ClassVar[bool] = False  # type: ignore[misc]  # b_dec lies in the target's space: no such setting

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.d_out is not None and (not isinstance(self.d_out, int) or self.d_out < 1):
            raise ValueError(f"d_out must be a whole number of at least 1, or None for d_in, got {self.d_out!r}.")


@final
class Transcoder(AffineWithAuxiliary):
    Config = TranscoderConfig
    config: TranscoderConfig  # type: ignore[assignment]
    form = "affine"
    row_kind = "pair"
    initial_norm = INITIAL_NORM

    def __init__(self, config: TranscoderConfig, allocation: Rule) -> None:
        super().__init__(config, allocation, (config.d_out or config.d_in,))
        kind = "none" if config.input_norm == "none" else "dataset"
        self.output = InputDescription(self.out_shape, kind, config.centre)
        if config.skip:
            self.W_skip = nn.Parameter(torch.zeros(*self.out_shape, config.d_in))

    def _initial_encoder(self, rows: Float[Tensor, "d_sae d_out"]) -> Float[Tensor, "d_sae d_in"]:
        seed = self.config.seed
        return affine.unit_rows(self.d_sae, self.row_shape, None if seed is None else -1 - seed)  # not those of W_dec

    def unit_rows(self) -> list[nn.Parameter]:
        return []

    @property
    def d_out(self) -> int:
        return self.out_shape[0]

    @property
    def needs_fit(self) -> bool:
        return self.input.needs_fit or self.output.needs_fit

    def set_directions(self, directions: Float[Tensor, "d_sae d_in"]) -> None:
        self.W_enc.copy_(directions)

    def fit_rest(self, x: Float[Tensor, "n d_in"], y: Float[Tensor, "n d_out"]) -> None:
        """W_skip: the linear map that predicts best. W_dec: of what is left the mean over a latent's matches, weighted
        by its codes, as least squares have it for a latent on its own; one without a match keeps what it has."""
        y = y - self.b_dec
        if self.config.skip:
            self.W_skip.copy_(ridge(x, y))
            y = y - F.linear(x, self.W_skip)
        latents = self.encode_scaled(x, self.selection())
        squares = latents.values.new_zeros(self.d_sae).index_add_(0, latents.indices, latents.values.square())
        found = sum_by_latent(latents, latents.values, y) / squares.clamp_min(1e-9)[:, None]
        self.W_dec.copy_(torch.where(squares[:, None] > 0, found, self.W_dec))

    @property
    def decode_needs_x(self) -> bool:
        return self.config.skip

    def decode_scaled(
        self, latents: Latents, x: Float[Tensor, "tokens d_in"] | None = None
    ) -> Float[Tensor, "tokens d_out"]:
        y_hat = super().decode_scaled(latents)
        return y_hat + F.linear(x, self.W_skip) if self.config.skip and x is not None else y_hat

    def undo(self, y_hat: Float[Tensor, "tokens d_out"], x: Float[Tensor, "tokens d_in"] | None) -> Tensor:
        return self.output.undo(y_hat, None)

    def prepare(
        self, x: Float[Tensor, "tokens d_in"], target: Float[Tensor, "tokens d_out"] | None = None
    ) -> tuple[Float[Tensor, "tokens d_in"], Float[Tensor, "tokens d_out"]]:
        y = self.output.apply_to(self._targets(target).to(self.device))
        return self.input.apply_to(x.to(self.device, self.dtype)), y

    def fit_input(self, x: Any, target: Any = None) -> None:
        """Estimate both descriptions from raw, filtered activations and their targets (`dataset` only)."""
        targets = self._targets(target)
        self.input.fit(self._rows(x))
        self.output.fit(targets)

    def _targets(self, target: Tensor | None) -> Float[Tensor, "tokens d_out"]:
        if target is None:
            raise ValueError(
                f"{self.name} learns to predict a target from x, and there is none. Give Batch(x, target=y), "
                "ArraySource(x, target=y), or a cache of two hookpoints (PairStore)."
            )
        if target.shape[-1:] != self.out_shape:
            raise ValueError(f"Expected targets [..., {self.d_out}] (d_out = {self.d_out}), got {list(target.shape)}.")
        return target.reshape(-1, self.d_out).to(self.dtype)

    def fold_in(self, mean: Float[Tensor, " d_in"], scale: Float[Tensor, ""]) -> None:
        """As `folded` says; W_dec and W_skip times s_in / s_out, and the means go into the biases."""
        ratio = scale / self.output.scale
        self.b_enc.div_(scale).sub_(self.W_enc @ mean)
        self.W_dec.mul_(ratio)
        self.b_dec.div_(self.output.scale).add_(self.output.mean)
        if self.config.skip:
            self.W_skip.mul_(ratio)
            self.b_dec.sub_(self.W_skip @ mean)
        unit = scale if self.config.affinity == "code" else self.output.scale
        self.allocation.rescale(1 / unit.item())
        self.output = InputDescription(self.out_shape, "none", self.config.centre).to(mean)

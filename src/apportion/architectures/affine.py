"""Affine encoder, affine decoder: what most sparse autoencoders have in common.

    pre_acts = W_enc (x - b_dec) + b_enc          x prepared by the input description; b_dec only if subtract_b_dec
    z        = relu(pre_acts) on the matches that the rule chose, by affinity
    x_hat    = z W_dec + b_dec

Rows may have several sites (crosscoders): weights are then [d_sae, num_sites, d_in], and the products run over both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from apportion.allocation import Rule, Selection
from apportion.architectures.base import SAE, SAEConfig
from apportion.architectures.inputs import as_tensor
from apportion.architectures.start import begin, drawn, generator_for, rows_needed, usual_share
from apportion.devices import on_gpu
from apportion.kernels import Experts, choose, decode_matches, encode_matches, rows_of
from apportion.latents import Latents, from_matches
from apportion.settings import newer
from apportion.torch_state import usual


@dataclass(frozen=True, kw_only=True)
class AffineConfig(SAEConfig):
    subtract_b_dec: bool = True
    """Subtract the decoder bias from the encoder's input."""


@dataclass(frozen=True, kw_only=True)
class LearnedConfig(AffineConfig):
    init: Literal["random", "data"] = newer("data", before="random")
    """Where training begins: random, at directions that know nothing; data, at a mixture of these with rows, and at the
    scale that reconstructs best (architectures/start.py)."""


class Affine(SAE):
    """Base of the architectures with one affine encoder and one affine decoder."""

    config: AffineConfig
    initial_norm = 1.0
    """Of decoder rows."""
    data_share: float
    """Of a direction that training begins with (start.py)."""

    def __init__(self, config: AffineConfig, allocation: Rule, out_shape: tuple[int, ...] | None = None) -> None:
        super().__init__(config, allocation)
        self.out_shape = out_shape or self.row_shape
        rows = unit_rows(config.d_sae, self.out_shape, config.seed)
        self.W_dec = nn.Parameter(self.initial_norm * rows)
        self.W_enc = nn.Parameter(self._initial_encoder(rows))
        self.b_enc = nn.Parameter(torch.zeros(config.d_sae))
        self.b_dec = nn.Parameter(torch.zeros(self.out_shape))
        self.data_share = usual_share(allocation)
        self._drawn = self._sums() if getattr(config, "init", "random") == "data" and not _blank.get() else None

    def _initial_encoder(self, rows: Float[Tensor, " d_sae *out"]) -> Float[Tensor, " d_sae *row"]:
        """Beside a decoder with rows in these directions."""
        return rows

    def encode_scaled(
        self, x: Float[Tensor, " tokens *row"], selection: Selection, experts: Experts | None = None
    ) -> Latents:
        """Choose among all latents of prepared rows, with gradients to x and all encoder parameters."""
        if x.requires_grad or not self.config.subtract_b_dec:
            return self.encode_centred(self.centred(x), selection, experts=experts)
        return self.encode_centred(self.centred(x).detach(), selection, experts=experts, centre=self.b_dec)

    def centred(self, x: Float[Tensor, " tokens *row"]) -> Float[Tensor, " tokens *row"]:
        return x - self.b_dec if self.config.subtract_b_dec else x

    def encode_centred(
        self,
        x: Float[Tensor, " tokens *row"],
        selection: Selection,
        ids: Int[Tensor, " n"] | None = None,
        experts: Experts | None = None,
        centre: Float[Tensor, "*row"] | None = None,
    ) -> Latents:
        """Choose among all latents, or among `ids` (ascending) only, of which the result then says which by their
        places among these. Gradients to x, W_enc and b_enc, sparse ones with `ids` (kernels.rows_of).

        With `experts`, each token has its expert's latents only, and its affinities are gated, but its codes are not.
        `centre` gets the gradient of what was subtracted from x, if x itself has none.
        """
        x, W_enc, b_enc = x.flatten(1), self.W_enc, self.b_enc
        if ids is not None:
            W_enc, b_enc = rows_of(W_enc, ids), b_enc[ids]
        W_enc, norms = W_enc.flatten(1), None
        if self.config.affinity == "code_times_decoder_norm":
            norms = self.decoder_norms() if ids is None else self.decoder_norms()[ids]
        m = choose(x, W_enc, b_enc, selection, norms=norms, experts=experts)
        matches = from_matches(m.rows, m.latents, m.values, len(W_enc), (x.shape[0],))
        latents = encode_matches(x, W_enc, b_enc, matches, None if centre is None else centre.flatten())
        if selection.padded and on_gpu(x):  # what fills up a row learns nothing
            return replace(latents, values=torch.where(m.values > 0, latents.values, 0.0))
        return latents

    def decode_scaled(
        self, latents: Latents, x: Float[Tensor, " tokens *row"] | None = None
    ) -> Float[Tensor, " tokens *out"]:
        return decode_matches(latents, self.W_dec.flatten(1)).unflatten(1, self.out_shape) + self.b_dec

    @property
    def takes_screen(self) -> bool:
        """Whether steps of training can be screened (kernels/select.py): with a budget there is a cut to look above."""
        return self.allocation.budget(1) is not None

    def affinities(self, latents: Latents) -> Float[Tensor, " nnz"]:
        values = latents.values.detach()
        return values if self.config.affinity == "code" else values * self.decoder_norms()[latents.indices]

    def decoder_norms(self) -> Float[Tensor, " d_sae"]:
        """What codes are multiplied by where affinity is code_times_decoder_norm; no gradients."""
        return self.W_dec.detach().flatten(1).norm(dim=1)

    def unit_rows(self) -> list[nn.Parameter]:
        return [self.W_dec]

    # How training begins (start.py)

    @property
    def needs_start(self) -> bool:
        """Whether the weights are still those that were drawn: what was trained, loaded or set by hand is no start."""
        return self._drawn is not None and torch.allclose(self._drawn, self._sums(), rtol=0, atol=1e-6)

    def _sums(self) -> Float[Tensor, " 4"]:
        drawn = (self.W_enc, self.W_dec, self.b_enc, self.b_dec)
        return torch.stack([weights.detach().sum(dtype=torch.float64) for weights in drawn]).cpu()

    @usual(learning=True)
    def start(self, x: Any, target: Any = None) -> None:
        """With `init="data"`, for an SAE that was not trained yet: set the weights that training begins with, from raw,
        filtered rows. The Trainer does it; other loops call it after `fit_input`."""
        if self.needs_start:
            x, generator = self._rows(x), generator_for(self.W_dec)
            some = drawn(min(len(x), rows_needed(self)), len(x), generator)
            target = None if target is None else as_tensor(target).flatten(0, -2)[some]
            begin(self, *self.prepare(x[some], target), generator, self.data_share)

    def rows_for_latents(self, x: Float[Tensor, " n *row"], generator: torch.Generator) -> Int[Tensor, " d_sae"]:
        """For each latent a row that its direction is made of."""
        return drawn(self.d_sae, len(x), generator)

    def set_directions(self, directions: Float[Tensor, " d_sae *row"]) -> None:
        """Of encoder and decoder; decoder rows keep their norms."""
        self.W_enc.copy_(directions)
        self.W_dec.copy_(directions * self.W_dec.flatten(1).norm(dim=1).view(-1, *[1] * len(self.row_shape)))

    def fit_rest(self, x: Float[Tensor, " n *row"], y: Float[Tensor, " n *out"]) -> None:
        """Set by some prepared rows what directions do not: thresholds, a decoder that is not the encoder's."""

    def rescale(self, factor: float) -> None:
        """Make the reconstruction so many times as large, less b_dec."""
        for weights in (self.W_enc, self.b_enc) if self.unit_rows() else (self.W_dec,):
            weights.mul_(factor)

    def fold_in(self, mean: Float[Tensor, "*sites d_in"], scale: Float[Tensor, "*sites"]) -> None:
        if not self.config.subtract_b_dec:
            self.b_enc.sub_(scale * (self.W_enc @ mean))
        self.b_enc.div_(scale)
        self.b_dec.div_(scale).add_(mean)
        self.allocation.rescale(1 / scale.item())


_blank: ContextVar[bool] = ContextVar("blank", default=False)


@contextmanager
def blank_weights() -> Iterator[None]:
    """New SAEs within have weights that are not set, which saves time where they are about to be read from a file."""
    token = _blank.set(True)
    try:
        yield
    finally:
        _blank.reset(token)


def unit_rows(n: int, shape: tuple[int, ...], seed: int | None) -> Float[Tensor, " n *shape"]:
    """Random directions; `seed` None uses torch's global generator."""
    if _blank.get():
        return torch.empty(n, *shape)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    rows = torch.randn(n, *shape, generator=generator).flatten(1)
    return (rows / rows.norm(dim=1, keepdim=True)).unflatten(1, shape)

"""The encoder's product, tile by tile into a reused buffer, and what matches compete by.

    codes_tj    = <x_t, W_enc_j> + b_enc_j
    affinity_tj = codes_tj * norms_j * gates_t           norms (of decoder rows) and gates where they are given

With experts (arXiv 2410.08201) a token has the latents of one expert only, and expert e owns the latents starts[e] to
starts[e + 1] - 1. Tokens are then walked through expert by expert, a block is [tokens of e, latents of e], and no other
product is made.

In the precision "int8" both factors are rounded to whole numbers of 8 bits, of which processors with VNNI (and the
matrix units of GPUs) multiply several times as many as floats:

    x_td ~ s_t q_td e_d        W_jd ~ r_j p_jd / e_d        codes_tj ~ s_t r_j <q_t, p_j> + b_enc_j

with a scale for every token and every latent, and e_d = sqrt(rms x_d / rms W_d), so that a dimension in which inputs
are large does not take all the digits of the others. Where one bound is for many latents, GROUP of them share a scale,
so that few groups have to be looked at (kernels/scan.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from apportion.blocks import GROUP, block_rows, tile_shape
from apportion.kernels.primitives import dot_products

ROUNDED_ROWS = 512
"""Rows that are rounded to whole numbers together, in the cache."""


@dataclass(frozen=True)
class Experts:
    """Which part of the latents each token may use."""

    of: Int[Tensor, " tokens"]
    """The expert of each token."""
    gates: Float[Tensor, " tokens"]
    """What the affinities of each token are multiplied by; positive."""
    starts: Int[Tensor, " num_experts_plus_1"]
    """Where the latents of each expert begin, and the last one's end; on the CPU."""

    def among(self, latents: Int[Tensor, " n"]) -> Experts:
        """The same experts when only these latents (ascending) take part and are numbered 0 .. n - 1."""
        return replace(self, starts=torch.searchsorted(latents.cpu(), self.starts))


@dataclass
class Block:
    """A part of the product: tokens by latents, or latents by tokens. `affinity` may be `codes` itself."""

    codes: Float[Tensor, "rows columns"]
    affinity: Float[Tensor, "rows columns"]
    first: int
    """Place of its first token in the walk; `Product.tokens_at` says which tokens are where."""
    share: float = 1.0
    """Columns, as a share of all latents that its tokens may have."""


@dataclass
class WholeNumbers:
    """The same part as products of whole numbers: codes = numbers * scales * latent_scales + bias."""

    numbers: Int[Tensor, "rows columns"]
    scales: Float[Tensor, " rows"]
    latent_scales: Float[Tensor, " columns"]
    bias: Float[Tensor, " columns"]
    norms: Float[Tensor, " columns"] | None
    gates: Float[Tensor, " rows"] | None
    first: int
    share: float = 1.0

    @cached_property
    def codes(self) -> Float[Tensor, "rows columns"]:
        return torch.addcmul(self.bias, self.numbers * self.scales[:, None], self.latent_scales)

    @cached_property
    def affinity(self) -> Float[Tensor, "rows columns"]:
        weighted = self.codes if self.norms is None else self.codes * self.norms
        return weighted if self.gates is None else weighted * self.gates[:, None]


Precision = torch.dtype | Literal["int8"]


class Product:
    """x W_enc^T + b_enc of one batch."""

    def __init__(
        self,
        x: Float[Tensor, "tokens d_in"],
        W_enc: Float[Tensor, "d_sae d_in"],
        b_enc: Float[Tensor, " d_sae"],
        norms: Float[Tensor, " d_sae"] | None = None,
        experts: Experts | None = None,
    ) -> None:
        self.x, self.W_enc, self.b_enc, self.norms, self.experts = x, W_enc, b_enc, norms, experts
        self.gates, self.walk, self.order = None, x, None
        self.shared_scales = True
        """Of whole numbers, by GROUP latents; to be set before there are any."""
        self.groups = [(slice(0, len(x)), slice(0, len(W_enc)))]
        """Tokens, as places of the walk, with their latents."""
        if experts is not None:
            self.gates, self.order = experts.gates.to(x.dtype), experts.of.argsort(stable=True)
            self.walk = x[self.order]
            loads = torch.bincount(experts.of, minlength=len(experts.starts) - 1).cpu()
            tokens, latents = (pairwise(ends) for ends in ([0, *loads.cumsum(0).tolist()], experts.starts.tolist()))
            both = zip(tokens, latents, strict=True)
            self.groups = [(slice(*t), slice(*j)) for t, j in both if t[0] < t[1] and j[0] < j[1]]

    def tokens_at(self, places: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        """The tokens at these places of the walk."""
        return places if self.order is None else self.order[places]

    @property
    def in_order(self) -> bool:
        """Whether matches come in (token, latent) order from the blocks."""
        return self.order is None and all(tile_shape(1, _length(j), self.x)[1] >= _length(j) for _, j in self.groups)

    def of_tokens(self, tokens: Int[Tensor, " n"]) -> Product:
        """The product of these tokens alone."""
        experts = self.experts and replace(self.experts, of=self.experts.of[tokens], gates=self.experts.gates[tokens])
        return Product(self.x[tokens], self.W_enc, self.b_enc, self.norms, experts)

    def first_rows(self, dtype: Precision) -> Block | WholeNumbers | None:
        """Some tokens by all latents that they may have; None if there are none."""
        for tokens, latents in self.groups[:1]:
            rows = min(_length(tokens), block_rows(_length(latents), self.x))
            part = slice(tokens.start, tokens.start + rows)
            return next(self._tiles([(part, latents, 1.0)], dtype))[1]
        return None

    def blocks(self, dtype: Precision, whole: bool = False) -> Iterator[tuple[slice, Block | WholeNumbers]]:
        """Which latents, and tokens by latents, computed in `dtype`. A block is valid until the next one is made.

        All blocks of some tokens come one after the other; if `whole`, one has all their latents.
        """
        parts = []
        for tokens, latents in self.groups:
            rows, columns = tile_shape(_length(tokens), width := _length(latents), self.x)
            if whole and columns < width:
                rows, columns = block_rows(width, self.x), width
            tiles = [(j, _length(j) / width) for j in _split(latents, columns)]
            parts += [(part, j, share) for part in _split(tokens, rows) for j, share in tiles]
        return self._tiles(parts, dtype)

    def _tiles(self, parts: Sequence[tuple[slice, slice, float]], dtype: Precision) -> Iterator[tuple[slice, Any]]:
        size = max((_length(part) * _length(latents) for part, latents, _ in parts), default=0)
        if dtype == "int8":
            yield from self._tiles_of_whole_numbers(parts, self.x.new_empty(size, dtype=torch.int32))
            return
        x, W, b = (t.to(dtype) for t in (self.walk, self.W_enc, self.b_enc))
        buffer = x.new_empty(size)
        weighted = buffer if self.norms is None and self.gates is None else torch.empty_like(buffer)
        for part, latents, share in parts:
            shape = (_length(part), _length(latents))
            out, out_weighted = (t[: shape[0] * shape[1]].view(shape) for t in (buffer, weighted))
            codes = torch.addmm(b[latents], x[part], W[latents].T, out=out)
            norms = None if self.norms is None else self.norms[latents]
            yield latents, Block(codes, self._affinity(codes, norms, part, 1, out_weighted), part.start, share)

    def _tiles_of_whole_numbers(
        self, parts: Sequence[tuple[slice, slice, float]], buffer: Tensor
    ) -> Iterator[tuple[slice, WholeNumbers]]:
        (x, scales), (W, latent_scales) = self.whole_numbers
        gates = None if self.gates is None or self.order is None else self.gates[self.order]
        for part, j, share in parts:
            out = buffer[: _length(part) * _length(j)].view(_length(part), _length(j))
            numbers = torch._int_mm(x[part], W[j].T, out=out)
            norms, own = None if self.norms is None else self.norms[j], None if gates is None else gates[part]
            scale = latent_scales[j]
            yield j, WholeNumbers(numbers, scales[part], scale, self.b_enc[j], norms, own, part.start, share)

    @cached_property
    def whole_numbers(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """The walk and W_enc rounded to whole numbers, and the scales of their rows."""
        size_x, size_W = (t[:: max(1, len(t) // 1024)].square().mean(0).sqrt() for t in (self.walk, self.W_enc))
        even = (size_x / size_W).sqrt()
        even = torch.where((even > 0) & even.isfinite(), even, 1.0)
        return _rounded(self.walk, 1 / even, False), _rounded(self.W_enc, even, self.shared_scales)

    def columns(self, latents: Int[Tensor, " n"]) -> Iterator[tuple[Tensor, Block]]:
        """Which latents, and latents by tokens; for these latents in their order, or expert by expert."""
        for tokens, owned in self.groups:
            mine = latents if self.order is None else latents[(latents >= owned.start) & (latents < owned.stop)]
            for ids in mine.split(block_rows(_length(tokens), self.x)) if len(mine) else ():
                codes = torch.addmm(self.b_enc[ids, None], self.W_enc[ids], self.walk[tokens].T)
                norms = None if self.norms is None else self.norms[ids, None]
                yield ids, Block(codes, self._affinity(codes, norms, tokens, 0, None), tokens.start)

    def _affinity(self, codes: Tensor, norms: Tensor | None, places: slice, axis: int, out: Tensor | None) -> Tensor:
        """`norms` as they are to be multiplied; `axis` is that of the latents."""
        weighted = codes
        if norms is not None:
            weighted = torch.mul(codes, norms.to(codes.dtype), out=out)
        if self.gates is not None:
            assert self.order is not None
            weighted = torch.mul(weighted, self.gates[self.order[places]].unsqueeze(axis), out=out)
        return weighted

    def at(
        self, rows: Int[Tensor, " n"], latents: Int[Tensor, " n"]
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """Codes and affinities of single matches, given in token order, in full precision."""
        offsets = torch.searchsorted(rows, torch.arange(len(self.x) + 1, device=rows.device))
        codes = dot_products(offsets, rows, latents, self.x, self.W_enc) + self.b_enc[latents]
        affinity = codes if self.norms is None else codes * self.norms[latents]
        return codes, affinity if self.gates is None else affinity * self.gates[rows]


def _rounded(t: Float[Tensor, "n d"], factors: Float[Tensor, " d"], shared: bool) -> tuple[Tensor, Tensor]:
    """Rows times factors, as whole numbers up to 127, and what to multiply these with; `shared` by GROUP rows."""
    numbers, scales = torch.empty_like(t, dtype=torch.int8), t.new_empty(len(t))
    for first in range(0, len(t), ROUNDED_ROWS):
        rows = slice(first, first + ROUNDED_ROWS)
        part = t[rows] * factors
        own = part.abs().amax(1)
        if shared and len(own) % GROUP == 0:
            own = own.view(-1, GROUP).amax(1).repeat_interleave(GROUP)
        scales[rows] = (own / 127).clamp_min_(torch.finfo(t.dtype).tiny)
        numbers[rows] = part.div_(scales[rows, None]).round_()
    return numbers, scales


def _length(part: slice) -> int:
    return part.stop - part.start


def _split(part: slice, size: int) -> list[slice]:
    return [slice(start, min(start + size, part.stop)) for start in range(part.start, part.stop, size)]

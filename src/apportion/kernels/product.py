"""The encoder's product, block by block into a reused buffer, and what matches compete by.

    codes_tj    = <x_t, W_enc_j> + b_enc_j
    affinity_tj = codes_tj * norms_j * gates_t           norms (of decoder rows) and gates where they are given

With experts (arXiv 2410.08201) a token has the latents of one expert only, and expert e owns the latents starts[e] to
starts[e + 1] - 1. Tokens are then walked through expert by expert, a block is [tokens of e, latents of e], and no other
product is made.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from apportion.blocks import block_rows
from apportion.kernels.primitives import dot_products


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


@dataclass(frozen=True)
class Block:
    """A part of the product: tokens by latents, or latents by tokens. `affinity` may be `codes` itself."""

    codes: Float[Tensor, "rows columns"]
    affinity: Float[Tensor, "rows columns"]
    first: int
    """Place of its first token in the walk; `Product.tokens_at` says which tokens are where."""


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
        self.x, self.W_enc, self.b_enc, self.norms = x, W_enc, b_enc, norms
        self.gates, self.walk, self.order = None, x, None
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

    def blocks(self, dtype: torch.dtype) -> Iterator[tuple[slice, Block]]:
        """Which latents, and tokens by latents, computed in `dtype`. A block is valid until the next one is made."""
        x, W, b = (t.to(dtype) for t in (self.walk, self.W_enc, self.b_enc))
        parts = [(part, j) for tokens, j in self.groups for part in _split(tokens, block_rows(_length(j), x))]
        buffer = x.new_empty(max((_length(part) * _length(latents) for part, latents in parts), default=0))
        weighted = buffer if self.norms is None and self.gates is None else torch.empty_like(buffer)
        for part, latents in parts:
            shape = (_length(part), _length(latents))
            out, out_weighted = (t[: shape[0] * shape[1]].view(shape) for t in (buffer, weighted))
            codes = torch.addmm(b[latents], x[part], W[latents].T, out=out)
            norms = None if self.norms is None else self.norms[latents]
            yield latents, Block(codes, self._affinity(codes, norms, part, 1, out_weighted), part.start)

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


def _length(part: slice) -> int:
    return part.stop - part.start


def _split(part: slice, size: int) -> list[slice]:
    return [slice(start, min(start + size, part.stop)) for start in range(part.start, part.stop, size)]

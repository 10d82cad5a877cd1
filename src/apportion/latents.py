"""The sparse [tokens, d_sae] matrix that every sparse autoencoder of this library produces.

An SAE's code is almost all zeros, so it is kept row by row (compressed sparse rows):

    tokens       0           1     2                    values   [a  b  c  d]      autograd flows through these
    latents   [. a . b]  [. . . .] [c . . d]            indices  [1  3  0  3]      ascending within a row
                                                        offsets  [0  2  2  4]      row t is offsets[t] : offsets[t + 1]

Zeros are never stored: nnz / tokens is the L0, and a TopK row may hold fewer than k entries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Real
from torch import Tensor

from apportion.devices import marked


@dataclass(frozen=True, eq=False)
class Latents:
    """Active latents of a batch of tokens.

    `shape` is the leading shape of the input (`[batch, pos]`, say); its product is the number of rows.
    Only `values` is differentiable.
    """

    values: Real[Tensor, " nnz"]
    """The codes; in `by_first_latent` the numbers of the matches."""
    indices: Int[Tensor, " nnz"]
    offsets: Int[Tensor, " tokens_plus_1"]
    d_sae: int
    shape: tuple[int, ...]
    _shared: dict[str, Any] = field(default_factory=dict, repr=False)
    """What follows from the matches alone, computed once; handed on to Latents with the same matches. So what `rows`
    and `by_latent` return must not be written to."""

    def __post_init__(self) -> None:
        assert self.values.shape == self.indices.shape, "one index for each value"
        assert self.offsets.shape == (prod(self.shape) + 1,), "one offset for each row and one for the end"

    @staticmethod
    def from_dense(z: Float[Tensor, "*lead d_sae"]) -> Latents:
        """The non-zero entries of a dense code, with gradients through them."""
        flat = z.reshape(-1, z.shape[-1])
        rows, indices = flat.nonzero(as_tuple=True)
        return from_matches(rows, indices, flat[rows, indices], z.shape[-1], tuple(z.shape[:-1]))

    @property
    def tokens(self) -> int:
        return self.offsets.numel() - 1

    @property
    def nnz(self) -> int:
        return self.values.numel()

    def dense(self) -> Float[Tensor, "*lead d_sae"]:
        z = self.values.new_zeros(self.tokens, self.d_sae)
        return z.index_put((self.rows(), self.indices), self.values).reshape(*self.shape, self.d_sae)

    def l0(self) -> Int[Tensor, "*lead"]:
        """Active latents of each token."""
        return self.offsets.diff().reshape(self.shape)

    def rows(self) -> Int[Tensor, " nnz"]:
        """The token of each match. Not to be written to."""
        if "rows" not in self._shared:
            with torch.inference_mode(False):  # what is made within inference mode could never be used for gradients
                tokens = torch.arange(self.tokens, device=self.offsets.device)
                self._shared["rows"] = tokens.repeat_interleave(self.offsets.diff(), output_size=self.nnz)
        return self._shared["rows"]

    def by_latent(self) -> tuple[Int[Tensor, " nnz"], Int[Tensor, " nnz"], Int[Tensor, " d_sae_plus_1"]]:
        """The matches grouped by latent: their order, the token of each in that order, where each latent begins.

        Not to be written to.
        """
        if "by_latent" not in self._shared:
            with torch.inference_mode(False):
                order = self.indices.int().argsort(stable=True)
                counts = self.counts()
                offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
                self._shared["by_latent"] = (order, self.rows()[order], offsets)
        return self._shared["by_latent"]

    def by_first_latent(self) -> tuple[Int[Tensor, " tokens"], Latents]:
        """The tokens in the order of their first latents, and so reordered the matches, with their numbers as values.

        Not to be written to.
        """
        if "by_first_latent" not in self._shared:
            with torch.inference_mode(False):
                numbers = torch.arange(self.nnz, device=self.indices.device)
                padded = torch.cat([self.indices, self.indices.new_zeros(1)])
                order = padded[self.offsets[:-1]].int().argsort()
                flat = Latents(numbers, self.indices, self.offsets, self.d_sae, (self.tokens,))
                self._shared["by_first_latent"] = (order, flat[order])
        return self._shared["by_first_latent"]

    def counts(self) -> Int[Tensor, " d_sae"]:
        """How many tokens each latent is active on."""
        counts = torch.zeros(self.d_sae, dtype=torch.int64, device=self.indices.device)
        return counts.scatter_add_(0, self.indices, torch.ones_like(self.indices))  # bincount waits for a GPU

    def with_values(self, values: Float[Tensor, " nnz"]) -> Latents:
        """The same matches with other values; matches whose new value is zero are dropped."""
        if values.shape != self.values.shape:
            raise ValueError(f"with_values needs a value for each of the {self.nnz} matches, got {list(values.shape)}.")
        changed = replace(self, values=values)
        keep = values != 0
        return changed if bool(keep.all()) else changed.where(keep)

    def where(self, keep: Bool[Tensor, " nnz"]) -> Latents:
        """Only the matches marked True."""
        kept_before = torch.cat([keep.new_zeros(1, dtype=torch.int64), keep.cumsum(0)])
        offsets, places = kept_before[self.offsets], marked(keep)
        return Latents(self.values[places], self.indices[places], offsets, self.d_sae, self.shape)

    def select(self, latents: Int[Tensor, " n"]) -> Latents:
        """The columns `latents` (distinct ids), renumbered 0..n-1 in the order given."""
        renumbered = torch.full((self.d_sae,), -1, device=self.indices.device)
        renumbered[latents] = torch.arange(latents.numel(), device=self.indices.device)
        if int((renumbered >= 0).sum()) != latents.numel():
            raise ValueError("latents[..., ids] needs distinct ids.")
        part = self.where(renumbered[self.indices] >= 0)
        indices = renumbered[part.indices]
        order = (part.rows() * latents.numel() + indices).argsort()
        return Latents(part.values[order], indices[order], part.offsets, latents.numel(), self.shape)

    def __getitem__(self, tokens: Any) -> Latents:
        """`latents[tokens]` slices leading dimensions; `latents[..., ids]` slices latents (a slice, an id, or ids)."""
        if isinstance(tokens, tuple) and tokens and tokens[0] is Ellipsis:
            if len(tokens) != 2:
                raise ValueError("Write latents[..., ids] to choose latents, or latents[tokens] to choose tokens.")
            ids = torch.arange(self.d_sae, device=self.indices.device)[tokens[1]]
            return self.select(ids.reshape(-1))
        kept = torch.arange(self.tokens, device=self.offsets.device).reshape(self.shape)[tokens]
        flat = kept.reshape(-1)
        lengths = self.offsets.diff()[flat]
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        within = torch.arange(int(offsets[-1]), device=flat.device) - offsets[:-1].repeat_interleave(lengths)
        source = self.offsets[flat].repeat_interleave(lengths) + within
        return Latents(self.values[source], self.indices[source], offsets, self.d_sae, tuple(kept.shape))

    def map(self, fn: Callable[[Tensor], Tensor]) -> Latents:
        """Apply a function of `values` (an edit, a gate, a scale)."""
        return self.with_values(fn(self.values))

    def to(self, *args: object, **kwargs: object) -> Latents:
        """Move values (device or dtype) and the index tensors (device only)."""
        values = self.values.to(*args, **kwargs)  # type: ignore[arg-type]
        indices, offsets = (t.to(device=values.device) for t in (self.indices, self.offsets))
        return Latents(values, indices, offsets, self.d_sae, self.shape)

    def detach(self) -> Latents:
        return replace(self, values=self.values.detach())

    def __repr__(self) -> str:
        l0 = self.nnz / max(self.tokens, 1)
        return f"Latents(shape={[*self.shape, self.d_sae]}, nnz={self.nnz}, l0={l0:.2f})"


def from_matches(
    rows: Int[Tensor, " nnz"],
    indices: Int[Tensor, " nnz"],
    values: Float[Tensor, " nnz"],
    d_sae: int,
    shape: tuple[int, ...],
) -> Latents:
    """Latents from (token, latent, value) triples that are already in (token, latent) order."""
    offsets = torch.searchsorted(rows, torch.arange(prod(shape) + 1, device=rows.device))
    return Latents(values, indices, offsets, d_sae, shape, {"rows": rows})


def concatenated(parts: Sequence[Latents]) -> Latents:
    """The rows of several Latents one after the other, in one leading dimension; at least one part."""
    ends = torch.cat([part.offsets[-1:] for part in parts]).cumsum(0)
    later = [part.offsets[1:] + end for part, end in zip(parts[1:], ends, strict=False)]
    return Latents(
        torch.cat([part.values for part in parts]),
        torch.cat([part.indices for part in parts]),
        torch.cat([parts[0].offsets, *later]),
        parts[0].d_sae,
        (sum(part.tokens for part in parts),),
    )

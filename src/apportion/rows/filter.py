"""The token filter: which rows take part in training, calibration and evaluation.

A few tokens of a language model carry activations that have nothing to do with the text. In SmolLM2 at layer 15 the
first position of every context has norm 23,700 against a median of 170 (an attention sink), and so has about one other
token in 10,000. Left in, these rows hold 77 % of all variance in a single direction and make every FVU look excellent.
So three kinds of row are left out, and reported:

    first_position   position 0 of a context
    special          BOS, EOS, padding and the like
    norm_outlier     norm above `norm_outlier` times the median norm of ordinary rows, or not a number

The median is that of all rows of a cache, fitted again when rows are added (rows/norms.py); a live source takes that of
its first rows. A filter is a plain value that gives the same answer for the same row for ever, so it travels with the
SAE that was trained with it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, get_type_hints

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from apportion.about import About
from apportion.fields import check_fields
from apportion.settings import check_names

FIT_ROWS = 50_000
REASONS: tuple[str, ...] = ("first_position", "special", "norm_outlier")


@dataclass(frozen=True)
class TokenFilter:
    """Settings of the filter and, once fitted, the median norm and the special tokens it was fitted with."""

    special_tokens: bool = True
    """Leave out the tokenizer's special tokens."""
    first_position: bool = True
    """Leave out position 0 of each context."""
    norm_outlier: float | None = 10.0
    """Leave out rows whose norm is above this many times the median norm; None or 0 keeps them."""
    median_norm: float | None = None
    """The median norm of ordinary rows; set by `fit`."""
    special_ids: tuple[int, ...] = ()
    """The ids of special tokens; set by `fit`."""

    def __post_init__(self) -> None:
        if self.norm_outlier is not None and not (self.norm_outlier == 0 or self.norm_outlier > 1):
            raise ValueError(
                f"norm_outlier={self.norm_outlier} would leave out ordinary rows: use a factor above 1 "
                "(10 is usual), or None to keep all rows"
            )

    @property
    def is_fitted(self) -> bool:
        return self.median_norm is not None or not self.norm_outlier

    @property
    def limit(self) -> float | None:
        """The norm above which a row is an outlier, in float32 as norms are; None if there is no such limit."""
        if not self.norm_outlier or not self.median_norm:
            return None
        return torch.tensor(self.norm_outlier * self.median_norm, dtype=torch.float32).item()

    def fit(
        self,
        norms: Float[Tensor, " n"],
        tokens: Int[Tensor, " n"],
        positions: Int[Tensor, " n"],
        special_ids: Iterable[int] = (),
    ) -> TokenFilter:
        """This filter with the median of `norms` over ordinary rows (neither position 0 nor a special token).

        A filter that has a median already keeps it: evaluation data can be collected with the filter of training.
        """
        fitted = replace(self, special_ids=tuple(sorted(set(special_ids))))
        if self.median_norm is not None:
            return fitted
        ordinary = kinds_of(tokens, positions, fitted.special_ids)["ordinary"]
        norms = norms[ordinary] if ordinary.any() else norms
        return replace(fitted, median_norm=float(norms.float().median()))

    def reasons(
        self, norms: Float[Tensor, "*rows"], tokens: Int[Tensor, "*rows"] | None, positions: Int[Tensor, "*rows"] | None
    ) -> dict[str, Bool[Tensor, "*rows"]]:
        """For each reason the rows left out because of it; a row counts under the first reason that applies."""
        if not self.is_fitted:
            raise ValueError(
                "the token filter has no median norm yet: call fit on the first rows collected, "
                "or set norm_outlier=None"
            )
        never = torch.zeros_like(norms, dtype=torch.bool)
        first = positions == 0 if self.first_position and positions is not None else never
        special = _is_in(tokens, self.special_ids) if self.special_tokens and tokens is not None else never
        outlier = never if (limit := self.limit) is None else ~(norms <= limit)
        return {"first_position": first, "special": special & ~first, "norm_outlier": outlier & ~first & ~special}

    def mask(
        self,
        x: Float[Tensor, "*rows d_in"],
        tokens: Int[Tensor, "*rows"] | None = None,
        positions: Int[Tensor, "*rows"] | None = None,
    ) -> Bool[Tensor, "*rows"]:
        """True for the rows that take part; a reason whose tokens or positions are not given does not apply."""
        return self.mask_of(row_norms(x), tokens, positions)

    def mask_of(
        self,
        norms: Float[Tensor, "*rows"],
        tokens: Int[Tensor, "*rows"] | None = None,
        positions: Int[Tensor, "*rows"] | None = None,
    ) -> Bool[Tensor, "*rows"]:
        """The same for rows of these norms."""
        left_out = self.reasons(norms, tokens, positions)
        return ~(left_out["first_position"] | left_out["special"] | left_out["norm_outlier"])

    def counted(
        self,
        norms: Float[Tensor, " n"],
        tokens: Int[Tensor, " n"],
        positions: Int[Tensor, " n"],
        counts: dict[str, int],
    ) -> Bool[Tensor, " n"]:
        """True for the rows of these norms that take part; the others are counted by their reasons."""
        mask = torch.ones_like(norms, dtype=torch.bool)
        for reason, rows in self.reasons(norms, tokens, positions).items():
            counts[reason] += int(rows.sum())
            mask &= ~rows
        return mask

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"special_ids": list(self.special_ids)}

    @staticmethod
    def from_dict(values: dict[str, Any]) -> TokenFilter:
        """What `to_dict` made. ValueError, naming it, for a setting of another kind or one that there is not."""
        check_names(values, (field.name for field in fields(TokenFilter)), "the token filter")
        check_fields(values, {}, get_type_hints(TokenFilter), "filter")
        return TokenFilter(**{**values, "special_ids": tuple(values.get("special_ids", ()))})


def trained_filter(about: About, hookpoint: str | None = None) -> TokenFilter | None:
    """The filter in the description of rows, at one hookpoint if there are several; None if it does not say."""
    found = about.at(hookpoint).filter
    return None if found is None else TokenFilter.from_dict(found)


def row_norms(x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows"]:
    """Euclidean norms in float32, whatever the dtype of x."""
    return x.float().norm(dim=-1)


def kinds_of(
    tokens: Int[Tensor, "*rows"], positions: Int[Tensor, "*rows"], special_ids: tuple[int, ...]
) -> dict[str, Bool[Tensor, "*rows"]]:
    """Of what kind each row is: a first position, else a special token, else ordinary."""
    first, special = positions == 0, _is_in(tokens, special_ids)
    return {"ordinary": ~first & ~special, "first_position": first, "special": special & ~first}


def _is_in(tokens: Int[Tensor, "*rows"], ids: tuple[int, ...]) -> Bool[Tensor, "*rows"]:
    return torch.isin(tokens, torch.tensor(ids, dtype=tokens.dtype, device=tokens.device))

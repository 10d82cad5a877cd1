"""Do experts share the work, or learn the same directions over again? After arXiv 2410.08201.

    duplicated     row j is, if some other row has a cosine above 0.9 with it
    nearest_ji     max over the rows i' of expert i, without j itself, of cos(j, i')
    similarity_hi  mean over the rows j of expert h of nearest_ji: the diagonal is within experts, the rest between

A Switch SAE that learned every direction once would have rows nearer to each other within experts than under a split of
the same rows at random, and no more duplicates than a plain SAE. The same measures of a plain SAE, split into as many
parts, are what to compare with. They apply to decoder and encoder rows alike.

Cosines are made in row blocks: n^2 d multiplications, and n * E numbers kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from apportion.blocks import block_rows
from apportion.evals.evaluator import Evaluator, Found, Subject, add_evaluator, found_in
from apportion.evals.figures import Figure
from apportion.matching import directions

DUPLICATE = 0.9
"""Cosine above which two rows count as duplicates, as in the paper's code."""


@dataclass(frozen=True)
class Geometry:
    """Figures of one dictionary in E equal parts; NaN where there is nothing to compare (E = 1; one row per expert)."""

    duplicated: float
    """Share of rows with a duplicate anywhere."""
    duplicated_elsewhere: float
    """Share of rows with a duplicate in another expert."""
    within: float
    """Mean cosine of a row with the nearest other one of its expert."""
    between: float
    """Mean cosine of a row with the nearest one of another expert, over all other experts."""
    within_at_random: float
    """`within`, had the rows been split at random."""
    between_at_random: float
    """`between`, had the rows been split at random."""


@final
@add_evaluator
class OfDecoder(Evaluator):
    """Of the decoder, in as many parts as there are experts."""

    name = "geometry"
    needs = frozenset()
    figures = (
        Figure("duplicated", "duplicated", ".1%", "latents with a near copy: a cosine above 0.9", "lower"),
        Figure("duplicated_elsewhere", "copied", ".1%", "latents with a near copy in another expert", "lower", None),
        Figure("within", "within", ".3f", "mean cosine with the nearest latent of the same expert", column=None),
        Figure("between", "between", ".3f", "mean cosine with the nearest latent of another expert", column=None),
    )

    def run(self, subject: Subject) -> Iterator[Found]:
        experts = getattr(subject.sae, "num_experts", 1)
        yield from found_in(vars(geometry(subject.sae.get_parameter("W_dec"), experts)), self.figures, 0, "weights")


@torch.no_grad()
def geometry(rows: Float[Tensor, " n *row"], num_experts: int, *, seed: int = 0) -> Geometry:
    """Measure decoder (or encoder) rows whose expert e owns the rows e n / E .. (e + 1) n / E - 1.

    `seed` draws the random split. Raises ValueError if the rows do not divide into experts of equal size.
    """
    nearest = nearest_cosines(rows, num_experts)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).to(rows.device)
    elsewhere = torch.where(_own(nearest), -torch.inf, nearest)
    return Geometry(
        duplicated(nearest).double().mean().item(),
        duplicated(elsewhere).double().mean().item(),
        *_within_and_between(nearest),
        *_within_and_between(nearest_cosines(rows[order], num_experts)),
    )


@torch.no_grad()
def nearest_cosines(rows: Float[Tensor, " n *row"], num_experts: int = 1) -> Float[Tensor, "n num_experts"]:
    """For each row the largest cosine with a row of each expert, itself left out (-inf if it is its expert's only)."""
    if num_experts < 1 or len(rows) % num_experts:
        raise ValueError(f"{len(rows)} rows do not divide into {num_experts} experts of equal size.")
    unit = directions(rows)
    found = []
    for start in range(0, len(unit), size := block_rows(len(unit), unit)):
        cosines = unit[start : start + size] @ unit.T
        cosines.diagonal(start).fill_(-torch.inf)
        found.append(cosines.unflatten(1, (num_experts, -1)).amax(2))
    return torch.cat(found) if found else unit.new_zeros(0, num_experts)


def duplicated(nearest: Float[Tensor, "n num_experts"], above: float = DUPLICATE) -> Bool[Tensor, " n"]:
    """The rows with a near copy, from `nearest_cosines`."""
    return nearest.amax(1) > above


def similarity(nearest: Float[Tensor, "n num_experts"]) -> Float[Tensor, "num_experts num_experts"]:
    """Entry [h, i]: mean over the rows of expert h of the cosine with the nearest row of expert i."""
    return nearest.double().unflatten(0, (nearest.shape[1], -1)).mean(1)


def _own(nearest: Float[Tensor, "n num_experts"]) -> Bool[Tensor, "n num_experts"]:
    n, num_experts = nearest.shape
    expert = torch.arange(num_experts, device=nearest.device)
    return expert.repeat_interleave(n // num_experts)[:, None] == expert


def _within_and_between(nearest: Float[Tensor, "n num_experts"]) -> tuple[float, float]:
    similar = similarity(nearest)
    own = torch.eye(len(similar), dtype=torch.bool, device=similar.device)
    within, between = (similar[part].mean().item() for part in (own, ~own))
    return within if within > -torch.inf else float("nan"), between

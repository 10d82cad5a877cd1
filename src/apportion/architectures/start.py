"""How training begins: with latents that reconstruct the first rows already, where random ones overshoot them.

    d_j    = (1 - w) r_j + w u_j, at norm 1        r_j a random direction, u_j that of a random row about the mean
    W_enc  = c d      W_dec = d      b_enc = 0     b_dec = mean y
    c      = <y - b_dec, v> / ||v||^2              v = y_hat - b_dec at c = 1, over some rows

c is the least-squares fit of the reconstruction: codes, and with them v, are proportional to W_enc, and no rule
chooses otherwise when all affinities are multiplied by one number. Where decoder rows have no fixed norm c goes into
them. Half of a direction is drawn at random, so that latents are no copies of rows, which would hardly ever fire for
any other; half comes from the data, so that all lie where the data lie.

Rows are prepared ones (scaled data). Which are drawn follows from the seed and their number. Of rows that are too few
each serves several latents; those that lie at the mean say nothing, and leave a latent its random direction.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from apportion.allocation import StepContext

if TYPE_CHECKING:
    from apportion.architectures.affine import Affine

DATA_SHARE = 0.5
"""w."""
FITTED_ROWS = 4096
"""Rows for the scale: as many as a batch has."""

RIDGE = 1e-3
"""Of a linear map, as a share of the mean square of x."""


def generator_for(seed: int | None) -> torch.Generator | None:
    """Other numbers than the initial weights are drawn with; None, torch's global generator, for no seed."""
    return None if seed is None else torch.Generator().manual_seed((seed << 8) + 1)


def mixed(
    directions: Float[Tensor, " d_sae *row"], rows: Float[Tensor, " d_sae *row"], share: float
) -> Float[Tensor, " d_sae *row"]:
    """Between the directions and those of the rows, at norm 1; the directions alone for rows of norm zero."""
    r, u = (t.flatten(1) / t.flatten(1).norm(dim=1, keepdim=True).clamp_min(1e-12) for t in (directions, rows))
    d = (1 - share) * r + share * u
    return (d / d.norm(dim=1, keepdim=True)).view_as(directions)


def drawn(n: int, rows: int, generator: torch.Generator | None) -> Int[Tensor, " n"]:
    """n places among the rows, none twice before every one was drawn."""
    rounds = [torch.randperm(rows, generator=generator) for _ in range(-(-n // rows))]
    return torch.cat(rounds)[:n]


def least_squares(y: Tensor, v: Tensor) -> float:
    """The number by which v comes closest to y; 1 if there is none above zero."""
    best = ((y.double() * v.double()).sum() / v.double().square().sum()).item()
    return best if best > 0 and best < float("inf") else 1.0


@torch.no_grad()
def begin(sae: Affine, x: Float[Tensor, " n *row"], y: Float[Tensor, " n *out"]) -> None:
    """Set the weights of an SAE that has not been trained, from prepared rows and their targets."""
    generator = generator_for(sae.config.seed)
    sae.b_dec.copy_(y.mean(0))
    centred = x - (sae.b_dec if sae.config.subtract_b_dec else x.mean(0))
    sae.set_directions(mixed(sae.W_enc, centred[sae.rows_for_latents(x, generator)], DATA_SHARE))
    some = drawn(min(FITTED_ROWS, len(x)), len(x), generator)
    x, y = x[some], y[some]
    sae.fit_decoder(x, y)
    made = sae.forward_scaled(x, StepContext())
    sae.rescale(least_squares(y - sae.b_dec, made.y_hat - sae.b_dec))


def ridge(x: Float[Tensor, "n d_in"], y: Float[Tensor, "n d_out"]) -> Float[Tensor, "d_out d_in"]:
    """The linear map of least squares from x to y; directions in which x hardly spreads are left alone."""
    x64, y64 = x.double(), y.double()
    gram = x64.T @ x64
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    return torch.linalg.solve(gram, x64.T @ y64).T.to(x)

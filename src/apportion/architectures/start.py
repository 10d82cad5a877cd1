"""How training begins: with latents that reconstruct the first rows already, where random ones overshoot them.

    d_j    = (1 - w) r_j + w u_j, at norm 1        r_j a random direction
    u_j    = (x - mean x) / std x, at norm 1       of a random row x; mean and std of every dimension
    W_enc  = c d      W_dec = d      b_dec = mean y
    c      = <y - b_dec, v> / ||v||^2              v = y_hat - b_dec at c = 1, over some rows

c is the least-squares fit of the reconstruction: codes, and with them v, are proportional to W_enc, and no rule
chooses otherwise when all affinities are multiplied by one number. Where decoder rows have no fixed norm c goes into
them. Biases are zero, but for SAEs that a penalty makes sparse (sparsity.py). A part of every direction is drawn at
random, so that latents are no copies of rows, which would hardly ever fire for any other. In units of their standard
deviation all dimensions count alike: else most rows would lie in the few of large variance, where latents would crowd
out each other. What it is worth: docs/start.md. All of it is ours; no paper is followed.

Rows are prepared ones (scaled data). Which are drawn follows from the initial weights and from how many there are. Of
too few each serves several latents; those that lie at the mean say nothing, and leave a latent its random direction.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from apportion.allocation import MutualChoice, Rule, StepContext

if TYPE_CHECKING:
    from apportion.architectures.affine import Affine

SHARE_OF_OWN, SHARE_IN_COMMON = 0.4, 0.7
"""w, where every token has a budget of its own or none, and where those of a batch have one in common: latents that are
alike do not last there, so that it may be larger (and it is for experts, switch.py)."""
FITTED_ROWS = 1024
"""Rows for the scale, and as many others for thresholds and decoders: about what a batch has."""
LEAST_SPREAD = 1e-2
"""Standard deviation of a dimension, as a share of the rms over all: less counts as so much, for it may be noise."""
RIDGE = 1e-3
"""Of a linear map, as a share of the mean square of x."""


def generator_for(weights: Tensor) -> torch.Generator:
    """One that follows from the weights that were drawn, and so from their seed, or torch's where they had none."""
    first, second = weights.detach().flatten()[[0, -1]].float().cpu().view(torch.int32).tolist()
    return torch.Generator().manual_seed((first << 32 | second & 0xFFFFFFFF) & (1 << 63) - 1)


def mixed(
    directions: Float[Tensor, " d_sae *row"], rows: Float[Tensor, " d_sae *row"], share: float
) -> Float[Tensor, " d_sae *row"]:
    """Between the directions and those of the rows, at norm 1; the directions alone for rows of norm zero."""
    r, u = (t.flatten(1) / t.flatten(1).norm(dim=1, keepdim=True).clamp_min(1e-12) for t in (directions, rows))
    of_rows = share * u.any(1, keepdim=True)
    d = (1 - of_rows) * r + of_rows * u
    return (d / d.norm(dim=1, keepdim=True)).view_as(directions)


def standardised(rows: Float[Tensor, " m *row"], centred: Float[Tensor, " n *row"]) -> Float[Tensor, " m *row"]:
    """Rows in units of the standard deviation that each dimension has in centred rows."""
    deviations = centred / centred.abs().max().clamp_min(torch.finfo(centred.dtype).tiny)
    spread = deviations.square().mean(0).sqrt()
    least = LEAST_SPREAD * spread.square().mean().sqrt()
    return rows / spread.clamp_min(least) if least > 0 else rows


def drawn(n: int, rows: int, generator: torch.Generator) -> Int[Tensor, " n"]:
    """n places among the rows, none twice before every one was drawn."""
    rounds = [torch.randperm(rows, generator=generator) for _ in range(-(-n // rows))]
    return torch.cat(rounds)[:n]


def usual_share(rule: Rule) -> float:
    """w of SAEs with this rule."""
    return SHARE_IN_COMMON if rule.batch_coupled else SHARE_OF_OWN


def least_squares(y: Tensor, v: Tensor) -> float:
    """The number by which v comes closest to y; 1 if there is none above zero."""
    best = ((y.double() * v.double()).sum() / v.double().square().sum()).item()
    return best if best > 0 and best < float("inf") else 1.0


def rows_needed(sae: Affine) -> int:
    """How many rows a start is made of, if there are as many."""
    return max(sae.d_sae, 2 * FITTED_ROWS)


@torch.no_grad()
def begin(
    sae: Affine, x: Float[Tensor, " n *row"], y: Float[Tensor, " n *out"], generator: torch.Generator, share: float
) -> None:
    """Set the weights of an SAE that has not been trained, from prepared rows in random order and their targets."""
    sae.b_dec.copy_(y.mean(0))
    centred = x - (sae.b_dec if sae.config.subtract_b_dec else x.mean(0))
    chosen = sae.rows_for_latents(x, generator)
    sae.set_directions(mixed(sae.W_enc, standardised(centred[chosen], centred), share))
    sae.fit_rest(x[:FITTED_ROWS], y[:FITTED_ROWS])
    x, y = x[-FITTED_ROWS:], y[-FITTED_ROWS:]
    made = sae.forward_scaled(x, StepContext())
    sae.rescale(least_squares(y - sae.b_dec, made.y_hat - sae.b_dec))


def cut_for(sae: Affine, x: Float[Tensor, " n *row"], l0: float) -> float | None:
    """What a pre-activation must exceed for so many latents of a prepared row to do so, in the mean; None if none is
    above zero."""
    rule = MutualChoice(MutualChoice.Config(k=min(l0, sae.d_sae)), sae.d_sae)
    values = sae.encode_centred(sae.centred(x), sae.selection(rule=rule)).values
    return values.min().item() * (1 - 1e-5) if len(values) else None  # below what rounding makes of equal ones


def ridge(x: Float[Tensor, "n d_in"], y: Float[Tensor, "n d_out"]) -> Float[Tensor, "d_out d_in"]:
    """The linear map of least squares from x to y; directions in which x hardly spreads are left alone."""
    x64, y64 = x.double(), y.double()
    gram = x64.T @ x64
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    return torch.linalg.solve(gram, x64.T @ y64).T.to(x)

"""Where training begins: every SAE from random directions and from the data (architectures/start.py), side by side.

    python -m apportion.recipes.start --out results/start --acts acts/train --eval-acts acts/valid --model MODEL

The tables are those of recipes/family.py with a line for each start, on rows with known features and on a cache, and
two figures that would show latents which are copies of rows or of each other. A start may also be a number, the share
of the data in every direction: 0 is the scale alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Annotated, Any, ClassVar

import torch
from tyro.conf import arg

from apportion.architectures import SAE, SAES
from apportion.evals import geometry
from apportion.evals.figures import Figure, add_figures
from apportion.matching import directions, nearest_rows, pair_cosines
from apportion.recipes.command import listed, main
from apportion.recipes.family import FIGURES_OF, Caches, Family, new_sae, why_left_out
from apportion.recipes.parts import Part, TruthPart
from apportion.rows import Batch
from apportion.training.trainer import FIT_INPUT_ROWS

LEARNED = tuple(name for name, entry in SAES.items() if entry.settings().get("init") == "data")
STARTS = ("random", "data")
NEAR = Figure(
    "nearest_row",
    "nearest row",
    ".3f",
    "mean over latents of the largest cosine of the decoder row with a training row, about the mean",
)
add_figures(NEAR)


class Copies:
    """A part that also looks for latents that are copies."""

    def evaluate(self, sae: SAE) -> dict[str, Any]:
        found = super().evaluate(sae)  # type: ignore[misc]
        rows = self.source(sae, seed=0).sample(FIT_INPUT_ROWS)  # type: ignore[attr-defined]
        duplicated = geometry.geometry(sae.get_parameter("W_dec"), 1).duplicated
        return {**found, "duplicated": duplicated, NEAR.key: nearest_row(sae, rows)}


@dataclass(frozen=True, kw_only=True)
class Truth(Copies, TruthPart):
    pass


@dataclass(frozen=True, kw_only=True)
class Cache(Copies, Caches):
    pass


@dataclass(frozen=True, kw_only=True)
class Start(Family):
    """Compare where training begins."""

    saes: listed(str, "A,B,..") = LEARNED  # pyright: ignore[reportInvalidTypeForm]
    """Which SAEs."""
    starts: listed(str, "A,B,..") = STARTS  # pyright: ignore[reportInvalidTypeForm]
    """Which starts."""
    truth: Truth = field(default_factory=Truth)
    cache: Annotated[Cache, arg(name="")] = field(default_factory=Cache)
    figures: ClassVar = {part: (*figures, "duplicated", NEAR.key) for part, figures in FIGURES_OF.items()}

    def arms(self, part: Part) -> dict[str, Callable[[int], SAE]]:
        names = [sae for sae in self.saes if why_left_out(part, sae) is None]
        starts = [(start, share_of(start)) for start in self.starts]
        return {
            f"{sae} {start}": partial(begun, part, sae, start, share) for sae, (start, share) in product(names, starts)
        }


def share_of(start: str) -> float | None:
    """Of the data, where a start is a number."""
    if start in STARTS:
        return None
    try:
        share = float(start)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise ValueError(f"--starts takes {', '.join(STARTS)} and shares between 0 and 1; got {start!r}.")
    return share


def begun(part: Part, name: str, start: str, share: float | None, seed: int) -> SAE:
    """An untrained SAE that will begin so."""
    sae = new_sae(part, name, seed, init="random" if start == "random" else "data")
    if share is not None:
        sae.data_share = share  # type: ignore[assignment]
    return sae


@torch.no_grad()
def nearest_row(sae: SAE, rows: Batch) -> float:
    """The figure of that name."""
    _, y = sae.prepare(rows.x, rows.target)
    latents, y = directions(sae.get_parameter("W_dec")), directions(y - y.mean(0))
    nearest, _ = nearest_rows(latents, y)
    return pair_cosines(latents, y, nearest).double().mean().item()


if __name__ == "__main__":
    sys.exit(main(Start, "start", __doc__))

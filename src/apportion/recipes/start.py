"""Where training begins: every SAE from random directions and from the data (architectures/start.py), side by side.

    python -m apportion.recipes.start --out results/start --acts acts/train --eval-acts acts/valid --model MODEL

The tables are those of recipes/family.py with a line for each start, on rows with known features and on a cache.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Literal

from apportion.architectures import SAE, SAES
from apportion.recipes.command import listed, main
from apportion.recipes.family import Family, new_sae, why_left_out
from apportion.recipes.parts import Part

LEARNED = tuple(name for name, entry in SAES.items() if "init" in entry.architecture.Config.__dataclass_fields__)
INITS = ("random", "data")


@dataclass(frozen=True, kw_only=True)
class Start(Family):
    """Compare where training begins."""

    saes: listed(str, "A,B,..") = LEARNED  # pyright: ignore[reportInvalidTypeForm]
    """Which SAEs."""
    inits: tuple[Literal["random", "data"], ...] = INITS
    """Which starts."""

    def arms(self, part: Part) -> dict[str, Callable[[int], SAE]]:
        names = [sae for sae in self.saes if why_left_out(part, sae) is None]
        return {f"{sae} {init}": partial(new_sae, part, sae, init=init) for sae, init in product(names, self.inits)}


if __name__ == "__main__":
    sys.exit(main(Start, "start", __doc__))

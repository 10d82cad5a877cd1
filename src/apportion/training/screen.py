"""Which screen a run looks for its matches with (kernels/select.py), and whether that misses any.

With screen="auto" the fastest at the shape at hand is taken at the first step (kernels/fastest.py), for the rest of the
run and when it is resumed, or until latents get budgets of their own. How far below the cut it looks, the margin, is
SIGMAS times the distance by which it moves affinities, which is measured every CHECK_STEPS steps. In the same steps
the affinities of some tokens are computed in full precision, and counted is what exceeds the cut and was not chosen: if
that is more than MISSED of the matches, the margin is wider from then on. A margin beyond WIDEST ends the screen.
"""

from __future__ import annotations

import logging
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from apportion.allocation import Screen, Selection, StepContext
from apportion.architectures import SAE
from apportion.architectures.affine import Affine
from apportion.kernels.fastest import fastest
from apportion.kernels.select import MARGINS
from apportion.rows.batch import Batch

logger = logging.getLogger(__name__)

LEAST_WORK = 2**28
"""Multiplications and additions of a product below which nothing is measured: there it is not what takes the time."""
CHECK_STEPS, CHECK_TOKENS = 25, 64
MISSED = 1e-4
"""Share of the matches that may be missed."""
ENOUGH = 20_000
"""Matches over which that is judged."""
SIGMAS, WIDER = 3.0, 1.5
"""Of how far affinities move; and what is multiplied by it where that misses too many."""
NARROWEST, WIDEST, FALL = 2e-3, 0.3, 0.9
"""The least and the largest margin; it becomes smaller by no more than this factor at a time."""


class Screening:
    """Of one SAE."""

    def __init__(self, sae: SAE, asked: str | None) -> None:
        self.asked = asked
        self.screen: Screen = None if asked == "auto" else asked  # type: ignore[assignment]
        self.margin, self.factor = MARGINS.get(self.screen or "", 0.0), 1.0
        self.checked = self.missed = self.steps = 0
        self.share: float | None = None
        """Of the matches, that were missed when it was last judged."""
        self.settled: str | None = None if isinstance(sae, Affine) else ""
        """For which kind of budget it has been chosen; "" if there is nothing to choose."""

    def settle(self, sae: SAE, batch: Batch) -> None:
        """Before a step: choose by time, or say that what was asked for is slow; once for each kind of budget."""
        if self.settled == "":
            return
        assert isinstance(sae, Affine)
        of_each = isinstance(sae.allocation.budget(len(batch.x)), Tensor)
        kind = "each latent" if of_each else "all" if sae.takes_screen else ""
        if kind == self.settled or (self.settled and self.asked != "auto"):
            return
        self.settled = kind
        if not kind:
            return
        best, times, margin = self.measured(sae, batch)
        said = ", ".join(f"{screen or 'float32'} {1e3 * taken:.1f} ms" for screen, taken in times.items())
        if self.asked == "auto":
            self.screen, self.margin = best, margin
            if said:
                logger.info("screen: %s (finding the matches of a step: %s)", best, said)
        elif self.screen and times and times.get(self.screen, 0.0) > times[None]:
            logger.warning(
                'screen = "%s" is slower here than none (finding the matches of a step: %s)', self.screen, said
            )

    @torch.no_grad()
    def measured(self, sae: Affine, batch: Batch) -> tuple[Screen, dict[Screen, float], float]:
        """The fastest, seconds of each, and the margin that it wants; no seconds where the product is small, or not in
        float32."""
        x, _ = sae.prepare(batch.x, batch.target)
        share = 1 / getattr(sae, "num_experts", 1)
        if x.dtype != torch.float32 or 2 * len(x) * sae.W_enc.numel() * share < LEAST_WORK:
            return None, {}, 0.0
        warm: dict[Screen, Tensor | None] = {}
        margins: dict[Screen, float] = {}

        def search(screen: Screen) -> None:
            check = int(screen is not None and screen not in margins)
            selection = Selection(sae.allocation, warm.get(screen), screen, margin=margins.get(screen), check=check)
            sae.forward_scaled(x, StepContext(selection=selection))
            warm[screen] = selection.next_warm
            if selection.moved is not None:
                margins[screen] = max(NARROWEST, SIGMAS * selection.moved)

        best, times = fastest(search, x.device)
        margin = margins.get(best, MARGINS.get(best or "", 0.0))
        return (best, times, margin) if margin <= WIDEST else (None, times, 0.0)

    def selection(self, sae: SAE, warm: Any) -> Selection:
        """How a step chooses."""
        self.steps += 1
        check = CHECK_TOKENS if self.screen and self.steps % CHECK_STEPS == 1 % CHECK_STEPS else 0
        return Selection(sae.allocation, warm, self.screen, margin=self.margin or None, check=check)

    def note(self, selection: Selection) -> None:
        """After the step: how far it moved affinities, and what it missed."""
        if not self.screen or not selection.check:
            return
        self.checked, self.missed = self.checked + selection.checked, self.missed + selection.missed
        if self.checked >= ENOUGH:
            self.share, self.checked, self.missed = self.missed / self.checked, 0, 0
            self.factor *= WIDER if self.share > MISSED else 1.0
        if selection.moved is not None:
            self.margin = max(NARROWEST, FALL * self.margin, SIGMAS * self.factor * selection.moved)
        if self.margin > WIDEST:
            logger.warning('screen = "%s" moves affinities by %.2g and is given up', self.screen, selection.moved)
            self.screen = None

    def state(self) -> dict[str, Any]:
        """What a resumed run goes on with; JSON-able."""
        kept = ("screen", "margin", "factor", "checked", "missed", "steps", "share", "settled")
        return {name: getattr(self, name) for name in kept} if self.settled else {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on with what `state` returned, unless another screen was asked for."""
        if state and (self.asked == "auto" or state["screen"] in (None, self.asked)):
            for name, value in state.items():
                setattr(self, name, value)


def check_state(state: Any) -> None:
    """ValueError unless a `Screening` may have returned this as its state."""
    kinds = {
        "screen": (str, NoneType), "settled": str, "margin": float, "factor": float, "share": (float, NoneType),
        "checked": int, "missed": int, "steps": int,
    }  # fmt: skip
    alike = isinstance(state, dict) and (not state or state.keys() == kinds.keys())
    if not alike or not all(isinstance(value, kinds[name]) for name, value in state.items()):
        raise ValueError(f"the state of a screen is {state!r}")
    if state and state["screen"] not in (None, *MARGINS):
        raise ValueError(f"screen is {state['screen']!r}")

"""Which screen a run looks for its matches with (kernels/select.py), and whether that misses any.

With screen="auto" the fastest at the shape at hand is taken at the first step (kernels/fastest.py), for the rest of the
run and when it is resumed. Every CHECK_STEPS steps the affinities of some tokens are computed in full precision, and
counted is what exceeds the cut and was not chosen. If that is more than MISSED of the matches, the screen looks further
below the cut from then on; if it has to look too far, it is given up.
"""

from __future__ import annotations

import logging
from typing import Any

from apportion.allocation import Screen, Selection
from apportion.architectures import SAE
from apportion.architectures.affine import Affine
from apportion.kernels.fastest import fastest
from apportion.kernels.select import MARGINS
from apportion.rows.batch import Batch

logger = logging.getLogger(__name__)

CHECK_STEPS, CHECK_TOKENS = 25, 64
MISSED = 1e-4
"""Share of the matches that may be missed."""
ENOUGH = 20_000
"""Matches over which that is judged."""
WIDER, WIDEST = 1.5, 0.3
"""What a margin that is too small is multiplied by, and what is too large for one."""


class Screening:
    """Of one SAE."""

    def __init__(self, sae: SAE, asked: str | None) -> None:
        self.asked = asked
        self.screen: Screen = None if asked == "auto" else asked  # type: ignore[assignment]
        self.margin = MARGINS.get(self.screen or "", 0.0)
        self.checked = self.missed = self.steps = 0
        self.share: float | None = None
        """Of the matches, that were missed when it was last judged."""
        self.settled = not isinstance(sae, Affine)

    def settle(self, sae: SAE, batch: Batch) -> None:
        """Before the first step: choose by time, or say that what was asked for is slow."""
        if self.settled:
            return
        self.settled = True
        assert isinstance(sae, Affine)
        budget = sae.allocation.budget(len(batch.x))
        if budget is None:  # no cut to look above
            return
        x = sae.prepare(batch.x, batch.target)[0].flatten(1)
        matches = budget if isinstance(budget, int) else int(budget.sum())
        share = 1 / getattr(sae, "num_experts", 1)
        best, times = fastest(x, sae.W_enc.detach().flatten(1), matches, share)
        said = ", ".join(f"{screen or 'float32'} {1e3 * taken:.1f} ms" for screen, taken in times.items())
        if self.asked == "auto":
            self.screen, self.margin = best, MARGINS.get(best or "", 0.0)
            if said:
                logger.info("screen: %s (the product of a step: %s)", best, said)
        elif self.screen and times and times.get(self.screen, 0.0) > times[None]:
            logger.warning('screen = "%s" is slower here than none (the product of a step: %s)', self.screen, said)

    def selection(self, sae: SAE, warm: Any) -> Selection:
        """How a step chooses."""
        self.steps += 1
        check = CHECK_TOKENS if self.screen and self.steps % CHECK_STEPS == 0 else 0
        return Selection(sae.allocation, warm, self.screen, margin=self.margin or None, check=check)

    def note(self, selection: Selection) -> None:
        """After the step: what it missed."""
        if not self.screen or not selection.checked:
            return
        self.checked, self.missed = self.checked + selection.checked, self.missed + selection.missed
        if self.checked < ENOUGH:
            return
        self.share, self.checked, self.missed = self.missed / self.checked, 0, 0
        if self.share > MISSED:
            self.margin *= WIDER
            if self.margin > WIDEST:
                logger.warning('screen = "%s" misses %.2g of the matches and is given up', self.screen, self.share)
                self.screen = None

    def state(self) -> dict[str, Any]:
        """What a resumed run goes on with; JSON-able."""
        kept = ("screen", "margin", "checked", "missed", "steps", "share")
        return {name: getattr(self, name) for name in kept} if self.settled else {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on with what `state` returned, unless another screen was asked for."""
        if state and (self.asked == "auto" or state["screen"] in (None, self.asked)):
            self.settled = True
            for name, value in state.items():
                setattr(self, name, value)

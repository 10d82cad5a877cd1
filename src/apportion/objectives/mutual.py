"""Mutual feature regularisation: SAEs trained side by side, with a penalty on what the others did not find.

    L = sum_n L_n + lambda(t) mean over pairs (p, q) of (1 - MMCS(W_p, W_q))          arXiv 2411.01220

    matching = "max"          MMCS = mean over rows of the largest cosine with any row of the other decoder, averaged
                              over both directions: the published text
    matching = "one_to_one"   mean cosine of the best one-to-one matching: what the public code computes; O(d_sae^3)
                              on the CPU at every step, for small dictionaries

L_n is the local loss of SAE n with its own terms. Gradients flow through the matched cosines only; which rows match is
fixed within a step. Finding that out takes d_sae^2 d_out multiplications for each pair, in row blocks. lambda(t) rises
along a half cosine. Features that several SAEs find are more often true ones: that is the reason for all this.

Differences from the public code: there the weights are tied and lambda rises over 100 steps; here the decoders are
compared, lambda rises over a share of the run, and the penalty is counted once, not once for each SAE.

Under "max" the penalty can also be lowered by making the rows of one SAE alike; the figure `within_mmcs` would show it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from apportion.architectures import SAE
from apportion.matching import directions, nearest_rows, one_to_one, pair_cosines
from apportion.rows.batch import Batch
from apportion.settings import settle
from apportion.training.objective import Objective, TrainingContext, local_reconstruction

if TYPE_CHECKING:
    from apportion.training.learner import Learner
    from apportion.training.trainer import Trainer


@dataclass(frozen=True, kw_only=True)
class MutualConfig:
    weight: float = 0.1
    """lambda: weight of one minus the similarity of the decoders."""
    weight_warmup_share: float = 0.05
    """Share of the run in which lambda rises along a half cosine from zero."""
    matching: Literal["max", "one_to_one"] = "max"
    """Each row with the nearest row of the other SAE (max), or every row with one of its own (one_to_one)."""
    redraw: Literal["none", "idle", "sae"] = "idle"
    """What gets new initial weights at the end of each dead window: latents that were silent throughout (idle), SAEs
    whose firing rates are far from equal, as in the public code (sae), or nothing."""
    max_score: float = 2.5
    """redraw = "sae": draw anew above mean_j (|r_j - r| / r)^3, with firing rates r_j and r = k / d_sae."""

    def __post_init__(self) -> None:
        settle(self)
        if self.weight < 0 or not 0 <= self.weight_warmup_share <= 1:
            raise ValueError(
                f"weight must not be negative and weight_warmup_share is a share of the run, "
                f"got {self.weight} and {self.weight_warmup_share}."
            )


class MutualFeatureRegularisation(Objective):
    """The objective for two or more SAEs with the same decoder width; give them different seeds.

    Reports `cross_mmcs`, the similarity that the penalty raises, and in steps that are logged `within_mmcs`.
    """

    least_saes = 2
    name = "mutual"
    config: MutualConfig

    def __init__(self, config: MutualConfig | None = None) -> None:
        self.config = config or MutualConfig()

    def __call__(self, saes: Sequence[SAE], batch: Batch, context: TrainingContext) -> dict[str, Tensor]:
        if len(saes) < self.least_saes:
            raise ValueError(f"Mutual feature regularisation needs two SAEs or more, got {len(saes)}.")
        terms = local_reconstruction(saes, batch, context)
        dictionaries = [directions(sae.get_parameter("W_dec")) for sae in saes]
        similarity = torch.stack([self._similarity(a, b) for a, b in combinations(dictionaries, 2)]).mean()
        penalty = self.weight_at(context.each[0].progress) * (1 - similarity)
        terms["mutual"] = context.group.mean(penalty, 1)  # the same in every process
        context.figures["cross_mmcs"] = similarity.detach()
        if context.logged:
            context.figures["within_mmcs"] = torch.stack([within_mmcs(W.detach()) for W in dictionaries]).mean()
        return terms

    def weight_at(self, progress: float) -> float:
        """lambda after a share of the run: a half cosine from 0, then constant."""
        if progress >= self.config.weight_warmup_share:
            return self.config.weight
        return self.config.weight * (1 - math.cos(math.pi * progress / self.config.weight_warmup_share)) / 2

    def _similarity(self, a: Float[Tensor, "n d"], b: Float[Tensor, "m d"]) -> Float[Tensor, ""]:
        if self.config.matching == "one_to_one":
            return pair_cosines(a, b, one_to_one(a, b)).mean()
        of_a, of_b = nearest_rows(a, b)
        return (pair_cosines(a, b, of_a).mean() + pair_cosines(b, a, of_b).mean()) / 2

    def after_step(self, trainer: Trainer) -> None:
        """At the end of each dead window, give idle latents (or unbalanced SAEs) new weights."""
        window, before = trainer.config.dead_window, trainer.tokens - trainer.config.batch_tokens
        if self.config.redraw == "none" or trainer.tokens // window == before // window:
            return
        for i, learner in enumerate(trainer.learners):
            latents = self._to_redraw(learner)
            if latents.numel():
                learner.redraw(latents, seed=trainer.config.seed + 1_000_003 * trainer.steps + i)

    def _to_redraw(self, learner: Learner) -> Int[Tensor, " n"]:
        if self.config.redraw == "idle":
            return learner.activity.dead().nonzero().squeeze(1)
        k, everything = learner.sae.k, torch.arange(learner.sae.d_sae, device=learner.sae.device)
        if k is None:
            raise ValueError('redraw = "sae" compares firing rates with k / d_sae, and this SAE has no k: use "idle".')
        score = imbalance(learner.activity.density(), k / learner.sae.d_sae)
        return everything[: len(everything) * (score > self.config.max_score)]


def imbalance(rates: Float[Tensor, " d_sae"], expected: float) -> float:
    """mean_j (|r_j - r| / r)^3: 0 if all latents fire equally often, 1 if none fires, large with a few dense ones.

    The public code compares with 0.0625, right for one of its data sets only; here r is k / d_sae. Where features
    differ much in frequency, as in language, a healthy SAE scores far above 2.5.
    """
    return ((rates - expected).abs() / expected).pow(3).mean().item()


def within_mmcs(W: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """Mean cosine of unit rows with the nearest other row."""
    return pair_cosines(W, W, nearest_rows(W, W, skip_same=True)[0]).mean()

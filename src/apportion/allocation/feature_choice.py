"""Feature Choice: each latent keeps its m_j best tokens. arXiv 2411.02124.

    maximise sum S A   subject to  sum_b S_bj <= m_j  for every latent j,   sum_j m_j = M = floor(k * tokens)

Every latent is used by construction while training. The m_j come from stored *densities* (expected share of tokens,
summing to k), turned into whole numbers for the batch at hand by largest remainder:

    uniform   every latent has density k / d_sae
    zipf      the latent of rank r has density C / (r + beta)^alpha; alpha and beta are settings, or fitted; no latent
              gets less than one token per training batch

Which latent gets which rank is free at the start (their index). With `switch_at` = f the first share f of training is
Mutual Choice; then the latents are ranked by measured density, and ranks and densities stay frozen. The phases and the
constants alpha = 1, beta = 7 are our form of the method, not quoted from the paper.

k is not annealed (annealing.py): that keeps latents alive early on, and here none can die. Densities, ranks and what
aux_zipf expects of them are all stated for one k.

In eval mode latent j fires where its affinity exceeds its own threshold, calibrated so that its expected density is
m_j / tokens.

When to use it: where no latent may die, or where the frequencies of latents are to be known beforehand. In our main
experiment (docs/experiments.md) that costs some FVU; Zipf budgets cost less than uniform ones.

Cost: as Mutual Choice, one dense product and k matches per token, with a selection that is more work, because every
latent has a bound and a cut of its own. A batch must have at least d_sae / k tokens.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from apportion.allocation import reference
from apportion.allocation.base import Candidates, Pool, Settled, StepContext, check_k, threshold_between, total_matches
from apportion.allocation.mutual_choice import best_anywhere, likely_bound, scalar_threshold
from apportion.allocation.threshold import ThresholdInEval
from apportion.allocation.zipf import NOISE_SHARE, ZipfFit, fit_zipf, integer_budgets, zipf_densities
from apportion.group import Group
from apportion.ranking import order_within, rank_within, ranks_in_order

logger = logging.getLogger(__name__)

POOL_PARTS = 8
"""The pool of a calibration is ranked in so many parts, which bounds the memory that sorting takes."""


@dataclass(frozen=True, kw_only=True)
class FeatureChoiceConfig:
    k: float = 32
    """Mean active latents per token; the latents' densities sum to it."""
    budgets: Literal["uniform", "zipf"] = "uniform"
    """How the budget is shared among latents."""
    zipf_alpha: float | None = 1.0
    """Zipf exponent; None fits it to the densities measured at the switch."""
    zipf_beta: float | None = 7.0
    """Zipf offset; None fits it to the densities measured at the switch."""
    switch_at: float = 0.0
    """Share of training that runs as Mutual Choice before ranks are frozen; 0 starts with Feature Choice."""


@final
class FeatureChoice(ThresholdInEval):
    Config = FeatureChoiceConfig
    batch_coupled = True
    density: Tensor
    """Expected share of tokens of each latent; NaN during a Mutual Choice phase, frozen after it."""

    def __init__(self, config: FeatureChoiceConfig, d_sae: int) -> None:
        super().__init__(config, d_sae)
        check_k("Feature Choice", config.k, d_sae)
        fits = config.budgets == "zipf" and (config.zipf_alpha is None or config.zipf_beta is None)
        if not 0 <= config.switch_at < 1:
            raise ValueError(f"Feature Choice: switch_at is a share of training in [0, 1), got {config.switch_at}.")
        if fits and config.switch_at == 0:
            raise ValueError(
                "Feature Choice: zipf_alpha or zipf_beta = None is fitted to densities of a Mutual Choice phase; "
                "set switch_at (0.3, say), or give both constants."
            )
        self.register_buffer("threshold", torch.full((d_sae,), torch.nan))
        self.register_buffer("density", torch.full((d_sae,), torch.nan))
        self.in_mutual_phase = config.switch_at > 0
        self.fit: ZipfFit | None = None
        self._floored_for: int | None = None
        self._budgets: dict[int, Tensor] = {}
        if not self.in_mutual_phase:
            self.freeze(torch.arange(d_sae, 0, -1, dtype=torch.float64), batch_tokens=None)
        self.register_load_state_dict_post_hook(FeatureChoice._after_load)

    def _after_load(self, _: object) -> None:
        self.in_mutual_phase = bool(self.density.isnan().any())
        self._budgets.clear()

    # Densities: who gets how much

    def freeze(self, measured: Float[Tensor, " d_sae"], batch_tokens: int | None) -> None:
        """Fix the latents' ranks by measured density and give each rank its density; ends a Mutual Choice phase."""
        config, d_sae = self.config, self.d_sae
        if config.budgets == "uniform":
            self.density.fill_(config.k / d_sae)
        else:
            ranked = measured.double().sort(descending=True, stable=True)
            alpha, beta = config.zipf_alpha, config.zipf_beta
            if alpha is None or beta is None:
                self.fit = fit_zipf(ranked.values, alpha=alpha, beta=beta, min_density=NOISE_SHARE * config.k / d_sae)
                alpha, beta = self.fit.alpha, self.fit.beta
                logger.info("Feature Choice from here on; Zipf budgets fitted to the measured densities: %s", self.fit)
            floor = 1 / batch_tokens if batch_tokens else 0.0
            self.density[ranked.indices] = zipf_densities(d_sae, config.k, alpha, beta, floor).to(self.density)
        self.in_mutual_phase, self._floored_for = False, batch_tokens
        self._budgets.clear()

    def begin_step(self, context: StepContext) -> None:
        if self.in_mutual_phase:
            if context.progress >= self.config.switch_at:
                assert context.density is not None, "the trainer supplies measured densities"
                self.freeze(context.density, context.batch_tokens)
        elif self.config.switch_at == 0 and self._floored_for != context.batch_tokens:
            self.freeze(self.density, context.batch_tokens)

    @property
    def needs_end(self) -> bool:
        return self.in_mutual_phase

    def expected_densities(self) -> Tensor | None:
        return None if self.in_mutual_phase else self.density.sort(descending=True).values

    def findings(self) -> dict[str, Any]:
        return {} if self.fit is None else {"zipf_fit_at_switch": vars(self.fit)}

    def check_batch(self, batch_tokens: int) -> None:
        if total_matches(self.config.k, batch_tokens) < self.d_sae:
            enough = -(-self.d_sae // self.config.k)
            raise ValueError(
                f"Feature Choice: k * batch_tokens = {self.config.k:g} * {batch_tokens} is less than "
                f"d_sae = {self.d_sae}, so some latents would never fire. Use batch_tokens >= {enough:.0f}."
            )

    # Selection in training

    def budget(self, tokens: int) -> int | Tensor:
        total = total_matches(self.config.k, tokens)
        if self.in_mutual_phase:
            return total
        if tokens not in self._budgets or self._budgets[tokens].device != self.density.device:
            self._budgets = {tokens: integer_budgets(self.density, total, cap=tokens)}
        return self._budgets[tokens]

    def bounds(self, warm: Tensor | None) -> Tensor | None:
        return warm if self.in_mutual_phase or (warm is not None and warm.ndim == 1) else None

    def total(self, tokens: int) -> int:
        return total_matches(self.config.k, tokens)

    def first_bounds(self, affinity: Tensor) -> Tensor | None:
        return likely_bound(affinity, total_matches(self.config.k, len(affinity))) if self.in_mutual_phase else None

    def settle(self, candidates: Candidates, budget: int | Tensor | None, group: Group) -> Settled:
        if isinstance(budget, int):
            return best_anywhere(candidates, budget, group)
        assert budget is not None
        return best_of_each_latent(candidates, budget, group)

    def reference(self, affinity: Float[Tensor, "tokens d_sae"]) -> Bool[Tensor, "tokens d_sae"]:
        budget = self.budget(len(affinity))
        if isinstance(budget, int):
            return reference.mutual_choice(affinity, budget)
        return reference.feature_choice(affinity, budget)

    # Thresholds for eval mode

    def wanted(self, tokens: int) -> int | Int[Tensor, " d_sae"]:
        total = total_matches(self.config.k, tokens)
        return total if self.in_mutual_phase else integer_budgets(self.density, total, cap=tokens)

    def wanted_of(self, tokens: int, available: Int[Tensor, " d_sae"]) -> int | Int[Tensor, " d_sae"]:
        """What a latent with too few positive affinities leaves goes to the others, so that the expected L0 is k."""
        total = total_matches(self.config.k, tokens)
        return total if self.in_mutual_phase else integer_budgets(self.density, total, cap=available)

    def set_threshold(self, pool: Pool) -> bool:
        if self.in_mutual_phase:
            threshold = scalar_threshold(pool, total_matches(self.config.k, pool.tokens))
            if threshold is not None:
                self.threshold.fill_(threshold)
            return threshold is not None
        latents, affinity, cut_off = pool.latents, pool.affinity, pool.floor > 0
        held = torch.bincount(latents, minlength=self.d_sae) + pool.above
        available = torch.where(cut_off, pool.tokens, held) if pool.available is None else pool.available
        wanted = self.wanted_of(pool.tokens, available)
        assert isinstance(wanted, Tensor)
        if bool((cut_off & (wanted >= held)).any()):
            return False
        inside, outside = affinity.new_zeros(2, self.d_sae)
        at = wanted - pool.above
        for first in range(0, self.d_sae, step := -(-self.d_sae // POOL_PARTS)):
            part = ((latents >= first) & (latents < first + step)).nonzero().squeeze(1)
            ids, values = latents[part].long(), affinity[part]
            rank = rank_within(ids, values, self.d_sae)
            for place, here in ((inside, rank == at[ids] - 1), (outside, rank == at[ids])):
                place[ids[here]] = values[here]
        inside[wanted == 0] = torch.inf
        # All matches found are wanted: stay just below the smallest, for there may be more beyond the pool.
        outside = torch.where(wanted == available, torch.nextafter(inside, torch.zeros_like(inside)), outside)
        self.threshold.copy_(threshold_between(inside, outside))
        return True


def best_of_each_latent(candidates: Candidates, budget: Int[Tensor, " d_sae"], group: Group) -> Settled:
    """The budget[j] largest affinities of each latent j."""
    affinity, own = group.joined(candidates.affinity)
    latents, _ = group.joined(candidates.latents)
    order, counts = order_within(latents, affinity, candidates.d_sae)
    ranked, first = affinity[order], counts.cumsum(0) - counts

    def ranked_at(rank: Tensor, otherwise: Tensor) -> Tensor:
        """Of each latent, where it has so many."""
        there = (rank >= 0) & (rank < counts)
        return torch.where(there, ranked[torch.where(there, first + rank, 0)], otherwise) if len(ranked) else otherwise

    none = affinity.new_zeros(candidates.d_sae)
    cut = ranked_at(budget - 1, none).masked_fill(budget == 0, torch.inf)
    # Scan the next batch from about twice the budget down, which is as far as a look at a single latent goes; a latent
    # that had fewer candidates goes lower.
    next_bounds = ranked_at(2 * budget + 3, 0.8 * ranked_at(counts - 1, none))
    keep = torch.empty_like(order, dtype=torch.bool)
    keep[order] = ranks_in_order(counts, len(order)) < budget.repeat_interleave(counts, output_size=len(order))
    return Settled(keep=keep[own], cut=cut, next_bounds=next_bounds)

"""k-annealing: a budget that starts large and falls to k, so that every latent gets to learn early on.

    k_t = k_start + (k - k_start) min(1, t / share)          t: share of the run that is done

Llama Scope (arXiv 2410.20526) trains so, from d_in / 2 down to k over the first tenth of the run, in place of an
auxiliary loss. Per-token budgets are rounded up to whole numbers, a budget of the whole batch is not. The budget in
force follows from the progress of the run alone. Eval mode uses k; so does training without an end, and `encode` in
train mode before the first step. Feature Choice has no such schedule: its latents are all used from the start.
"""

from __future__ import annotations

from dataclasses import dataclass

from apportion.allocation.base import Rule, StepContext, check_k


@dataclass(frozen=True, kw_only=True)
class AnnealedConfig:
    k: float
    k_start: float | None = None
    """Budget per token at the start of training, which falls linearly to k; None: k throughout."""
    k_anneal_share: float = 0.1
    """Share of training over which the budget falls from k_start to k."""


class AnnealedRule(Rule):
    """Base of the rules whose budget follows a schedule."""

    config: AnnealedConfig

    def __init__(self, config: AnnealedConfig, d_sae: int, name: str) -> None:
        super().__init__(config, d_sae)
        check_k(name, config.k, d_sae)
        if config.k_start is not None and not 0 < config.k_start <= d_sae:
            raise ValueError(f"{name}: k_start must lie between 0 and d_sae = {d_sae}, got {config.k_start}.")
        if not 0 < config.k_anneal_share <= 1:
            raise ValueError(f"{name}: k_anneal_share is a share of training in (0, 1], got {config.k_anneal_share}.")
        self._k_of_step: float = config.k

    def begin_step(self, context: StepContext) -> None:
        start, end = self.config.k_start, self.config.k
        if start is not None:
            done = context.progress / self.config.k_anneal_share
            self._k_of_step = start + (end - start) * done if done < 1 else end

    @property
    def k_in_force(self) -> float:
        """The budget per token of the current training step, and k in eval mode."""
        return self._k_of_step if self.training else self.config.k

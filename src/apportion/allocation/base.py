"""What a rule of allocation is.

An SAE has tokens * d_sae possible matches and a budget; a *rule* says which matches become non-zero, given their
affinities (arXiv 2411.02124 poses sparsity as this allocation problem). The kernels compute affinities in row blocks
and never hold the whole matrix. They ask the rule four things:

    budget(tokens)      what there is to hand out: a count, or a count per latent; None if the rule has no budget
    bounds(warm)        only matches with affinity > bound can matter: a scalar or one per latent; None if not known
                        yet: latents with budgets of their own are then looked up one by one
    prune(candidates)   of some matches above the bounds: which may be chosen in the end. Local, any number of times
    settle(candidates)  of all matches above the bounds, in (token, latent) order: which are chosen, and the cut. Once
                        for each look, and over all processes of a group: budget, cut and bounds are the same for all

The *cut* closes the loop: it is the affinity that a further match would have to exceed to be chosen, 0 while the
budget is not exhausted. If cut >= bound, nothing below the bound could have been chosen and the result is exact;
if cut < bound, the kernel looks again below the bound. Ties are resolved in (token, latent) order.

A rule says how it chooses once more, densely and obviously: `reference`. Tests compare the two.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from math import floor
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from apportion.group import ALONE, Group


@dataclass(frozen=True)
class Candidates:
    """Matches above the bounds, with positive affinity, in (token, latent) order."""

    rows: Int[Tensor, " n"]
    latents: Int[Tensor, " n"]
    affinity: Float[Tensor, " n"]
    tokens: int
    d_sae: int


@dataclass(frozen=True)
class Settled:
    """`keep` marks the chosen candidates; `cut` and `next_bounds` are a scalar or one per latent, or None."""

    keep: Bool[Tensor, " n"]
    cut: Tensor | None = None
    next_bounds: Tensor | None = None


@dataclass(frozen=True)
class Pool:
    """The best matches of many tokens, for calibration: all with an affinity above `floor` (a scalar, or one per
    latent; 0: all there are), save that the very best may be counted only."""

    latents: Int[Tensor, " n"]
    affinity: Float[Tensor, " n"]
    tokens: int
    floor: Tensor
    above: Tensor | int = 0
    """How many better ones there are than those held: in all, or of each latent."""
    available: Tensor | None = None
    """How many there are of each latent; None: those held, or as many as tokens where the floor cuts some off."""


Screen = Literal["bfloat16", "int8"] | None
"""In what precision candidates are looked for, if not in that of the codes (kernels/select.py)."""


@dataclass
class Selection:
    """How the matches of one batch are chosen: made once for each batch, and spent by `kernels.choose`."""

    rule: Rule
    warm: Tensor | None = None
    """Bounds that an earlier batch left behind: a scalar, or one per latent."""
    screen: Screen = None
    group: Group = ALONE
    """The processes that share the budget."""
    margin: float | None = None
    """Of the screen: how far below the cut it looks, as a share of it; None: as it usually does."""
    check: int = 0
    """Tokens whose affinities are computed in full, to see what the screen missed."""
    padded: bool = False
    """Under a rule that limits rows: every row may have that many matches, with codes of zero where fewer are positive.
    On a GPU nothing is waited for then."""
    aside: Bool[Tensor, " n"] | None = None
    """A mask whose marks somebody wants to have counted: on a GPU with what is waited for anyway."""
    next_warm: Tensor | None = None
    """Afterwards: the bounds for the next batch."""
    checked: int = 0
    """Afterwards: matches of the tokens that were checked."""
    missed: int = 0
    """Afterwards: what exceeds the cut on these tokens and was not chosen."""
    moved: float | None = None
    """Afterwards, if something was checked: how far the screen moved the affinities of candidates (rms), as a share of
    the lowest of those that they compete with."""

    num_aside: int | None = None
    """Afterwards: the marks of `aside`, if they were counted."""

    def counted_with(self, count: Int[Tensor, ""]) -> int:
        """A number on the device, and with it the marks of `aside`, in one wait."""
        if self.aside is None:
            return int(count)
        number, self.num_aside = torch.stack([count, self.aside.sum()]).tolist()
        return number

    def by(self, rule: Rule) -> Selection:
        """The same way of looking with another rule, of which no bounds are known."""
        return replace(self, rule=rule, warm=None)

    def report(self, other: Selection) -> None:
        """What was checked and counted in another one is what was in this."""
        self.checked, self.missed, self.moved = other.checked, other.missed, other.moved
        self.num_aside = other.num_aside


@dataclass(frozen=True)
class StepContext:
    """What a training step knows about the run: schedules and auxiliary losses read it, nobody writes it."""

    progress: float = 1.0
    """Share of the run that is done, 0..1; 1 for a run without an end."""
    lr_share: float = 1.0
    """Learning rate of this step as a share of its peak."""
    steps: int = 0
    """Steps done before this one."""
    batch_tokens: int = 0
    dead: Bool[Tensor, " d_sae"] | None = None
    """Latents that have been silent for the whole dead window."""
    density: Float[Tensor, " d_sae"] | None = None
    """Running average of each latent's firing rate per token."""
    l0: float | None = None
    """Mean L0 of the previous step; None before the first."""
    selection: Selection | None = None
    """How this step chooses; None: by the rule in force, as `encode` does."""

    @property
    def group(self) -> Group:
        """The processes that make this step together."""
        return ALONE if self.selection is None else self.selection.group


class Rule(nn.Module, ABC):
    """A way to allocate matches. Subclasses are final; one file each; `Config` is a frozen dataclass."""

    Config: ClassVar[type]
    batch_coupled: ClassVar[bool]
    """True if, in train mode, a token's code depends on the other tokens; such rules need thresholds in eval mode."""
    eval_form: ClassVar[Literal["topk", "threshold"] | None] = None
    """How it chooses in eval mode, where that is plain: the `row_limit` best of each token, or whatever exceeds
    `in_force().threshold`. None: in some way of its own (a threshold and a cap, say), which no other library knows."""
    not_to_train: ClassVar[str | None] = None
    """Why a new SAE cannot have it as its `allocation`, in words that go on from the rule's name; None: it can."""
    threshold: Tensor
    """Eval-mode threshold, a scalar or one per latent; NaN until calibrated. Rules without one leave it out."""

    def __init__(self, config: Any, d_sae: int) -> None:
        super().__init__()
        self.config = config
        self.d_sae = d_sae

    @property
    def k(self) -> float | None:
        """The budget per token (the setting), or None."""
        return getattr(self.config, "k", None)

    @property
    def needs_end(self) -> bool:
        """True if a schedule of this rule is a share of the run, so that the run must have an end."""
        return False

    @property
    def row_limit(self) -> int | None:
        """At most this many matches of one token can be chosen, its best ones, besides what the budget says; None if
        there is no such limit. With one, each row is bounded by its own matches, and `bounds` is not asked."""
        return None

    @abstractmethod
    def budget(self, tokens: int) -> int | Int[Tensor, " d_sae"] | None:
        """What there is to hand out to so many tokens: those of all processes together."""

    def total(self, tokens: int) -> int | None:
        """The same over all latents."""
        budget = self.budget(tokens)
        return int(budget.sum()) if isinstance(budget, Tensor) else budget

    def bounds(self, warm: Tensor | None) -> Tensor | None:
        """Below which affinity nothing has to be looked at, if `warm` came from the batch before."""
        return warm

    def first_bounds(self, affinity: Float[Tensor, "rows d_sae"]) -> Tensor | None:
        """A guess from the first row block, for a cold start; too high is mended, too low is slow."""
        return None

    def prune(self, candidates: Candidates, budget: int | Tensor | None) -> Settled:
        """What may still be chosen, whatever the candidates are that are not among these.

        That is what would be chosen among these alone, for a rule under which more candidates never help one.
        """
        return self.settle(candidates, budget, ALONE)

    @abstractmethod
    def settle(self, candidates: Candidates, budget: int | Tensor | None, group: Group) -> Settled:
        """Which candidates are chosen. `group`: the processes whose candidates compete for the budget."""

    def reference(self, affinity: Float[Tensor, "tokens d_sae"]) -> Bool[Tensor, "tokens d_sae"]:
        """The matches, from all affinities at once, written as plainly as can be (allocation/reference.py has some)."""
        raise NotImplementedError(f"{type(self).__name__} has no dense reference to be compared with.")

    def expected_densities(self) -> Float[Tensor, " d_sae"] | None:
        """The density that the rule gives to each rank, most frequent first; None if it does not decide that."""
        return None

    def findings(self) -> dict[str, Any]:
        """What the rule found out while training (a fit, say), to be kept with the SAE; JSON-able."""
        return {}

    def begin_step(self, context: StepContext) -> None:
        """Advance schedules; called once at the start of every training step."""

    def check_batch(self, batch_tokens: int) -> None:
        """Raise ValueError if the rule cannot work with this batch size; called once before training."""

    def wanted(self, tokens: int) -> int | Int[Tensor, " d_sae"]:
        """How many matches of so many tokens thresholds are to let through: in all, or of each latent."""
        raise TypeError(f"{type(self).__name__} has no budget to calibrate.")

    def wanted_of(self, tokens: int, available: Int[Tensor, " d_sae"]) -> int | Int[Tensor, " d_sae"]:
        """The same where no latent has more matches than are `available`."""
        return self.wanted(tokens)

    def set_threshold(self, pool: Pool) -> bool:
        """Set the eval-mode threshold so that the expected L0 is k; False if the pool does not reach down to it."""
        raise TypeError(f"{type(self).__name__} has no threshold to set.")

    def in_eval(self, threshold: Tensor) -> Rule:
        """The rule of eval mode with these thresholds, a scalar or one each; see `ThresholdInEval`."""
        raise TypeError(f"{type(self).__name__} does not say what thresholds mean in eval mode: give it in_eval.")

    def relaxed(self, factor: float) -> Rule:
        """The rule of eval mode made `factor` times as generous (thresholds divided by it), for sweeps over L0."""
        return self.in_eval(self.in_force().threshold / factor)

    def rescale(self, factor: float) -> None:
        """Thresholds for affinities that are `factor` times as large."""
        if "threshold" in self._buffers:
            self.threshold.mul_(factor)

    def forget_threshold(self) -> None:
        """Thresholds do not outlive a change of the weights: eval mode asks for calibration again."""
        if self.batch_coupled:
            self.threshold.fill_(torch.nan)

    def in_force(self) -> Rule:
        """The rule that selects now: itself, or in eval mode its thresholds if it is coupled across the batch."""
        if self.training or not self.batch_coupled:
            return self
        if bool(self.threshold.isnan().any()):
            raise ValueError(
                f"{type(self).__name__} has no thresholds yet, and eval mode needs them. "
                "Call sae.calibrate(x) with some 100,000 rows of activations (fit does it), or use sae.train()."
            )
        return self.in_eval(self.threshold)


def total_matches(k: float, tokens: int) -> int:
    """floor(k * tokens), safe against the rounding of a fractional k."""
    return floor(k * tokens + 1e-9)


def threshold_between(inside: Float[Tensor, "*n"], outside: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """A threshold that keeps `inside` and drops `outside` (inside >= outside; equal ones are both dropped).

    Halfway, so that rounding in the product does not move a match across it.
    """
    below = torch.nextafter(inside, torch.zeros_like(inside))
    return torch.maximum(torch.minimum((inside + outside) / 2, below), outside)


def check_k(name: str, k: float, d_sae: int) -> None:
    """Refuse budgets that no batch could spend."""
    if not 0 < k <= d_sae:
        raise ValueError(f"{name}: k must lie between 0 and d_sae = {d_sae}, got {k}. Lower k or raise d_sae.")


def largest(affinity: Float[Tensor, " n"], count: int) -> tuple[Bool[Tensor, " n"], Float[Tensor, ""]]:
    """Mark the `count` largest entries, earlier ones first among ties; and the smallest marked (0 if fewer exist)."""
    if count >= affinity.numel():
        cut = affinity.min() if count == affinity.numel() and count else affinity.new_zeros(())
        return torch.ones_like(affinity, dtype=torch.bool), cut
    if count <= 0:
        return torch.zeros_like(affinity, dtype=torch.bool), affinity.new_tensor(torch.inf)
    cut = affinity.topk(count, sorted=False).values.min()
    keep, ties = affinity > cut, affinity == cut
    return keep | (ties & (ties.cumsum(0) <= count - keep.sum())), cut

"""The features of a synthetic world: how often each fires, with which others, how strongly, and in which direction.

Probabilities. The features that nothing stands above are Zipf-shaped by rank r,

    p_r = min(max_probability, C / (r + 1 + zipf_beta)^zipf_alpha)        C so that `active` features fire on average

Some of them are roots of a tree. Whenever a parent fires, one of its `branching` children fires with it, or with
probability 1 - child_share none: siblings exclude one another, and a child of a parent with probability p has
p child_share / branching. So the probability of every feature is known exactly.

Correlations. A feature on top fires where a standard normal lies low enough (ground_truth.py). The normals share
`correlation_rank` directions (a Gaussian copula), so that features fire together or avoid one another without changing
how often each does.

Magnitudes fall linearly with the rank of the probability. Directions are random, pushed apart if asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from apportion.rows.order import seeded
from apportion.settings import require, settle

Layout = Literal["row", "sites", "target"]
MAX_SHARED = 0.9
"""At most this share of the variance of a feature's normal is shared with others."""
REPULSION_ENTRIES = 2**21
"""Cosines that are held at a time while directions are pushed apart."""


@dataclass(frozen=True, kw_only=True)
class GroundTruthConfig:
    """The world that rows come from. The default trains in seconds on a CPU."""

    d_in: int = 64
    """Width of the rows."""
    num_features: int = 256
    """True features, those in trees included."""
    active: float = 4.0
    """Features that fire on a token, on average."""
    zipf_alpha: float = 0.5
    """How fast firing probabilities fall with rank."""
    zipf_beta: float = 0.0
    """Flattens the head of the Zipf curve."""
    max_probability: float = 0.4
    """No feature fires more often than this."""
    difficulty: tuple[float, ...] = (0.25, 1.75)
    """Equally likely levels of difficulty; relative numbers of active features. One level: all tokens alike."""
    num_roots: int = 8
    """Trees of features."""
    branching: int = 4
    """Children of each parent, of which at most one fires."""
    depth: int = 1
    """Generations below a root."""
    child_share: float = 0.8
    """Probability that some child fires, given that the parent does."""
    correlation_rank: int = 8
    """Directions that the normals behind the firings share; 0: features fire independently."""
    correlation_scale: float = 0.1
    """Standard deviation of a feature's loading on each of these directions."""
    magnitudes: tuple[float, float] = (5.0, 4.0)
    """Mean magnitude of the most and of the least frequent feature; linear in between."""
    magnitude_sd: float = 0.5
    """Spread of a feature's magnitude from token to token."""
    shift: float = 0.0
    """Length of a constant vector added to every row."""
    noise: float = 0.0
    """Standard deviation of Gaussian noise on every coordinate."""
    repulsion_steps: int = 0
    """Steps that push the random directions apart; each costs two products num_features x num_features x d_in."""
    layout: Layout = "row"
    """row: rows [d_in]. The others have two directions per feature: rows [2, d_in], or a row with another as target."""
    seed: int = 0
    """Seed of the world: directions, loadings. Rows have a seed of their own."""

    def __post_init__(self) -> None:
        settle(self)
        require(self, ("d_in", "num_features"), lambda n: n >= 1, "must be at least 1")
        at_least_0 = ("num_roots", "branching", "depth", "correlation_rank", "repulsion_steps", "noise", "magnitude_sd")
        require(self, at_least_0, lambda n: not n < 0, "cannot be negative")
        shares = ("max_probability", "child_share")
        require(self, shares, lambda p: 0 < p <= 1, "is a probability above 0 and at most 1")
        if not self.difficulty or min(self.difficulty) < 0 or not sum(self.difficulty) > 0:
            raise ValueError(
                f"difficulty needs positive numbers, got {self.difficulty}; (1.0,) makes all tokens alike."
            )
        hardest = self.max_probability * max(self.levels)
        if hardest > 1:
            raise ValueError(
                f"On the hardest tokens a feature would fire with probability {hardest:g}: "
                f"lower max_probability = {self.max_probability} or the spread of difficulty = {self.difficulty}."
            )
        if self.num_top < max(self.num_roots, 1):
            raise ValueError(
                f"{self.num_roots} trees of {self.tree_size} features do not fit into num_features = "
                f"{self.num_features}. Lower num_roots, branching or depth."
            )

    @property
    def levels(self) -> tuple[float, ...]:
        """The levels of difficulty, scaled to mean 1."""
        mean = sum(self.difficulty) / len(self.difficulty)
        return tuple(level / mean for level in self.difficulty)

    @property
    def tree_size(self) -> int:
        return sum(self.branching**generation for generation in range(self.depth + 1))

    @property
    def num_top(self) -> int:
        """Features that nothing stands above: roots, and those outside of the trees."""
        return self.num_features - self.num_roots * (self.tree_size - 1)


LIKE_SYNTH_SAE_BENCH = GroundTruthConfig(
    d_in=768, num_features=16_384, active=34.0, difficulty=(1.0,), num_roots=128, depth=3, correlation_rank=25
)
"""Of the size and with the ingredients of SynthSAEBench-16k, not equal to it: its trees keep Zipf probabilities for
children, ours divide the parent's, and its directions are made nearly orthogonal (`repulsion_steps` does that)."""


class World:
    """What a configuration says, as tensors. Ids of features: first those on top by falling probability, then the
    generations of children in the order of their parents."""

    def __init__(self, config: GroundTruthConfig) -> None:
        self.config = config
        on_top, share, self.generations = trees(config)
        top = top_probabilities(config, torch.zeros(config.num_top).double().index_add(0, on_top, share))
        self.probability: Float[Tensor, " num_features"] = top[on_top] * share
        """Share of tokens on which a feature fires, float64."""
        self.cuts = torch.special.ndtri(top * torch.tensor(config.levels).double()[:, None]).float()
        """[levels, num_top]: a feature on top fires where its normal lies below."""
        self.loadings, self.own = loadings(config)
        rank = self.probability.argsort(descending=True, stable=True).argsort()
        first, last = config.magnitudes
        self.magnitude = first + (last - first) * rank / max(1, config.num_features - 1)
        """Mean magnitude of each feature, [num_features]."""
        self.directions = directions(config)
        self.shift = config.shift * unit(torch.randn(self.directions.shape[1:], generator=_seeded(config, "shift")))


def trees(
    config: GroundTruthConfig,
) -> tuple[Int[Tensor, " num_features"], Float[Tensor, " num_features"], list[tuple[Tensor, Tensor]]]:
    """The feature at the top of each feature's tree, its share of that one's probability; (parents, children) by
    generation, in ids."""
    on_top = torch.arange(config.num_top)
    share = torch.ones(config.num_top, dtype=torch.float64)
    parents = torch.arange(config.num_roots) * config.num_top // max(config.num_roots, 1)
    generations = []
    for _ in range(config.depth):
        children = torch.arange(len(parents) * config.branching) + len(on_top)
        on_top = torch.cat([on_top, on_top[parents].repeat_interleave(config.branching)])
        below = share[parents] * config.child_share / max(config.branching, 1)
        share = torch.cat([share, below.repeat_interleave(config.branching)])
        generations.append((parents, children))
        parents = children
    return on_top, share, generations


def top_probabilities(config: GroundTruthConfig, weight: Float[Tensor, " num_top"]) -> Float[Tensor, " num_top"]:
    """Zipf-shaped, capped, and such that sum p * weight = active; `weight` is the mean number of features in the tree
    below a feature that fires, itself included."""
    most = config.max_probability * weight.sum().item()
    if not 0 < config.active <= most:
        raise ValueError(
            f"active = {config.active:g} features per token cannot be reached with max_probability = "
            f"{config.max_probability:g}, which allows for up to {most:g}. Change one of them."
        )
    shape = (torch.arange(config.num_top).double() + 1 + config.zipf_beta).pow(-config.zipf_alpha)
    low, high = 0.0, config.max_probability / shape.min().item()
    for _ in range(100):
        middle = (low + high) / 2
        reached = ((middle * shape).clamp_max(config.max_probability) * weight).sum().item()
        low, high = (middle, high) if reached < config.active else (low, middle)
    return (high * shape).clamp_max(config.max_probability)


def loadings(config: GroundTruthConfig) -> tuple[Float[Tensor, "num_top rank"], Float[Tensor, " num_top"]]:
    """Loadings on the shared directions, and the factor of a feature's own normal that makes the variance 1."""
    shape = (config.num_top, config.correlation_rank)
    w = config.correlation_scale * torch.randn(shape, generator=_seeded(config, "loadings"))
    variance = w.square().sum(1)
    w = w * (MAX_SHARED / variance.clamp_min(MAX_SHARED)).sqrt()[:, None]
    return w, (1 - variance.clamp_max(MAX_SHARED)).sqrt()


def directions(config: GroundTruthConfig) -> Float[Tensor, "num_features sites d_in"]:
    sites = 1 if config.layout == "row" else 2
    generator = _seeded(config, "directions")
    drawn = [torch.randn(config.num_features, config.d_in, generator=generator) for _ in range(sites)]
    return torch.stack([repelled(unit(d), config.repulsion_steps) for d in drawn], dim=1)


def repelled(d: Float[Tensor, "n d_in"], steps: int) -> Float[Tensor, "n d_in"]:
    """Unit directions pushed apart: gradient steps on the sum of cos^4 over pairs, which large overlaps dominate."""
    for step in range(steps):
        push = torch.empty_like(d)
        for rows in torch.arange(len(d)).split(max(1, REPULSION_ENTRIES // len(d))):
            cosines = d[rows] @ d.T
            cosines[torch.arange(len(rows)), rows] = 0
            push[rows] = cosines.pow(3) @ d
        push -= (push * d).sum(1, keepdim=True) * d
        length = push.norm(dim=1, keepdim=True).mean().clamp_min(torch.finfo(push.dtype).eps)
        d = unit(d - 0.1 * (1 - step / steps) * push / length)
    return d


def unit(x: Float[Tensor, "*lead d"]) -> Float[Tensor, "*lead d"]:
    return x / x.norm(dim=-1, keepdim=True)


def _seeded(config: GroundTruthConfig, part: str) -> torch.Generator:
    return seeded("ground truth world", config.seed, part)

"""Selection with experts: exactly what the rule would choose among dense affinities with all other entries zero."""

from __future__ import annotations

import pytest
import torch

from apportion import blocks
from apportion.allocation import FeatureChoice, MutualChoice, Rule, Screen, Selection, Threshold, TokenChoice, reference
from apportion.allocation.feature_choice import FeatureChoiceConfig
from apportion.allocation.mutual_choice import MutualChoiceConfig
from apportion.allocation.threshold import ThresholdConfig
from apportion.allocation.token_choice import TokenChoiceConfig
from apportion.kernels import Experts, choose, product, scan, select
from apportion.kernels.product import Product


class Problem:
    """Small whole numbers and powers of two: products are exact in any order, and ties abound."""

    def __init__(self, loads: list[int], starts: list[int], *, norms: bool = False, bias: int = 0) -> None:
        g = torch.Generator().manual_seed(0)
        tokens, d_sae = sum(loads), starts[-1]
        self.x = torch.randint(-2, 3, (tokens, 3), generator=g).float()
        self.W = torch.randint(-2, 3, (d_sae, 3), generator=g).float()
        self.b = torch.randint(-1, 2, (d_sae,), generator=g).float() + bias
        self.norms = 2.0 ** torch.randint(-1, 2, (d_sae,), generator=g).float() if norms else None
        of = torch.arange(len(loads)).repeat_interleave(torch.tensor(loads))[torch.randperm(tokens, generator=g)]
        gates = 2.0 ** torch.randint(-2, 1, (tokens,), generator=g).float()
        self.experts = Experts(of, gates, torch.tensor(starts))
        first, end = self.experts.starts[of, None], self.experts.starts[of + 1, None]
        latents = torch.arange(d_sae)
        self.codes = self.x @ self.W.T + self.b
        self.affinity = self.codes.relu() * (1 if self.norms is None else self.norms) * gates[:, None]
        self.affinity[(latents < first) | (latents >= end)] = 0


PROBLEMS = {
    "even": Problem([6, 6, 6], [0, 5, 10, 15]),
    "uneven": Problem([1, 11, 4], [0, 5, 10, 15]),
    "idle experts": Problem([0, 9, 0, 7, 0], [0, 4, 8, 12, 16, 20]),
    "one row": Problem([0, 1, 0], [0, 5, 10, 15]),
    "no rows": Problem([0, 0], [0, 5, 10]),
    "one expert": Problem([13], [0, 15]),
    "unequal widths, one without latents": Problem([5, 6, 7], [0, 8, 8, 13]),
    "an expert each": Problem([2] * 7, list(range(8))),
    "few positives": Problem([6, 6, 6], [0, 5, 10, 15], bias=-4),
    "decoder norms": Problem([6, 3, 6], [0, 5, 10, 15], norms=True),
    "width of eight": Problem([9, 5], [0, 8, 16]),
}


def rules(d_sae: int) -> dict[str, Rule]:
    k = min(3, d_sae)
    return {
        "topk": TokenChoice(TokenChoiceConfig(k=k), d_sae),
        "mutual": MutualChoice(MutualChoiceConfig(k=0.6 * k), d_sae),
        "feature": FeatureChoice(FeatureChoiceConfig(k=k), d_sae),
        "zipf": FeatureChoice(FeatureChoiceConfig(k=k, budgets="zipf", zipf_beta=1.0), d_sae),
        "relu": Threshold(ThresholdConfig(), d_sae),
        "thresholds": Threshold.at(torch.arange(d_sae) / 4, d_sae),
    }


RULES = list(rules(5))


def dense(rule: Rule, affinity: torch.Tensor) -> torch.Tensor:
    tokens = len(affinity)
    if isinstance(rule, TokenChoice):
        return reference.token_choice(affinity, int(rule.config.k))
    if isinstance(rule, MutualChoice):
        return reference.mutual_choice(affinity, rule.budget(tokens))
    if isinstance(rule, FeatureChoice):
        return reference.feature_choice(affinity, rule.budget(tokens))
    assert isinstance(rule, Threshold)
    return reference.threshold(affinity, rule.threshold)


def check(p: Problem, rule: Rule, warm: torch.Tensor | None = None, screen: Screen = None) -> torch.Tensor | None:
    """Returns the bounds for the next batch."""
    selection = Selection(rule, warm, screen)
    found = choose(p.x, p.W, p.b, selection, norms=p.norms, experts=p.experts)
    S = dense(rule, p.affinity)
    rows, latents = S.nonzero(as_tuple=True)
    assert torch.equal(found.rows, rows) and torch.equal(found.latents, latents)
    assert torch.equal(found.values, p.codes[S]), "codes are not gated"
    return selection.next_warm


@pytest.fixture(params=[1, 16, 2**20], ids=lambda n: f"block{n}", autouse=True)
def block(request, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_ENTRIES", request.param)
    monkeypatch.setattr(blocks, "MIN_BLOCK_ROWS", 1)
    monkeypatch.setattr(blocks, "TILE_ROWS", max(3, request.param // 3))
    monkeypatch.setattr(blocks, "TILE_COLUMNS", max(4, request.param // 5))
    monkeypatch.setattr(blocks, "GROUP", 2)
    monkeypatch.setattr(scan, "GROUP", 2)
    monkeypatch.setattr(product, "GROUP", 2)
    monkeypatch.setattr(scan, "LEAST_ENTRIES", 10)
    monkeypatch.setattr(select, "SPARE_CANDIDATES", request.param // 4)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("p", PROBLEMS.values(), ids=list(PROBLEMS))
@pytest.mark.parametrize("screen", [None, "bfloat16"])
def test_equals_the_dense_selection(p, rule, screen):
    chosen = rules(len(p.W))[rule]
    check(p, chosen, screen=screen)
    warm = None
    for _ in range(2):
        warm = check(p, chosen, warm, screen)
    if rule in ("mutual", "zipf") and warm is not None:
        check(p, chosen, 3 * warm, screen)


def test_each_experts_product_is_made_for_its_tokens_only():
    p = PROBLEMS["uneven"]
    entries = sum(block.codes.numel() for _, block in Product(p.x, p.W, p.b, None, p.experts).blocks(torch.float32))
    assert entries == 5 * 16


def test_some_latents_only():
    """The same experts over a selection of latents."""
    p = PROBLEMS["uneven"]
    ids = torch.tensor([0, 3, 4, 7, 12, 13, 14])
    experts = p.experts.among(ids)
    assert experts.starts.tolist() == [0, 3, 4, 7]
    rule = TokenChoice(TokenChoiceConfig(k=2), len(ids))
    found = choose(p.x, p.W[ids], p.b[ids], Selection(rule), experts=experts)
    rows, latents = reference.token_choice(p.affinity[:, ids], 2).nonzero(as_tuple=True)
    assert torch.equal(found.rows, rows) and torch.equal(found.latents, latents)


@pytest.mark.parametrize("k", [0.05, 0.3])
@pytest.mark.parametrize("screen", [None, "bfloat16"])
@pytest.mark.parametrize("values", [1, 3])
def test_ties_go_to_the_earlier_token_whichever_expert_it_has(k, screen, values):
    """Experts come one after the other, and what is thrown out meanwhile must not depend on that."""
    p = Problem([40, 40, 40], [0, 5, 10, 15])
    g = torch.Generator().manual_seed(1)
    p.x, p.W, p.b = torch.ones(120, 3), torch.zeros(15, 3), torch.ones(15)
    gates = 2.0 ** torch.randint(0, values, (120,), generator=g).float()
    p.experts = Experts(p.experts.of, gates, p.experts.starts)
    p.codes = torch.ones(120, 15)
    p.affinity = (p.affinity * 0 + gates[:, None]) * (torch.arange(15) // 5 == p.experts.of[:, None])
    check(p, MutualChoice(MutualChoiceConfig(k=k), 15), screen=screen)
    check(p, FeatureChoice(FeatureChoiceConfig(k=k), 15), screen=screen)

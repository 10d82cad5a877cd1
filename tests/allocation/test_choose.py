"""Every rule through the fast path, against its dense definition in allocation/reference.py.

Inputs are small whole numbers, so that float sums are exact, ties abound and equality can be strict.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apportion import blocks
from apportion.allocation import (
    FeatureChoice,
    MutualChoice,
    Rule,
    Screen,
    Selection,
    Threshold,
    TokenChoice,
    reference,
)
from apportion.allocation.base import largest, total_matches
from apportion.allocation.feature_choice import FeatureChoiceConfig
from apportion.allocation.mutual_choice import MutualChoiceConfig
from apportion.allocation.threshold import ThresholdConfig
from apportion.allocation.token_choice import TokenChoiceConfig
from apportion.kernels import choose, product, scan, select
from apportion.kernels.product import Product


@dataclass
class Problem:
    x: torch.Tensor
    W: torch.Tensor
    b: torch.Tensor
    norms: torch.Tensor | None = None

    @property
    def codes(self) -> torch.Tensor:
        return self.x @ self.W.T + self.b

    @property
    def affinity(self) -> torch.Tensor:
        return self.codes.relu() * (1 if self.norms is None else self.norms)


def quantised(tokens: int, d_sae: int, d_in: int = 3, seed: int = 0, bias: int = 0) -> Problem:
    """Whole numbers; with `bias` < 0 few affinities are positive."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(-2, 3, (tokens, d_in), generator=g).float()
    W = torch.randint(-2, 3, (d_sae, d_in), generator=g).float()
    return Problem(x, W, torch.randint(-1, 2, (d_sae,), generator=g).float() + bias)


def with_norms(p: Problem) -> Problem:
    g = torch.Generator().manual_seed(9)
    p.norms = 2.0 ** torch.randint(-2, 3, (len(p.W),), generator=g).float()
    return p


def topk(k: int, d_sae: int) -> Rule:
    return TokenChoice(TokenChoiceConfig(k=k), d_sae)


def mutual(k: float, d_sae: int) -> Rule:
    return MutualChoice(MutualChoiceConfig(k=k), d_sae)


def feature(k: float, d_sae: int, **zipf: object) -> Rule:
    return FeatureChoice(FeatureChoiceConfig(k=k, **zipf), d_sae)  # type: ignore[arg-type]


def zipf(k: float, d_sae: int) -> Rule:
    return feature(k, d_sae, budgets="zipf", zipf_alpha=1.0, zipf_beta=1.0)


def dense(rule: Rule, affinity: torch.Tensor) -> torch.Tensor:
    """The match matrix by definition."""
    tokens = len(affinity)
    if isinstance(rule, TokenChoice):
        return reference.token_choice(affinity, int(rule.config.k))
    if isinstance(rule, MutualChoice):
        return reference.mutual_choice(affinity, rule.budget(tokens))
    if isinstance(rule, FeatureChoice):
        return reference.feature_choice(affinity, rule.budget(tokens))
    assert isinstance(rule, Threshold)
    return reference.threshold(affinity, rule.threshold)


def check(
    p: Problem, rule: Rule, warm: torch.Tensor | None = None, screen: Screen = None
) -> tuple[select.Matches, torch.Tensor | None]:
    """The fast path gives exactly the reference: matches, order, codes. Also the bounds for the next batch."""
    selection = Selection(rule, warm, screen)
    found = choose(p.x, p.W, p.b, selection, norms=p.norms)
    S = dense(rule, p.affinity)
    rows, latents = S.nonzero(as_tuple=True)
    assert torch.equal(found.rows, rows) and torch.equal(found.latents, latents)
    assert torch.equal(found.values, p.codes[S])
    return found, selection.next_warm


COUPLED = {"mutual": mutual, "feature": feature, "zipf": zipf}
RULES = {"topk": topk, **COUPLED}

PROBLEMS = {
    "plain": quantised(17, 13),
    "one row": quantised(1, 13),
    "no rows": quantised(0, 13),
    "one latent": quantised(17, 1),
    "one row, one latent": quantised(1, 1, seed=3),
    "few positives": quantised(17, 13, bias=-5),
    "all negative": quantised(17, 13, bias=-30),
    "all zero": Problem(torch.zeros(9, 3), torch.ones(5, 3), torch.zeros(5)),
    "all positive": quantised(17, 13, bias=30),
    "all equal": Problem(torch.ones(9, 3), torch.ones(5, 3), torch.zeros(5)),
    "duplicated rows": Problem(quantised(4, 13).x.repeat_interleave(4, 0), quantised(4, 13).W, quantised(4, 13).b),
    "repeated block": Problem(quantised(4, 13).x.repeat(4, 1), quantised(4, 13).W, quantised(4, 13).b),
    "popular latent": Problem(quantised(40, 13).x, quantised(40, 13).W, torch.tensor([-3.0] * 5 + [50.0] + [-3.0] * 7)),
    "decoder norms": with_norms(quantised(17, 13)),
    "zero norms": Problem(quantised(17, 13).x, quantised(17, 13).W, quantised(17, 13).b, torch.arange(13.0) % 3),
    "many groups of columns": quantised(9, 1280),
    "groups, few positives": quantised(9, 1280, bias=-6),
    "growing rows": Problem(
        quantised(40, 13).x.sort(0).values * torch.arange(40.0)[:, None], quantised(40, 13).W, quantised(40, 13).b
    ),
}

SMALL = {name: p for name, p in PROBLEMS.items() if len(p.W) < 20}

SCREENS = [None, "bfloat16"]
BLOCKS = [1, 40, 2**20]


def set_block(patch: pytest.MonkeyPatch, entries: int) -> None:
    patch.setattr(blocks, "BLOCK_ENTRIES", entries)
    patch.setattr(blocks, "MIN_BLOCK_ROWS", 1)
    patch.setattr(blocks, "TILE_ROWS", max(6, entries // 5))
    patch.setattr(blocks, "TILE_COLUMNS", max(6, entries // 6))
    patch.setattr(blocks, "GROUP", 2)
    patch.setattr(scan, "GROUP", 2)
    patch.setattr(product, "GROUP", 2)
    patch.setattr(scan, "LEAST_ENTRIES", 10)
    patch.setattr(select, "SPARE_CANDIDATES", entries // 4)


@pytest.fixture(params=BLOCKS, ids=lambda n: f"block{n}")
def block(request, monkeypatch):
    set_block(monkeypatch, request.param)
    return request.param


@pytest.mark.parametrize("p", PROBLEMS.values(), ids=list(PROBLEMS))
@pytest.mark.parametrize("make", RULES.values(), ids=list(RULES))
def test_equals_the_reference(p, make, block):
    d_sae = len(p.W)
    for k in {1, min(3, d_sae), min(20, d_sae)}:
        check(p, make(k, d_sae))
    if make is not topk:
        for k in (0.1, 0.5, min(2.3, d_sae)):
            check(p, make(k, d_sae))


@pytest.mark.parametrize("p", SMALL.values(), ids=list(SMALL))
@pytest.mark.parametrize("make", RULES.values(), ids=list(RULES))
def test_the_screen_misses_nothing_that_bfloat16_can_tell(p, make, block):
    """Small whole numbers are exact in bfloat16; ties may be more than the screen keeps only beyond these sizes."""
    for k in {1, min(3, len(p.W)), len(p.W)}:
        check(p, make(k, len(p.W)), screen="bfloat16")


@pytest.mark.few(25)
@pytest.mark.parametrize("p", SMALL.values(), ids=list(SMALL))
@pytest.mark.parametrize("make", COUPLED.values(), ids=list(COUPLED))
def test_warm_starts_change_nothing(p, make, block):
    d_sae = len(p.W)
    generator = torch.Generator().manual_seed(1)
    scalars = [0.0, 1.0, 2.0, 5.5, 1e6, torch.inf]
    starts = [torch.tensor(s) for s in scalars]
    if make is not mutual:
        starts += [torch.full((d_sae,), s) for s in scalars]
        starts += [torch.tensor(scalars)[torch.randint(0, 6, (d_sae,), generator=generator)] for _ in range(4)]
    for k in (0.5, min(3, d_sae), d_sae):
        for bounds in starts:
            before = bounds.clone()
            check(p, make(k, d_sae), bounds)
            assert torch.equal(bounds, before), "a bound given is not written to"


@pytest.mark.parametrize("make", COUPLED.values(), ids=list(COUPLED))
def test_bounds_carried_over_a_changing_stream(make, block):
    """One warm start through batches of very different size and scale."""
    rule, warm = make(2.5, 11), None
    for i, (tokens, scale) in enumerate([(20, 1), (20, 8), (3, 1), (0, 1), (1, 1), (30, 0), (30, 4), (20, 1), (7, 64)]):
        p = quantised(tokens, 11, seed=i)
        p.x *= scale
        _, warm = check(p, rule, warm)
        assert warm is not None and not bool(warm.isnan().any())


@pytest.mark.parametrize("theta", [0.0, 1.0, -1.0, 3.0, 100.0])
def test_threshold(theta, block):
    for p in PROBLEMS.values():
        check(p, Threshold(ThresholdConfig(theta=theta), len(p.W)))


@pytest.mark.parametrize("screen", SCREENS)
@pytest.mark.parametrize("theta", range(1, 14))
def test_threshold_is_strict(theta, screen):
    """Whole numbers, so that many affinities equal it."""
    p = quantised(17, 13, d_in=6, bias=4)
    assert bool((p.affinity == theta).any())
    check(p, Threshold(ThresholdConfig(theta=theta), 13), screen=screen)


@pytest.mark.parametrize("screen", SCREENS)
def test_threshold_per_latent_is_strict(block, screen):
    for p in SMALL.values():
        theta = torch.arange(float(len(p.W))) % 4 - 1
        found, _ = check(p, Threshold.at(theta, len(p.W)), screen=screen)
        norms = 1 if p.norms is None else p.norms[found.latents]
        assert bool((found.values * norms > theta[found.latents]).all())


rules = st.sampled_from(sorted(RULES))
sizes = st.tuples(st.integers(0, 12), st.integers(1, 12), st.integers(1, 4))


@given(
    name=rules,
    size=sizes,
    seed=st.integers(0, 999),
    share=st.floats(0.02, 1),
    bias=st.integers(-4, 2),
    norms=st.booleans(),
    block=st.sampled_from([1, 7, 30, 2**20]),
    starts=st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.0, 9.0, torch.inf]), min_size=12, max_size=12),
    start=st.sampled_from(["cold", "scalar", "each"]),
    screen=st.sampled_from(SCREENS),
)
@settings(deadline=None, derandomize=True, max_examples=400)
def test_any_problem(name, size, seed, share, bias, norms, block, starts, start, screen):
    tokens, d_sae, d_in = size
    p = quantised(tokens, d_sae, d_in, seed, bias)
    p = with_norms(p) if norms else p
    k = share * d_sae
    rule = RULES[name](max(1, round(k)) if name == "topk" else k, d_sae)
    bounds = None
    if start == "scalar":
        bounds = torch.tensor(starts[0])
    elif start == "each" and name in ("feature", "zipf"):
        bounds = torch.tensor(starts[:d_sae])
    with pytest.MonkeyPatch.context() as patch:
        set_block(patch, block)
        check(p, rule, bounds, screen)


class Spy:
    """Counts what the scan does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.scans, self.columns, self.prunes, self.settles = 0, 0, 0, 0
        for name in ("rows", "columns", "prune", "settle"):
            monkeypatch.setattr(select._Scan, name, self._counted(name, getattr(select._Scan, name)))

    def _counted(self, name, original):
        def counted(scan, *args):
            attribute = {"rows": "scans", "columns": "columns", "prune": "prunes", "settle": "settles"}[name]
            setattr(self, attribute, getattr(self, attribute) + 1)
            return original(scan, *args)

        return counted


@pytest.mark.parametrize("make", COUPLED.values(), ids=list(COUPLED))
def test_compaction_happens_and_is_exact(make, monkeypatch):
    """Bounds far too low: the candidates are pruned on the way instead of piling up."""
    set_block(monkeypatch, 26)
    spy = Spy(monkeypatch)
    p = PROBLEMS["growing rows"]
    check(p, make(0.5, 13), torch.zeros(()) if make is mutual else torch.zeros(13))
    assert spy.scans == 1 and spy.columns == 0 and spy.prunes > 0 and spy.settles == 1


def test_mutual_choice_looks_again_below_a_bound_that_was_too_high(monkeypatch):
    spy = Spy(monkeypatch)
    p, rule = PROBLEMS["plain"], mutual(3, 13)
    cut = p.affinity.flatten().topk(3 * 17).values.min()
    check(p, rule, 0.9 * cut)
    assert spy.scans == 1
    check(p, rule, 1.1 * cut)
    assert spy.scans == 3, "once more, at half the bound"
    check(p, rule, 100 * cut)
    assert spy.scans == 6, "at half the bound, then at zero"


def test_feature_choice_looks_up_single_latents(monkeypatch):
    spy = Spy(monkeypatch)
    p, rule = PROBLEMS["plain"], feature(3, 13)
    check(p, rule)
    assert spy.columns == 1, "a cold start looks up every latent"
    check(p, rule, torch.zeros(13))
    assert spy.columns == 1
    bounds = torch.zeros(13)
    bounds[4] = 1e6
    asked = []
    columns = select._Scan.columns
    monkeypatch.setattr(select._Scan, "columns", lambda scan, ids: asked.extend(ids.tolist()) or columns(scan, ids))
    check(p, rule, bounds)
    assert asked == [4]


def test_looking_up_a_latent_finds_its_best_tokens_and_no_more():
    p = PROBLEMS["all equal"]
    scan = select._Scan(Product(p.x, p.W, p.b), Selection(feature(1.25, 5)))
    scan.budget = torch.full((5,), 2)
    (found,) = scan.columns(torch.tensor([3, 1]))
    assert found.latents.tolist() == 8 * [3] + 8 * [1] and found.rows.tolist() == 2 * list(range(8))


@pytest.mark.parametrize("screen", SCREENS)
@pytest.mark.parametrize("make", COUPLED.values(), ids=list(COUPLED))
def test_warm_bounds_make_the_next_look_short(make, screen, monkeypatch):
    """On the same data again the carried bounds suffice: one scan, no second look."""
    p, rule = quantised(300, 13, d_in=6), make(2, 13)
    p.x += 0.01 * torch.randn(300, 6, generator=torch.Generator().manual_seed(0))
    first = Selection(rule, screen=screen)
    choose(p.x, p.W, p.b, first)
    spy = Spy(monkeypatch)
    choose(p.x, p.W, p.b, Selection(rule, first.next_warm, screen))
    assert spy.scans == 1 and spy.columns == 0


@pytest.mark.parametrize("make", RULES.values(), ids=list(RULES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_real_numbers(make, dtype, block):
    """Without ties, in both precisions; the blocked product may round differently, the matches are the same."""
    g = torch.Generator().manual_seed(0)
    x, W, b = (torch.randn(*s, generator=g, dtype=torch.float64).to(dtype) for s in ((63, 10), (29, 10), (29,)))
    rule = make(4, 29)
    found = choose(x, W, b, Selection(rule))
    assert found.values.dtype == dtype
    codes = x.double() @ W.double().T + b.double()
    S = dense(rule, codes.relu())
    assert torch.equal(torch.stack([found.rows, found.latents], 1), S.nonzero())
    assert torch.allclose(found.values.double(), codes[S], rtol=1e-5, atol=1e-5)


@pytest.mark.few(10)
@pytest.mark.parametrize("make", RULES.values(), ids=list(RULES))
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("screen", ["bfloat16", "int8"])
def test_the_screen_on_real_numbers(make, norms, screen, block):
    """Over a warm-started stream: the budget is spent, values are exact, whatever is missed lies at the cut."""
    g = torch.Generator().manual_seed(0)
    tokens, d_in, d_sae, k = 200, 64, 320, 8
    W, b = torch.randn(d_sae, d_in, generator=g) / 8, torch.randn(d_sae, generator=g) / 8
    scale = 1 + torch.rand(d_sae, generator=g) if norms else None
    rule, warm, missed = make(k, d_sae), None, 0
    for _ in range(4):
        x = torch.randn(tokens, d_in, generator=g)
        exact, screened = Selection(rule), Selection(rule, warm, screen)
        exact, found = (choose(x, W, b, selection, norms=scale) for selection in (exact, screened))
        warm = screened.next_warm
        codes = x.double() @ W.double().T + b.double()
        assert torch.allclose(found.values.double(), codes[found.rows, found.latents], rtol=1e-5, atol=1e-5)
        flat = found.rows * d_sae + found.latents
        assert (flat.diff() > 0).all(), "in order, each once"
        assert len(found.rows) == len(exact.rows), "the budget is spent"
        missed += int((~torch.isin(exact.rows * d_sae + exact.latents, flat)).sum())
    assert missed <= 3, "of 6400"


def matches_missed(p: Problem, rule: Rule, warm: torch.Tensor | None = None) -> int:
    """By the screen, of those that exceed the cut by more than float32 rounds."""
    exact, found = (choose(p.x, p.W, p.b, how) for how in (Selection(rule), Selection(rule, warm, "bfloat16")))
    assert len(found.rows) == len(exact.rows)
    places = [m.rows * len(p.W) + m.latents for m in (exact, found)]
    missed = ~torch.isin(*places)
    cut = exact.values.min()
    if rule.row_limit is not None:
        cut = torch.full((len(p.x),), torch.inf).scatter_reduce(0, exact.rows, exact.values, "amin")[exact.rows]
    return int((missed & (exact.values > (1 + 1e-5) * cut)).sum())


@pytest.mark.parametrize(("b", "warm"), [(1.0, True), (5.0, True), (20.0, False)])
@pytest.mark.parametrize("make", [mutual, topk])
def test_the_screen_keeps_its_margin_when_candidates_are_thrown_out(make, b, warm, monkeypatch):
    """At the usual sizes of blocks and lists, much of the list lies within the margin: one scan, nothing is missed."""
    g = torch.Generator().manual_seed(0)
    x, W = torch.randn(2048, 64, generator=g), torch.nn.functional.normalize(torch.randn(4096, 64, generator=g))
    x[1024:] *= 0.3
    p = Problem(x, W, torch.full((4096,), b))
    spy = Spy(monkeypatch)
    assert matches_missed(p, make(32, 4096), torch.zeros(()) if warm else None) == 0
    assert spy.scans == 2, "one of them without the screen"


@pytest.mark.parametrize("make", RULES.values(), ids=list(RULES))
def test_the_screen_gives_way_where_its_margin_holds_too_much(make, monkeypatch):
    """A bias so large that bfloat16 tells nothing apart: full precision, and no list of all entries."""
    monkeypatch.setattr(select, "SPARE_CANDIDATES", 0)
    p = quantised(60, 40, d_in=6)
    p.b += 4096
    set_block(monkeypatch, 400)
    spy = Spy(monkeypatch)
    check(p, make(3, 40), None if make in (topk, mutual) else torch.zeros(40), screen="bfloat16")
    assert 2 <= spy.scans <= 3


def test_a_second_look_is_in_full_precision():
    """A component common to all inputs, which the bias cancels, blinds the screen; a bound far too high uncovers it."""
    g = torch.Generator().manual_seed(0)
    x, W = torch.randn(100, 16, generator=g) + 50, torch.randn(200, 16, generator=g)
    p = Problem(x, W, -50 * W.sum(1))
    assert matches_missed(p, mutual(5, 200)) > 10, "beyond what the screen is for"
    assert matches_missed(p, mutual(5, 200), torch.tensor(1e6)) == 0


def test_the_screen_finds_near_duplicates():
    """Many more latents than k within the margin of a row's cut."""
    g = torch.Generator().manual_seed(0)
    W = torch.randn(10, 64, generator=g).repeat_interleave(100, 0) + 1e-3 * torch.randn(1000, 64, generator=g)
    p = Problem(torch.randn(100, 64, generator=g), torch.nn.functional.normalize(W), torch.zeros(1000))
    assert matches_missed(p, topk(32, 1000)) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", RULES.values(), ids=list(RULES))
def test_sixteen_bits(make, dtype, block):
    """Whole numbers are exact here too; there is no screen below float32."""
    for name in ("plain", "one row, one latent", "few positives", "all equal", "decoder norms", "repeated block"):
        p = PROBLEMS[name]
        tensors = (t if t is None else t.to(dtype) for t in (p.x, p.W, p.b, p.norms))
        p = Problem(*tensors)
        for k in {1, min(3, len(p.W)), len(p.W)}:
            check(p, make(k, len(p.W)).to(dtype), screen="bfloat16")
        check(p, Threshold(ThresholdConfig(theta=2), len(p.W)).to(dtype))


@pytest.mark.parametrize("theta", [2.0, 5.0])
def test_the_screen_with_thresholds(theta, block):
    g = torch.Generator().manual_seed(1)
    x, W, b = (torch.randn(*s, generator=g) for s in ((63, 16), (100, 16), (100,)))
    for rule in (Threshold(ThresholdConfig(theta=theta), 100), Threshold.at(theta + torch.rand(100, generator=g), 100)):
        exact, found = (choose(x, W, b, Selection(rule, screen=screen)) for screen in SCREENS)
        assert torch.equal(exact.rows, found.rows) and torch.equal(exact.latents, found.latents)
        assert torch.allclose(exact.values, found.values, rtol=1e-5, atol=1e-5)


def test_no_gradient_and_no_change():
    p = quantised(9, 5)
    p.W.requires_grad_()
    rule = zipf(2, 5)
    before = {name: t.clone() for name, t in rule.state_dict().items()}
    assert not choose(p.x, p.W, p.b, Selection(rule)).values.requires_grad
    assert all(torch.equal(t, before[name]) or before[name].isnan().all() for name, t in rule.state_dict().items())


@given(
    affinity=st.lists(st.integers(1, 5), max_size=12).map(lambda v: torch.tensor(v, dtype=torch.float32)),
    count=st.integers(0, 14),
)
@settings(deadline=None, derandomize=True, max_examples=100)
def test_the_cut_is_what_a_further_match_would_have_to_exceed(affinity, count):
    """The smallest chosen affinity; 0 while the budget is not exhausted; infinite if there is none to hand out."""
    keep, cut = largest(affinity, count)
    wanted = affinity.argsort(descending=True, stable=True)[:count].sort().values
    assert keep.nonzero().squeeze(1).tolist() == wanted.tolist()
    if count > len(affinity) or not len(affinity):
        assert cut == 0
    else:
        assert cut == (affinity[wanted].min() if count else torch.inf)


def test_topk_refuses_a_fractional_k():
    with pytest.raises(ValueError, match=r"2\.5.*mutual_choice"):
        topk(2.5, 8)  # type: ignore[arg-type]
    assert topk(2.0, 8).row_limit == 2  # type: ignore[arg-type]


@pytest.mark.parametrize("make", RULES.values(), ids=list(RULES))
@pytest.mark.parametrize("k", [0, -1, 9, float("nan")])
def test_impossible_budgets_are_refused(make, k):
    with pytest.raises(ValueError, match=r"k must lie between 0 and d_sae = 8|TopK keeps a whole number.*got k = nan"):
        make(k, 8)


def test_mutual_choice_spends_the_whole_part_of_a_fractional_budget():
    p = PROBLEMS["all positive"]
    for k, matches in [(2.5, 42), (0.3, 5), (0.05, 0), (13, 221)]:
        assert check(p, mutual(k, 13))[0].rows.numel() == matches


@pytest.mark.parametrize("percent", range(1, 101))
def test_a_budget_of_so_many_percent_of_a_hundred_tokens(percent):
    """Budgets such as 0.29 are no binary fractions, and 100 of them a little less than 29."""
    assert total_matches(percent / 100, 100) == percent


def test_eval_rule_in_force():
    for rule in (mutual(2, 5), feature(2, 5)):
        assert rule.in_force() is rule
        with pytest.raises(ValueError, match=r"sae\.calibrate"):
            rule.eval().in_force()
        rule.threshold.fill_(1.5)
        in_force = rule.in_force()
        assert isinstance(in_force, Threshold)
        p = quantised(17, 5)
        S = p.affinity > 1.5
        assert torch.equal(choose(p.x, p.W, p.b, Selection(in_force)).values, p.codes[S])
        assert (rule.relaxed(2.0).threshold == 0.75).all(), "twice as generous"
    assert topk(2, 5).eval().in_force().row_limit == 2

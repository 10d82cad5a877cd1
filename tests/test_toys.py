"""What a third party adds is one class and one line: a rule with a cap and a budget, an objective, an architecture.

Rules and named SAEs on the command line are in test_conformance.py, measures and evaluators in evals/test_figures.py.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import final

import numpy as np
import pytest
import torch

import apportion as ap
from apportion.about import About
from apportion.allocation import RULES, Candidates, Rule, Settled
from apportion.allocation.base import total_matches
from apportion.allocation.mutual_choice import MARGIN, scalar_threshold
from apportion.allocation.threshold import Threshold
from apportion.architectures import SAES, NamedSAE, to_jumprelu
from apportion.architectures.auxiliary import AffineWithAuxiliary, AuxiliaryConfig
from apportion.architectures.plain import Plain
from apportion.cli import main
from apportion.group import ALONE
from apportion.objectives import OBJECTIVES, NamedObjective
from apportion.ranking import rank_within
from apportion.testing import check_sae
from apportion.training import Objective, local_reconstruction

X = torch.randn(2000, 8, generator=torch.Generator().manual_seed(0))


def capped(affinity: torch.Tensor, cap: int) -> torch.Tensor:
    """Which are among the `cap` best of their row."""
    rank = affinity.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return (rank < cap) & (affinity > 0)


class AboveAndCapped(Rule):
    """Whatever exceeds a threshold, of each token the `cap` best."""

    batch_coupled = False

    def __init__(self, threshold, d_sae, cap):
        super().__init__(None, d_sae)
        self.threshold, self.cap = threshold, cap

    @property
    def row_limit(self):
        return self.cap

    def budget(self, tokens):
        return None

    def settle(self, candidates, budget, group):
        theta = self.threshold if self.threshold.ndim == 0 else self.threshold[candidates.latents]
        rank = rank_within(candidates.rows, candidates.affinity, candidates.tokens)
        return Settled((rank < self.cap) & (candidates.affinity > theta))

    def reference(self, affinity):
        return capped(affinity, self.cap) & (affinity > self.threshold)


@dataclass(frozen=True, kw_only=True)
class CappedConfig:
    k: float = 32
    """Mean active latents per token."""
    cap_factor: int = 2
    """No token gets more than this many times k."""


@final
class CappedChoice(Rule):
    """The best k * tokens matches anywhere, of each token at most its cap_factor * k best."""

    Config = CappedConfig
    batch_coupled = True

    def __init__(self, config, d_sae):
        super().__init__(config, d_sae)
        self.register_buffer("threshold", torch.tensor(torch.nan))

    @property
    def row_limit(self):
        return int(self.config.cap_factor * self.config.k)

    def budget(self, tokens):
        return total_matches(self.config.k, tokens)

    def settle(self, candidates: Candidates, budget, group):
        allowed = rank_within(candidates.rows, candidates.affinity, candidates.tokens) < self.row_limit
        affinity = torch.where(allowed, candidates.affinity, -1.0)
        kept = affinity.argsort(descending=True, stable=True)[:budget]
        keep = torch.zeros_like(allowed)
        keep[kept] = allowed[kept]
        spent = budget and int(keep.sum()) == budget
        cut = affinity[kept].min() if spent else affinity.new_zeros(())
        return Settled(keep, cut.clamp_min(0), MARGIN * cut.clamp_min(0))

    def reference(self, affinity):
        best = torch.where(capped(affinity, self.row_limit), affinity, 0.0).flatten()
        chosen = torch.zeros_like(best, dtype=torch.bool)
        chosen[best.argsort(descending=True, stable=True)[: self.budget(len(affinity))]] = True
        return (chosen & (best > 0)).view(affinity.shape)

    def in_eval(self, threshold):
        return AboveAndCapped(threshold, self.d_sae, self.row_limit)

    def wanted(self, tokens):
        return total_matches(self.config.k, tokens)

    def set_threshold(self, pool):
        threshold = scalar_threshold(pool, self.wanted(pool.tokens))
        if threshold is not None:
            self.threshold.copy_(threshold)
        return threshold is not None


@pytest.fixture
def capped_choice(monkeypatch: pytest.MonkeyPatch) -> type[Rule]:
    monkeypatch.setitem(RULES, "capped_choice", CappedChoice)
    monkeypatch.setitem(SAES, "capped_choice", NamedSAE(Plain, CappedChoice, "the strongest, but few of each token"))
    return CappedChoice


def test_a_rule_with_a_cap_and_a_budget(capped_choice: type[Rule]) -> None:
    check_sae(partial(ap.create, "capped_choice"))
    sae = ap.create("capped_choice", d_in=8, d_sae=32, k=3, seed=0)
    sae.fit_input(X)
    with torch.no_grad():  # tokens that differ: without the cap some would take more
        loud = torch.cat([X[:1000], 6 * X[1000:]])
    trained = sae.encode(loud)
    assert trained.nnz == 3 * len(loud) and trained.l0().max() == 6
    assert sae.calibrate(loud) == pytest.approx(3, rel=1e-3)
    in_eval = sae.eval().encode(loud).l0()
    assert in_eval.max() == 6 and in_eval.double().mean() == pytest.approx(3, rel=1e-3)
    assert sae.allocation.relaxed(2.0).cap == 6, "more generous, and still capped"
    with pytest.raises(ValueError, match=r"holds the rule CappedChoice; .*sae\.save"):
        ap.export(sae, "nowhere", "sae_lens")
    with pytest.raises(ValueError, match="to_jumprelu is for"):
        to_jumprelu(sae, X)


def test_a_rule_that_forgets_its_cap_in_eval_mode_is_caught(capped_choice, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(self, threshold):
        rule = AboveAndCapped(threshold, self.d_sae, self.row_limit)
        rule.settle = partial(Threshold.settle, rule)
        return rule

    monkeypatch.setattr(CappedChoice, "in_eval", wrong)
    with pytest.raises(AssertionError, match="selection_equals_reference"):
        check_sae(partial(ap.create, "capped_choice"), only="selection_equals_reference")


def test_a_rule_without_a_reference_does_not_pass_in_silence(capped_choice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CappedChoice, "reference", Rule.reference)
    with pytest.raises(AssertionError, match="CappedChoice has no dense reference to be compared with"):
        check_sae(partial(ap.create, "capped_choice"), only="selection_equals_reference")


def test_a_rule_that_does_not_say_what_thresholds_mean(capped_choice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CappedChoice, "in_eval", Rule.in_eval)
    with pytest.raises(TypeError, match="CappedChoice does not say what thresholds mean in eval mode"):
        ap.create("capped_choice", d_in=8, d_sae=32, k=3, seed=0).calibrate(X)


@dataclass(frozen=True, kw_only=True)
class QuietConfig:
    quiet_weight: float = 0.5
    """Weight of the mean code."""


class Quiet(Objective):
    """Reconstruction, and codes that are no larger than needed."""

    name = "quiet"

    def __init__(self, config=None):
        self.config = config or QuietConfig()

    def __call__(self, saes, batch, context):
        terms = local_reconstruction(saes, batch, context)
        latents = context.seen[0][0]
        terms["quiet"] = context.group.mean(self.config.quiet_weight * latents.values.mean(), latents.tokens)
        return terms


@pytest.fixture
def rows(tmp_path: Path) -> str:
    np.save(tmp_path / "x.npy", X.numpy())
    return str(tmp_path / "x.npy")


def test_an_objective_is_one_class_and_one_line(rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OBJECTIVES, "quiet", NamedObjective(Quiet, QuietConfig()))
    train = ["train", rows, "--k", "3", "--d-sae", "32", "--batch-tokens", "128", "--training-objective", "quiet"]
    assert main([*train, "--quiet-weight", "0.25", "--out", str(tmp_path / "run")]) == 0
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["objective"] == {"name": "quiet", "quiet_weight": 0.25}
    assert "quiet" in json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert main([*train, "--quiet-weight", "0.5", "--out", str(tmp_path / "run"), "--resume"]) == 2
    plain = ap.Trainer(ap.create("topk", d_in=8, d_sae=32, k=3, seed=0), objective=Quiet(QuietConfig(quiet_weight=0.0)))
    assert plain.step(X[:64])["quiet"] == 0


def test_what_is_no_objective_is_refused() -> None:
    def with_attributes(saes, batch, context):
        return {}

    with_attributes.whole_contexts = True

    @functools.wraps(local_reconstruction.__call__)
    def decorated(*given):
        return local_reconstruction(*given)

    for fine in (decorated, functools.partial(decorated), local_reconstruction.__call__):
        ap.Trainer(ap.create("topk", d_in=8, d_sae=32, k=3), objective=fine).step(X[:64])
    for wrong in (with_attributes, "local", Quiet):
        with pytest.raises(ValueError, match=r"subclass of apportion\.training\.Objective, or a plain function"):
            ap.Trainer(ap.create("topk", d_in=8, d_sae=32, k=3), objective=wrong)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class ScaledConfig(AuxiliaryConfig):
    loudness: float = 1.0
    """What the reconstruction loss is multiplied by."""


@final
class Scaled(AffineWithAuxiliary):
    Config = ScaledConfig
    form = "affine"

    def reconstruction_loss(self, y, made, group=ALONE):
        return self.config.loudness * super().reconstruction_loss(y, made, group)


def test_an_architecture_is_one_class_and_one_line(rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SAES, "scaled", NamedSAE(Scaled, RULES["topk"], "as TopK, but louder", any_rule=True))
    check_sae(partial(ap.create, "scaled", loudness=2.0))
    train = ["train", rows, "--sae", "scaled", "--k", "3", "--d-sae", "32", "--batch-tokens", "128", "--loudness", "3"]
    assert main([*train, "--out", str(tmp_path / "run")]) == 0
    sae = ap.load(tmp_path / "run")
    assert sae.settings()["loudness"] == 3 and main(["eval", str(tmp_path / "run")]) == 0
    ap.export(sae, tmp_path / "exported", "sae_lens")
    assert torch.equal(ap.load(tmp_path / "exported").encode(X[:50]).dense() > 0, sae.encode(X[:50]).dense() > 0)
    assert to_jumprelu(sae, X).encode(X).nnz == pytest.approx(3 * len(X), rel=0.01)


class Counting:
    """A source of somebody else's: rows that are made as they are asked for."""

    d_in, num_rows = 8, None

    def __init__(self):
        self.at = 0

    def rows(self, seed, n):
        return ap.Batch(torch.randn(n, 8, generator=torch.Generator().manual_seed(seed)))

    def batches(self, batch_tokens) -> Iterator[ap.Batch]:
        while True:
            self.at += 1
            yield self.rows(self.at, batch_tokens)

    def sample(self, n):
        return self.rows(-1, n)

    def held_out(self, max_rows, chunk=4096):
        yield self.rows(-2, min(max_rows, 4096))

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]

    def describe(self):
        return About(kind="counting", d_in=8)


def test_a_source_is_one_class(tmp_path: Path) -> None:
    config = ap.TrainConfig(batch_tokens=128, total_tokens=128 * 20)
    sae = ap.Trainer(ap.create("mutual_choice", d_in=8, d_sae=32, k=3, seed=0), config).fit(
        Counting(), tmp_path / "run"
    )
    assert sae.source.kind == "counting" and ap.load(tmp_path / "run").source == sae.source
    assert ap.evaluate(sae, X)["l0"] == pytest.approx(3, rel=0.1)


def test_a_source_that_describes_itself_otherwise_is_told_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Counting, "describe", lambda self: {"kind": "counting"})
    monkeypatch.setattr(Counting, "sample", lambda *_: pytest.fail("too late"))
    config = ap.TrainConfig(batch_tokens=128, total_tokens=1280)
    with pytest.raises(ValueError, match=r"Counting\.describe\(\) returns a dict, and should return an About"):
        ap.Trainer(ap.create("topk", d_in=8, d_sae=32, k=3), config).fit(Counting())

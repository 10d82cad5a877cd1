"""Mutual feature regularisation: the penalty, its weight, what is redrawn, and that it does what it is for."""

from __future__ import annotations

import dataclasses
import json
import math
from itertools import permutations
from pathlib import Path

import pytest
import torch

import apportion as ap
from apportion import matching
from apportion.allocation import StepContext
from apportion.evals.similarity import similarity, within_similarity
from apportion.objectives import MutualConfig, MutualFeatureRegularisation
from apportion.objectives.mutual import imbalance
from apportion.rows import ArraySource
from apportion.training import local_reconstruction
from apportion.training.learner import Learner
from apportion.training.objective import TrainingContext

D_IN, D_SAE, K, BATCH = 6, 10, 2, 32


def data(n: int = 400, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, D_IN, generator=torch.Generator().manual_seed(seed)) * 2 + 1


def new(name: str = "topk", n: int = 2, **settings) -> list[ap.SAE]:
    settings = {"d_in": D_IN, "d_sae": D_SAE, "k": K, "k_aux": 4} | settings
    return [ap.create(name, seed=i, **settings) for i in range(n)]


def trainer(name: str = "topk", n: int = 2, train: dict | None = None, sae: dict | None = None, **mutual) -> ap.Trainer:
    defaults = {"lr": 1e-2, "batch_tokens": BATCH, "total_tokens": BATCH * 20, "dead_window_tokens": 3 * BATCH,
                "log_every_steps": 2, "checkpoint_every_tokens": 10 * BATCH}  # fmt: skip
    config = ap.TrainConfig(**(defaults | (train or {})))
    return ap.Trainer(new(name, n, **(sae or {})), config, MutualFeatureRegularisation(MutualConfig(**mutual)))


def context(saes: list[ap.SAE], progress: float = 1.0, logged: bool = False) -> TrainingContext:
    return TrainingContext(tuple(StepContext(progress=progress) for _ in saes), logged=logged)


def naive_similarity(saes: list[ap.SAE], matching: str) -> torch.Tensor:
    """All cosines at once; of all permutations the best."""
    found = []
    for p in range(len(saes)):
        for q in range(p):
            a, b = saes[p].W_dec, saes[q].W_dec
            cosines = a @ b.T / (a.norm(dim=1)[:, None] * b.norm(dim=1))
            if matching == "max":
                found.append((cosines.max(1).values.mean() + cosines.max(0).values.mean()) / 2)
            else:
                rows = torch.arange(len(a))
                best = max(permutations(range(len(a))), key=lambda p: float(cosines.detach()[rows, list(p)].sum()))
                found.append(cosines[rows, list(best)].mean())
    return torch.stack(found).mean()


@pytest.mark.parametrize("kind", ["max", "one_to_one"])
@pytest.mark.parametrize("n", [2, 3])
def test_penalty_and_gradient_are_those_of_the_naive_form(kind, n, monkeypatch):
    monkeypatch.setattr(matching, "block_rows", lambda width, like: 3)
    objective = MutualFeatureRegularisation(MutualConfig(weight=0.7, matching=kind))
    grads, values = [], []
    for naive in (False, True):
        saes = [sae.double() for sae in new(n=n, d_sae=6)]
        with torch.no_grad():
            saes[0].W_dec.mul_(1.5)  # cosines do not depend on norms
        if naive:
            terms = {"mutual": 0.7 * (1 - naive_similarity(saes, kind))}
        else:
            terms = objective(saes, ap.Batch(data(20).double()), context(saes))
        terms["mutual"].backward()
        grads.append([sae.W_dec.grad for sae in saes])
        values.append(terms["mutual"].item())
    assert values[0] == pytest.approx(values[1], rel=1e-12) and values[0] > 0
    for ours, theirs in zip(*grads, strict=True):
        assert (ours - theirs).abs().max() <= 1e-9 * theirs.abs().max()


def test_losses_are_the_local_ones_and_the_penalty_counts_once():
    saes = new(n=3)
    local = local_reconstruction(saes, ap.Batch(data(50)), context(saes))
    seen = context(saes)
    terms = MutualFeatureRegularisation(MutualConfig(weight=0.5))(saes, ap.Batch(data(50)), seen)
    assert terms.pop("mutual").item() == pytest.approx(0.5 * (1 - naive_similarity(saes, "max").item()), rel=1e-5)
    assert {k: v.item() for k, v in terms.items()} == {k: v.item() for k, v in local.items()}
    assert len(seen.seen) == 3


def test_lambda_rises_along_a_half_cosine():
    objective = MutualFeatureRegularisation(MutualConfig(weight=3.0, weight_warmup_share=0.2))
    assert objective.weight_at(0.0) == 0
    assert objective.weight_at(0.05) == pytest.approx(3 * (1 - math.cos(math.pi / 4)) / 2)
    assert objective.weight_at(0.1) == pytest.approx(1.5)
    assert objective.weight_at(0.2) == objective.weight_at(1.0) == 3.0
    assert MutualFeatureRegularisation(MutualConfig(weight_warmup_share=0.0)).weight_at(0.0) == 0.1


def test_similarities_are_reported():
    t = trainer(redraw="none")
    first, second = t.step(data(BATCH)), t.step(data(BATCH, seed=1))
    assert "within_mmcs" not in first and {"cross_mmcs", "within_mmcs", "mutual"} <= second.keys()
    before = [sae.W_dec.detach().clone() for sae in t.saes]
    figures = t.step(data(BATCH)), t.step(data(BATCH))
    assert figures[0]["cross_mmcs"].item() != figures[1]["cross_mmcs"].item()
    assert not any(torch.equal(W, sae.W_dec) for W, sae in zip(before, t.saes, strict=True))


# What is redrawn


def kill(sae: ap.SAE, latents: list[int]) -> None:
    """They never fire, whatever the input, until they are redrawn."""
    with torch.no_grad():
        sae.b_enc[latents] = -1e3


def test_idle_latents_are_redrawn_at_the_end_of_a_dead_window():
    t = trainer(sae={"aux": "none"})
    kill(t.saes[1], [2, 7])
    for step in range(3):
        assert t.saes[1].b_enc[2] < -900, step
        t.step(data(BATCH, seed=step))
    sae, own = t.saes[1], t.learners[1]
    assert sae.b_enc[2] == sae.b_enc[7] == 0 and not own.activity.dead().any()
    directions = torch.nn.functional.normalize(sae.W_enc[[2, 7]], dim=1)
    assert torch.allclose(directions, sae.W_dec[[2, 7]])
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(D_SAE))
    for name in ("W_enc", "W_dec", "b_enc"):
        moments = own.optimizer.moments[sae.get_parameter(name)]
        assert not moments.exp_avg[[2, 7]].any() and not moments.exp_avg_sq[[2, 7]].any()
        assert moments.exp_avg_sq[[0, 1, 3]].any() and moments.steps == 3
    assert not own.activity.silent_tokens[[2, 7]].any() and own.bounds is None


def test_others_stay_and_no_two_redrawn_latents_are_alike():
    runs = []
    for redraw in ("none", "idle"):
        t = trainer(n=3, sae={"aux": "none"}, redraw=redraw)
        for sae in t.saes[1:]:
            kill(sae, [4])
        for step in range(3):
            t.step(data(BATCH, seed=step))
        runs.append(t)
    kept, redrawn = runs
    assert not kept.learners[0].activity.dead().any()
    assert torch.equal(kept.saes[0].W_dec, redrawn.saes[0].W_dec)
    others = (~kept.learners[1].activity.dead()).nonzero().squeeze(1)
    assert len(others) < D_SAE and torch.equal(kept.saes[1].W_dec[others], redrawn.saes[1].W_dec[others])
    assert not torch.allclose(redrawn.saes[1].W_dec[4], redrawn.saes[2].W_dec[4], atol=1e-2)


def test_unbalanced_saes_are_redrawn_as_a_whole():
    t = trainer(sae={"aux": "none", "init": "random"}, redraw="sae", max_score=1.0)
    with torch.no_grad():
        t.saes[1].b_enc[:K] = 1e3  # these two take every token
    before = t.saes[0].W_dec.detach().clone()
    for step in range(3):
        t.step(data(BATCH, seed=step))
    assert not t.saes[1].b_enc.any() and not t.learners[1].activity.average.any()
    assert torch.allclose(t.saes[0].W_dec, before, atol=0.2) and t.saes[0].b_enc.any()


def test_imbalance_in_closed_form():
    assert imbalance(torch.full((8,), 0.25), 0.25) == 0
    assert imbalance(torch.zeros(8), 0.25) == 1
    assert imbalance(torch.tensor([1.0, 0, 0, 0]), 0.25) == pytest.approx((27 + 3) / 4)


@pytest.mark.parametrize("name", ap.SAES)
def test_redrawing_reaches_whatever_has_a_row_per_latent(name):
    d_sae = 32
    sae = ap.create(name, d_in=16, d_sae=d_sae, k=K)
    learner = Learner(sae, ap.TrainConfig())
    with torch.no_grad():
        for p in sae.parameters():
            p.fill_(9.0)
    learner.redraw(torch.tensor([1, 3]), seed=5)
    for key, p in sae.named_parameters():
        if key.rpartition(".")[2] in ("W_enc", "W_dec", "b_enc", "threshold"):
            assert p.shape[0] == d_sae and not (p[[1, 3]] == 9).any(), key
        assert (p[[0, 2, 4]] == 9).all() if p.shape[0] == d_sae else (p == 9).all(), key


def test_redrawn_latents_are_no_louder_than_the_others():
    """Weights that training has made small, or a start at the data."""
    sae = ap.create("topk", d_in=16, d_sae=32, k=K)
    learner = Learner(sae, ap.TrainConfig())
    with torch.no_grad():
        sae.W_enc.mul_(0.2)
    learner.redraw(torch.tensor([1, 3]), seed=5)
    assert torch.allclose(sae.W_enc.norm(dim=1), torch.full((32,), 0.2))
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(32))


def test_what_belongs_to_outputs_is_not_redrawn():
    sae = ap.create("skip_transcoder", d_in=16, d_out=32, d_sae=32, k=K)
    with torch.no_grad():
        sae.W_skip.fill_(9.0), sae.b_dec.fill_(9.0)
    Learner(sae, ap.TrainConfig()).redraw(torch.tensor([1, 3]), seed=5)
    assert bool((sae.W_skip == 9).all()) and bool((sae.b_dec == 9).all())


# Whole runs


def metrics(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


class Crash(Exception):
    pass


class Crashing(ArraySource):
    """Hands out twelve batches."""

    def batches(self, batch_tokens):
        for i, batch in enumerate(super().batches(batch_tokens)):
            if i == 12:
                raise Crash
            yield batch


@pytest.mark.parametrize("name", ["topk", "mutual_choice"])
def test_a_run_of_several_saes_resumes_exactly(name, tmp_path):
    settings = {"sae": {"aux": "none"}, "n": 3}
    trainer(name, **settings).fit(ArraySource(data()), tmp_path / "whole")
    with pytest.raises(Crash):
        trainer(name, **settings).fit(Crashing(data()), tmp_path / "run")
    assert [f.name for f in tmp_path.joinpath("run").glob("checkpoint*")] == ["checkpoint-10"]
    trainer(name, **settings).fit(ArraySource(data()), tmp_path / "run", resume=True)
    assert sorted(f.name for f in (tmp_path / "run").iterdir()) == [
        "finished.json", "metrics.jsonl", "run.json", "sae-0", "sae-1", "sae-2",
    ]  # fmt: skip
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "run")
    for i in range(3):
        one, two = ap.load(tmp_path / "whole" / f"sae-{i}"), ap.load(tmp_path / "run" / f"sae-{i}")
        assert all(torch.equal(t, two.state_dict()[key]) for key, t in one.state_dict().items())
        assert one.info == two.info and one.info["training"]["objective"]["weight"] == 0.1
    assert not torch.equal(one.W_dec, ap.load(tmp_path / "run" / "sae-0").W_dec)
    again = trainer(name, **settings)
    again.fit(ArraySource(data()), tmp_path / "run", resume=True)
    for i, sae in enumerate(again.saes):
        assert torch.equal(sae.W_dec, ap.load(tmp_path / "run" / f"sae-{i}").W_dec)


@pytest.mark.parametrize(
    ("changed", "message"), [({"n": 2}, "num_saes = 3, now it is 2"), ({"weight": 0.2}, "objective weight = 0.1")]
)
def test_a_run_is_resumed_as_it_was_begun(changed, message, tmp_path):
    with pytest.raises(Crash):
        trainer(n=3).fit(Crashing(data()), tmp_path / "run")
    with pytest.raises(ValueError, match=message):
        trainer(**({"n": 3} | changed)).fit(ArraySource(data()), tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"matching": "hungarian"}, "'hungarian'; known are: max, one_to_one"),
        ({"redraw": "dead"}, "did you mean idle"),
        ({"weight": -1.0}, "must not be negative"),
        ({"weight_warmup_share": 100.0}, "share of the run"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(ValueError, match=message):
        MutualConfig(**settings)


def test_one_sae_has_no_other():
    with pytest.raises(ValueError, match="two SAEs or more, got 1"):
        trainer(n=1).step(data(BATCH))


def features(n: int, d: int = 16, num_features: int = 32, active: int = 3) -> torch.Tensor:
    """Sparse sums of known directions: the more frequent ones are found by every SAE, the others by some."""
    g = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(num_features, d, generator=g), dim=1)
    shares = 1 / torch.arange(1.0, num_features + 1)
    chosen = torch.multinomial(shares.expand(n, -1), active, generator=g)
    return (torch.rand(n, active, 1, generator=g) * directions[chosen]).sum(1)


@pytest.mark.few(1)
@pytest.mark.parametrize(("kind", "figures"), [("max", ("mmcs_ab", "mmcs_ba")), ("one_to_one", ("one_to_one",))])
def test_the_penalty_raises_similarity_between_saes(kind, figures):
    x, found = features(2000), []
    for weight in (0.0, 0.5):
        saes = [ap.create("topk", d_in=16, d_sae=32, k=3, seed=i) for i in range(2)]
        config = ap.TrainConfig(lr=1e-2, batch_tokens=200, total_tokens=20_000)
        objective = MutualFeatureRegularisation(MutualConfig(weight=weight, matching=kind))
        ap.Trainer(saes, config, objective).fit(x, progress=False)
        found.append(similarity(*saes))
        assert within_similarity(saes[0]) < 0.9
    for key in figures:
        assert found[1][key] > found[0][key] + 0.02, key


def test_a_setting_that_an_older_record_lacks_means_its_default():
    objective = MutualFeatureRegularisation(MutualConfig(weight=0.5))
    assert objective.defaults() == {f.name: f.default for f in dataclasses.fields(MutualConfig)}
    trainer = ap.Trainer([ap.create("topk", d_in=8, d_sae=16, k=2, seed=i) for i in range(2)], objective=objective)
    assert trainer.defaults()["objective"] == objective.defaults() and local_reconstruction.defaults() == {}

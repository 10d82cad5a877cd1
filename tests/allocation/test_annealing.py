"""Budgets that fall from k_start to k: the schedule, and what it must not touch."""

from __future__ import annotations

import pytest
import torch

import apportion as ap
from apportion.allocation import RULES, StepContext
from apportion.rows import ArraySource

D_IN, D_SAE, K = 8, 40, 3


def activations(n: int = 500, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, D_IN, generator=torch.Generator().manual_seed(seed)) * 2 + 1


def new(name: str, **settings: object) -> ap.SAE:
    return ap.create(name, **{"d_in": D_IN, "d_sae": D_SAE, "k": K, "seed": 0, "k_start": 10, **settings})


@pytest.fixture(params=["topk", "mutual_choice"])
def name(request) -> str:
    return request.param


@pytest.mark.parametrize(
    ("start", "share", "budgets"),
    [
        (10, 0.5, {0.0: 10, 0.1: 8.6, 0.25: 6.5, 0.4999: 3.0014, 0.5: 3, 0.7: 3, 1.0: 3}),
        (10.7, 1.0, {0.0: 10.7, 0.5: 6.85, 1.0: 3}),
        (1, 0.5, {0.0: 1, 0.25: 2, 0.5: 3}),
        (None, 0.5, {0.0: 3, 0.25: 3, 1.0: 3}),
    ],
)
def test_schedule(start, share, budgets):
    config = {"k": K, "k_start": start, "k_anneal_share": share}
    topk, mutual = (RULES[n](RULES[n].Config(**config), D_SAE) for n in ("topk", "mutual_choice"))
    assert topk.budget(100) == mutual.budget(100) == 300, "k, until a step begins"
    for progress, k in budgets.items():
        for rule in (topk, mutual):
            rule.begin_step(StepContext(progress=progress))
            assert rule.k == K, "the setting stays"
        assert topk.budget(100) == 100 * -int(-k // 1) and topk.row_limit == -int(-k // 1)
        assert mutual.budget(10_000) == round(k * 10_000)
    topk.begin_step(StepContext(progress=0.0))
    assert topk.eval().budget(100) == 300


def test_training_follows_the_schedule(name):
    sae = new(name, k_anneal_share=0.5)
    trainer = ap.Trainer(sae, ap.TrainConfig(batch_tokens=50, total_tokens=500))
    l0 = [trainer.step(activations(50, seed))["l0"].item() for seed in range(10)]
    wanted = [10.0, 8.6, 7.2, 5.8, 4.4, 3, 3, 3, 3, 3]
    assert l0 == pytest.approx([float(-int(-k // 1)) for k in wanted] if name == "topk" else wanted)


def test_without_an_end_k_holds_from_the_start(name):
    trainer = ap.Trainer(new(name), ap.TrainConfig(batch_tokens=50))
    assert trainer.step(activations(50))["l0"].item() == K


def test_eval_and_calibration_are_about_k(name):
    sae, x = new(name), activations(4000)
    sae.fit_input(x)
    sae.begin_step(StepContext(progress=0.0))
    assert sae.encode(x).nnz == 10 * len(x)
    assert sae.calibrate(x) == pytest.approx(K, rel=0.01)
    assert sae.encode(x).nnz == 10 * len(x), "calibration leaves the schedule alone"
    assert sae.eval().encode(x).nnz == pytest.approx(K * len(x), rel=0.01)


def test_resuming_in_the_middle_is_exact(name, tmp_path):
    class Source(ArraySource):
        crash_at = None

        def batches(self, batch_tokens):
            for number, batch in enumerate(super().batches(batch_tokens), 1):
                if number == self.crash_at:
                    raise KeyboardInterrupt
                yield batch

    def fit(out: str, crash_at: int | None = None, resume: bool = False) -> ap.SAE:
        source = Source(activations(600))
        source.crash_at = crash_at
        config = ap.TrainConfig(
            lr=1e-2, batch_tokens=40, total_tokens=480, log_every_steps=1, checkpoint_every_tokens=160
        )
        trainer = ap.Trainer(new(name, k_anneal_share=0.8), config)
        return trainer.fit(source, tmp_path / out, resume=resume, progress=False)

    whole = fit("whole")
    with pytest.raises(KeyboardInterrupt):
        fit("parts", crash_at=7)
    parts = fit("parts", resume=True)
    for key, tensor in whole.state_dict().items():
        assert torch.equal(tensor, parts.state_dict()[key]), key
    one, two = (
        [line.split('"seconds"')[0] for line in (tmp_path / f / "metrics.jsonl").read_text().splitlines()]
        for f in ("whole", "parts")
    )
    assert one == two and len(one) == 12


@pytest.mark.parametrize("settings", [{"k_start": 0}, {"k_start": 41}, {"k_anneal_share": 0}, {"k_anneal_share": 1.1}])
def test_schedules_that_cannot_be(name, settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        new(name, **settings)


def test_feature_choice_has_no_schedule():
    with pytest.raises(ValueError, match="no setting 'k_start'"):
        new("feature_choice")

"""Dead latents, firing rates, and settings of a run."""

import pytest
import torch

import apportion as ap
from apportion.training.activity import Activity


def test_dead_counts_tokens_not_steps():
    small, large = Activity(5, 256, 1000), Activity(5, 256, 1000)
    nothing = torch.zeros(5, dtype=torch.int64)
    for _ in range(3):
        small.update(nothing, 64)
        assert not bool(small.dead().any())
    small.update(nothing, 64)
    large.update(nothing, 256)
    assert torch.equal(small.silent_tokens, large.silent_tokens)
    assert bool(small.dead().all()) and bool(large.dead().all())
    assert torch.allclose(small.weight, large.weight, rtol=1e-12)


def test_firing_starts_the_window_again():
    activity = Activity(3, 100, 1000)
    activity.update(torch.tensor([0, 1, 7]), 60)
    activity.update(torch.tensor([0, 0, 7]), 60)
    assert activity.silent_tokens.tolist() == [120, 60, 0]
    assert activity.dead().tolist() == [True, False, False]
    activity.update(torch.tensor([1, 0, 0]), 60)
    assert activity.dead().tolist() == [False, True, False]


def test_density_is_corrected_for_its_start():
    activity = Activity(3, 100, 10_000)
    assert activity.density().tolist() == [0, 0, 0]
    activity.update(torch.tensor([5, 0, 50]), 50)
    assert torch.allclose(activity.density(), torch.tensor([0.1, 0, 1.0]).double(), rtol=1e-9)
    for tokens in (50, 10, 500):
        activity.update(torch.tensor([tokens // 10, 0, tokens]), tokens)
        assert torch.allclose(activity.density(), torch.tensor([0.1, 0, 1.0]).double(), rtol=1e-9), "a constant rate"


def test_density_is_the_weighted_mean_of_the_rates():
    from math import exp

    activity = Activity(1, 100, 300)
    activity.update(torch.tensor([20]), 100)
    activity.update(torch.tensor([40]), 200)
    a, b = exp(-200 / 300) * (1 - exp(-100 / 300)), 1 - exp(-200 / 300)
    assert activity.density().item() == pytest.approx((a * 0.2 + b * 0.2) / (a + b), rel=1e-9)
    activity.update(torch.tensor([0]), 100)
    keep = exp(-100 / 300)
    assert activity.density().item() == pytest.approx(0.2 * keep * (a + b) / (keep * (a + b) + 1 - keep), rel=1e-9)


def test_learning_rate_schedule():
    config = ap.TrainConfig(lr=2.0, batch_tokens=10, total_tokens=1000, warmup_share=0.05, decay_share=0.2)
    steps = {0: 0.2, 1: 0.4, 3: 0.8, 4: 1, 50: 1, 80: 1, 81: 0.95, 90: 0.5, 99: 0.05}
    for step, share in steps.items():
        assert config.lr_at(step * config.batch_tokens) == pytest.approx(2.0 * share), step


def test_learning_rate_without_an_end_or_without_schedule():
    assert {ap.TrainConfig(lr=2.0).lr_at(s) for s in (0, 1, 10**6)} == {2.0}
    flat = ap.TrainConfig(lr=2.0, batch_tokens=10, total_tokens=1000, warmup_share=0, decay_share=0)
    assert {flat.lr_at(10 * s) for s in range(100)} == {2.0}
    assert flat.lr_at(1000) == 0, "behind the end"
    all_of_it = ap.TrainConfig(lr=1.0, batch_tokens=10, total_tokens=100, warmup_share=0.5, decay_share=0.5)
    assert [all_of_it.lr_at(10 * s) for s in range(10)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1, 0.8, 0.6, 0.4, 0.2])


def test_behind_the_end_nothing_is_learnt():
    config = ap.TrainConfig(lr=1.0, batch_tokens=10, total_tokens=100)
    assert config.lr_at(99) > 0 and {config.lr_at(t) for t in (100, 101, 10**6)} == {0.0}
    assert config.progress_at(50) == 0.5 and config.progress_at(1000) == 1.0


def test_windows_follow_the_length_of_the_run():
    assert ap.TrainConfig().dead_window == 10_000_000
    short = ap.TrainConfig(total_tokens=1_000_000)
    assert (short.dead_window, short.density_window) == (100_000, 100_000)
    given = ap.TrainConfig(total_tokens=1_000_000, dead_window_tokens=7, density_window_tokens=8)
    assert (given.dead_window, given.density_window) == (7, 8)
    tiny = ap.TrainConfig(batch_tokens=4, total_tokens=8)
    assert tiny.dead_window >= 1 and tiny.density_window >= 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0}, "lr"),
        ({"batch_tokens": 0}, "batch_tokens"),
        ({"total_tokens": 100}, "total_tokens = 100.*2048"),
        ({"warmup_share": 0.7, "decay_share": 0.5}, "warmup_share"),
        ({"decay_share": -0.1}, "decay_share"),
        ({"clip_ratio": -1}, "clip_ratio"),
        ({"dead_window_tokens": -5}, "dead_window_tokens"),
        ({"density_window_tokens": 0}, "density_window_tokens"),
        ({"dtype": "float16"}, "float32"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(ValueError, match=message):
        ap.TrainConfig(**settings)

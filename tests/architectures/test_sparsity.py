"""The controller of sparsity coefficients: on simulated answers of L0 to lambda, and in training."""

from __future__ import annotations

from math import exp, log

import pytest
import torch

import apportion as ap
from apportion.allocation import StepContext
from apportion.architectures.sparsity import (
    CLIP,
    DESCENT,
    INTEGRAL,
    LEAST,
    LEAST_LR_SHARE,
    PROPORTIONAL,
    RAMP,
    SparsityCoefficient,
)

K = 32


def simulate(steps: int, speed: float, power: float, first: float = 8192.0, end: bool = True) -> list[float]:
    """L0 / k of every step if log L0 goes `speed` of the way to -power log lambda in each, in proportion to lr."""
    steering, l0, path = SparsityCoefficient(K, None, initial=0.01), first, []
    seen = None
    for step in range(steps):
        lr_share = min(1.0, 20 * (step + 1) / steps, 5 * (steps - step) / steps) if end else 1.0
        progress = step / steps if end else 1.0
        steering.begin_step(StepContext(progress=progress, l0=seen, lr_share=lr_share))
        settled = min(first, K * (steering.value.item() / 0.1) ** -power)
        l0 *= (settled / l0) ** (speed * lr_share)
        seen = l0
        path.append(l0 / K)
    return path


@pytest.mark.parametrize("steps", [500, 5000])
@pytest.mark.parametrize("speed", [0.02, 0.1])
@pytest.mark.parametrize("power", [1.0, 2.0])
def test_l0_from_thousands_arrives_at_k_without_falling_far_below(steps: int, speed: float, power: float) -> None:
    path = simulate(steps, speed, power)
    assert path[-1] == pytest.approx(1, abs=0.05)
    assert min(path) > 0.9
    assert max(path[int(0.3 * steps) :]) < 60, "the descent begins early"


def test_a_run_without_an_end_is_steered_to_k_too() -> None:
    path = simulate(3000, 0.02, 1.0, end=False)
    assert path[-1] == pytest.approx(1, abs=0.02)
    assert min(path) > 0.8


@pytest.mark.parametrize(
    ("progress", "lr_share", "gain"),
    [(1.0, 1.0, 1.0), (1.0, 0.5, 2.0), (0.5, 0.5, 2.0), (0.49, 0.5, 1.0), (1.0, 0.01, 1 / LEAST_LR_SHARE)],
)
def test_two_steps_in_closed_form(progress: float, lr_share: float, gain: float) -> None:
    """As the learning rate falls, so much more is asked of lambda; not before the descent has ended."""
    steering, first, then = SparsityCoefficient(K, None, initial=0.01), log(1.2), log(1.5)
    for l0 in (1.2 * K, 1.5 * K):
        steering.begin_step(StepContext(progress=progress, l0=l0, lr_share=lr_share))
    wanted = first * max(0.0, 1 - progress / DESCENT)  # of log (L0 / k), on the way down to 0
    errors = first - wanted, then - wanted
    change = gain * (INTEGRAL * errors[0] + PROPORTIONAL * (errors[1] - errors[0]) + INTEGRAL * errors[1])
    assert log(steering.value.item() / 0.01) == pytest.approx(change, rel=1e-4)


def test_the_error_is_clipped_before_it_is_integrated() -> None:
    steering = SparsityCoefficient(K, None, initial=0.01)
    for _ in range(3):
        steering.begin_step(StepContext(progress=1.0, l0=100.0 * K))
    assert log(steering.value.item() / 0.01) == pytest.approx(3 * INTEGRAL * CLIP, rel=1e-4)


def test_dead_silence_lowers_the_coefficient_down_to_its_least_and_no_further() -> None:
    steering = SparsityCoefficient(K, None, initial=0.01)
    for _ in range(2000):
        steering.begin_step(StepContext(progress=0.5, l0=0.0))
    assert steering.value.item() == pytest.approx(LEAST * 0.01)
    steering.begin_step(StepContext(progress=0.5, l0=2.0 * K))
    assert steering.value.item() > LEAST * 0.01


def test_steering_begins_at_a_tenth_of_what_fits_the_width_and_the_budget() -> None:
    """An L1 norm is about sqrt(d_in k) at that L0, an L0 is k."""
    for name, wanted in (("relu", 0.1 / (24 * 6) ** 0.5), ("gated", 0.1 / (24 * 6) ** 0.5), ("jumprelu", 0.1 / 6)):
        sae = ap.create(name, d_in=24, d_sae=96, k=6)
        assert sae.coefficient.value.item() == pytest.approx(wanted), name


def test_nothing_happens_before_there_is_an_l0() -> None:
    steering = SparsityCoefficient(K, None, initial=0.01)
    steering.begin_step(StepContext(progress=0.0))
    assert steering.value.item() == pytest.approx(0.01)


def test_a_fixed_coefficient_is_ramped_and_ignores_l0() -> None:
    steering = SparsityCoefficient(K, 0.5, initial=0.01)
    for progress, wanted in ((0.0, 0.0), (RAMP / 2, 0.25), (RAMP, 0.5), (1.0, 0.5)):
        steering.begin_step(StepContext(progress=progress, l0=4000.0))
        assert steering.value.item() == pytest.approx(wanted)


def test_its_whole_state_is_in_its_buffers() -> None:
    def feed(steering: SparsityCoefficient, steps: range) -> None:
        for i in steps:
            steering.begin_step(StepContext(progress=i / 100, l0=K * exp(3 - i / 20), lr_share=1 - i / 100))

    whole, first, rest = (SparsityCoefficient(K, None, initial=0.01) for _ in range(3))
    feed(whole, range(90))
    feed(first, range(40))
    rest.load_state_dict(first.state_dict())
    feed(rest, range(40, 90))
    assert torch.equal(whole.value, rest.value)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["relu", pytest.param("gated", marks=pytest.mark.slow)])
def test_trained_saes_have_the_l0_that_was_asked_for(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(32, 16, generator=generator), dim=1)
    fires = torch.rand(20_000, 32, generator=generator) < 6 / 32
    x = (fires * (1 + torch.rand(20_000, 32, generator=generator))) @ directions
    sae = ap.create(name, d_in=16, d_sae=64, k=6, seed=0)
    config = ap.TrainConfig(batch_tokens=256, total_tokens=256 * 800, lr=3e-3)
    ap.Trainer(sae, config).fit(x, progress=False)
    assert sae.info["calibration"]["l0"] == pytest.approx(6, rel=0.05)


@pytest.mark.parametrize("settings", [{"k": 0}, {"k": 65}, {"coefficient": -0.1}])
def test_settings_that_cannot_work_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        ap.create("relu", d_in=8, d_sae=64, **settings)


def test_where_the_target_is_reached_lambda_rests() -> None:
    steering = SparsityCoefficient(K, None, initial=0.01)
    for _ in range(3):
        steering.begin_step(StepContext(progress=1.0, l0=float(K)))
    assert log(steering.value.item() / 0.01) == pytest.approx(0, abs=1e-5)

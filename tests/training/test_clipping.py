"""Clipping relative to the usual norm."""

import math

import pytest
import torch

from apportion.training.clipping import WINDOW, RelativeClipping


def with_gradient(*norms: float) -> list[torch.Tensor]:
    """Parameters whose gradients have these norms."""
    parameters = []
    for norm in norms:
        p = torch.nn.Parameter(torch.zeros(4))
        p.grad = torch.full((4,), norm / 2)
        parameters.append(p)
    return parameters


def total_norm(parameters: list[torch.Tensor]) -> float:
    return math.sqrt(sum(p.grad.square().sum().item() for p in parameters))


def test_usual_gradients_pass_and_a_spike_is_cut_to_the_usual():
    clipping = RelativeClipping(1.5)
    for _ in range(50):
        usual = with_gradient(3.0, 4.0)
        assert clipping.clip(usual).item() == pytest.approx(5)
        assert total_norm(usual) == pytest.approx(5)
    spike = with_gradient(300.0, 400.0)
    assert clipping.clip(spike).item() == pytest.approx(500)
    typical = math.exp(math.log(5) + (math.log(500) - math.log(5)) / 51)
    assert total_norm(spike) == pytest.approx(1.5 * typical)
    assert spike[0].grad[0].item() / spike[1].grad[0].item() == pytest.approx(0.75), "the direction stays"


def test_scale_of_the_loss_does_not_matter():
    norms = torch.logspace(-1, 1, 30).tolist()
    scales = []
    for factor in (1.0, 1e4):
        clipping, kept = RelativeClipping(1.0), []
        for norm in norms:
            parameters = with_gradient(norm * factor)
            clipping.clip(parameters)
            kept.append(total_norm(parameters) / (norm * factor))
        scales.append(kept)
    assert scales[0] == pytest.approx(scales[1], rel=1e-5)
    assert min(scales[0]) < 0.9


def test_it_follows_a_slow_change():
    clipping = RelativeClipping(1.0)
    for norm in [1.0] * WINDOW + [10.0] * (10 * WINDOW):
        clipping.clip(with_gradient(norm))
    last = with_gradient(10.0)
    clipping.clip(last)
    assert total_norm(last) == pytest.approx(10, rel=1e-3)


def test_zero_gradients_stay_zero():
    clipping = RelativeClipping(1.0)
    zero = with_gradient(0.0)
    clipping.clip(zero)
    assert total_norm(zero) == 0
    after = with_gradient(1.0)
    clipping.clip(after)
    assert total_norm(after) == pytest.approx(1), "a zero gradient says nothing about what is usual"

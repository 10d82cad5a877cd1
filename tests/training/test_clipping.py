"""Clipping relative to the usual norm."""

import math

import pytest
import torch

from apportion.training.clipping import WINDOW, RelativeClipping


def scale(clipping: RelativeClipping, norm: float) -> float:
    return clipping.scale(torch.tensor(norm)).item()


def test_usual_gradients_pass_and_a_spike_is_cut_to_the_usual():
    clipping = RelativeClipping(1.5)
    assert [scale(clipping, 5.0) for _ in range(50)] == [1.0] * 50
    typical = math.exp(math.log(5) + (math.log(500) - math.log(5)) / 51)
    assert scale(clipping, 500.0) * 500 == pytest.approx(1.5 * typical)


def test_scale_of_the_loss_does_not_matter():
    norms = torch.logspace(-1, 1, 30).tolist()
    scales = []
    for factor in (1.0, 1e4):
        clipping = RelativeClipping(1.0)
        scales.append([scale(clipping, norm * factor) for norm in norms])
    assert scales[0] == pytest.approx(scales[1], rel=1e-5)
    assert min(scales[0]) < 0.9


def test_it_follows_a_slow_change():
    clipping = RelativeClipping(1.0)
    for norm in [1.0] * WINDOW + [10.0] * (10 * WINDOW):
        scale(clipping, norm)
    assert scale(clipping, 10.0) == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize("strange", [0.0, math.inf, math.nan])
def test_a_strange_norm_leaves_the_mean_alone(strange):
    clipping = RelativeClipping(1.0)
    assert scale(clipping, strange) == (1 if strange == 0 else 0), "gradients that are not finite are not used"
    assert [scale(clipping, 2.0), scale(clipping, 4.0)] == [1.0, pytest.approx(math.sqrt(8) / 4)]

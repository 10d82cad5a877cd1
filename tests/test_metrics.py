"""Closed forms of every metric."""

import math

import pytest
import torch

from apportion.latents import Latents
from apportion.metrics import FVU, Activations, batch_fvu, correlation, entropy, load, recovered, variance


def rows(n: int = 200, d: int = 7, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fvu(x: torch.Tensor, x_hat: torch.Tensor, chunk: int = 10**9) -> float:
    measure = FVU()
    for a, b in zip(x.split(chunk), x_hat.split(chunk), strict=True):
        measure.add(a, b)
    return measure.value()


def test_fvu_of_perfect_and_mean():
    x = rows()
    assert fvu(x, x) == 0
    assert fvu(x, x.mean(0).expand_as(x)) == pytest.approx(1, rel=1e-12)
    assert fvu(x, torch.zeros_like(x)) > 1


EQUAL = {
    "float32": torch.full((333, 5), 0.1),
    "float64": torch.full((333, 5), 0.1, dtype=torch.float64) / 3,
    "large": torch.full((70_000, 3), 1e6) / 7,
    "one row": torch.full((1, 5), 0.1),
    "zero": torch.zeros(4, 5),
}


@pytest.mark.parametrize("name", EQUAL)
@pytest.mark.parametrize("chunk", [5, 10**9])
def test_fvu_and_correlation_of_equal_rows_are_nan_however_they_were_rounded(name, chunk):
    x = EQUAL[name]
    assert math.isnan(fvu(x[:300], x[:300] + 1, chunk)) and math.isnan(fvu(x, x, 10**9))
    assert batch_fvu(x, x + 1).isnan() and batch_fvu(x, x).isnan()
    assert math.isnan(correlation(x[:, 0], torch.arange(float(len(x)))))


def test_a_little_spread_about_a_large_mean_is_spread():
    assert batch_fvu(1000 + rows().float(), 1000 + rows().float()) == 0
    assert batch_fvu(1000 + rows().float(), 1000 + torch.zeros(200, 7)).item() == pytest.approx(1, rel=0.1)
    assert fvu(1e9 + rows(), 1e9 + 0 * rows()) == pytest.approx(1, rel=0.1)


def test_variance_of_what_does_not_vary_is_zero():
    x = torch.stack([torch.full((10_007,), 0.1, dtype=torch.float64), rows(10_007, 1)[:, 0]])
    found = variance(x.mean(1), x.square().mean(1))
    assert found[0] == 0 and found[1].item() == pytest.approx(x[1].var(correction=0).item(), rel=1e-9)
    assert variance(torch.tensor(torch.nan), torch.tensor(torch.nan)).isnan()


def test_an_ablation_that_changes_nothing_recovers_nothing():
    assert math.isnan(recovered(2.0, 0.1 + 0.2, 0.3)) and recovered(2.0, 1.0, 3.0) == 0.5


def test_fvu_of_a_known_case():
    # Spread about the mean: 2 * 4 * 3 = 24; error: 4 rows off by 1 in one coordinate = 4.
    x = torch.tensor([[1.0, 1, 1], [-1, -1, -1]]).repeat(4, 1)
    x_hat = x.clone()
    x_hat[:4, 0] += 1
    assert fvu(x, x_hat) == pytest.approx(4 / 24, rel=1e-12)
    assert batch_fvu(x, x_hat).item() == pytest.approx(4 / 24, rel=1e-6)


@pytest.mark.parametrize("scale", [1e-3, 1, 250.0])
@pytest.mark.parametrize("shift", [0.0, 30.0])
def test_fvu_ignores_shift_and_scale(scale, shift):
    x = rows()
    x_hat = x + 0.3 * rows(seed=1)
    assert fvu(scale * x + shift, scale * x_hat + shift) == pytest.approx(fvu(x, x_hat), rel=1e-9)


@pytest.mark.parametrize("mean", [0.0, 1e4])
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_fvu_in_chunks_equals_one_go(mean, chunk):
    x = rows() + mean
    x_hat = x + 0.3 * rows(seed=1)
    # The spread is that of the data, whatever its mean: compare with the sums of the centred data.
    centred = x - x.mean(0)
    wanted = ((x - x_hat).square().sum() / centred.square().sum()).item()
    assert fvu(x, x_hat, chunk) == pytest.approx(wanted, rel=1e-9)


def test_fvu_of_drifting_chunks():
    """Chunk means that differ count as spread."""
    x = rows() + torch.arange(200.0)[:, None]
    x_hat = x + 0.3 * rows(seed=1)
    assert fvu(x, x_hat, 13) == pytest.approx(batch_fvu(x, x_hat).item(), rel=1e-9)


def test_fvu_without_data_or_spread_is_nan():
    assert math.isnan(FVU().value())
    empty = FVU()
    empty.add(torch.zeros(0, 3), torch.zeros(0, 3))
    assert math.isnan(empty.value()) and empty.tokens == 0
    assert math.isnan(fvu(torch.ones(5, 3), torch.zeros(5, 3)))


def test_fvu_sums_float32_in_float64():
    x = (rows(5000, 3) * 1e-2 + 100).float()
    x_hat = (x.double() + 0.1e-2 * rows(5000, 3, seed=1)).float()
    error, spread = (x.double() - x_hat.double()).square().sum(), (x.double() - x.double().mean(0)).square().sum()
    assert fvu(x, x_hat, 100) == pytest.approx((error / spread).item(), rel=1e-9)


def test_activations():
    z = torch.tensor([[0.5, 0, 0, 2], [0, 0, 0, 0], [1, 0, 3, 4], [0, 0, 0, 7.0]])
    measure = Activations(4)
    measure.add(Latents.from_dense(z[:1]))
    measure.add(Latents.from_dense(z[1:].reshape(3, 1, 4)))
    assert measure.tokens == 4
    assert measure.l0().tolist() == [2, 0, 3, 1]
    assert measure.mean_l0() == 6 / 4
    assert measure.density().tolist() == [0.5, 0, 0.25, 0.75]
    assert measure.dead() == 0.25


def test_activations_of_nothing():
    measure = Activations(4)
    assert measure.tokens == 0 and measure.l0().shape == (0,) and math.isnan(measure.mean_l0())
    assert measure.dead() == 1


def test_correlation():
    a = rows(50, 1).squeeze()
    assert correlation(a, 3 * a - 2) == pytest.approx(1, rel=1e-12)
    assert correlation(a, -a) == pytest.approx(-1, rel=1e-12)
    b = torch.tensor([1.0, -1, 1, -1])
    assert correlation(b, torch.tensor([1.0, 1, -1, -1])) == 0
    assert correlation(torch.tensor([1, 2, 3]), torch.tensor([1, 2, 4])) == pytest.approx(3 / math.sqrt(2 * 14 / 3))
    assert math.isnan(correlation(a, torch.ones(50)))


def test_recovered():
    assert recovered(2.0, 2.0, 10.0) == 1
    assert recovered(10.0, 2.0, 10.0) == 0
    assert recovered(4.0, 2.0, 10.0) == 0.75
    assert recovered(12.0, 2.0, 10.0) == -0.25
    assert math.isnan(recovered(3.0, 2.0, 2.0))


def test_load_and_its_entropy():
    assert load(torch.tensor([[0, 2], [2, 2]]), 4).tolist() == [0.25, 0, 0.75, 0]
    assert entropy(load(torch.arange(12) % 4, 4)) == pytest.approx(math.log(4))
    assert entropy(load(torch.full((7,), 3), 4)) == 0
    assert entropy(torch.tensor([0.25, 0, 0.75, 0])) == pytest.approx(0.25 * math.log(4) + 0.75 * math.log(4 / 3))

"""Losses as functions: values, scales and gradients."""

import pytest
import torch

from apportion import losses


def rows(n: int = 20, d: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_reconstruction_is_the_mean_square_per_dimension():
    x = torch.tensor([[1.0, 2], [3, 4]])
    assert losses.reconstruction(x, x).item() == 0
    assert losses.reconstruction(x, torch.zeros(2, 2)).item() == (1 + 4 + 9 + 16) / 4


def test_auxiliary_of_perfect_and_of_the_mean():
    error = rows()
    assert losses.auxiliary(error, error, 1.0).item() == 0
    assert losses.auxiliary(error, error.mean(0).expand_as(error), 1.0).item() == pytest.approx(1)


def test_auxiliary_ignores_the_scale_of_the_error():
    error, error_hat = rows(), rows(seed=1)
    one = losses.auxiliary(error, error_hat, 1.0)
    assert losses.auxiliary(7 * error, 7 * error_hat, 1.0).item() == pytest.approx(one.item(), rel=1e-12)


def test_auxiliary_scales_with_the_share():
    error, error_hat = rows(), rows(seed=1)
    one = losses.auxiliary(error, error_hat, 1.0)
    assert losses.auxiliary(error, error_hat, 0.25).item() == pytest.approx(0.25 * one.item(), rel=1e-12)


def test_auxiliary_treats_the_error_as_a_constant():
    error, error_hat = rows().requires_grad_(), rows(seed=1).requires_grad_()
    losses.auxiliary(error, error_hat, 0.5).backward()
    assert error.grad is None
    with torch.no_grad():
        wanted = 0.5 * 2 * (error_hat - error) / (error - error.mean(0)).square().sum()
    assert torch.allclose(error_hat.grad, wanted, rtol=1e-12)


@pytest.mark.parametrize("case", ["perfect reconstruction", "one row", "equal rows"])
def test_auxiliary_without_spread_is_zero_with_a_finite_gradient(case):
    """0 / 0 and x / 0 count as 0, and must not put NaN into the weights either."""
    error = {
        "perfect reconstruction": torch.zeros(4, 3),
        "one row": torch.ones(1, 3),
        "equal rows": torch.ones(4, 3),
    }[case]
    error_hat = (torch.zeros_like(error) if case != "one row" else 0.5 * error).requires_grad_()
    value = losses.auxiliary(error, error_hat, 1.0)
    value.backward()
    assert value.item() == 0
    assert torch.equal(error_hat.grad, torch.zeros_like(error))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_auxiliary_of_equal_rows_is_zero_however_they_were_rounded(dtype):
    """0.1 has no exact mean; and where the error is small beside x, it consists of what rounding left of x."""
    noise = torch.randn(64, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    eps = torch.finfo(dtype).eps
    cases = [(torch.full((300, 16), 0.1, dtype=dtype), 0.0), (3 * eps * noise, 1.0), (5e3 * eps * noise, 1e6)]
    for error, size in cases:
        error_hat = torch.ones_like(error).requires_grad_()
        value = losses.auxiliary(error, error_hat, 1.0, torch.tensor(size))
        value.backward()
        assert value.item() == 0 and not error_hat.grad.any()
    assert losses.auxiliary(1e4 * eps * noise, torch.zeros_like(noise), 1.0, 1.0).item() == pytest.approx(1, rel=0.1)


def test_auxiliary_does_not_hide_nan():
    error = rows()
    error[3, 1] = torch.nan
    assert losses.auxiliary(error, rows(seed=1), 1.0).isnan()


def test_underutilised_by_hand():
    # Ranks by density: latents 2, 0, 3, 1. Half of the expected at these ranks: 0.4, 0.2, 0.1, 0.05.
    density = torch.tensor([0.19, 0.06, 0.5, 0.1])
    expected = torch.tensor([0.8, 0.4, 0.2, 0.1])
    none_dead = torch.zeros(4, dtype=torch.bool)
    assert losses.underutilised(density, none_dead, expected, 0.5).tolist() == [True, False, False, False]
    assert losses.underutilised(density, none_dead, expected, 1.0).tolist() == [True, True, True, True]


@pytest.mark.parametrize("c", [0.0, 0.1, 0.5, 1.0])
def test_underutilised_contains_the_dead(c):
    generator = torch.Generator().manual_seed(0)
    density = torch.rand(50, generator=generator)
    dead = torch.rand(50, generator=generator) < 0.2
    expected = torch.linspace(0.9, 0.1, 50)
    silent = losses.underutilised(density, dead, expected, c)
    assert bool(silent[dead].all())
    if c == 0:
        assert torch.equal(silent, dead)


def test_underutilised_grows_with_c():
    density = torch.rand(50, generator=torch.Generator().manual_seed(0))
    dead = torch.zeros(50, dtype=torch.bool)
    expected = torch.linspace(2.0, 0.1, 50)
    sizes = [int(losses.underutilised(density, dead, expected, c).sum()) for c in (0.0, 0.25, 0.5, 1.0)]
    assert sizes == sorted(sizes) and sizes[0] == 0 < sizes[-1]


def test_silent_latents_are_underutilised_at_any_c():
    density = torch.tensor([0.5, 0.0, 0.3])
    dead = torch.zeros(3, dtype=torch.bool)
    silent = losses.underutilised(density, dead, torch.tensor([0.5, 0.3, 0.1]), 1e-6)
    assert silent.tolist() == [False, True, False]

"""Zipf densities and whole-number budgets."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apportion.allocation.zipf import fit_zipf, integer_budgets, zipf_densities

densities = st.lists(st.integers(0, 1000), min_size=1, max_size=30).map(lambda v: torch.tensor(v).double() / 997)


@given(density=densities, total=st.integers(0, 500), floor=st.integers(0, 3), cap=st.none() | st.integers(3, 60))
@settings(deadline=None, derandomize=True, max_examples=300)
def test_budgets_sum_exactly_within_floor_and_cap(density, total, floor, cap):
    n = len(density)
    reachable = total if cap is None else min(total, cap * n)
    if floor * n > reachable or (cap is None and floor > total):
        with pytest.raises(ValueError, match="floor"):
            integer_budgets(density, total, floor=floor, cap=cap)
        return
    budgets = integer_budgets(density, total, floor=floor, cap=cap)
    assert budgets.dtype == torch.int64 and int(budgets.sum()) == reachable
    assert bool((budgets >= floor).all())
    assert bool((budgets <= (total if cap is None else cap)).all())
    order = density.argsort(descending=True, stable=True)
    assert bool((budgets[order].diff() <= 0).all()), "a denser latent never gets less"


@given(density=densities, total=st.integers(0, 500))
@settings(deadline=None, derandomize=True, max_examples=100)
def test_budgets_are_within_one_of_the_exact_share(density, total):
    if not bool(density.any()):
        density = density + 1
    exact = total * density / density.sum()
    assert bool(((integer_budgets(density, total) - exact).abs() < 1 + 1e-9).all())


@given(caps=st.lists(st.integers(0, 9), min_size=1, max_size=20), total=st.integers(0, 100), seed=st.integers(0, 99))
@settings(deadline=None, derandomize=True, max_examples=200)
def test_budgets_with_a_cap_for_each(caps, total, seed):
    caps = torch.tensor(caps)
    density = torch.rand(len(caps), generator=torch.Generator().manual_seed(seed))
    budgets = integer_budgets(density, total, cap=caps)
    assert int(budgets.sum()) == min(total, int(caps.sum()))
    assert bool((budgets <= caps).all()) and bool((budgets >= 0).all())


def test_largest_remainder_by_hand():
    density = torch.tensor([0.5, 0.3, 0.2])
    assert integer_budgets(density, 10).tolist() == [5, 3, 2]
    assert integer_budgets(density, 4).tolist() == [2, 1, 1]  # exact 2, 1.2, 0.8
    assert integer_budgets(torch.ones(4), 6).tolist() == [2, 2, 1, 1], "ties: the earlier latent first"
    assert integer_budgets(torch.tensor([1.0, 0, 0]), 5, cap=3).tolist() == [3, 1, 1]
    assert integer_budgets(density, 6, floor=2).tolist() == [2, 2, 2]


@pytest.mark.parametrize("d_sae", [7, 4608, 100_003])
def test_uniform_budgets_do_not_drift(d_sae):
    """Whole shares stay whole, in float32 too."""
    budgets = integer_budgets(torch.full((d_sae,), 0.1), 3 * d_sae)
    assert bool((budgets == 3).all())


def test_published_example_of_budgets():
    """papers.md 1.4: 24576 latents, 4096 tokens, k = 32, at least one token each."""
    curve = (torch.arange(1, 24577).double() + 7) ** -1.0
    budgets = integer_budgets(curve, 32 * 4096, floor=1, cap=4095)
    assert int(budgets.sum()) == 32 * 4096
    assert int(budgets.max()) == 1646
    assert (budgets == 1).double().mean().item() == pytest.approx(0.073, abs=0.002)
    assert integer_budgets(torch.ones(24576), 32 * 4096).unique().tolist() == [5, 6]


def test_published_example_of_a_curve_that_is_too_steep():
    """papers.md 1.4: 512 latents, 256 tokens, k = 8, alpha = 1.5, beta = 0: the first hits the cap, 64 % get one."""
    curve = torch.arange(1, 513).double() ** -1.5
    budgets = integer_budgets(curve, 8 * 256, floor=1, cap=255)
    assert int(budgets.sum()) == 8 * 256 and int(budgets[0]) == 255
    assert (budgets == 1).double().mean().item() == pytest.approx(0.64, abs=0.02)


@given(
    d_sae=st.integers(1, 60),
    share=st.floats(0.01, 1),
    alpha=st.floats(0, 3),
    beta=st.floats(0, 50),
    floor=st.floats(0, 0.2),
)
@settings(deadline=None, derandomize=True, max_examples=200)
def test_zipf_densities_sum_to_k(d_sae, share, alpha, beta, floor):
    k = share * d_sae
    curve = zipf_densities(d_sae, k, alpha, beta, floor)
    assert curve.sum().item() == pytest.approx(k, rel=1e-9)
    assert bool((curve <= 1 + 1e-12).all()) and bool((curve.diff() <= 1e-15).all())
    if floor * d_sae <= k:
        assert bool((curve >= floor - 1e-12).all())
    else:
        assert bool((curve > 0).all()), "a floor that does not fit is left out"


def test_zipf_densities_follow_the_curve():
    curve = zipf_densities(100, 2.0, 1.2, 7.0)
    r = torch.arange(1, 101).double()
    shape = (r + 7) ** -1.2
    assert torch.allclose(curve, 2 * shape / shape.sum(), rtol=1e-12)


def test_zipf_density_beyond_one_goes_to_the_others():
    curve = zipf_densities(512, 8.0, 1.5, 0.0)
    assert curve[0] == 1 and curve.sum().item() == pytest.approx(8)
    rest = torch.arange(1, 513).double() ** -1.5
    free = curve < 1
    assert torch.allclose(curve[free] / rest[free], (curve[free] / rest[free])[:1].expand(int(free.sum())))


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 7.0), (0.7, 0.0), (1.5, 100.0), (2.0, 30.0)])
def test_fit_recovers_the_constants(alpha, beta):
    r = torch.arange(1, 4001).double()
    fit = fit_zipf(0.4 * (r + beta) ** -alpha)
    assert fit.alpha == pytest.approx(alpha, rel=0.02)
    assert fit.beta == pytest.approx(beta, rel=0.06, abs=0.1)
    assert fit.error < 0.01 and fit.r2 > 0.999 and fit.ranks == 4000
    assert torch.allclose(fit.curve(torch.arange(1, 4001)).log10(), (0.4 * (r + beta) ** -alpha).log10(), atol=0.03)


def test_fit_ignores_the_order():
    density = 0.4 * (torch.arange(1, 501).double() + 7) ** -1.0
    shuffled = density[torch.randperm(500, generator=torch.Generator().manual_seed(0))]
    assert fit_zipf(shuffled) == fit_zipf(density)


def test_fit_keeps_given_constants():
    r = torch.arange(1, 2001).double()
    density = 0.4 * (r + 7) ** -1.0
    exact = fit_zipf(density, alpha=1.0, beta=7.0)
    assert (exact.alpha, exact.beta) == (1.0, 7.0)
    assert 10**exact.log10_scale == pytest.approx(0.4, rel=1e-9) and exact.error < 1e-9 and exact.r2 == pytest.approx(1)
    assert fit_zipf(density, alpha=1.0).beta == pytest.approx(7, rel=0.06)
    assert fit_zipf(density, beta=7.0).alpha == pytest.approx(1, rel=1e-6)


def test_fit_reports_its_error_in_decades():
    """Three decades about a flat line: errors of 1, 0 and -1 decade."""
    flat = fit_zipf(torch.tensor([1.0, 0.1, 0.01]), alpha=0.0, beta=0.0)
    assert flat.error == pytest.approx((2 / 3) ** 0.5, rel=1e-6)
    assert 10**flat.log10_scale == pytest.approx(0.1, rel=1e-6) and flat.r2 == pytest.approx(0, abs=1e-6)


def test_fit_leaves_out_the_noisy_tail():
    r = torch.arange(1, 2001).double()
    density = 0.4 * (r + 7) ** -1.0
    density[1000:] = 1e-9
    fit = fit_zipf(density, min_density=1e-6)
    assert fit.ranks == 1000 and fit.alpha == pytest.approx(1, rel=0.02)
    assert fit_zipf(density).error > 0.1


def test_fit_needs_three_ranks():
    with pytest.raises(ValueError, match=r"three latents .* got 2"):
        fit_zipf(torch.tensor([0.5, 0.1, 0.0, 0.0]))
    assert fit_zipf(torch.tensor([0.5, 0.1, 0.05])).ranks == 3


def test_densities_steeper_than_any_power_law_still_give_a_curve_that_sums_to_k():
    """Exponential densities drive alpha and beta to their limits; the curve made from them must stay usable."""
    density = torch.exp(-torch.arange(512, dtype=torch.float64) / 40)
    fit = fit_zipf(density)
    densities = zipf_densities(512, 8.0, fit.alpha, fit.beta)
    assert densities.sum().item() == pytest.approx(8) and bool(densities.isfinite().all())
    assert bool((zipf_densities(5000, 4.0, 300.0, 1e4).diff() <= 0).all())


@pytest.mark.parametrize("beta", [0.0, 0.3, 7.0, 60.0, 2000.0])
def test_the_fit_is_the_best_of_all_betas(beta: float) -> None:
    """Of a curve with noise, in few ranks and in many: no other beta of the grid has a smaller error."""
    for n in (30, 3000):
        r = torch.arange(1, n + 1).double()
        noise = torch.randn(n, generator=torch.Generator().manual_seed(n)).double()
        density = (0.4 * (r + beta) ** -1.1 * 10 ** (0.1 * noise)).clamp_max(1)
        found = fit_zipf(density)
        assert found.error <= 1e-9 + min(
            fit_zipf(density, beta=float(b)).error for b in [0, *torch.logspace(-1, 4, 201)]
        )

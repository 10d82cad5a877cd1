"""What is special about Feature Choice: densities, budgets, the switch from Mutual Choice."""

import pytest
import torch

from apportion.allocation import FeatureChoice, Pool, Selection, StepContext
from apportion.allocation.feature_choice import FeatureChoiceConfig
from apportion.allocation.zipf import fit_zipf, zipf_densities
from apportion.kernels import choose


def rule(d_sae: int = 50, **settings: object) -> FeatureChoice:
    return FeatureChoice(FeatureChoiceConfig(**{"k": 4, **settings}), d_sae)  # type: ignore[arg-type]


def context(progress: float, density: torch.Tensor | None = None, batch_tokens: int = 100) -> StepContext:
    return StepContext(progress=progress, density=density, batch_tokens=batch_tokens)


def test_uniform_budgets_are_even():
    assert rule().budget(100).tolist() == [8] * 50
    ragged = rule().budget(99)
    assert int(ragged.sum()) == 396 and set(ragged.tolist()) == {7, 8}


def test_zipf_budgets_fall_with_rank():
    budgets = rule(budgets="zipf").budget(100)
    assert int(budgets.sum()) == 400
    assert bool((budgets.diff() <= 0).all()) and int(budgets[0]) > 2 * int(budgets[-1]) > 0


@pytest.mark.parametrize("tokens", [0, 1, 3, 25, 100, 1000])
@pytest.mark.parametrize("budgets", ["uniform", "zipf"])
def test_budgets_follow_the_actual_batch(tokens, budgets):
    budget = rule(budgets=budgets).budget(tokens)
    assert int(budget.sum()) == 4 * tokens and bool((budget <= tokens).all())


def test_every_latent_is_used():
    generator = torch.Generator().manual_seed(0)
    x, W = torch.randn(100, 8, generator=generator), torch.randn(50, 8, generator=generator)
    found = choose(x, W, torch.zeros(50), Selection(rule()))
    assert torch.bincount(found.latents, minlength=50).tolist() == [8] * 50


@pytest.mark.parametrize("tokens", [13, 20, 100])
def test_a_batch_that_is_accepted_leaves_no_latent_without_budget(tokens):
    rule().check_batch(tokens)
    assert int(rule().budget(tokens).min()) >= 1
    switched = rule(budgets="zipf", switch_at=0.5)
    switched.begin_step(context(0.5, torch.rand(50), batch_tokens=tokens))
    assert int(switched.budget(tokens).min()) >= 1


def test_a_batch_that_is_accepted_leaves_no_latent_without_budget_under_zipf_from_the_start():
    zipf = rule(budgets="zipf")
    zipf.check_batch(13)
    zipf.begin_step(context(1.0, torch.zeros(50), batch_tokens=13))
    before = zipf.budget(13)
    assert int(before.min()) >= 1 and int(before.sum()) == 52 and int(before[0]) > 1
    zipf.begin_step(context(1.0, torch.rand(50), batch_tokens=13))
    assert zipf.budget(13).equal(before), "ranks stay as they are"


def test_budgets_made_before_the_first_step_do_not_outlive_it():
    """Whoever encodes as many rows beforehand does not take the floor of one token per batch away."""
    zipf = rule(budgets="zipf", zipf_alpha=2.0)
    assert int(zipf.budget(13).min()) == 0
    zipf.begin_step(context(0.0, torch.zeros(50), batch_tokens=13))
    assert int(zipf.budget(13).min()) >= 1 and int(zipf.budget(13).sum()) == 52


def test_budgets_follow_densities_that_are_loaded():
    before, other = rule(), rule(budgets="zipf")
    assert before.budget(100).tolist() == [8] * 50
    before.load_state_dict(other.state_dict())
    assert torch.equal(before.budget(100), other.budget(100))


def test_no_latent_gets_more_than_all_tokens():
    """Whatever the densities; what one cannot take goes to the others."""
    skewed = rule(d_sae=4, k=3)
    skewed.density.copy_(torch.tensor([0.9, 0.2, 0.1, 0.1]))
    for budget in (skewed.budget(10), skewed.wanted(10)):
        assert isinstance(budget, torch.Tensor) and budget.tolist() == [10, 10, 5, 5]


def test_thresholds_let_no_latent_through_on_more_than_all_rows():
    """Latent 1 was seen down to its floor only, so it may have more matches; latents 2 and 3 have none to take."""
    skewed = rule(d_sae=4, k=1.5)
    latents = torch.tensor([0] * 10 + [1] * 7)
    affinity = torch.cat([torch.arange(10.0, 0, -1), torch.arange(17.0, 10, -1)])
    pool = Pool(latents, affinity, 10, torch.tensor([0.0, 10.5, 0.0, 0.0]))
    assert not skewed.set_threshold(pool), "what latent 1 would have to give lies below its floor"
    reaching = Pool(latents, affinity, 10, torch.zeros(4))
    assert skewed.set_threshold(reaching)
    counts = [int((affinity[latents == j] > skewed.threshold[j]).sum()) for j in range(4)]
    assert counts == [8, 7, 0, 0]


def test_check_batch():
    rule().check_batch(13)
    with pytest.raises(ValueError, match=r"batch_tokens >= 13"):
        rule().check_batch(12)


def test_switch_ranks_by_measured_density():
    switching = rule(budgets="zipf", switch_at=0.5)
    generator = torch.Generator().manual_seed(0)
    measured = torch.rand(50, generator=generator).double()
    assert switching.budget(100) == 400, "a Mutual Choice phase"
    switching.begin_step(context(0.49, measured))
    assert switching.budget(100) == 400
    switching.begin_step(context(0.5, measured))
    order = measured.argsort(descending=True)
    assert bool((switching.density[order].diff() <= 0).all())
    assert switching.density.sum().item() == pytest.approx(4, rel=1e-5)
    assert bool((switching.density >= 0.01 - 1e-6).all()), "one token per batch for each"
    frozen = switching.density.clone()
    switching.begin_step(context(0.9, torch.rand(50, generator=generator).double()))
    assert torch.equal(switching.density, frozen), "ranks stay"


def test_switch_to_uniform():
    switching = rule(switch_at=0.5)
    switching.begin_step(context(0.5, torch.rand(50)))
    assert switching.budget(100).tolist() == [8] * 50


def test_fitted_constants():
    """Densities that are a Zipf curve in a random order come back as themselves."""
    r = torch.arange(1, 51).double()
    curve = (r + 3) ** -1.5
    curve *= 4 / curve.sum()
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    measured = torch.empty_like(curve)
    measured[order] = curve
    fitted = rule(budgets="zipf", zipf_alpha=None, zipf_beta=None, switch_at=0.3)
    fitted.begin_step(context(0.3, measured, batch_tokens=1_000_000))
    assert torch.allclose(fitted.density.double(), measured, rtol=0.05)


def test_one_fitted_constant():
    r = torch.arange(1, 51).double()
    measured = (r + 3) ** -1.5
    fitted = rule(budgets="zipf", zipf_alpha=None, zipf_beta=3.0, switch_at=0.3)
    fitted.begin_step(context(0.3, measured * 4 / measured.sum(), batch_tokens=1_000_000))
    assert torch.allclose(fitted.density.double(), measured * 4 / measured.sum(), rtol=1e-3)


@pytest.mark.parametrize("given", [{"zipf_alpha": 0.5, "zipf_beta": None}, {"zipf_alpha": None, "zipf_beta": 40.0}])
def test_a_given_constant_is_kept_even_where_another_would_fit_better(given):
    r = torch.arange(1, 51).double()
    measured = (r + 3) ** -1.5
    measured *= 4 / measured.sum()
    fitted = rule(budgets="zipf", switch_at=0.3, **given)
    fitted.begin_step(context(0.3, measured, batch_tokens=1_000_000))
    alpha, beta = given["zipf_alpha"], given["zipf_beta"]
    fit = fit_zipf(measured, alpha=alpha, beta=beta)
    wanted = zipf_densities(50, 4, fit.alpha if alpha is None else alpha, fit.beta if beta is None else beta, 1e-6)
    assert torch.allclose(fitted.density.double(), wanted, rtol=1e-3)
    assert not torch.allclose(fitted.density.double(), measured, rtol=0.05)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"switch_at": 1.0}, "switch_at"),
        ({"switch_at": -0.1}, "switch_at"),
        ({"budgets": "zipf", "zipf_alpha": None}, "switch_at"),
        ({"budgets": "zipf", "zipf_beta": None}, "switch_at"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(ValueError, match=message):
        rule(**settings)


def test_warm_bounds_survive_the_switch():
    """The scalar bound of the Mutual phase is not taken for a bound of each latent."""
    switching = rule(switch_at=0.5)
    generator = torch.Generator().manual_seed(0)
    x, W = torch.randn(100, 8, generator=generator), torch.randn(50, 8, generator=generator)
    first = Selection(switching)
    choose(x, W, torch.zeros(50), first)
    assert first.next_warm is not None and first.next_warm.ndim == 0
    switching.begin_step(context(0.5, torch.rand(50)))
    second = Selection(switching, first.next_warm)
    found = choose(x, W, torch.zeros(50), second)
    assert torch.bincount(found.latents, minlength=50).tolist() == [8] * 50
    assert second.next_warm is not None and second.next_warm.shape == (50,)


@pytest.mark.parametrize("budgets", ["uniform", "zipf"])
def test_a_look_at_single_latents_tells_their_next_bounds(budgets):
    """The affinity of rank 2 m + 3, so that about twice the budget is scanned next time."""
    cold = rule(budgets=budgets)
    selection = Selection(cold)
    generator = torch.Generator().manual_seed(0)
    x, W = torch.randn(100, 8, generator=generator), torch.randn(50, 8, generator=generator)
    choose(x, W, torch.full((50,), 99.0), selection)
    warm = selection.next_warm
    best = (x @ W.T + 99).sort(dim=0, descending=True).values
    at = 2 * cold.budget(100) + 3
    told = at < 100
    assert warm is not None and int(told.sum()) > 40
    assert torch.allclose(warm[told], best[at[told], told.nonzero().squeeze(1)])


def test_state_remembers_the_switch():
    before, after = rule(switch_at=0.5), rule(switch_at=0.5)
    after.begin_step(context(0.5, torch.rand(50)))
    fresh = rule(switch_at=0.5)
    fresh.load_state_dict(before.state_dict())
    assert fresh.budget(100) == 400
    fresh.load_state_dict(after.state_dict())
    assert fresh.budget(100).tolist() == [8] * 50

"""Auxiliary losses of the plain SAE: whom they reach, and their gradients against dense float64 autograd."""

from __future__ import annotations

import pytest
import torch

import apportion as ap
from apportion.allocation import StepContext, reference
from apportion.allocation.zipf import fit_zipf, zipf_densities
from apportion.architectures import rebuild
from apportion.architectures.base import Pass
from apportion.devices import marked
from apportion.losses import underutilised

D_IN, D_SAE, TOKENS = 12, 30, 25
ROWS = ("W_enc", "b_enc", "W_dec")


CURVE = {"aux_zipf_alpha": 1.0, "aux_zipf_beta": 7.0}
"""A given Zipf curve, steeper than most measured ones."""


def new(aux: str = "aux_k", **settings: object) -> ap.SAE:
    sae = ap.create("mutual_choice", d_in=D_IN, d_sae=D_SAE, k=3, aux=aux, seed=0, input_norm="none", **settings)
    with torch.no_grad():
        g = torch.Generator().manual_seed(1)
        sae.b_dec.copy_(torch.randn(D_IN, generator=g))
        sae.b_enc.copy_(0.3 * torch.randn(D_SAE, generator=g))
        sae.W_enc.add_(0.3 * torch.randn(D_SAE, D_IN, generator=g))
    return sae.double()


def activations(n: int = TOKENS) -> torch.Tensor:
    return torch.randn(n, D_IN, generator=torch.Generator().manual_seed(2)).double() * 2


def context(silent: list[int], density: torch.Tensor | None = None) -> StepContext:
    dead = torch.zeros(D_SAE, dtype=torch.bool)
    dead[silent] = True
    if density is None:
        density = torch.linspace(1, 0.1, D_SAE).double() * 0.12
        density[silent] = 0
    return StepContext(dead=dead, density=density, batch_tokens=TOKENS)


def own_term(sae: ap.SAE, at: StepContext, x: torch.Tensor | None = None) -> torch.Tensor | None:
    x = activations() if x is None else x
    latents = sae.encode_scaled(x, sae.selection())
    terms = sae.own_terms(x, x, Pass(latents, sae.decode_scaled(latents)), at)
    assert set(terms) <= {sae.config.aux}
    return terms.get(sae.config.aux)


def gradients(sae: ap.SAE, term: torch.Tensor) -> dict[str, torch.Tensor]:
    sae.zero_grad()
    term.backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone().to_dense() for n, p in sae.named_parameters()}


def dense_term(sae: ap.SAE, silent: torch.Tensor, k_aux: int) -> torch.Tensor:
    """The auxiliary loss written out on dense matrices."""
    x = activations()
    with torch.no_grad():
        error = x - sae.decode_scaled(sae.encode_scaled(x, sae.selection()))
        centred = x - sae.b_dec
    codes = centred @ sae.W_enc.T + sae.b_enc
    norms = sae.W_dec.norm(dim=1) if sae.config.affinity == "code_times_decoder_norm" else 1
    affinity = (codes * norms).relu().detach()
    affinity[:, ~silent] = 0
    z = codes * reference.token_choice(affinity, k_aux)
    spread = (error - error.mean(0)).square().sum()
    share = min(1.0, int(silent.sum()) / k_aux)
    return sae.config.aux_weight * share * (error - z @ sae.W_dec).square().sum() / spread


@pytest.mark.parametrize("silent", [[4, 7, 8, 20, 29], [0], list(range(D_SAE))], ids=len)
@pytest.mark.parametrize("k_aux", [2, 5, 16])
@pytest.mark.parametrize("affinity", ["code", "code_times_decoder_norm"])
def test_equals_dense_autograd(silent, k_aux, affinity):
    sae = new(k_aux=k_aux, affinity=affinity)
    with torch.no_grad():
        sae.W_dec *= torch.linspace(0.5, 2, D_SAE)[:, None]
    at = context(silent)
    term, wanted = own_term(sae, at), dense_term(sae, at.dead, k_aux)
    assert term.item() == pytest.approx(wanted.item(), rel=1e-9)
    got, wanted = gradients(sae, term), gradients(sae, wanted)
    for name in got:
        assert (got[name] - wanted[name]).abs().max() <= 1e-9 * wanted[name].abs().max(), name


@pytest.mark.parametrize("aux", ["aux_k", "aux_zipf"])
def test_reaches_the_silent_latents_and_nothing_else(aux):
    sae = new(aux, k_aux=3, **CURVE)
    at = context([4, 7, 8, 20, 29])
    grads = gradients(sae, own_term(sae, at))
    silent = at.dead
    if aux == "aux_zipf":
        silent = underutilised(at.density, at.dead, sae._expected_densities(at.density), sae.config.aux_c)
        assert bool((silent & ~at.dead).any()) and not bool(silent.all())
    for name in ROWS:
        reached = grads[name].reshape(D_SAE, -1).ne(0).any(1)
        assert not bool(reached[~silent].any()), name
        assert bool(reached[at.dead].all()), name
    for name in grads.keys() - set(ROWS):
        assert not bool(grads[name].any()), f"{name} must get exact zeros"


def test_aux_zipf_with_c_0_is_aux_k():
    """Equal weight and k_aux: the same loss and gradients, bit for bit."""
    results = []
    for sae in (new("aux_k", aux_weight=0.1, k_aux=4), new("aux_zipf", aux_weight=0.1, k_aux=4, aux_c=0.0)):
        term = own_term(sae, context([4, 7, 8, 20, 29]))
        results.append((term.detach(), gradients(sae, term)))
    (a, grads_a), (b, grads_b) = results
    assert torch.equal(a, b) and bool(a > 0)
    assert all(torch.equal(grads_a[n], grads_b[n]) for n in grads_a)
    far = own_term(new("aux_zipf", aux_weight=0.1, k_aux=4, aux_c=0.5, **CURVE), context([4, 7, 8, 20, 29]))
    assert not torch.equal(far.detach(), a), "c = 0.5 revives more"


def test_weight_and_share_scale_the_term():
    at = context([4, 7, 8, 20])
    one = own_term(new(k_aux=4, aux_weight=1.0), at)
    assert own_term(new(k_aux=4, aux_weight=0.25), at).item() == pytest.approx(0.25 * one.item(), rel=1e-12)
    # With k_aux = 16 but four silent latents, the same matches count a quarter.
    assert own_term(new(k_aux=16, aux_weight=1.0), at).item() == pytest.approx(4 / 16 * one.item(), rel=1e-12)


def test_no_term_without_silent_latents_or_weight():
    assert own_term(new("aux_k"), context([])) is None
    assert own_term(new("none"), context([1, 2])) is None
    assert own_term(new("aux_k", aux_weight=0.0), context([1, 2])) is None
    assert own_term(new("aux_k"), StepContext()) is None, "a user's own loop that counts nothing"


@pytest.mark.parametrize("case", ["perfect", "one row"])
def test_nothing_left_to_explain_gives_zero_and_no_nan(case):
    sae = new()
    x = activations(1 if case == "one row" else TOKENS)
    latents = sae.encode_scaled(x, sae.selection())
    x_hat = x if case == "perfect" else sae.decode_scaled(latents)
    term = sae.own_terms(x, x, Pass(latents, x_hat), context([1, 2, 3]))["aux_k"]
    assert term.item() == 0
    assert all(not bool(g.any()) for g in gradients(sae, term).values())


@pytest.mark.parametrize(("d_in", "wanted"), [(1, 1), (2, 1), (12, 8), (576, 256), (1024, 512), (768, 512)])
def test_default_k_aux_is_half_the_width_rounded_to_a_power_of_two(d_in, wanted):
    assert ap.create("topk", d_in=d_in, d_sae=4, k=1).config.aux_matches == wanted


@pytest.mark.parametrize("curve", [CURVE, {}])
def test_expected_densities_sum_to_k(curve):
    expected = new("aux_zipf", **curve)._expected_densities(zipf_densities(D_SAE, 3, 1.2, 4.0))
    assert expected.sum().item() == pytest.approx(3)
    assert bool((expected.diff() <= 0).all())


def test_a_fitted_curve_blames_only_the_tail_that_falls_below_it():
    """Densities on a Zipf curve are nobody's fault, whatever its constants; latents below half of it are revived."""
    sae = ap.create("mutual_choice", d_in=12, d_sae=2000, k=20, aux="aux_zipf")
    density = zipf_densities(2000, 20, 1.6, 130.0)[torch.randperm(2000, generator=torch.Generator().manual_seed(0))]
    alive = torch.zeros(2000, dtype=torch.bool)
    assert not sae._silent(StepContext(dead=alive, density=density)).any()
    weak = density.argsort()[:100].sort().values
    density[weak] *= 0.1
    blamed = set(marked(sae._silent(StepContext(dead=alive, density=density))).tolist())
    assert len(blamed & set(weak.tolist())) > 90 and len(blamed) < 130
    fixed = ap.create("mutual_choice", d_in=12, d_sae=2000, k=20, aux="aux_zipf", **CURVE)
    most = int(density.argmax())
    assert fixed._silent(StepContext(dead=alive, density=density))[most], "a steeper curve blames the head"


def test_feature_choice_expects_its_own_budgets():
    """Once ranks are frozen, a latent is underutilised only below its own budget."""
    sae = ap.create("feature_choice", d_in=12, d_sae=40, k=4)
    density = torch.full((40,), 0.1)
    density[7] = 0.04
    silent = sae._silent(StepContext(dead=torch.zeros(40, dtype=torch.bool), density=density))
    assert marked(silent).tolist() == [7]


def test_the_curve_is_fitted_seldom_once_densities_are_averages_over_many_steps():
    """And what was fitted last is kept with a checkpoint."""
    sae = ap.create("mutual_choice", d_in=12, d_sae=200, k=20, aux="aux_zipf")
    dead = torch.zeros(200, dtype=torch.bool)
    steep, flat = (zipf_densities(200, 20, alpha, 5.0) for alpha in (1.5, 0.5))

    def silent(sae: ap.SAE, density: torch.Tensor, steps: int) -> int:
        return int(sae._silent(StepContext(dead=dead, density=density, steps=steps)).sum())

    assert silent(sae, flat, 80) == 0
    assert silent(sae, steep, 81) > 0, "compared with the curve of a step ago"
    resumed = ap.create("mutual_choice", d_in=12, d_sae=200, k=20, aux="aux_zipf")
    resumed.carry_on(sae.carried())
    assert silent(resumed, steep, 82) == silent(sae, steep, 82) > 0
    assert silent(sae, steep, 96) == 0 and silent(sae, flat, 3) == silent(sae, steep, 4) == 0


@pytest.mark.parametrize("budgets", ["uniform", "zipf"])
def test_feature_choice_expects_exactly_the_densities_it_hands_out(budgets):
    """And not a curve of its own; in a Mutual Choice phase there are none yet."""
    made = {"d_in": 12, "d_sae": 40, "k": 4, "aux": "aux_zipf", "budgets": budgets, **CURVE}
    measured = zipf_densities(40, 4, 0.3, 1.0)
    decided = ap.create("feature_choice", **made, zipf_alpha=2.0, zipf_beta=1.0)
    expected = decided._expected_densities(measured)
    assert torch.equal(expected, decided.allocation.density.sort(descending=True).values)
    mutual = ap.create("feature_choice", **made, switch_at=0.5)
    assert torch.allclose(mutual._expected_densities(measured), zipf_densities(40, 4, 1.0, 7.0))


@pytest.mark.parametrize("given", [{"alpha": 0.5}, {"beta": 40.0}])
def test_a_given_constant_is_kept_while_the_other_is_fitted(given):
    sae = ap.create("mutual_choice", d_in=12, d_sae=200, k=2, **{f"aux_zipf_{name}": v for name, v in given.items()})
    measured = zipf_densities(200, 2, 1.5, 3.0)
    free = fit_zipf(measured)
    assert (free.alpha, free.beta) == pytest.approx((1.5, 3.0), rel=0.05), "neither is what would be fitted"
    fit = fit_zipf(measured, **given)
    wanted = zipf_densities(200, 2, **({"alpha": fit.alpha, "beta": fit.beta} | given))
    assert torch.allclose(sae._expected_densities(measured), wanted, rtol=1e-6)


@pytest.mark.parametrize("curve", [CURVE, {}])
def test_aux_zipf_goes_by_the_k_of_the_sae_where_its_rule_has_none(curve):
    jumprelu, mutual = (
        ap.create(name, d_in=D_IN, d_sae=D_SAE, k=3, aux="aux_zipf", aux_weight=0.5, k_aux=4, seed=0, **curve)
        for name in ("jumprelu", "mutual_choice")
    )
    measured = zipf_densities(D_SAE, 3, 1.2, 4.0)
    measured[[2, 9]] = 0
    expected = jumprelu._expected_densities(measured)
    assert jumprelu.allocation.k is None and expected.sum().item() == pytest.approx(3)
    assert torch.equal(expected, mutual._expected_densities(measured))
    x = activations().float()
    at = StepContext(dead=measured == 0, density=measured, batch_tokens=TOKENS)
    made = jumprelu.forward_scaled(x, at)
    assert jumprelu.own_terms(x, x, made, at)["aux_zipf"].item() > 0


def test_aux_zipf_needs_a_k():
    with pytest.raises(ValueError, match="this SAE has no k"):
        rebuild("transcoder", d_in=D_IN, d_sae=D_SAE, allocation="threshold", aux="aux_zipf")

"""Gated SAE: the three losses against their dense definition, closed gates, and the shrinkage that it is free of."""

from __future__ import annotations

import pytest
import torch

import apportion as ap
from apportion.allocation import StepContext, TokenChoice, reference
from apportion.allocation.token_choice import TokenChoiceConfig
from apportion.architectures.gated import Gated

D_IN, D_SAE, TOKENS = 7, 23, 13


def new(**settings: object) -> Gated:
    """In general position, in float64, with a coefficient of 0.3 in force."""
    given = {"d_in": D_IN, "d_sae": D_SAE, "k": 4, "coefficient": 0.3, "seed": 0, "input_norm": "none"}
    sae = ap.create("gated", **{**given, **settings}).double()
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in sae.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=g, dtype=torch.float64))
    sae.begin_step(StepContext())
    assert isinstance(sae, Gated)
    return sae


def activations(n: int = TOKENS) -> torch.Tensor:
    return torch.randn(n, D_IN, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def dense(sae: Gated, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """pi and z as in the paper."""
    u = (x - sae.b_dec if sae.config.subtract_b_dec else x) @ sae.W_enc.T
    pi = u + sae.b_enc
    return pi, (pi > 0) * (sae.r_mag.exp() * u + sae.b_mag).relu()


def terms_of(sae: ap.SAE, x: torch.Tensor) -> dict[str, torch.Tensor]:
    made = sae.forward_scaled(x, StepContext())
    return {"reconstruction": sae.reconstruction_loss(x, made)} | sae.own_terms(x, x, made, StepContext())


@pytest.mark.parametrize("settings", [{}, {"subtract_b_dec": False}])
def test_losses_and_gradients_are_those_of_the_dense_definition(settings: dict[str, object]) -> None:
    sae, x = new(**settings), activations().requires_grad_()
    pi, z = dense(sae, x)
    wanted = {
        "reconstruction": (z @ sae.W_dec + sae.b_dec - x).square().mean(),
        "sparsity": 0.3 * pi.relu().sum(1).mean(),
        "gates": (pi.relu() @ sae.W_dec.detach() + sae.b_dec.detach() - x).square().mean(),
    }
    terms = terms_of(sae, x)
    assert terms.keys() == wanted.keys()
    given = [*sae.parameters(), x]
    for name in wanted:
        torch.testing.assert_close(terms[name], wanted[name])
        ours, densely = (
            torch.autograd.grad(t[name], given, retain_graph=True, allow_unused=True, materialize_grads=True)
            for t in (terms, wanted)
        )
        for a, b in zip(ours, densely, strict=True):
            assert (a - b).abs().max() <= 1e-9 * max(b.abs().max(), 1e-3)


def test_the_third_term_does_not_reach_the_decoder() -> None:
    sae = new(subtract_b_dec=False)
    terms_of(sae, activations())["gates"].backward()
    assert sae.W_dec.grad is None and sae.b_dec.grad is None
    assert sae.W_enc.grad is not None and bool((sae.W_enc.grad != 0).any())


def test_no_bias_opens_a_closed_gate() -> None:
    sae, x = new(), activations()
    with torch.no_grad():
        sae.b_mag.fill_(50.0)
    pi, z = dense(sae, x)
    codes = sae.encode(x).dense()
    assert bool((codes[pi <= 0] == 0).all()) and bool((pi <= 0).any())
    assert bool((codes[pi > 0] > 0).all())
    torch.testing.assert_close(codes, z)


def test_open_gates_without_a_magnitude_are_penalised_but_do_not_fire() -> None:
    sae, x = new(), activations()
    with torch.no_grad():
        sae.b_mag.fill_(-50.0)
    made = sae.forward_scaled(x, StepContext())
    assert made.latents.nnz == 0
    assert made.gates.nnz > 0
    assert sae.own_terms(x, x, made, StepContext())["sparsity"] > 0


def test_other_rules_choose_among_the_gates() -> None:
    sae, x = new(), activations()
    pi, z = dense(sae, x)
    rule = TokenChoice(TokenChoiceConfig(k=3), D_SAE)
    latents = sae.encode_scaled(x, sae.selection(rule=rule))
    torch.testing.assert_close(latents.dense(), z * reference.token_choice(pi.relu(), 3))
    torch.testing.assert_close(sae.affinities(latents), pi[latents.rows(), latents.indices])


@pytest.mark.parametrize("subtract_b_dec", [True, False])
def test_folding_keeps_reconstructions(subtract_b_dec: bool) -> None:
    sae, x = new(input_norm="dataset", subtract_b_dec=subtract_b_dec), 3 * activations(50) + 2
    sae.fit_input(x)
    raw = sae.eval().folded()
    torch.testing.assert_close(raw(x), sae(x))
    torch.testing.assert_close(raw.encode(x).dense(), sae.encode(x).dense() / sae.scale)


def bias_after_training(name: str, x: torch.Tensor, **settings: object) -> float:
    """The paper's gamma: how much longer reconstructions are than the part of x that they capture, about the mean."""
    sae = ap.create(name, d_in=x.shape[1], d_sae=64, seed=0, **settings)
    config = ap.TrainConfig(batch_tokens=256, total_tokens=256 * 400, lr=3e-3)
    ap.Trainer(sae, config).fit(x, progress=False)
    with torch.no_grad():
        x_hat, x = sae(x) - x.mean(0), x - x.mean(0)
    return ((x_hat * x_hat).sum() / (x_hat * x).sum()).item()


@pytest.mark.slow
def test_gates_do_not_shrink_reconstructions_as_an_l1_penalty_does() -> None:
    g = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(32, 16, generator=g), dim=1)
    x = ((torch.rand(8000, 32, generator=g) < 2 / 32) * (1 + torch.rand(8000, 32, generator=g))) @ directions
    assert bias_after_training("gated", x, coefficient=0.06) == pytest.approx(1, abs=0.05)
    assert bias_after_training("relu", x, coefficient=0.06) < 0.87

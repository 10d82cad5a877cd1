"""ReLU with an L1 penalty: gradients, the decoder norms' part, the start, p-annealing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import apportion as ap
from apportion.allocation import StepContext
from apportion.architectures.base import Pass
from apportion.architectures.relu import SMALLEST, ReLU
from apportion.latents import Latents

D_IN, D_SAE, TOKENS = 7, 23, 13


def new(**settings: object) -> ReLU:
    """In general position, in float64, with a coefficient of 0.3 in force."""
    given = {"d_in": D_IN, "d_sae": D_SAE, "k": 4, "coefficient": 0.3, "seed": 0, "input_norm": "none"}
    sae = ap.create("relu", **{**given, **settings}).double()
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in sae.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=g, dtype=torch.float64))
    sae.begin_step(StepContext())
    assert isinstance(sae, ReLU)
    return sae


def activations(n: int = TOKENS) -> torch.Tensor:
    return torch.randn(n, D_IN, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def terms_of(sae: ap.SAE, x: torch.Tensor) -> dict[str, torch.Tensor]:
    made = sae.forward_scaled(x, StepContext())
    return {"reconstruction": sae.reconstruction_loss(x, made)} | sae.own_terms(x, x, made, StepContext())


def codes(sae: ReLU, x: torch.Tensor) -> torch.Tensor:
    return ((x - sae.b_dec if sae.config.subtract_b_dec else x) @ sae.W_enc.T + sae.b_enc).relu()


@pytest.mark.parametrize("settings", [{}, {"subtract_b_dec": True}, {"p_end": 0.4}])
def test_losses_and_gradients_are_those_of_the_dense_definition(settings: dict[str, object]) -> None:
    sae, x = new(**settings), activations().requires_grad_()
    given = [*sae.parameters(), x]
    z = codes(sae, x)
    weighted = z * sae.W_dec.norm(dim=1)
    p = settings.get("p_end", 1.0)
    if p != 1:  # the coefficient that keeps the pressure
        weighted = torch.where(weighted > 0, weighted, 1.0) ** p * (weighted > 0)
        weighted = weighted * ((z * sae.W_dec.norm(dim=1)).sum() / weighted.sum()).detach()
    wanted = {
        "reconstruction": (z @ sae.W_dec + sae.b_dec - x).square().mean(),
        "sparsity": 0.3 * weighted.sum(1).mean(),
    }
    of_wanted = torch.autograd.grad(torch.stack(list(wanted.values())).sum(), given)
    terms = terms_of(sae, x)
    of_terms = torch.autograd.grad(torch.stack(list(terms.values())).sum(), given)
    assert terms.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(terms[name], wanted[name])
    for ours, dense in zip(of_terms, of_wanted, strict=True):
        assert (ours - dense).abs().max() <= 1e-9 * dense.abs().max()


def test_it_starts_with_short_rows_and_the_decoders_transpose_as_encoder() -> None:
    sae = ap.create("relu", d_in=D_IN, d_sae=D_SAE, k=4)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.full((D_SAE,), 0.1))
    assert torch.equal(sae.W_dec, sae.W_enc)
    assert not sae.config.subtract_b_dec
    assert sae.unit_rows() == []


def test_longer_decoder_rows_with_shorter_codes_gain_nothing() -> None:
    sae, x = new(), activations()
    before = terms_of(sae, x)
    with torch.no_grad():
        factors = torch.linspace(0.5, 3, D_SAE, dtype=torch.float64)
        sae.W_dec.mul_(factors[:, None])
        sae.W_enc.div_(factors[:, None])
        sae.b_enc.div_(factors)
    for name, term in terms_of(sae, x).items():
        torch.testing.assert_close(term, before[name])


@pytest.mark.parametrize("shares", [[1.0], [0.3, 0.4, 0.5, 0.7, 0.8, 1.0]])
def test_the_pressure_outlives_every_change_of_p(shares: list[float]) -> None:
    sae, x = new(p_end=0.2), activations()
    sae.p.fill_(1.0)
    sae.compensation.fill_(1.0)
    l1 = (codes(sae, x) * sae.W_dec.norm(dim=1)).sum(1).mean()
    for share in shares:
        sae.begin_step(StepContext(progress=share))
        torch.testing.assert_close(terms_of(sae, x)["sparsity"], 0.3 * l1)
    assert sae.p.item() == pytest.approx(0.2)


def test_p_falls_from_its_start_to_the_end_of_the_run() -> None:
    sae, x = new(p_end=0.2, p_start_share=0.4), activations()
    for share, p in ((0.0, 1.0), (0.4, 1.0), (0.7, 0.6), (1.0, 0.2)):
        sae.begin_step(StepContext(progress=share))
        terms_of(sae, x)
        assert sae.p.item() == pytest.approx(p)


def test_almost_silent_codes_do_not_break_the_annealed_penalty() -> None:
    sae = new(p_end=0.2)
    values = torch.tensor([SMALLEST / 100, 2 * SMALLEST, 1.0], dtype=torch.float64, requires_grad=True)
    latents = Latents(values, torch.tensor([0, 1, 2]), torch.tensor([0, 3]), D_SAE, (1,))
    sae.own_terms(activations(1), activations(1), Pass(latents, activations(1)), StepContext())["sparsity"].backward()
    assert values.grad is not None and bool(values.grad.isfinite().all())
    assert values.grad[0] == 0


def test_folding_keeps_reconstructions() -> None:
    sae, x = new(input_norm="dataset"), 3 * activations(50) + 2
    sae.fit_input(x)
    raw = sae.eval().folded()
    torch.testing.assert_close(raw(x), sae(x))
    torch.testing.assert_close(raw.encode(x).dense(), sae.encode(x).dense() / sae.scale)


def test_a_resumed_run_goes_on_with_the_same_penalty(tmp_path) -> None:
    sae, x = new(p_end=0.3, coefficient=None), activations()
    for share in (0.2, 0.5, 0.7):
        sae.begin_step(StepContext(progress=share, l0=9.0 - share))
        terms_of(sae, x)
    sae.save(tmp_path)
    again = ap.load(tmp_path).train()
    for each in (sae, again):
        each.begin_step(replace(StepContext(), progress=0.75, l0=8.0))
    for name, term in terms_of(sae, x).items():
        assert torch.equal(term, terms_of(again, x)[name])


@pytest.mark.parametrize("settings", [{"p_end": 0.0}, {"p_end": 1.5}, {"p_start_share": 1.0}, {"p_start_share": -0.1}])
def test_schedules_that_cannot_work_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        ap.create("relu", d_in=D_IN, d_sae=D_SAE, k=4, **settings)

"""Multi-TopK: both losses against dense float64 autograd, from one product, and what it is for."""

from __future__ import annotations

import pytest
import torch

import apportion as ap
from apportion.allocation import StepContext, TokenChoice, reference
from apportion.architectures import affine
from apportion.architectures.multi_topk import MultiTopK

D_IN, D_SAE = 7, 41
ROWS = ("W_enc", "b_enc", "W_dec", "b_dec")


def new(**settings: object) -> MultiTopK:
    settings = {"k": 3, "seed": 0, "aux": "none", "input_norm": "none", **settings}
    sae = ap.create("multi_topk", d_in=D_IN, d_sae=D_SAE, **settings).double()
    assert isinstance(sae, MultiTopK)
    with torch.no_grad():
        g = torch.Generator().manual_seed(1)
        for p in sae.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=g))
    return sae


def activations(n: int = 23) -> torch.Tensor:
    return torch.randn(n, D_IN, generator=torch.Generator().manual_seed(2)).double() * 2


def dense(sae: MultiTopK, x: torch.Tensor, k: int) -> torch.Tensor:
    """Reconstruction from the k best latents of each token, written out."""
    codes = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    norms = sae.W_dec.norm(dim=1) if sae.config.affinity == "code_times_decoder_norm" else 1
    return (codes * reference.token_choice((codes * norms).detach(), k)) @ sae.W_dec + sae.b_dec


@pytest.mark.parametrize("affinity", ["code", "code_times_decoder_norm"])
@pytest.mark.parametrize("k, factor", [(1, 2), (3, 4), (3, 13), (9, 7), (41, 2)])
def test_losses_and_gradients_equal_dense_autograd(k, factor, affinity):
    sae, x = new(k=k, multi_factor=factor, affinity=affinity, multi_weight=0.3), activations()
    context = StepContext()
    made = sae.forward_scaled(x, context)
    got = {"reconstruction": sae.reconstruction_loss(x, made)} | sae.own_terms(x, x, made, context)
    narrow, wide = (dense(sae, x, n) for n in (k, min(k * factor, D_SAE)))
    assert torch.allclose(made.y_hat, narrow, rtol=1e-12)
    wanted = {"reconstruction": (x - narrow).square().mean(), "multi_topk": 0.3 * (x - wide).square().mean()}
    assert got.keys() == wanted.keys()
    for name, term in wanted.items():
        assert got[name].item() == pytest.approx(term.item(), rel=1e-12)
        parameters = [getattr(sae, n) for n in ROWS]
        ours, theirs = (torch.autograd.grad(t, parameters, retain_graph=True) for t in (got[name], term))
        for a, b in zip(ours, theirs, strict=True):
            assert torch.allclose(a, b, rtol=0, atol=1e-12 * float(b.abs().max()))


def test_latents_are_those_of_topk_even_with_ties():
    sae = new(k=2)
    g = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in sae.parameters():
            p.copy_(torch.randint(-1, 2, p.shape, generator=g))
    x = torch.randint(-1, 2, (50, D_IN), generator=g).double()
    made, wanted = sae.forward_scaled(x, StepContext()), sae.encode_scaled(x, sae.selection())
    assert torch.equal(made.latents.indices, wanted.indices) and torch.equal(made.latents.offsets, wanted.offsets)
    assert torch.equal(made.latents.values, wanted.values)
    mask = reference.token_choice((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc, 2)
    assert torch.equal(wanted.dense() != 0, mask)


def test_one_product(monkeypatch):
    calls, choose = [], affine.choose
    monkeypatch.setattr(affine, "choose", lambda *a, **k: calls.append(a[3].rule.k) or choose(*a, **k))
    sae, x = new(), activations()
    made = sae.forward_scaled(x, StepContext())
    sae.own_terms(x, x, made, StepContext())
    assert calls == [12]


def test_the_second_budget_follows_annealing():
    sae, x = new(k=2, k_start=8, k_anneal_share=0.5), activations()
    for progress, k in [(0.0, 8), (0.25, 5), (0.5, 2), (1.0, 2)]:
        context = StepContext(progress=progress)
        sae.begin_step(context)
        made = sae.forward_scaled(x, context)
        assert torch.allclose(made.y_hat, dense(sae, x, k), rtol=1e-12)
        assert torch.allclose(made.wide, dense(sae, x, min(4 * k, D_SAE)), rtol=1e-12)


@pytest.mark.parametrize("settings", [{"multi_factor": 1}, {"multi_factor": 2.5}, {"multi_weight": 0}])
def test_settings_that_make_no_sense(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        new(**settings)


def test_it_reconstructs_better_with_more_latents_than_topk():
    """Three of 24 directions per token; both SAEs are trained with k = 2 and then use up to 8 latents."""
    directions = torch.randn(24, 12, generator=torch.Generator().manual_seed(99))
    g = torch.Generator().manual_seed(0)
    active = torch.zeros(7000, 24).scatter_(1, torch.rand(7000, 24, generator=g).topk(3, dim=1).indices, 1.0)
    x = (active * (0.5 + torch.rand(7000, 24, generator=g))) @ directions
    train, test = x[:6000], x[6000:]
    fvu = {}
    for name in ("topk", "multi_topk"):
        config = ap.TrainConfig(lr=1e-2, batch_tokens=128, total_tokens=128 * 200, dead_window_tokens=2000)
        sae = ap.Trainer(ap.create(name, d_in=12, d_sae=32, k=2, seed=0), config).fit(train, progress=False)
        rule = sae.allocation
        assert isinstance(rule, TokenChoice)
        for k in (2, 8):
            sae.allocation = rule.relaxed(k / 2).eval()
            fvu[name, k] = float((test - sae(test).detach()).square().sum() / (test - test.mean(0)).square().sum())
    assert fvu["multi_topk", 8] < 0.7 * fvu["topk", 8], fvu
    assert fvu["multi_topk", 8] < fvu["multi_topk", 2] < 1.2 * fvu["topk", 2], fvu

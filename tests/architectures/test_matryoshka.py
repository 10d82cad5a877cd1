"""Matryoshka: the nested loss against dense float64 autograd, its scale, and what the first prefixes learn."""

from __future__ import annotations

import pytest
import torch

import apportion as ap
from apportion.allocation import StepContext
from apportion.architectures import matryoshka
from apportion.architectures.base import Pass
from apportion.architectures.matryoshka import Matryoshka, split_latents
from apportion.latents import Latents

D_IN = 7
SHARES = {"five": (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0), "two": (0.3, 1.0), "one": (1.0,)}
ROWS = ("W_enc", "b_enc", "W_dec", "b_dec")


def new(d_sae: int = 33, **settings: object) -> Matryoshka:
    settings = {"k": 3, "seed": 0, "aux": "none", "input_norm": "none", **settings}
    sae = ap.create("matryoshka", d_in=D_IN, d_sae=d_sae, **settings).double()
    assert isinstance(sae, Matryoshka)
    with torch.no_grad():
        g = torch.Generator().manual_seed(1)
        for p in sae.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=g))
    return sae


def activations(n: int = 25, seed: int = 2) -> torch.Tensor:
    return torch.randn(n, D_IN, generator=torch.Generator().manual_seed(seed)).double() * 2


def passed(sae: Matryoshka, x: torch.Tensor) -> Pass:
    return sae.forward_scaled(x, StepContext())


def gradients(sae: Matryoshka, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    found = torch.autograd.grad(loss, [getattr(sae, name) for name in ROWS], retain_graph=True)
    return dict(zip(ROWS, found, strict=True))


def dense_loss(sae: Matryoshka, x: torch.Tensor) -> torch.Tensor:
    """The nested loss written out: a full reconstruction for each prefix."""
    mask = sae.encode_scaled(x, sae.selection()).dense() != 0
    z = ((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc) * mask
    total, before = torch.zeros((), dtype=x.dtype), 0
    for size in sae.prefixes:
        x_hat = z[:, :size] @ sae.W_dec[:size] + sae.b_dec
        if sae.config.detach and before:
            inner = z[:, :before] @ sae.W_dec[:before] + sae.b_dec
            x_hat = inner.detach() + z[:, before:size] @ sae.W_dec[before:size]
        total = total + (x - x_hat).square().sum(1).mean() / D_IN
        before = size
    return total / len(sae.prefixes)


@pytest.mark.parametrize("shares", SHARES)
@pytest.mark.parametrize("tokens", [1, 25])
@pytest.mark.parametrize("detach", [False, True], ids=["joint", "detached"])
@pytest.mark.parametrize("allocation", ["mutual_choice", "topk", "feature_choice"])
def test_loss_and_gradients_equal_dense_autograd(shares, tokens, detach, allocation):
    sae = new(prefix_shares=SHARES[shares], detach=detach, allocation=allocation)
    x = activations(tokens)
    made = passed(sae, x)
    got, wanted = sae.reconstruction_loss(x, made), dense_loss(sae, x)
    assert got.item() == pytest.approx(wanted.item(), rel=1e-12)
    ours, theirs = gradients(sae, got), gradients(sae, wanted)
    for name in ROWS:
        assert torch.allclose(ours[name], theirs[name], rtol=0, atol=1e-12 * float(theirs[name].abs().max())), name
    assert torch.allclose(made.y_hat, sae.decode_scaled(made.latents), rtol=1e-12)


def test_competition_by_decoder_norm():
    sae = new(affinity="code_times_decoder_norm", k=2)
    x = activations()
    mask = sae.encode_scaled(x, sae.selection()).dense() != 0
    affinity = ((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc).relu() * sae.W_dec.norm(dim=1)
    assert affinity[mask].min() >= affinity[~mask].max() and int(mask.sum()) == 2 * len(x)
    assert sae.reconstruction_loss(x, passed(sae, x)).item() == pytest.approx(dense_loss(sae, x).item(), rel=1e-12)


def test_one_prefix_is_a_plain_sae():
    sae, plain = (
        new(prefix_shares=[1]),
        ap.create("mutual_choice", d_in=D_IN, d_sae=33, k=3, input_norm="none").double(),
    )
    plain.load_state_dict(sae.state_dict())
    x = activations()
    ours, theirs = passed(sae, x), plain.forward_scaled(x, StepContext())
    assert torch.equal(sae.reconstruction_loss(x, ours), plain.reconstruction_loss(x, theirs))


def test_the_loss_is_a_mean_over_prefixes():
    """Where no latent is active every prefix reconstructs with b_dec alone: the mean is that error, whatever G is."""
    x = activations()
    for shares in SHARES.values():
        sae = new(prefix_shares=shares)
        torch.nn.init.constant_(sae.b_enc, -1e3)
        wanted = (x - sae.b_dec).square().mean()
        assert sae.reconstruction_loss(x, passed(sae, x)).item() == pytest.approx(wanted.item(), rel=1e-12)


def test_every_match_is_decoded_once(monkeypatch):
    decoded = []
    decode = matryoshka.decode_matches
    monkeypatch.setattr(matryoshka, "decode_matches", lambda z, W: decoded.append((z.nnz, *W.shape)) or decode(z, W))
    sae = new()
    made = passed(sae, activations())
    assert sum(nnz for nnz, *_ in decoded) == made.latents.nnz
    assert sum(rows for _, rows, _ in decoded) == sae.d_sae


def test_detached_prefixes_train_only_what_they_add():
    """The loss of the largest prefix alone: without `detach` it reaches all latents, with it the last group."""
    for detach in (False, True):
        sae = new(detach=detach, k=12)
        x = activations(200)
        (last,) = torch.autograd.grad((x - passed(sae, x).nested[-1]).square().mean(), sae.W_dec)
        assert bool(last[: sae.prefixes[-2]].any()) != detach and bool(last[sae.prefixes[-2] :].any())


def test_other_objectives_reach_all_latents_even_if_detached():
    sae, x = new(detach=True), activations(200)
    weights = torch.randn(len(x), D_IN, generator=torch.Generator().manual_seed(5)).double()
    made = passed(sae, x)
    (got,) = torch.autograd.grad((made.y_hat * weights).sum(), sae.W_dec)
    assert torch.allclose(got, made.latents.dense().T @ weights, rtol=1e-12)


def test_auxiliary_loss_is_about_the_whole_sae():
    sae = new(aux="aux_k", k_aux=4, aux_weight=0.5)
    x, dead = activations(), torch.arange(sae.d_sae) < 6
    context = StepContext(dead=dead, density=torch.zeros(sae.d_sae).double(), batch_tokens=len(x))
    made = sae.forward_scaled(x, context)
    wanted = sae.auxiliary_terms(x, x - sae.decode_scaled(made.latents), context)
    assert sae.own_terms(x, x, made, context).keys() == wanted.keys() == {"aux_k"}
    assert torch.allclose(sae.own_terms(x, x, made, context)["aux_k"], wanted["aux_k"], rtol=1e-12)


@pytest.mark.parametrize("density", [0.0, 0.05, 0.9])
@pytest.mark.parametrize("sizes", [[1], [3, 1, 8], [5, 7], [1] * 12])
def test_splitting_latents(density, sizes):
    g = torch.Generator().manual_seed(3)
    dense = torch.rand(6, sum(sizes), generator=g) * (torch.rand(6, sum(sizes), generator=g) < density)
    dense[2] = 0
    latents = Latents.from_dense(dense.reshape(2, 3, -1).requires_grad_())
    parts = split_latents(latents, sizes)
    for part, wanted in zip(parts, dense.split(sizes, dim=1), strict=True):
        assert part.shape == (2, 3) and torch.equal(part.dense().flatten(0, 1), wanted)
        assert bool((part.indices.diff()[part.rows().diff() == 0] > 0).all()), "ascending within a row"
    assert sum(part.values.sum() for part in parts).item() == pytest.approx(float(dense.sum()))


# Prefixes for users


def test_decode_prefix():
    sae = ap.create("matryoshka", d_in=D_IN, d_sae=40, k=4, seed=0)
    assert isinstance(sae, Matryoshka) and sae.prefixes == (2, 5, 10, 20, 40)
    x = activations(60).float().reshape(3, 20, D_IN)
    sae.fit_input(x)
    latents = sae.encode(x)
    for prefix, size in enumerate(sae.prefixes, 1):
        z = latents.dense()
        z[..., size:] = 0
        got = sae.decode_prefix(latents, prefix)
        assert got.shape == x.shape and torch.allclose(got, sae.decode(z), rtol=1e-5, atol=1e-6)
    assert torch.equal(sae.decode_prefix(latents, 5), sae.decode(latents))
    for wrong in (0, 6, -1, 1.5):
        with pytest.raises(ValueError, match="from 1 to 5"):
            sae.decode_prefix(latents, wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("d_sae", "prefixes"), [(40, (2, 5, 10, 20, 40)), (47, (3, 6, 12, 24, 47)), (2000, (125, 250, 500, 1000, 2000))]
)
def test_prefixes_are_rounded_to_the_nearest_number_of_latents(d_sae, prefixes):
    assert ap.create("matryoshka", d_in=D_IN, d_sae=d_sae, k=4).prefixes == prefixes


def test_decode_prefix_with_normalised_tokens():
    sae = ap.create("matryoshka", d_in=D_IN, d_sae=40, k=4, seed=0, input_norm="token_standardise")
    assert isinstance(sae, Matryoshka)
    x = activations(10).float()
    latents = sae.encode(x)
    assert torch.equal(sae.decode_prefix(latents, 5, x), sae(x))
    with pytest.raises(ValueError, match="needs the input"):
        sae.decode_prefix(latents, 5)


@pytest.mark.parametrize(
    "shares", [(), (0.5,), (0.5, 0.25, 1.0), (0.5, 0.5, 1.0), (1e-3, 1.0), (-0.5, 1.0), 1.0, ("a", 1)]
)
def test_prefixes_that_cannot_be(shares):
    with pytest.raises(ValueError, match="prefix_shares"):
        ap.create("matryoshka", d_in=D_IN, d_sae=40, k=4, prefix_shares=shares)


def test_prefixes_survive_saving(tmp_path):
    sae = ap.create("matryoshka", d_in=D_IN, d_sae=40, k=4, prefix_shares=[0.1, 1], detach=True)
    sae.save(tmp_path)
    loaded = ap.load(tmp_path)
    assert loaded.settings() == sae.settings() and loaded.settings()["prefix_shares"] == (0.1, 1)
    assert isinstance(loaded, Matryoshka) and loaded.prefixes == (4, 40)


# What it learns


def synthetic(n: int, seed: int) -> torch.Tensor:
    """Three of 24 directions per token."""
    directions = torch.randn(24, 12, generator=torch.Generator().manual_seed(99))
    g = torch.Generator().manual_seed(seed)
    active = torch.zeros(n, 24).scatter_(1, torch.rand(n, 24, generator=g).topk(3, dim=1).indices, 1.0)
    return (active * (0.5 + torch.rand(n, 24, generator=g))) @ directions


@pytest.mark.parametrize("detach", [pytest.param(True, marks=pytest.mark.slow), False], ids=["detached", "joint"])
def test_inner_prefixes_reconstruct(detach):
    x, test = synthetic(6000, 0), synthetic(1000, 1)
    errors = {}
    for name, settings in {"matryoshka": {"detach": detach}, "mutual_choice": {"aux": "aux_k"}}.items():
        sae = ap.create(name, d_in=12, d_sae=32, k=3, seed=0, **settings)
        config = ap.TrainConfig(lr=1e-2, batch_tokens=128, total_tokens=128 * 200, dead_window_tokens=2000)
        sae = ap.Trainer(sae, config).fit(x, progress=False)
        z = sae.encode(test).dense().detach()
        errors[name] = []
        for size in (8, 16, 32):
            x_hat = sae.decode(z * (torch.arange(32) < size))
            errors[name].append(float((test - x_hat.detach()).square().sum() / (test - test.mean(0)).square().sum()))
    ours, plain = errors["matryoshka"], errors["mutual_choice"]
    assert ours[0] < 0.8 * plain[0] and ours[1] < 0.9 * plain[1], errors
    assert ours[2] < 0.45, errors

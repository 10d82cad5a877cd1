"""Transcoders: targets, the skip, separate scales, and gradients against dense float64 autograd."""

from __future__ import annotations

import pytest
import torch

import apportion as ap
from apportion.allocation import StepContext, reference
from apportion.architectures.transcoder import Transcoder
from apportion.rows import ArraySource, Batch
from apportion.training.objective import TrainingContext, local_reconstruction

D_IN, D_OUT, D_SAE, K, TOKENS = 7, 5, 22, 3, 33


def pairs(n: int = TOKENS, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Input and target of unlike sizes and centres."""
    g = torch.Generator().manual_seed(seed)
    x = 3 * torch.randn(n, D_IN, generator=g) + torch.linspace(-5, 9, D_IN)
    W = torch.randn(D_OUT, D_IN, generator=torch.Generator().manual_seed(99))
    return x, 0.02 * torch.relu(x @ W.T) - 4


def new(name: str = "transcoder", **settings: object) -> Transcoder:
    """Every weight non-zero and unlike its neighbours, fitted on float64 pairs."""
    sae = ap.create(name, **{"d_in": D_IN, "d_out": D_OUT, "d_sae": D_SAE, "k": K, "seed": 0, **settings}).double()
    assert isinstance(sae, Transcoder)
    with torch.no_grad():
        g = torch.Generator().manual_seed(1)
        for name, p in sae.named_parameters():
            if name != "W_enc":
                p.add_(0.3 * torch.randn(p.shape, generator=g))
    sae.fit_input(*(t.double() for t in pairs(2000)))
    return sae


def dense(sae: Transcoder, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(chosen codes, prepared target, its reconstruction), written out; x and y raw."""
    x, y = (x - sae.input.mean) * sae.input.scale, (y - sae.output.mean) * sae.output.scale
    codes = x @ sae.W_enc.T + sae.b_enc
    norms = sae.W_dec.norm(dim=1) if sae.config.affinity == "code_times_decoder_norm" else 1
    z = codes * reference.token_choice((codes * norms).relu().detach(), K)
    y_hat = z @ sae.W_dec + sae.b_dec
    return z, y, y_hat + x @ sae.W_skip.T if sae.config.skip else y_hat


def losses_of(sae: Transcoder, x: torch.Tensor, y: torch.Tensor, dead: torch.Tensor) -> dict[str, torch.Tensor]:
    at = StepContext(batch_tokens=len(x), dead=dead, density=torch.full((D_SAE,), K / D_SAE))
    return local_reconstruction([sae], Batch(x, y), TrainingContext((at,)))


@pytest.mark.parametrize("affinity", ["code", "code_times_decoder_norm"])
@pytest.mark.parametrize("name", ["transcoder", "skip_transcoder"])
def test_losses_and_gradients_equal_dense_autograd(name: str, affinity: str) -> None:
    sae = new(name, affinity=affinity, k_aux=2)
    x, y = (t.double() for t in pairs())
    dead = torch.zeros(D_SAE, dtype=torch.bool)
    dead[[2, 3, 11, 20]] = True
    terms = losses_of(sae, x, y, dead)
    parameters = dict(sae.named_parameters())
    got = torch.autograd.grad(sum(terms.values()), list(parameters.values()))

    _, prepared, y_hat = dense(sae, x, y)
    wanted_terms = {"reconstruction": (prepared - y_hat).square().sum() / y.numel()}
    error = (prepared - y_hat).detach()
    codes = ((x - sae.input.mean) * sae.input.scale) @ sae.W_enc.T + sae.b_enc
    norms = sae.W_dec.norm(dim=1) if affinity != "code" else 1
    affinities = (codes * norms).relu().detach()
    affinities[:, ~dead] = 0
    error_hat = (codes * reference.token_choice(affinities, 2)) @ sae.W_dec
    spread = (error - error.mean(0)).square().sum()
    wanted_terms["aux_k"] = (error - error_hat).square().sum() / spread / 32
    assert terms.keys() == wanted_terms.keys()
    for term in terms:
        assert terms[term].item() == pytest.approx(wanted_terms[term].item(), rel=1e-10), term
    wanted = torch.autograd.grad(sum(wanted_terms.values()), list(parameters.values()))
    for p, a, b in zip(parameters, got, wanted, strict=True):
        assert (a - b).abs().max() <= 1e-9 * b.abs().max(), p
        assert bool(b.any()), f"{p} takes part"


@pytest.mark.parametrize("name", ["transcoder", "skip_transcoder"])
def test_reconstruction_is_in_the_units_of_the_target(name: str) -> None:
    sae = new(name)
    x, y = (t.double() for t in pairs(60))
    z, _, y_hat = dense(sae, x, y)
    assert torch.allclose(sae.encode(x).dense(), z, rtol=1e-10)
    wanted = y_hat / sae.output.scale + sae.output.mean
    assert torch.allclose(sae(x), wanted, rtol=1e-10)
    deep = x.reshape(3, 2, 10, D_IN)
    assert sae(deep).shape == (3, 2, 10, D_OUT) and torch.equal(sae(deep).reshape(60, D_OUT), sae(x))


def test_only_a_skip_needs_the_input_to_decode() -> None:
    plain, skip = new(), new("skip_transcoder")
    x = pairs()[0].double()
    assert torch.equal(plain.decode(plain.encode(x)), plain(x))
    with pytest.raises(ValueError, match="has a skip"):
        skip.decode(skip.encode(x))


def test_gradients_reach_x_through_codes_and_skip() -> None:
    sae = new("skip_transcoder")
    x = pairs(9)[0].double().requires_grad_()
    weights = torch.randn(9, D_OUT, generator=torch.Generator().manual_seed(5)).double()
    (got,) = torch.autograd.grad((sae(x) * weights).sum(), x)
    y_hat = dense(sae, x, torch.zeros(9, D_OUT).double())[2] / sae.output.scale
    (wanted,) = torch.autograd.grad((y_hat * weights).sum(), x)
    assert torch.allclose(got, wanted, rtol=1e-9)


@pytest.mark.parametrize("affinity", ["code", "code_times_decoder_norm"])
@pytest.mark.parametrize(("name", "allocation"), [("transcoder", "topk"), ("skip_transcoder", "mutual_choice")])
def test_folding_keeps_reconstructions_and_moves_codes_by_the_input_scale(
    name: str, allocation: str, affinity: str
) -> None:
    sae = new(name, allocation=allocation, affinity=affinity)
    x = pairs(500, seed=3)[0].double()
    sae.calibrate(x)
    sae.eval()
    folded = sae.folded()
    assert folded.settings() == sae.settings() | {"input_norm": "none"}
    assert not folded.needs_fit and torch.equal(folded.output.scale, torch.ones(()).double())
    codes, wanted = folded.encode(x).dense(), sae.encode(x).dense() / sae.scale
    assert (codes - wanted).abs().max() <= 1e-9 * wanted.abs().max()
    assert torch.equal(codes > 0, wanted > 0) and bool((codes > 0).any())
    assert (folded(x) - sae(x)).abs().max() <= 1e-9 * sae(x).abs().max()


def test_scales_are_those_of_input_and_target() -> None:
    sae = ap.create("transcoder", d_in=D_IN, d_out=D_OUT, d_sae=D_SAE, k=K)
    assert sae.needs_fit
    x, y = pairs(4000)
    sae.fit_input(x, y)
    assert not sae.needs_fit
    a, b = sae.prepare(x, y)
    assert a.square().sum(1).mean().item() == pytest.approx(D_IN, rel=1e-4)
    assert b.square().sum(1).mean().item() == pytest.approx(D_OUT, rel=1e-4)
    assert sae.output.scale / sae.input.scale > 10


@pytest.mark.parametrize("kind", ["none", "dataset", "token_standardise", "token_norm"])
def test_every_input_norm_trains_and_decodes_without_the_target(kind: str) -> None:
    sae = ap.create("transcoder", d_in=D_IN, d_out=D_OUT, d_sae=D_SAE, k=K, input_norm=kind, seed=0)
    x, y = pairs(300)
    ap.Trainer(sae, ap.TrainConfig(batch_tokens=100)).step(Batch(x, y))
    assert sae.output.kind == ("none" if kind == "none" else "dataset")
    assert bool(sae.output.mean.any()) == (kind != "none"), "also where only the target has something to fit"
    assert sae.decode(sae.encode(x)).shape == y.shape


def test_initial_weights() -> None:
    sae = ap.create("skip_transcoder", d_in=D_IN, d_sae=400, k=K, seed=3)
    assert sae.d_out == D_IN and not bool(sae.W_skip.any())
    assert torch.allclose(sae.W_enc.norm(dim=1), torch.ones(400))
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.full((400,), 0.1)) and sae.unit_rows() == []
    alike = torch.cosine_similarity(sae.W_enc, sae.W_dec, dim=1)
    assert alike.mean().abs() < 0.1 and alike.std() < 0.6, "input and target are different spaces"
    twin = ap.create("skip_transcoder", d_in=D_IN, d_sae=400, k=K, seed=4)
    assert not torch.equal(twin.W_enc, sae.W_enc) and not torch.equal(twin.W_dec, sae.W_enc)


@pytest.mark.parametrize("call", ["step", "fit_input", "prepare", "fit"])
def test_a_target_is_needed(call: str) -> None:
    sae = ap.create("transcoder", d_in=D_IN, d_out=D_OUT, d_sae=D_SAE, k=K)
    trainer = ap.Trainer(sae, ap.TrainConfig(batch_tokens=10, total_tokens=20))
    x = pairs()[0]
    does = {"step": trainer.step, "fit_input": sae.fit_input, "prepare": sae.prepare, "fit": trainer.fit}[call]
    with pytest.raises(ValueError, match=r"target=y"):
        does(x)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"d_out": 0}, "d_out"), ({"d_out": 2.5}, "d_out"), ({"subtract_b_dec": True}, "no setting 'subtract_b_dec'")],
)
def test_settings_that_cannot_work(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ap.create("transcoder", **{"d_in": D_IN, "d_sae": D_SAE, "k": K, **settings})


def test_a_target_of_another_width_is_refused() -> None:
    x, y = pairs()
    with pytest.raises(ValueError, match="d_out = 5"):
        new().prepare(x, y[:, :-1])


def test_an_sae_of_another_kind_refuses_a_target() -> None:
    with pytest.raises(ValueError, match="transcoder"):
        ap.Trainer(ap.create("topk", d_in=D_IN, d_sae=D_SAE, k=K)).step(Batch(*pairs()))


def test_saved_and_loaded(tmp_path) -> None:
    sae = new("skip_transcoder", target_hookpoint="model.layers.1.mlp", hookpoint="model.layers.1.mlp:in")
    sae.save(tmp_path)
    loaded = ap.load(tmp_path)
    x = pairs()[0].double()
    assert torch.equal(loaded(x), sae.eval()(x)) and loaded.settings() == sae.settings()
    assert loaded.target_hookpoint == "model.layers.1.mlp"


def test_learns_a_nonlinear_map_and_the_skip_takes_the_linear_part() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(6000, 16, generator=g)
    W_in, W_out = torch.randn(12, 16, generator=g), torch.randn(8, 12, generator=g)
    y = torch.relu(x @ W_in.T - 4) @ W_out.T + 0.5 * x @ torch.randn(16, 8, generator=g)
    fvu = {}
    for name in ("transcoder", "skip_transcoder"):
        sae = ap.create(name, d_in=16, d_out=8, d_sae=64, k=4, seed=0)
        ap.Trainer(sae, ap.TrainConfig(lr=3e-3, batch_tokens=256, total_tokens=60_000)).fit(
            ArraySource(x, target=y), progress=False
        )
        fvu[name] = ((sae(x) - y).square().sum() / (y - y.mean(0)).square().sum()).item()
    design = torch.cat([x, torch.ones(len(x), 1)], 1)
    linear = design @ torch.linalg.lstsq(design, y).solution
    linear_fvu = ((linear - y).square().sum() / (y - y.mean(0)).square().sum()).item()
    assert fvu["skip_transcoder"] < 0.6 * linear_fvu, (fvu, linear_fvu)
    assert fvu["skip_transcoder"] < fvu["transcoder"] < 0.5

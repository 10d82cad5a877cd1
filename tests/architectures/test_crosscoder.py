"""Crosscoders: one code for several sites, a scale for each, gradients against dense autograd, model diffs."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch

import apportion as ap
from apportion.allocation import StepContext, reference
from apportion.architectures import crosscoder
from apportion.architectures.crosscoder import Crosscoder
from apportion.evals import model_diff
from apportion.evals.model_diff import ModelDiff, direction_cosines, relative_norms, site_shares
from apportion.language import load_model
from apportion.language.collect import collect
from apportion.rows import Batch
from apportion.training.objective import TrainingContext, local_reconstruction

D_IN, D_SAE, K, TOKENS = 6, 26, 3, 31


def activations(n: int = TOKENS, num_sites: int = 2, seed: int = 0) -> torch.Tensor:
    """Sites of unlike sizes and centres, correlated."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, num_sites, D_IN, generator=g) + torch.randn(n, 1, D_IN, generator=g)
    return x * torch.logspace(-1, 2, num_sites)[:, None] + torch.linspace(-3, 20, D_IN)


def new(num_sites: int = 2, **settings: object) -> Crosscoder:
    """Every weight unlike its neighbours, fitted."""
    values = {"d_in": D_IN, "d_sae": D_SAE, "k": K, "seed": 0, "num_sites": num_sites, **settings}
    sae = ap.create("crosscoder", **values).double()
    assert isinstance(sae, Crosscoder)
    with torch.no_grad():
        g = torch.Generator().manual_seed(1)
        for p in sae.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=g))
        sae.W_dec.mul_(torch.rand(D_SAE, num_sites, 1, generator=g) + 0.1)
    sae.fit_input(activations(2000, num_sites).double())
    return sae


def affinities(sae: Crosscoder, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and affinities of prepared rows, written out site by site."""
    if sae.config.subtract_b_dec:
        x = x - sae.b_dec
    codes = sum(x[:, site] @ sae.W_enc[:, site].T for site in range(x.shape[1])) + sae.b_enc
    norms = sum(sae.W_dec[:, site].norm(dim=1) for site in range(x.shape[1]))
    return codes, (codes * norms if sae.config.affinity == "code_times_decoder_norm" else codes).relu().detach()


def decoded(sae: Crosscoder, z: torch.Tensor) -> torch.Tensor:
    return torch.stack([z @ sae.W_dec[:, s] + sae.b_dec[s] for s in range(sae.config.num_sites)], dim=1)


@pytest.mark.parametrize("num_sites", [2, 3])
@pytest.mark.parametrize("affinity", ["code", "code_times_decoder_norm"])
@pytest.mark.parametrize("subtract_b_dec", [False, True])
def test_losses_and_gradients_equal_dense_autograd(num_sites: int, affinity: str, subtract_b_dec: bool) -> None:
    sae = new(num_sites, affinity=affinity, subtract_b_dec=subtract_b_dec, k_aux=2)
    raw = activations(num_sites=num_sites).double()
    dead = torch.zeros(D_SAE, dtype=torch.bool)
    dead[[1, 8, 9, 25]] = True
    at = StepContext(batch_tokens=TOKENS, dead=dead, density=torch.full((D_SAE,), K / D_SAE))
    terms = local_reconstruction([sae], Batch(raw), TrainingContext((at,)))
    parameters = dict(sae.named_parameters())
    got = torch.autograd.grad(sum(terms.values()), list(parameters.values()))

    x = (raw - sae.mean) * sae.scale[:, None]
    codes, affinity_ = affinities(sae, x)
    x_hat = decoded(sae, codes * reference.token_choice(affinity_, K))
    wanted_terms = {"reconstruction": (x - x_hat).square().sum() / (TOKENS * num_sites * D_IN)}
    error = (x - x_hat).detach()
    with torch.no_grad():
        at_aux = x - sae.b_dec if subtract_b_dec else x
    codes = sum(at_aux[:, s] @ sae.W_enc[:, s].T for s in range(num_sites)) + sae.b_enc
    silenced = affinity_.clone()
    silenced[:, ~dead] = 0
    error_hat = decoded(sae, codes * reference.token_choice(silenced, 2)) - sae.b_dec.detach()
    error_hat = error_hat - (sae.b_dec - sae.b_dec.detach())
    spread = (error - error.mean(0)).square().sum()
    wanted_terms["aux_k"] = (error - error_hat).square().sum() / spread / 32
    assert terms.keys() == wanted_terms.keys()
    for term in terms:
        assert terms[term].item() == pytest.approx(wanted_terms[term].item(), rel=1e-10), term
    wanted = torch.autograd.grad(sum(wanted_terms.values()), list(parameters.values()))
    for p, a, b in zip(parameters, got, wanted, strict=True):
        assert (a - b).abs().max() <= 1e-9 * b.abs().max(), p
        assert bool(b.any()), f"{p} takes part"


def test_shapes_and_the_reconstruction_of_every_site() -> None:
    sae = new(3)
    raw = activations(60, 3).double()
    x = (raw - sae.mean) * sae.scale[:, None]
    codes, affinity = affinities(sae, x)
    z = codes * reference.token_choice(affinity, K)
    latents = sae.encode(raw)
    assert latents.shape == (60,) and torch.allclose(latents.dense(), z, rtol=1e-10)
    wanted = decoded(sae, z) / sae.scale[:, None] + sae.mean
    assert torch.allclose(sae(raw), wanted, rtol=1e-10)
    deep = raw.reshape(5, 12, 3, D_IN)
    assert sae.encode(deep).shape == (5, 12) and sae(deep).shape == deep.shape
    assert sae.scale.shape == (3,) and len(set(sae.scale.tolist())) == 3


def test_matches_compete_by_code_times_the_sum_of_norms() -> None:
    """Two latents with equal codes: the one that writes to both sites wins over the one with the longer joined row."""
    sae = ap.create("crosscoder", d_in=2, d_sae=2, k=1, input_norm="none")
    with torch.no_grad():
        sae.W_enc.zero_()
        sae.W_enc[:, 0, 0] = 1.0
        sae.W_dec.copy_(torch.tensor([[[1.2, 0.0], [0.0, 0.0]], [[0.8, 0.0], [0.0, 0.8]]]))
    assert sae.W_dec[0].norm() > sae.W_dec[1].norm()
    assert sae.encode(torch.tensor([[1.0, 0.0], [0.0, 0.0]])).indices.tolist() == [1]


@pytest.mark.parametrize("affinity", ["code", "code_times_decoder_norm"])
@pytest.mark.parametrize("subtract_b_dec", [False, True])
@pytest.mark.parametrize("allocation", ["topk", "mutual_choice", "feature_choice"])
def test_folding_keeps_reconstructions_and_matches(allocation: str, subtract_b_dec: bool, affinity: str) -> None:
    """Codes move by the geometric mean of the scales, and norms stay those of scaled data."""
    sae = new(3, allocation=allocation, subtract_b_dec=subtract_b_dec, affinity=affinity)
    x = activations(400, 3, seed=4).double()
    sae.calibrate(x)
    sae.eval()
    folded = sae.folded()
    typical = sae.scale.log().mean().exp()
    codes, wanted = folded.encode(x).dense(), sae.encode(x).dense() / typical
    assert torch.equal(codes > 0, wanted > 0) and bool((codes > 0).any())
    assert (codes - wanted).abs().max() <= 1e-8 * wanted.abs().max()
    assert (folded(x) - sae(x)).abs().max() <= 1e-9 * sae(x).abs().max()
    assert torch.allclose(folded.site_norms(), sae.site_norms(), rtol=1e-12)
    assert torch.equal(folded.scale, torch.ones(3).double())


def test_a_folded_crosscoder_is_saved_with_its_relative_scales(tmp_path) -> None:
    sae = new()
    folded = sae.folded()
    folded.save(tmp_path)
    loaded = ap.load(tmp_path)
    x = activations().double()
    assert torch.equal(loaded(x), folded.eval()(x))
    assert torch.allclose(site_shares(loaded), site_shares(sae), rtol=1e-12)


def test_decoder_norms_are_free() -> None:
    sae = ap.create("crosscoder", d_in=D_IN, d_sae=D_SAE, k=K, seed=0)
    assert torch.allclose(sae.W_dec, 0.1 * sae.W_enc) and torch.allclose(
        sae.W_enc.flatten(1).norm(dim=1), torch.ones(D_SAE)
    )
    trainer = ap.Trainer(sae, ap.TrainConfig(lr=1e-2, batch_tokens=100))
    for seed in range(5):
        trainer.step(activations(100, seed=seed))
    norms = sae.W_dec.flatten(1).norm(dim=1)
    assert (norms - 0.1).abs().max() > 0.01 and sae.unit_rows() == []


@pytest.mark.parametrize("num_sites", [1, 0, 2.5])
def test_one_site_is_no_crosscoder(num_sites: float) -> None:
    with pytest.raises(ValueError, match="num_sites"):
        ap.create("crosscoder", d_in=D_IN, d_sae=D_SAE, k=K, num_sites=num_sites)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_at_one_site_names_the_row(bad: float) -> None:
    x = activations(6).double()
    x[4, 1, 2] = bad
    with pytest.raises(ValueError, match=r"Row 4.*NaN"):
        new().encode(x)


@pytest.mark.parametrize("shape", [(5, D_IN), (5, 3, D_IN), (5, 2, D_IN + 1), (D_IN,)], ids=str)
def test_rows_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\[\.\.\., 2, 6\]"):
        new().encode(torch.ones(shape))


# Model diffing


def of_norms(norms: list[list[float]]) -> Crosscoder:
    """A crosscoder whose latents write with these norms."""
    sae = ap.create("crosscoder", d_in=4, d_sae=len(norms), k=1, seed=0, num_sites=len(norms[0]))
    assert isinstance(sae, Crosscoder)
    with torch.no_grad():
        sae.W_dec.div_(sae.W_dec.norm(dim=2, keepdim=True)).mul_(torch.tensor(norms)[..., None])
    return sae


def test_relative_norms_and_classes_of_constructed_norms() -> None:
    sae = of_norms([[3.0, 0.0], [9.0, 1.0], [1.0, 1.0], [6.0, 4.0], [4.0, 6.0], [7.0, 3.0], [0.0, 2.0], [0.0, 0.0]])
    r = relative_norms(sae)
    assert torch.allclose(r[:-1], torch.tensor([1.0, 0.9, 0.5, 0.6, 0.4, 0.7, 0.0]), atol=1e-6) and r[-1].isnan()
    diff = model_diff(sae, exclusive=0.89, shared=0.61)
    classes = {name: mask.nonzero().squeeze(1).tolist() for name, mask in vars(diff).items()}
    assert classes == {"only_a": [0, 1], "only_b": [6], "shared": [2, 3, 4], "between": [5], "dead": [7]}
    alive = torch.tensor([True, False, True, True, True, True, True, True])
    assert model_diff(sae, alive, exclusive=0.89, shared=0.61).counts() == {
        "only_a": 1, "only_b": 1, "shared": 3, "between": 1, "dead": 2,
    }  # fmt: skip


def test_shares_of_three_sites() -> None:
    shares = site_shares(of_norms([[1.0, 2.0, 1.0], [0.0, 0.0, 5.0]]))
    assert torch.allclose(shares, torch.tensor([[0.25, 0.5, 0.25], [0.0, 0.0, 1.0]]), atol=1e-6)
    with pytest.raises(ValueError, match="3"):
        relative_norms(of_norms([[1.0, 2.0, 1.0]]))


def test_directions_that_agree_and_that_do_not() -> None:
    sae = of_norms([[1.0, 2.0], [1.0, 2.0]])
    with torch.no_grad():
        sae.W_dec[0, 1] = 3 * sae.W_dec[0, 0]
        sae.W_dec[1, 1] = -sae.W_dec[1, 0]
    assert torch.allclose(direction_cosines(sae), torch.tensor([1.0, -1.0]), atol=1e-6)


@pytest.mark.parametrize("bounds", [{"exclusive": 1.1}, {"shared": 0.4}, {"shared": 0.95}])
def test_bounds_that_make_no_sense(bounds: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="shared"):
        model_diff(of_norms([[1.0, 2.0]]), **bounds)


def test_recovers_which_model_has_which_feature() -> None:
    """Two models of one space: 12 features in both, 6 only in A, 6 only in B; B's activations are 5 times as large."""
    g = torch.Generator().manual_seed(0)
    d, n = 20, 12_000
    directions = torch.nn.functional.normalize(torch.randn(24, d, generator=g), dim=1)
    kinds = ["shared"] * 12 + ["only_a"] * 6 + ["only_b"] * 6
    size = {"shared": [1.0, 5.0], "only_a": [1.0, 0.0], "only_b": [0.0, 5.0]}
    fires = (torch.rand(n, 24, generator=g) < 0.1) * (1 + torch.rand(n, 24, generator=g))
    x = torch.stack([(fires * torch.tensor([size[k][site] for k in kinds])) @ directions for site in (0, 1)], dim=1)
    sae = ap.create("crosscoder", d_in=d, d_sae=32, k=2.4, allocation="mutual_choice", seed=0)
    ap.Trainer(sae, ap.TrainConfig(lr=3e-3, batch_tokens=256, total_tokens=120_000)).fit(x, progress=False)
    diff = model_diff(sae, sae.encode(x).counts() > n / 1000)
    written = torch.nn.functional.normalize(sae.W_dec.detach().sum(1), dim=1)
    similarity, best = (directions @ written.T).max(1)
    right = [bool(vars(diff)[kind][latent]) for kind, latent in zip(kinds, best.tolist(), strict=True)]
    assert sum(right) >= 22 and int((similarity > 0.9).sum()) >= 22, (right, similarity, diff.counts())


@pytest.mark.slow
def test_the_documented_comparison_of_two_models(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lines of the docstring, in smaller sizes, on caches of a model and of the same with changed weights."""
    model, tokenizer = load_model(tiny_model_dir)
    text = ["the cat sat on the mat and looked at the dog by the old house and the sea was calm " * 200]
    g = torch.Generator().manual_seed(0)
    for folder in ("acts-base", "acts-chat"):
        collect(model, tokenizer, "model.layers.1", text, out=tmp_path / folder, tokens=3000, context_tokens=16)
        with torch.no_grad():
            for p in model.model.layers[1].parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=g))
    doc = inspect.cleandoc(crosscoder.__doc__ or "")
    example = doc[doc.index("    import apportion as ap") :].split("\nWhen to use it")[0]
    for written, smaller in (("model.layers.8", "model.layers.1"), ("d_sae=16_384, k=32", "d_sae=64, k=4")):
        assert written in example
        example = example.replace(written, smaller)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(re.sub("^    ", "", example, flags=re.MULTILINE), "the docstring", "exec"), names)
    diff, only_chat = names["diff"], names["only_chat"]
    assert isinstance(diff, ModelDiff) and sum(diff.counts().values()) == 64 and diff.counts()["dead"] < 64
    assert isinstance(only_chat, torch.Tensor) and len(only_chat) == diff.counts()["only_b"]
    assert type(ap.load("runs/diff")) is Crosscoder

"""PCA and neurons: the basis, exact reconstruction with all of it, and that nothing is trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import apportion as ap
from apportion.architectures.fixed_basis import principal_components
from apportion.cli import main
from apportion.language import load_model
from apportion.language.collect import collect
from apportion.rows import ArraySource

D_IN = 6


def rows(n: int = 500, seed: int = 0) -> torch.Tensor:
    """Correlated, off centre, with a clear order of variances."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(D_IN, D_IN, generator=torch.Generator().manual_seed(9)).double()
    spread = torch.tensor([5.0, 3.0, 2.0, 1.0, 0.5, 0.2]).double()
    return torch.randn(n, D_IN, generator=g).double() * spread @ torch.linalg.qr(mix).Q + 4


def fitted(name: str = "pca", x: torch.Tensor | None = None, **settings: object) -> ap.SAE:
    sae = ap.create(name, **{"d_in": D_IN, "k": 2, **settings}).double()
    sae.fit_input(rows() if x is None else x)
    return sae.eval()


def test_components_are_those_of_the_svd():
    x = rows()
    V = principal_components(x)
    _, sizes, wanted = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    assert torch.allclose(V @ V.T, torch.eye(D_IN, dtype=torch.float64), atol=1e-10)
    assert torch.allclose((V * wanted).sum(1).abs(), torch.ones(D_IN, dtype=torch.float64))
    assert torch.allclose(((x - x.mean(0)) @ V.T).norm(dim=0), sizes)
    assert bool((V.gather(1, V.abs().argmax(1, keepdim=True)) > 0).all())


def test_fewer_rows_than_directions_give_a_basis_as_well():
    V = principal_components(rows(3))
    assert torch.allclose(V @ V.T, torch.eye(D_IN, dtype=torch.float64), atol=1e-10)


@pytest.mark.parametrize("name", ["pca", "neurons"])
@pytest.mark.parametrize("input_norm", ["dataset", "none", "token_standardise", "token_norm"])
@pytest.mark.parametrize("subtract_b_dec", [True, False])
def test_all_of_the_basis_reconstructs_everything(name, input_norm, subtract_b_dec):
    sae = fitted(name, k=D_IN, input_norm=input_norm, subtract_b_dec=subtract_b_dec)
    x = rows(50, seed=1)
    lost = 2e-5 if input_norm.startswith("token") else 1e-9  # the constant beside a token's spread is not put back
    assert (sae(x) - x).abs().max() <= lost * x.abs().max()
    assert sae.encode(x).l0().max() <= D_IN, "a direction is active with one of its signs"


@pytest.mark.parametrize("input_norm", ["dataset", "none"])
def test_codes_are_coordinates_of_centred_rows(input_norm):
    sae, x = fitted(k=D_IN, input_norm=input_norm), rows(50, seed=1)
    V = principal_components(rows())
    scale = sae.scale if input_norm == "dataset" else 1.0
    wanted = scale * (x - rows().mean(0)) @ V.T
    assert torch.allclose(sae.encode(x).dense(), torch.cat([wanted, -wanted], 1).relu(), atol=1e-9)
    assert sae.encode(rows().mean(0)).dense().max() < 1e-9
    without = fitted(k=D_IN, input_norm=input_norm, subtract_b_dec=False)
    assert torch.allclose(without.encode(x).dense(), sae.encode(x).dense(), atol=1e-9)


def test_codes_of_neurons_are_the_activations():
    x = rows(50, seed=1)
    z = fitted("neurons", k=D_IN, input_norm="none").encode(x).dense()
    assert torch.allclose(z, torch.cat([x, -x], 1).relu())


@pytest.mark.parametrize("k", [1, 2, 5])
def test_every_token_has_its_own_k_components(k):
    """What is left is what the other coordinates hold; the same k components for all tokens leave more."""
    sae, x = fitted(k=k), rows(2000, seed=1)
    coordinates = (x - rows().mean(0)) @ principal_components(rows()).T
    left = coordinates.square().sort(dim=1).values[:, : D_IN - k].sum()
    got = (x - sae(x)).square().sum()
    assert torch.allclose(got, left)
    assert got < coordinates[:, k:].square().sum()


@pytest.mark.parametrize("allocation", ["mutual_choice", "feature_choice"])
def test_other_rules(allocation):
    sae, x = fitted(allocation=allocation), rows(2000, seed=1)
    assert sae.calibrate(x) == pytest.approx(2, rel=0.01)
    assert 0 < (x - sae(x)).square().sum() / (x - x.mean(0)).square().sum() < 1


@pytest.mark.parametrize("name", ["pca", "neurons"])
@pytest.mark.parametrize("input_norm", ["dataset", "none"])
def test_fit_prepares_and_trains_nothing(name, input_norm, tmp_path):
    sae = ap.create(name, d_in=D_IN, k=2, input_norm=input_norm)
    trainer = ap.Trainer(sae, ap.TrainConfig(batch_tokens=32, total_tokens=320))
    assert not trainer.trains
    with pytest.raises(ValueError, match="nothing to train"):
        trainer.step(rows(32).float())
    source = ArraySource(rows().float())
    trainer.fit(source, tmp_path / "run", progress=False)
    assert sae.info["calibration"]["l0"] == 2 and not sae.training
    wanted = fitted(name, source.sample(500).x, input_norm=input_norm).float()
    x = rows(50, seed=1).float()
    assert torch.allclose(sae(x), wanted(x), atol=1e-4)
    loaded = ap.load(tmp_path / "run")
    assert torch.equal(loaded(x), sae(x)) and not loaded.needs_fit
    assert not any(p.requires_grad for p in loaded.parameters())


def test_a_pca_that_was_fitted_is_not_fitted_again():
    sae = fitted().float()
    basis = sae.W_dec.clone()
    ap.Trainer(sae, ap.TrainConfig(batch_tokens=32, total_tokens=32)).fit(
        torch.randn(400, D_IN, generator=torch.Generator().manual_seed(0)), progress=False
    )
    assert torch.equal(sae.W_dec, basis)


def test_the_number_of_latents_follows_from_the_width():
    assert ap.create("pca", d_in=D_IN, k=2).d_sae == ap.create("pca", d_in=D_IN, d_sae=12, k=2).d_sae == 12
    for name in ("pca", "neurons"):
        with pytest.raises(ValueError, match=r"2 d_in = 12 latents.*got d_sae = 64.*set it to 12"):
            ap.create(name, d_in=D_IN, d_sae=64, k=2)
    with pytest.raises(ValueError, match="d_sae"):
        ap.create("topk", d_in=D_IN, k=2)
    with pytest.raises(ValueError, match="d_in"):
        ap.create("pca", k=2)


def test_rows_that_are_not_finite_are_refused():
    x = rows().float()
    x[3, 1] = torch.nan
    for input_norm in ("dataset", "none"):
        with pytest.raises(ValueError, match="NaN"):
            ap.create("pca", d_in=D_IN, k=2, input_norm=input_norm).fit_input(x)


def test_on_the_command_line(tiny_model_dir: Path, tmp_path: Path):
    text = ["the cat sat on the mat and looked at the dog by the old house and the sea was calm " * 40]
    collect(*load_model(tiny_model_dir), "model.layers.1", text, out=tmp_path / "acts", tokens=640, context_tokens=8)
    for name in ("pca", "neurons"):
        run = tmp_path / name
        options = ["--sae", name, "--k", "5", "--batch-tokens", "64", "--out", str(run)]
        assert main(["train", str(tmp_path / "acts"), *options]) == 0
        assert ap.load(run).d_sae == 64
        assert main(["eval", str(run), "--json", str(tmp_path / "out.json")]) == 0
        figures = json.loads((tmp_path / "out.json").read_text())
        assert 0 < figures["fvu"] < 1 and figures["l0"] == 5

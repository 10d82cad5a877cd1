"""Input descriptions: what they do to x, and back."""

import pytest
import torch

import apportion as ap
from apportion.architectures.inputs import InputDescription, geometric_median

D = 6


def activations(n: int = 500, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, D, generator=g) * torch.tensor([0.1, 1, 1, 2, 3, 20]) + torch.linspace(-50, 80, D)


def test_dataset_gives_unit_energy_per_dimension():
    x = activations()
    description = InputDescription((D,), "dataset", "mean")
    assert description.needs_fit
    assert torch.equal(description.apply_to(x), x), "s = 1 and mu = 0 until it is fitted"
    description.fit(x)
    assert not description.needs_fit
    scaled = description.apply_to(x)
    assert scaled.square().sum(1).mean().item() == pytest.approx(D, rel=1e-5)
    assert scaled.mean(0).abs().max() < 1e-4
    assert torch.allclose(description.undo(scaled, None), x, rtol=1e-5, atol=1e-4)


def test_geometric_median_resists_a_planted_outlier():
    x = torch.randn(400, D, generator=torch.Generator().manual_seed(0)).double()
    x[:4] += 1e6
    assert x.mean(0).norm() > 1e4
    assert geometric_median(x).norm() < 0.5
    description = InputDescription((D,), "dataset", "geometric_median")
    description.fit(x.float())
    assert description.mean.norm() < 0.5
    assert description.apply_to(x.float()).square().sum(1).mean().item() == pytest.approx(D, rel=1e-4)


def test_geometric_median_of_known_points():
    corners = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]]).double() + 5
    assert torch.allclose(geometric_median(corners), torch.full((2,), 5.0).double(), atol=1e-5)
    line = torch.tensor([[0.0], [0], [0], [10]]).double()
    assert geometric_median(line).item() == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("bad", ["equal rows", "nan", "inf", "one row"])
def test_fit_refuses_data_without_a_scale(bad):
    x = {"equal rows": torch.ones(5, D), "nan": activations(), "inf": activations(), "one row": activations(1)}[bad]
    if bad in ("nan", "inf"):
        x[3, 2] = float(bad)
    description = InputDescription((D,), "dataset", "mean")
    with pytest.raises(ValueError, match="rows given to fit the input scale"):
        description.fit(x)
    assert description.needs_fit and description.scale == 1


def test_token_standardise():
    x = activations()
    description = InputDescription((D,), "token_standardise", "mean")
    scaled = description.apply_to(x)
    assert scaled.mean(1).abs().max() < 1e-5
    assert torch.allclose(scaled.std(1), torch.ones(len(x)), rtol=1e-3)
    assert torch.allclose(description.undo(scaled, x), x, rtol=1e-5, atol=1e-4)


def test_the_way_back_of_token_standardise_is_without_its_small_summand():
    """So it is in MLSAE, OpenAI's TopK and SAELens, whose numbers ours are to equal."""
    x = activations().double() * 1e-3
    description = InputDescription((D,), "token_standardise", "mean")
    mean, std = x.mean(1, keepdim=True), x.std(1, keepdim=True)
    assert torch.equal(description.apply_to(x), (x - mean) / (std + 1e-5))
    assert torch.equal(description.undo(torch.ones_like(x), x), (std + mean).expand_as(x))


def test_token_norm():
    x = activations()
    description = InputDescription((D,), "token_norm", "mean")
    scaled = description.apply_to(x)
    assert torch.allclose(scaled.square().sum(1), torch.full((len(x),), float(D)), rtol=1e-5)
    assert torch.allclose(description.undo(scaled, x), x, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", ["token_standardise", "token_norm"])
def test_per_token_kinds_survive_rows_of_zeros_and_need_x_to_go_back(kind):
    description = InputDescription((D,), kind, "mean")
    zeros = torch.zeros(2, D)
    assert torch.equal(description.apply_to(zeros), zeros)
    assert torch.equal(description.undo(zeros, zeros), zeros)
    with pytest.raises(ValueError, match=r"decode\(latents, x\)"):
        description.undo(zeros, None)
    before = {name: t.clone() for name, t in description.state_dict().items()}
    description.fit(activations())
    assert all(torch.equal(t, before[name]) for name, t in description.state_dict().items()), "nothing to fit"
    assert not description.needs_fit


@pytest.mark.parametrize("kind", ["none", "dataset", "token_standardise", "token_norm"])
def test_a_perfect_sae_reconstructs_raw_activations(kind):
    """With an orthonormal dictionary of both signs, everything kept, x_hat is x whatever the input description."""
    sae = ap.create("topk", d_in=D, d_sae=2 * D, k=2 * D, input_norm=kind, subtract_b_dec=False)
    with torch.no_grad():
        sae.W_dec.copy_(torch.cat([torch.eye(D), -torch.eye(D)]))
        sae.W_enc.copy_(sae.W_dec)
    x = activations(60).reshape(3, 20, D)
    sae.fit_input(x)
    assert torch.allclose(sae(x), x, rtol=1e-4, atol=1e-3)
    latents = sae.encode(x)
    assert torch.allclose(sae.decode(latents, x), x, rtol=1e-4, atol=1e-3)
    if kind.startswith("token"):
        with pytest.raises(ValueError, match="x"):
            sae.decode(latents)
    else:
        assert torch.allclose(sae.decode(latents), x, rtol=1e-4, atol=1e-3)

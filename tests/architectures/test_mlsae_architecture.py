"""MLSAE: every row standardised on its own, whichever layer it is from."""

from __future__ import annotations

import pytest
import torch

import apportion as ap
from apportion.architectures import to_jumprelu

D_IN, D_SAE, K, TOKENS = 9, 31, 3, 40
LAYERS = torch.tensor([0.1, 3.0, 40.0])
"""How large activations are, layer by layer."""


def activations() -> torch.Tensor:
    """[tokens * layers, d_in]: each token is the same at every layer, but for size and centre."""
    x = torch.randn(TOKENS, 1, D_IN, generator=torch.Generator().manual_seed(0)).double()
    return (x * LAYERS[:, None] + 5 * LAYERS[:, None]).flatten(0, 1)


def new(**settings: object) -> ap.SAE:
    sae = ap.create("mlsae", d_in=D_IN, d_sae=D_SAE, k=K, seed=0, **settings).double()
    with torch.no_grad():
        g = torch.Generator().manual_seed(1)
        for p in (sae.b_enc, sae.b_dec, sae.W_enc):
            p.add_(0.3 * torch.randn(p.shape, generator=g))
    return sae.eval()


def test_equals_its_equations() -> None:
    sae, x = new(), activations()
    centre, size = x.mean(1, keepdim=True), x.std(1, keepdim=True)
    a = ((x - centre) / (size + 1e-5) - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    best = a.topk(K, dim=1).indices
    z = torch.zeros_like(a).scatter(1, best, a.gather(1, best).relu())
    latents = sae.encode(x)
    assert torch.allclose(latents.dense(), z, rtol=1e-9) and torch.equal(latents.dense() > 0, z > 0)
    assert torch.allclose(sae.decode(latents, x), (z @ sae.W_dec + sae.b_dec) * size + centre, rtol=1e-9)
    with pytest.raises(ValueError, match="needs the input x"):
        sae.decode(latents)


def test_the_size_of_a_layer_does_not_matter() -> None:
    """Rows of one token have one code at all layers, and errors of small layers count as much as others."""
    sae, x = new(), activations()
    codes = sae.encode(x).dense().view(TOKENS, len(LAYERS), D_SAE)
    assert torch.allclose(codes[:, :1], codes, rtol=1e-3) and bool(codes.any())
    rows, target = sae.prepare(x)
    errors = (
        (target - sae.decode_scaled(sae.encode_scaled(rows, sae.selection()))).square().mean(1).view(TOKENS, -1).mean(0)
    )
    assert torch.allclose(errors[0], errors, rtol=1e-3)


def test_it_becomes_a_jumprelu_sae_like_a_plain_one() -> None:
    sae, x = new(allocation="mutual_choice"), activations()
    sae.calibrate(x)
    form = to_jumprelu(sae)
    assert form.config.input_norm == "token_standardise"
    assert torch.equal(form.encode(x).dense(), sae.encode(x).dense())

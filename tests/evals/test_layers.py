"""Layer statistics of an SAE for all layers: against sums written out, against planted features, in closed form."""

from __future__ import annotations

import json

import pytest
import torch

import apportion as ap
from apportion.evals.layers import LayerStatistics
from apportion.latents import Latents
from apportion.rows import Batch

LAYERS, D_SAE, TOKENS = 4, 6, 37


def codes(seed: int = 0) -> torch.Tensor:
    """[tokens, layers, d_sae], sparse; latent 5 is dead."""
    g = torch.Generator().manual_seed(seed)
    z = torch.rand(TOKENS, LAYERS, D_SAE, generator=g).double() * (torch.rand(TOKENS, LAYERS, D_SAE, generator=g) < 0.3)
    z[..., 5] = 0
    return z


def variance(weights: torch.Tensor) -> float:
    p = weights / weights.sum()
    mean = sum(p[layer].item() * layer for layer in range(LAYERS))
    return sum(p[layer].item() * (layer - mean) ** 2 for layer in range(LAYERS))


def filled(z: torch.Tensor, parts: int = 3) -> LayerStatistics:
    statistics = LayerStatistics(z.shape[1], z.shape[2])
    for part in z.split(-(-len(z) // parts)):
        statistics.add(Latents.from_dense(part))
    return statistics


@pytest.mark.parametrize("by", ["mass", "counts"])
@pytest.mark.parametrize("mean", ["each", "activity"])
def test_equal_sums_written_out(by: str, mean: str) -> None:
    z = codes()
    statistics = filled(z)
    w = z if by == "mass" else (z > 0).double()
    latents = [w[:, :, j].sum(0) for j in range(D_SAE - 1)]
    pairs = [w[t, :, j] for t in range(TOKENS) for j in range(D_SAE) if w[t, :, j].sum() > 0]

    def average(distributions: list[torch.Tensor]) -> float:
        sizes = [d.sum().item() if mean == "activity" else 1.0 for d in distributions]
        return sum(s * variance(d) for s, d in zip(sizes, distributions, strict=True)) / sum(sizes)

    wanted = {"var": variance(w.sum((0, 2))), "var_latent": average(latents), "var_pair": average(pairs)}
    wanted |= {
        "rel_latent": wanted["var_latent"] / wanted["var"],
        "rel_pair": wanted["var_pair"] / wanted["var_latent"],
    }
    assert statistics.variances(by, mean) == pytest.approx(wanted, rel=1e-9)
    P = statistics.distribution(by)
    for j, distribution in enumerate(latents):
        assert torch.allclose(P[j], distribution / distribution.sum())
        assert statistics.variance(by)[j].item() == pytest.approx(variance(distribution))
        wanted_mean = (distribution * torch.arange(LAYERS)).sum() / distribution.sum()
        assert statistics.mean_layer(by)[j].item() == pytest.approx(wanted_mean.item())
    for of_dead in (P[5], statistics.variance(by)[5], statistics.mean_layer(by)[5]):
        assert bool(of_dead.isnan().all())


def test_dead_latents_and_inactive_pairs_do_not_dilute_the_means() -> None:
    z = codes()
    many_dead = torch.cat([z, torch.zeros(TOKENS, LAYERS, 50).double()], dim=2)
    with_idle_tokens = torch.cat([z, torch.zeros(100, LAYERS, D_SAE).double()])
    for mean in ("each", "activity"):
        for other in (many_dead, with_idle_tokens):
            assert filled(other).variances("mass", mean) == pytest.approx(filled(z).variances("mass", mean), rel=1e-12)


def test_how_the_rows_are_cut_into_batches_does_not_matter() -> None:
    z = codes()
    a, b = filled(z, 1).result(), filled(z, 9).result()
    assert a["latents_alive"] == b["latents_alive"] == 5
    assert a["mass"]["each"] == pytest.approx(b["mass"]["each"]) and a["counts"]["activity"] == pytest.approx(
        b["counts"]["activity"]
    )
    assert json.loads(json.dumps(a)) == a


def test_total_variance_holds_when_weighted_by_activity() -> None:
    for seed in range(5):
        for by in ("mass", "counts"):
            v = filled(codes(seed)).variances(by, "activity")
            assert v["var"] >= v["var_latent"] >= v["var_pair"] >= 0


def test_closed_forms() -> None:
    """Latent 0 lives at layer 2 alone, latent 1 at all layers of a token at once, latent 2 at one layer per token."""
    z = torch.zeros(4, LAYERS, 3).double()
    z[:, 2, 0] = 3.0
    z[:, :, 1] = 0.5
    z[torch.arange(4), torch.arange(4), 2] = 7.0
    statistics = filled(z, 1)
    uniform = 1.25  # the variance of 0, 1, 2, 3
    assert statistics.variance().tolist() == pytest.approx([0, uniform, uniform])
    assert statistics.mean_layer().tolist() == pytest.approx([2, 1.5, 1.5])
    v = statistics.variances("mass", "each")
    assert v["var_latent"] == pytest.approx(2 / 3 * uniform)
    assert v["var_pair"] == pytest.approx(4 * uniform / 12), "only latent 1 is spread within a token: 4 of 12 pairs"


def test_rows_that_are_not_tokens_by_layers_are_refused() -> None:
    for shape in ((12, D_SAE), (3, 5, D_SAE)):
        with pytest.raises(ValueError, match=r"\[tokens, 4\]"):
            LayerStatistics(LAYERS, D_SAE).add(Latents.from_dense(torch.ones(shape)))
    with pytest.raises(ValueError, match="No latent has fired"):
        LayerStatistics(LAYERS, D_SAE).result()


def stream(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A 4-layer stream with 8 persistent features, there from a layer on that varies from token to token, 8 others at
    one layer each, and a background at all of them. Layers differ in size and have an offset.

    Returns x [n, 4, d], the activity of each feature [n, 4, 16], and the directions [16, d].
    """
    g = torch.Generator().manual_seed(seed)
    d, features = 32, 16
    start = torch.randn(d, features + 2, generator=torch.Generator().manual_seed(7))
    start[:, 0] = 1
    directions = torch.linalg.qr(start).Q.T[1:]  # orthogonal to each other and to the offset
    fires = torch.rand(n, features, generator=g) < 0.2
    layer, ids = torch.arange(LAYERS)[None, :, None], torch.arange(features)
    begins = torch.randint(0, 3, (n, 1, features), generator=g)
    on = fires[:, None] & torch.where(ids < 8, layer >= begins, layer == ids % LAYERS)
    strength = on * (1 + 0.2 * torch.rand(n, LAYERS, features, generator=g))
    x = strength @ directions[:-1] + directions[-1] + 0.02 * torch.randn(n, LAYERS, d, generator=g)
    return x * torch.tensor([1.0, 3.0, 10.0, 40.0])[:, None] + 5.0, strength, directions[:-1]


def test_recovers_the_layers_of_planted_features() -> None:
    x, _, directions = stream(6000, seed=0)
    sae = ap.create("mlsae", d_in=32, d_sae=24, k=1.8, seed=0, allocation="mutual_choice", init="random")
    assert sae.config.input_norm == "token_standardise"
    trainer = ap.Trainer(
        sae, ap.TrainConfig(lr=3e-3, batch_tokens=512, total_tokens=150_000, decay_share=0.2, beta1=0.9)
    )
    rows = x.flatten(0, 1)
    g = torch.Generator().manual_seed(1)
    for _ in range(trainer.config.total_steps):
        pick = torch.randint(len(rows), (512,), generator=g)
        trainer.step(Batch(rows[pick], site=pick % LAYERS))
    sae.calibrate(rows)
    sae.eval()
    x, strength, _ = stream(2000, seed=3)
    statistics = LayerStatistics(LAYERS, sae.d_sae)
    statistics.add(sae.encode(x))
    similarity = directions @ sae.W_dec.detach().T
    best = similarity.argmax(1)
    assert similarity.amax(1).min() > 0.8 and len(set(best.tolist())) == 16, "every feature has found a latent"
    truth = (strength > 0).double().sum(0).T
    truth = truth / truth.sum(1, keepdim=True)
    assert (statistics.distribution("counts")[best] - truth).abs().max() < 0.06
    means = (truth * torch.arange(LAYERS)).sum(1)
    assert torch.allclose(statistics.mean_layer("counts")[best], means, atol=0.1)
    spread = statistics.variance("counts")[best]
    assert spread[8:].max() < 0.1 < 0.5 < spread[:8].min(), "those of one layer and the persistent ones"
    v = statistics.variances("counts", "each")
    assert v["var"] > v["var_latent"] > v["var_pair"] > 0

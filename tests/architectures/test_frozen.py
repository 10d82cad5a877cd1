"""Baselines with random directions: what is frozen stays, the rest is trained, the soft constraint holds and binds."""

from __future__ import annotations

import pytest
import torch

import apportion as ap
from apportion.architectures.frozen import within_cone
from apportion.rows import ArraySource

D_IN, D_SAE, K = 8, 32, 3


def rows(n: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, D_IN, generator=torch.Generator().manual_seed(seed)) * 3 + 1


def trained(name: str, steps: int = 30, lr: float = 0.1, **settings: object) -> tuple[ap.SAE, dict[str, torch.Tensor]]:
    """After a few large steps, and the state before them."""
    sae = ap.create(name, d_in=D_IN, d_sae=D_SAE, k=K, seed=0, **settings)
    before = {n: t.clone() for n, t in sae.state_dict().items()}
    trainer = ap.Trainer(sae, ap.TrainConfig(lr=lr, batch_tokens=64))
    for seed in range(steps):
        trainer.step(rows(seed=seed))
    return sae, before


def cosines(sae: ap.SAE, start: torch.Tensor) -> torch.Tensor:
    return torch.cosine_similarity(sae.W_dec.double(), start.double(), dim=1)


@pytest.mark.parametrize(("name", "frozen"), [("frozen_decoder", "W_dec"), ("frozen_encoder", "W_enc")])
@pytest.mark.parametrize("allocation", ["topk", "mutual_choice"])
def test_what_is_frozen_stays_and_the_rest_is_trained(name, frozen, allocation):
    sae, before = trained(name, allocation=allocation)
    moved = {n for n, p in sae.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {"W_enc", "W_dec", "b_enc", "b_dec"} - {frozen}
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(D_SAE), rtol=1e-6)


def test_training_keeps_nothing_for_what_is_frozen():
    sae = ap.create("frozen_decoder", d_in=D_IN, d_sae=D_SAE, k=K)
    trainer = ap.Trainer(sae, ap.TrainConfig(batch_tokens=64))
    trainer.step(rows())
    tensors, _ = trainer.state()
    assert any("adam.W_enc" in name for name in tensors) and not any("adam.W_dec" in name for name in tensors)
    assert sae.W_dec.grad is None


@pytest.mark.parametrize("min_cosine", [0.8, 0.95])
def test_the_soft_constraint_holds_and_binds(min_cosine):
    sae, before = trained("soft_frozen_decoder", min_cosine=min_cosine)
    found = cosines(sae, before["W_dec"])
    assert found.min() >= min_cosine - 1e-6 and found.max() < 1
    assert (found < min_cosine + 1e-6).sum() > D_SAE / 4, "most rows want to go further"
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(D_SAE), rtol=1e-6)
    free, before = trained("topk")
    assert cosines(free, before["W_dec"]).min() < min_cosine - 0.1, "without the constraint they do"


def test_the_ends_of_the_soft_constraint_are_plain_and_frozen():
    free, _ = trained("soft_frozen_decoder", min_cosine=-1.0)
    plain, _ = trained("topk", init="random")
    assert torch.equal(free.W_dec, plain.W_dec)
    tied, before = trained("soft_frozen_decoder", min_cosine=1.0)
    assert (tied.W_dec - before["W_dec"]).abs().max() < 1e-6


def test_the_soft_constraint_outlives_a_file(tmp_path):
    """The start is saved with the SAE, so that training goes on around the same one."""
    sae, before = trained("soft_frozen_decoder", steps=5)
    sae.save(tmp_path)
    trainer = ap.Trainer(ap.load(tmp_path), ap.TrainConfig(lr=0.1, batch_tokens=64))
    for seed in range(30):
        trainer.step(rows(seed=seed))
    assert cosines(trainer.sae, before["W_dec"]).min() >= 0.8 - 1e-6


def test_constrain_holds_it_in_a_loop_of_ones_own():
    sae = ap.create("soft_frozen_decoder", d_in=D_IN, d_sae=D_SAE, k=K, seed=0)
    start = sae.W_dec.detach().clone()
    with torch.no_grad():
        sae.W_dec.add_(rows(D_SAE, seed=1))
    sae.constrain()
    assert cosines(sae, start).min() >= 0.8 - 1e-6


def test_within_cone_is_the_nearest_direction():
    g = torch.Generator().manual_seed(0)

    def directions(*shape: int) -> torch.Tensor:
        return torch.nn.functional.normalize(torch.randn(*shape, generator=g, dtype=torch.float64), dim=-1)

    w, start, tries = directions(20, 4), directions(20, 4), directions(20, 20000, 4)
    got = within_cone(w, start, 0.5)
    inside = (w * start).sum(1) >= 0.5
    assert bool(inside.any()) and torch.equal(got[inside], w[inside])
    assert torch.allclose((got * start).sum(1)[~inside], torch.tensor(0.5, dtype=torch.float64))
    assert torch.allclose(got.norm(dim=1), torch.ones(20, dtype=torch.float64))
    nearness = (tries @ w[:, :, None]).squeeze(2)
    nearness[(tries @ start[:, :, None]).squeeze(2) < 0.5] = -1
    best, ours = nearness.max(1).values, (got * w).sum(1)
    assert bool((best <= ours + 1e-12).all()) and bool((best > ours - 0.05).all())


def test_a_cosine_has_limits():
    with pytest.raises(ValueError, match=r"min_cosine.*1\.5"):
        ap.create("soft_frozen_decoder", d_in=D_IN, d_sae=D_SAE, k=K, min_cosine=1.5)


def test_a_frozen_decoder_reconstructs_worse():
    """On data with structure, after the same training."""
    g = torch.Generator().manual_seed(0)
    codes = (torch.rand(4000, 20, generator=g) < 0.1) * torch.rand(4000, 20, generator=g)
    x = codes @ torch.randn(20, D_IN, generator=g)
    loss = {}
    for name in ("frozen_decoder", "soft_frozen_decoder", "topk"):
        sae = ap.create(name, d_in=D_IN, d_sae=D_SAE, k=K, seed=0)
        config = ap.TrainConfig(lr=1e-2, batch_tokens=128, total_tokens=10_000)
        ap.Trainer(sae, config).fit(ArraySource(x), progress=False)
        with torch.no_grad():
            loss[name] = (x - sae(x)).square().mean().item()
    assert max(loss["topk"], loss["soft_frozen_decoder"]) < 0.8 * loss["frozen_decoder"]

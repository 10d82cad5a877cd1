"""Conversion to JumpReLU form: equal codes where there were thresholds, equal L0 and nearly equal FVU for TopK."""

from __future__ import annotations

import pytest
import torch

import apportion as ap
from apportion.architectures import rebuild, to_jumprelu

D_IN, D_SAE, K = 32, 48, 3


def synthetic(n: int, seed: int) -> torch.Tensor:
    """About four of 48 directions per token, sometimes none and sometimes ten, some rarer than others; off centre."""
    directions = torch.randn(48, D_IN, generator=torch.Generator().manual_seed(99))
    g = torch.Generator().manual_seed(seed)
    active = torch.rand(n, 48, generator=g) < 0.3 / torch.arange(1, 49).sqrt()
    return 2 + (active * (0.5 + torch.rand(n, 48, generator=g))) @ directions


@pytest.fixture(scope="module")
def trained():
    """SAEs trained on ground truth; with free decoder norms where they compete by them."""
    kept = {}

    def get(name: str, affinity: str = "code", **settings: object) -> ap.SAE:
        key = (name, affinity, *settings.items())
        if key not in kept:
            sae = ap.create(name, d_in=D_IN, d_sae=D_SAE, k=K, seed=0, affinity=affinity, **settings)
            config = ap.TrainConfig(lr=1e-2, batch_tokens=128, total_tokens=128 * 150, dead_window_tokens=2000)
            sae = ap.Trainer(sae, config).fit(synthetic(6000, 0), progress=False)
            if affinity != "code":
                with torch.no_grad():
                    sae.W_dec.mul_(torch.linspace(0.5, 2, D_SAE)[:, None])
                    sae.W_enc.div_(torch.linspace(0.5, 2, D_SAE)[:, None])
                    sae.b_enc.div_(torch.linspace(0.5, 2, D_SAE))
            kept[key] = sae
        return kept[key]

    return get


def fvu(x_hat: torch.Tensor, x: torch.Tensor) -> float:
    return float((x - x_hat.detach()).square().sum() / (x - x.mean(0)).square().sum())


@pytest.mark.few(3)
@pytest.mark.parametrize("affinity", ["code", "code_times_decoder_norm"])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("mutual_choice", {}),
        ("feature_choice", {"budgets": "zipf"}),
        ("matryoshka", {}),
        ("matryoshka", {"allocation": "feature_choice"}),
    ],
    ids=str,
)
def test_codes_are_kept(name, settings, affinity, trained):
    sae, x = trained(name, affinity, **settings), synthetic(2000, 1)
    form = to_jumprelu(sae)
    assert form.name == "jumprelu" and not form.training and form.k == K and form.dtype == sae.dtype
    ours, theirs = form.encode(x).dense(), sae.encode(x).dense()
    differ = (ours != 0) != (theirs != 0)
    cut = form.log_threshold.exp().expand_as(ours)
    assert torch.allclose((ours + theirs)[differ], cut[differ], rtol=1e-5), "only what lies on the threshold may differ"
    assert int(differ.sum()) <= 2
    assert torch.equal(ours[~differ], theirs[~differ])
    assert fvu(form(x), x) == pytest.approx(fvu(sae(x), x), rel=1e-3)


@pytest.mark.few(2)
@pytest.mark.parametrize("affinity", ["code", "code_times_decoder_norm"])
@pytest.mark.parametrize("name", ["topk", "multi_topk"])
def test_topk_keeps_l0_and_fvu(name, affinity, trained):
    """Within 3 % and 2 %, where tokens differ in how many features they have; one threshold, on affinities."""
    sae, x = trained(name, affinity, init="random"), synthetic(4000, 1)
    form = to_jumprelu(sae, synthetic(6000, 2))
    l0, before = (s.encode(x).l0().double().mean().item() for s in (form, sae))
    assert before == pytest.approx(K, rel=1e-3) and l0 == pytest.approx(before, rel=0.03)
    assert fvu(form(x), x) <= 1.02 * fvu(sae(x), x)
    norms = sae.W_dec.norm(dim=1) if affinity != "code" else torch.ones(D_SAE)
    theta = form.log_threshold.exp() * norms
    assert torch.allclose(theta, theta[:1].expand(D_SAE), rtol=1e-5)
    assert form.info["calibration"]["tokens"] == 6000 and form.info["calibration"]["l0"] == pytest.approx(K, rel=1e-3)


def test_the_threshold_of_topk_by_its_definition(trained):
    """theta lies between the (k n)-th and the next largest affinity of all n tokens and latents."""
    sae, x = trained("topk").double(), synthetic(500, 3).double()
    form = to_jumprelu(sae, x)
    codes = ((x - sae.mean) * sae.scale - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    ranked = codes.flatten().sort(descending=True).values
    theta = form.log_threshold.exp()[0]
    assert ranked[K * 500] <= theta < ranked[K * 500 - 1]
    sae.float()


def test_thresholds_are_those_of_the_original_unless_rows_are_given(trained):
    sae = trained("mutual_choice")
    before = {key: t.clone() for key, t in sae.state_dict().items()}
    calm = to_jumprelu(sae)
    assert torch.allclose(calm.log_threshold.exp(), sae.allocation.threshold.expand(D_SAE), rtol=1e-6)
    loud = to_jumprelu(sae, 2 + 3 * (synthetic(3000, 4) - 2))
    assert bool((loud.log_threshold > calm.log_threshold).all())
    assert all(torch.equal(before[key], t) for key, t in sae.state_dict().items()), "the original stays as it is"
    assert calm.W_enc.data_ptr() != sae.W_enc.data_ptr()


def test_it_is_a_jumprelu_in_every_respect(trained, tmp_path):
    sae, x = trained("mutual_choice"), synthetic(300, 1)
    form = to_jumprelu(sae)
    form.save(tmp_path)
    loaded = ap.load(tmp_path)
    assert torch.equal(loaded(x), form(x)) and loaded.info == form.info
    assert loaded.info["converted_from"]["sae"] == "mutual_choice"
    assert loaded.info["source"] == sae.info["source"]
    folded = form.folded()
    assert torch.allclose(folded(x), form(x), rtol=1e-4, atol=1e-4)
    trainer = ap.Trainer(loaded, ap.TrainConfig(batch_tokens=300))
    assert all(bool(value.isfinite()) for value in trainer.step(x).values())


def test_latents_that_never_fire_and_thresholds_of_zero():
    """Feature Choice leaves some latents an infinite threshold; a budget never exhausted leaves Mutual Choice 0."""
    x = synthetic(300, 0)
    sae = ap.create("feature_choice", d_in=D_IN, d_sae=D_SAE, k=K, seed=0, input_norm="none")
    with torch.no_grad():
        sae.b_enc[:5] = -1e3
    sae.calibrate(x)
    form = to_jumprelu(sae)
    assert bool(form.log_threshold.isfinite().all()) and bool(form.log_threshold.exp().isfinite().all())
    assert torch.equal(form.encode(x).dense()[:, :5], torch.zeros(300, 5))
    assert torch.equal(form.encode(x).dense(), sae.eval().encode(x).dense())
    sae = ap.create("mutual_choice", d_in=D_IN, d_sae=D_SAE, k=D_SAE, seed=0)
    sae.fit_input(x)
    sae.calibrate(x)
    assert float(sae.allocation.threshold) == 0
    form = to_jumprelu(sae)
    assert bool(form.log_threshold.isfinite().all())
    assert torch.equal(form.encode(x).dense(), sae.eval().encode(x).dense())


def test_what_cannot_be_converted(trained):
    with pytest.raises(ValueError, match="activations"):
        to_jumprelu(trained("topk"))
    with pytest.raises(ValueError, match="calibrate"):
        to_jumprelu(ap.create("mutual_choice", d_in=D_IN, d_sae=D_SAE, k=K))
    with pytest.raises(ValueError, match="jumprelu"):
        to_jumprelu(to_jumprelu(trained("mutual_choice")))
    with pytest.raises(ValueError, match="budget"):
        to_jumprelu(rebuild("matryoshka", d_in=D_IN, d_sae=D_SAE, allocation="threshold"))

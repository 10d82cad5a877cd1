"""What the conformance suite does not see of the three plain SAEs: closed forms, messages, ties, calibration."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import apportion as ap
from apportion.allocation import Selection
from apportion.latents import Latents

D_IN, D_SAE, K = 8, 40, 4


def activations(n: int, seed: int = 0, d: int = D_IN) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) * 2 + 1


def new(name: str, **settings: object) -> ap.SAE:
    sae = ap.create(name, **{"d_in": D_IN, "d_sae": D_SAE, "k": K, "seed": 0, **settings})
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        sae.b_enc.copy_(0.1 * torch.randn(sae.d_sae, generator=generator))
        sae.b_dec.copy_(0.1 * torch.randn(D_IN, generator=generator))
    return sae


def ready(name: str, **settings: object) -> ap.SAE:
    sae = new(name, **settings)
    sae.fit_input(activations(2000))
    sae.calibrate(activations(2000, seed=1))
    return sae.eval()


def quantised(name: str) -> ap.SAE:
    """Whole numbers everywhere, so that products are exact and ties abound."""
    sae = ap.create(name, d_in=D_IN, d_sae=D_SAE, k=K, input_norm="none").eval()
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in sae.parameters():
            p.copy_(torch.randint(-2, 3, p.shape, generator=g))
        for buffer, tensor in sae.allocation.named_buffers():
            if buffer == "threshold":
                tensor.copy_(torch.randint(2, 9, tensor.shape, generator=g))
    return sae


def whole_numbers(*shape: int) -> torch.Tensor:
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(3)).float()


def snapshot(sae: ap.SAE) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in sae.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n].nan_to_num(-7), b[n].nan_to_num(-7)) for n in a)


@pytest.fixture(params=["topk", "mutual_choice", "feature_choice"])
def name(request) -> str:
    return request.param


# Shapes and dtypes


@pytest.mark.parametrize("d_sae", [D_SAE, 1024])
@pytest.mark.parametrize("weights", [torch.float16, torch.bfloat16], ids=str)
def test_sixteen_bit_weights(name, weights, d_sae):
    sae, x = ready(name, d_sae=d_sae).to(weights), activations(300, seed=3)
    wanted = ready(name, d_sae=d_sae)(x)
    assert (sae(x) - wanted).square().mean() < 0.01 * wanted.square().mean()
    sae.train()(x).square().mean().backward()
    assert all(bool(p.grad.isfinite().all()) and bool(p.grad.any()) for p in sae.parameters())
    assert sae.calibrate(activations(2000, seed=1)) == pytest.approx(K, rel=0.05)


def test_decode_accepts_a_dense_code(name):
    sae = ready(name)
    x = activations(6).reshape(2, 3, D_IN)
    latents = sae.encode(x)
    assert torch.equal(sae.decode(latents.dense()), sae.decode(latents))
    assert (
        torch.equal(sae.decode(latents.dense().double()), sae.decode(latents))
        and sae.decode(latents).dtype == sae.dtype
    )
    dense = latents.dense().detach().requires_grad_()
    sae.decode(dense).sum().backward()
    assert bool((dense.grad != 0).any())


def test_decode_follows_its_definition(name):
    sae = ready(name).double()
    x = activations(20).double()
    z = sae.encode(x).dense()
    wanted = (z @ sae.W_dec + sae.b_dec) / sae.scale + sae.mean
    assert torch.allclose(sae(x), wanted, rtol=1e-12)
    prepared = (x - sae.mean) * sae.scale
    codes = (prepared - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    assert torch.allclose(z, codes * (z != 0), rtol=1e-10) and bool((z >= 0).all()) and bool((z > 0).any())


def test_without_subtracting_the_bias(name):
    sae = ready(name, subtract_b_dec=False, input_norm="none").double()
    x = activations(20).double()
    z = sae.encode(x).dense()
    assert torch.allclose(z, (x @ sae.W_enc.T + sae.b_enc) * (z != 0), rtol=1e-10)


# Mistakes


def test_refusals_say_what_is_wrong_and_what_to_do():
    """That they come, and as ValueError, is for the conformance suite."""
    sae = ready("mutual_choice")
    latents, x = sae.encode(activations(4)), activations(6).reshape(2, 3, D_IN)
    x[1, 1, 3] = -torch.inf
    for said, call in {
        "d_in = 8": lambda: sae.encode(torch.ones(5, 7)),
        r"Row 4.*NaN": lambda: sae.encode(x),
        "d_sae = 40, got": lambda: sae.decode(latents[..., :20]),
        "at least one row": lambda: sae.calibrate([]),
        r"sae\.calibrate\(x\).*sae\.train\(\)": lambda: new("mutual_choice").eval()(activations(4)),
    }.items():
        with pytest.raises(ValueError, match=said):
            call()


def test_large_finite_inputs_are_fine(name):
    x = activations(6)
    x[0] = 3e38
    assert ready(name).encode(x).shape == (6,)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("mutual_choise", {}, "mutual_choice"),
        ("zzz", {}, "known are.*topk"),
        ("topk", {"dsae": 5}, "d_sae"),
        ("topk", {"switch_at": 0.3}, "no setting 'switch_at'"),
        ("topk", {"d_in": None}, "d_in"),
        ("topk", {"d_in": 0}, "d_in"),
        ("topk", {"d_sae": 2.5}, "d_sae"),
        ("topk", {"k": 41}, "d_sae = 40"),
        ("mutual_choice", {"k": 40.5}, "d_sae = 40"),
        ("feature_choice", {"k": 0}, "d_sae = 40"),
        ("topk", {"k": 2.5}, "mutual_choice"),
        ("topk", {"k_aux": 0}, "k_aux"),
        ("mutual_choice", {"aux_c": 1.5}, "aux_c"),
        ("topk", {"aux": "aux-k"}, "aux_k"),
        ("topk", {"input_norm": "standardise"}, "token_standardise"),
        ("topk", {"centre": "median"}, "geometric_median"),
        ("topk", {"affinity": "norm"}, "code_times_decoder_norm"),
        ("feature_choice", {"budgets": "zip"}, "zipf"),
    ],
)
def test_settings_that_cannot_work(name, settings, message):
    with pytest.raises(ValueError, match=message):
        ap.create(name, **{"d_in": D_IN, "d_sae": D_SAE, "k": 4, **settings})


def test_create_needs_sizes():
    with pytest.raises(ValueError, match="d_in and d_sae"):
        ap.create("topk")
    with pytest.raises(ValueError, match="d_sae"):
        ap.create("topk", d_in=4)


def test_k_may_equal_d_sae(name):
    sae = new(name, k=D_SAE, input_norm="none").double()
    x = activations(30).double()
    z = sae.encode(x).dense()
    codes = ((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc).relu()
    assert torch.allclose(z, codes, rtol=1e-9, atol=1e-12)


def test_copies_and_pickles(name):
    sae, x = ready(name), activations(6)
    for twin in (copy.deepcopy(sae), pickle.loads(pickle.dumps(sae))):
        assert torch.equal(twin(x), sae(x))


def test_a_seed_fixes_the_weights(name):
    a, b, c = (ap.create(name, d_in=D_IN, d_sae=D_SAE, k=K, seed=s) for s in (3, 3, 4))
    assert same(snapshot(a), snapshot(b)) and not same(snapshot(a), snapshot(c))
    assert a.training and torch.allclose(a.W_dec.norm(dim=1), torch.ones(D_SAE))


# encode changes nothing


def test_warm_starts_change_no_code(name):
    sae, warm = ready(name).train(), None
    for seed, scale in ((0, 1), (1, 5), (2, 0.1), (3, 1)):
        x = scale * activations(30, seed=seed)
        selection = Selection(sae.allocation, warm)
        found = sae.encode_scaled(sae.input.apply_to(x), selection)
        assert torch.allclose(found.dense(), sae.encode(x).dense(), rtol=1e-5, atol=1e-6)
        warm = selection.next_warm


# Eval mode: a token's code does not depend on its neighbours


def test_train_mode_of_coupled_rules_does_depend_on_the_batch():
    for name in ("mutual_choice", "feature_choice"):
        sae, x = ready(name).train(), activations(50)
        crowd = torch.cat([x[:5], 10 * x])
        assert not torch.equal(sae.encode(crowd).dense()[:5] > 0, sae.encode(x).dense()[:5] > 0)


# Calibration


def test_calibrated_l0_holds_where_decoder_rows_differ(name):
    sae = new(name, affinity="code_times_decoder_norm")
    with torch.no_grad():
        sae.W_dec *= torch.linspace(0.5, 2, D_SAE)[:, None]
    xs = activations(20_000, seed=1)
    measured = sae.calibrate(xs)
    assert measured == pytest.approx(K, rel=1e-3)
    sae.eval()
    assert sae.encode(activations(20_000, seed=2)).l0().double().mean().item() == pytest.approx(K, rel=0.02)
    on_the_same = sae.encode(xs).l0().double().mean().item()
    assert on_the_same == pytest.approx(measured, abs=1e-3), "what calibrate reports is what eval mode does"


@pytest.mark.parametrize("n", [100, 4096, 5001])
def test_calibration_is_exact_on_its_own_rows(name, n):
    """Exactly k * tokens matches lie above the thresholds; encoding anew may round one at the cut differently."""
    sae, xs = new(name).double(), activations(n).double() + 3
    measured = sae.calibrate(xs)
    assert measured * n == K * n
    assert abs(sae.eval().encode(xs).nnz - K * n) <= 5


@pytest.mark.parametrize("k", [0.3, 2.5])
def test_calibrated_l0_of_fractional_budgets(k):
    for name in ("mutual_choice", "feature_choice"):
        sae = new(name, k=k)
        assert sae.calibrate(activations(20_000, seed=1)) == pytest.approx(k, rel=1e-3)
        l0 = sae.eval().encode(activations(20_000, seed=2)).l0().double().mean().item()
        assert l0 == pytest.approx(k, rel=0.03)


@pytest.mark.parametrize("share_silent", [0.3, 0.8])
def test_calibrated_l0_with_silent_latents(name, share_silent):
    """Latents that never fire leave their share to the others; the reported L0 is the true one."""
    sae = new(name)
    with torch.no_grad():
        sae.b_enc[: int(share_silent * D_SAE)] = -1e4
    xs = activations(20_000, seed=1)
    measured = sae.calibrate(xs)
    true = sae.eval().encode(xs).l0().double().mean().item()
    assert true == pytest.approx(measured, abs=1e-3)
    positive = ((sae.input.apply_to(xs) - sae.b_dec) @ sae.W_enc.T + sae.b_enc > 0).sum(1).double()
    wanted = positive.clamp_max(K).mean().item() if name == "topk" else min(K, positive.mean().item())
    assert true == pytest.approx(wanted, rel=0.01)


def test_feature_choice_calibrates_every_latent():
    sae = new("feature_choice")
    sae.calibrate(activations(20_000, seed=1))
    density = sae.eval().encode(activations(20_000, seed=2)).counts() / 20_000
    assert torch.allclose(density, torch.full((D_SAE,), K / D_SAE), rtol=0.2)


def test_calibrating_twice_gives_the_same(name):
    sae, xs = new(name), activations(5000)
    sae.calibrate(xs)
    first = snapshot(sae)
    sae.calibrate(xs)
    assert same(first, snapshot(sae))


def test_thresholds_are_strict():
    """A token at the threshold exactly does not fire."""
    for name in ("mutual_choice", "feature_choice"):
        sae, x = quantised(name), whole_numbers(60, D_IN)
        codes = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
        theta = sae.allocation.threshold.expand(60, D_SAE)
        assert bool((codes == theta).any())
        assert torch.equal(sae.encode(x).dense() > 0, codes > theta)


def test_latents_can_be_edited_between_encode_and_decode(name):
    sae = ready(name).double()
    x = activations(6).double()
    latents = sae.encode(x)
    doubled = latents.map(lambda v: 2 * v)
    wanted = sae.decode(latents) + (latents.dense() @ sae.W_dec) / sae.scale
    assert torch.allclose(sae.decode(doubled), wanted, rtol=1e-10)
    assert isinstance(doubled, Latents)


def test_calibrate_takes_batches_and_their_masks(name):
    xs, mask = activations(6000), torch.arange(6000) % 3 > 0
    one, other = new(name), new(name)
    poisoned = torch.where(mask[:, None], xs, torch.full_like(xs, 1e3))
    batches = [ap.Batch(x, mask=m) for x, m in zip(poisoned.split(1000), mask.split(1000), strict=True)]
    assert one.calibrate(batches) == pytest.approx(other.calibrate(iter(xs[mask].split(500))), rel=1e-9)
    assert one.info["calibration"]["tokens"] == 4000
    for (key, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), key

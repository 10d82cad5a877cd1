"""One training step, in somebody else's loop."""

import pytest
import torch

import apportion as ap
from apportion.allocation import StepContext
from apportion.architectures import affine
from apportion.training.objective import TrainingContext, local_reconstruction

D_IN, D_SAE, K = 8, 48, 3
"""So few active latents that all sums run over lists of matches, not over dense blocks."""


def activations(n: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, D_IN, generator=torch.Generator().manual_seed(seed)) * 3 + 1


def new(name: str = "mutual_choice", **settings: object) -> ap.SAE:
    return ap.create(name, **{"d_in": D_IN, "d_sae": D_SAE, "k": K, "seed": 0, **settings})


def trainer(name: str = "mutual_choice", settings: dict | None = None, **train: object) -> ap.Trainer:
    return ap.Trainer(new(name, **(settings or {})), ap.TrainConfig(batch_tokens=64, **train))  # type: ignore[arg-type]


@pytest.fixture(params=["topk", "mutual_choice", "feature_choice"])
def name(request) -> str:
    return request.param


def test_returns_numbers_and_makes_progress(name):
    t = trainer(name, lr=1e-2)
    before = t.sae.state_dict()["W_enc"].clone()
    x = activations()
    first = t.step(x)
    assert {"loss", "reconstruction", "fvu_batch", "l0", "dead", "grad_norm"} <= first.keys()
    assert all(v.shape == () and not v.requires_grad and bool(v.isfinite()) for v in first.values())
    assert first["l0"].item() == pytest.approx(K, rel=0.05)
    assert not torch.equal(t.sae.W_enc, before)
    for _ in range(60):
        last = t.step(x)
    assert last["loss"] < 0.7 * first["loss"]
    assert (t.steps, t.tokens) == (61, 61 * 64)


def test_loss_is_the_sum_of_its_terms(name):
    t = trainer(name, {"aux": "aux_k", "k_aux": 4, "aux_weight": 0.5}, dead_window_tokens=1)
    t.learners[0].activity.silent_tokens[:10] = 10
    out = t.step(activations())
    assert out["aux_k"] > 0
    assert out["loss"].item() == pytest.approx((out["reconstruction"] + out["aux_k"]).item(), rel=1e-6)


def test_decoder_rows_stay_of_unit_norm(name):
    t = trainer(name, lr=0.1)
    for seed in range(5):
        t.step(activations(seed=seed))
        assert torch.allclose(t.sae.W_dec.norm(dim=1), torch.ones(D_SAE), rtol=1e-6)


def test_zero_rows_stay_zero():
    sae = new()
    with torch.no_grad():
        sae.W_dec[3] = 0
        sae.W_dec[4] *= 7
    sae.constrain()
    assert torch.allclose(sae.W_dec.norm(dim=1), (torch.arange(D_SAE) != 3).float())


def test_first_step_fits_the_input_description():
    t = trainer()
    x = activations()
    t.step(x)
    assert torch.allclose(t.sae.mean, x.mean(0), rtol=1e-5, atol=1e-5)
    fitted = t.sae.scale.clone()
    t.step(100 * activations(seed=1))
    assert torch.equal(t.sae.scale, fitted), "once"


def test_a_given_input_description_is_kept():
    sae = new()
    sae.fit_input(10 * activations())
    scale = sae.scale.clone()
    ap.Trainer(sae, ap.TrainConfig(batch_tokens=64)).step(activations())
    assert torch.equal(sae.scale, scale)


def test_masked_rows_take_no_part(name):
    x = activations(100)
    mask = torch.arange(100) % 3 != 0
    x[~mask] = torch.nan
    masked, plain = trainer(name), trainer(name)
    for _ in range(3):
        a, b = masked.step(ap.Batch(x, mask=mask)), plain.step(x[mask])
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert all(torch.equal(p, q) for p, q in zip(masked.sae.parameters(), plain.sae.parameters(), strict=True))
    assert masked.tokens == plain.tokens == 3 * int(mask.sum())


def test_an_empty_batch_is_refused():
    for batch in (ap.Batch(activations(), mask=torch.zeros(64, dtype=torch.bool)), activations(0)):
        with pytest.raises(ValueError, match="at least one row"):
            trainer().step(batch)


def test_another_width_is_refused():
    with pytest.raises(ValueError, match=r"d_in = 8.*\[10, 5\]"):
        trainer().step(torch.ones(10, 5))


@pytest.mark.parametrize("input_norm", ["dataset", "none", "token_norm"])
def test_nan_is_refused(name, input_norm):
    x = activations()
    x[3, 2] = torch.nan
    with pytest.raises(ValueError, match=r"NaN|nan"):
        trainer(name, {"input_norm": input_norm}).step(x)


def test_one_row_does_not_spoil_the_weights(name):
    t = trainer(name, {"input_norm": "none", "aux": "aux_k"}, dead_window_tokens=1)
    for seed in range(4):
        t.step(activations(1, seed))
    assert all(bool(p.isfinite().all()) for p in t.sae.parameters())


def test_leading_dimensions_are_flattened(name):
    a, b = trainer(name), trainer(name)
    x = activations()
    a.step(x.reshape(4, 16, D_IN)), b.step(x)
    assert all(torch.equal(p, q) for p, q in zip(a.sae.parameters(), b.sae.parameters(), strict=True))


def test_step_switches_to_train_mode():
    t = trainer("topk")
    t.sae.eval()
    t.step(activations())
    assert t.sae.training


def test_same_seed_same_result_bit_for_bit(name):
    results = []
    for _ in range(2):
        t = trainer(name, lr=1e-2)
        metrics = [t.step(activations(seed=s)) for s in range(6)]
        results.append((t.sae.state_dict(), metrics))
    (a, metrics_a), (b, metrics_b) = results
    assert all(torch.equal(a[key].nan_to_num(7), b[key].nan_to_num(7)) for key in a)
    assert all(torch.equal(m[key], n[key]) for m, n in zip(metrics_a, metrics_b, strict=True) for key in m)


def test_learning_rate_is_that_of_the_schedule():
    t = trainer("topk", lr=1.0, total_tokens=64 * 10, warmup_share=0.5, decay_share=0.2)
    seen = []
    for seed in range(10):
        seen.append(t.step(activations(seed=seed))["lr"].item())
    assert seen == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1, 1, 0.5])


@pytest.mark.parametrize("d_sae", [D_SAE, 12], ids=["as lists", "in dense blocks"])
def test_the_gradient_is_that_of_dense_autograd(name, d_sae):
    """The whole objective, in float64, on the matches that the rule chose."""
    sae = new(name, aux="none", d_sae=d_sae).double()
    sae.fit_input(activations())
    x = activations().double()
    grads = []
    for dense in (False, True):
        sae.zero_grad()
        if dense:
            prepared = sae.input.apply_to(x)
            mask = sae.encode_scaled(prepared, sae.selection()).dense().detach() != 0
            z = ((prepared - sae.b_dec) @ sae.W_enc.T + sae.b_enc) * mask
            loss = (z @ sae.W_dec + sae.b_dec - prepared).square().mean()
        else:
            terms = local_reconstruction([sae], ap.Batch(x), TrainingContext((StepContext(),)))
            loss = terms["reconstruction"]
        loss.backward()
        grads.append({n: p.grad.clone() for n, p in sae.named_parameters()})
    for key in grads[0]:
        assert (grads[0][key] - grads[1][key]).abs().max() <= 1e-9 * grads[1][key].abs().max(), key


@pytest.mark.parametrize("ratio", [2.0, 0.25])
def test_gradients_are_clipped(ratio, monkeypatch):
    """A first gradient is as large as usual, so that a ratio below 1 scales it; Adam's averages tell."""
    t, given = trainer(clip_ratio=ratio), {}
    gradient_norm = t.learners[0].optimizer.gradient_norm
    monkeypatch.setattr(
        t.learners[0].optimizer,
        "gradient_norm",
        lambda: given.update({n: p.grad.clone() for n, p in t.sae.named_parameters()}) or gradient_norm(),
    )
    t.step(activations())
    for name in ("W_enc", "b_enc", "b_dec"):
        average = t.learners[0].optimizer.state(t.sae.get_parameter(name))["exp_avg"]
        share = (1 - t.config.beta1) * min(ratio, 1)
        assert torch.allclose(average, share * given[name], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("screen", [None, "bfloat16"])
@pytest.mark.parametrize("own", [None, "bfloat16"])
def test_the_configured_screen_is_in_force_within_a_step_only(name, screen, own, monkeypatch):
    asked = []
    choose = affine.choose
    monkeypatch.setattr(affine, "choose", lambda *args, **named: asked.append(args[3].screen) or choose(*args, **named))
    sae = new(name, aux="none", init="random")
    sae.screen = own
    t = ap.Trainer(sae, ap.TrainConfig(batch_tokens=64, screen=screen))
    for _ in range(2):
        t.step(activations())
    assert asked == 2 * [screen] and sae.screen == own
    sae.encode(activations())
    assert asked[2:] == [own]
    sae.calibrate(activations())
    assert set(asked[3:]) == {own}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"screen": "bf16"}, "screen cannot be 'bf16'; did you mean bfloat16"),
        ({"screen": True}, "screen cannot be True; known are: auto, bfloat16, int8, None"),
        ({"screen": "bfloat16", "dtype": "float64"}, "needs dtype float32"),
    ],
)
def test_screens_that_cannot_work(settings, message):
    with pytest.raises(ValueError, match=message):
        ap.TrainConfig(**settings)


@pytest.mark.parametrize(
    ("total_tokens", "dead", "density"),
    [(None, 10_000_000, 1_000_000), (10**9, 10_000_000, 1_000_000), (10**8, 10_000_000, 1_000_000),
     (5 * 10**6, 500_000, 500_000), (4096, 409, 409)],
)  # fmt: skip
def test_windows_are_those_of_long_runs_or_a_tenth_of_a_shorter_one(total_tokens, dead, density):
    config = ap.TrainConfig(total_tokens=total_tokens)
    assert (config.dead_window, config.density_window) == (dead, density)
    given = ap.TrainConfig(total_tokens=total_tokens, dead_window_tokens=7, density_window_tokens=8)
    assert (given.dead_window, given.density_window) == (7, 8)
    assert ap.TrainConfig(batch_tokens=5, total_tokens=5).density_window == 1, "at least one token"


def test_float64_training():
    t = trainer("feature_choice", dtype="float64")
    t.step(activations())
    assert t.sae.dtype == torch.float64 and t.sae(activations(3)).dtype == torch.float32


def test_feature_choice_refuses_a_batch_that_is_too_small():
    with pytest.raises(ValueError, match="batch_tokens >= 16"):
        ap.Trainer(new("feature_choice"), ap.TrainConfig(batch_tokens=15))


def test_a_switch_needs_an_end():
    sae = new("feature_choice", switch_at=0.5)
    with pytest.raises(ValueError, match="total_tokens"):
        ap.Trainer(sae, ap.TrainConfig(batch_tokens=64))


def test_the_switch_happens_on_time():
    t = trainer("feature_choice", {"switch_at": 0.5, "budgets": "zipf"}, total_tokens=64 * 10)
    switched = []
    for seed in range(10):
        t.step(activations(seed=seed))
        switched.append(not t.sae.allocation.in_mutual_phase)
    assert switched == [False] * 5 + [True] * 5
    measured = t.learners[0].activity.density().argsort(descending=True)[0]
    assert t.sae.allocation.density[measured] > K / D_SAE


def test_fine_tuning_a_loaded_sae(name, tmp_path):
    settings = {"switch_at": 0.5} if name == "feature_choice" else {}
    t = trainer(name, settings, total_tokens=64 * 4)
    for seed in range(4):
        t.step(activations(seed=seed))
    t.sae.save(tmp_path)
    sae = ap.load(tmp_path)
    scale, before = sae.scale.clone(), sae.W_enc.clone()
    again = ap.Trainer(sae, ap.TrainConfig(batch_tokens=64))
    again.step(5 * activations(seed=9))
    assert torch.equal(sae.scale, scale) and not torch.equal(sae.W_enc, before)


def test_everything_works_without_the_trainer(name):
    sae = new(name)
    sae.fit_input(activations())
    optimizer = torch.optim.SGD(sae.parameters(), lr=0.1)
    x, losses = activations(), []
    for _ in range(20):
        loss = (sae(x) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        sae.constrain()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_several_threads_give_the_same_result_every_time():
    results = []
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for _ in range(2):
            t = trainer("feature_choice", lr=1e-2, dead_window_tokens=1)
            for seed in range(3):
                t.step(activations(2000, seed))
            results.append(t.sae.state_dict())
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0][key].nan_to_num(7), results[1][key].nan_to_num(7)) for key in results[0])


@pytest.mark.parametrize("name", ["mutual_choice", "feature_choice"])
def test_a_step_makes_thresholds_invalid(name):
    t = trainer(name)
    t.sae.calibrate(activations())
    t.sae.eval().encode(activations())
    t.step(activations())
    with pytest.raises(ValueError, match="calibrate"):
        t.sae.eval().encode(activations())


def test_an_objective_of_ones_own():
    """(saes, batch, context) -> named losses; the context is told what was seen."""
    calls = []

    def doubled(saes, batch, context):
        calls.append((len(saes), len(batch.x), context.each[0].progress))
        return {name: 2 * term for name, term in ap.training.local_reconstruction(saes, batch, context).items()}

    sae = ap.create("topk", d_in=D_IN, d_sae=D_SAE, k=K, seed=0)
    plain = ap.create("topk", d_in=D_IN, d_sae=D_SAE, k=K, seed=0)
    config = ap.TrainConfig(batch_tokens=64, total_tokens=640)
    metrics = ap.Trainer(sae, config, doubled).step(activations())
    once = ap.Trainer(plain, config).step(activations())
    assert metrics["reconstruction"].item() == pytest.approx(2 * once["reconstruction"].item())
    assert metrics["l0"] == once["l0"] and metrics["fvu_batch"] == once["fvu_batch"]
    assert calls == [(1, len(activations()), 0.0)]


def test_several_saes_learn_side_by_side_as_they_would_alone():
    config = ap.TrainConfig(batch_tokens=64, total_tokens=640)
    names = ("topk", "mutual_choice", "topk")

    def made(seed, name):
        return ap.create(name, d_in=D_IN, d_sae=D_SAE, k=K, seed=seed)

    together = ap.Trainer([made(i, name) for i, name in enumerate(names)], config)
    alone = [ap.Trainer(made(i, name), config) for i, name in enumerate(names)]
    for seed in range(4):
        x = activations(seed=seed)
        metrics = together.step(x)
        each = [t.step(x) for t in alone]
        assert metrics["loss"].item() == pytest.approx(sum(m["loss"].item() for m in each))
        for key in ("l0", "fvu_batch", "dead", "grad_norm"):
            assert metrics[key].item() == pytest.approx(sum(m[key].item() for m in each) / 3), key
    for sae, single in zip(together.saes, alone, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(sae.parameters(), single.sae.parameters(), strict=True))


def test_saes_side_by_side_take_the_same_rows():
    with pytest.raises(ValueError, match="same rows"):
        ap.Trainer([ap.create("topk", d_in=n, d_sae=D_SAE, k=K) for n in (D_IN, D_IN + 1)])
    with pytest.raises(ValueError, match="empty list"):
        ap.Trainer([])


@pytest.mark.parametrize("subtract_b_dec", [True, False])
def test_folded_saes_take_raw_activations(name, subtract_b_dec):
    sae = ap.create(name, d_in=D_IN, d_sae=D_SAE, k=K, seed=0, subtract_b_dec=subtract_b_dec)
    t = ap.Trainer(sae, ap.TrainConfig(batch_tokens=64, total_tokens=640))
    x = 7 * activations() + 3
    for _ in range(3):
        t.step(x)
    t.sae.calibrate(x)
    sae = t.sae.eval().double()
    folded = sae.folded()
    assert folded.config.input_norm == "none" and not folded.mean.any()
    wanted, got = sae.encode(x.double()).dense() / sae.scale, folded.encode(x.double()).dense()
    assert (wanted - got).abs().max() <= 1e-9 * wanted.abs().max()
    assert torch.allclose(folded(x.double()), sae(x.double()), rtol=1e-9, atol=1e-9)
    assert sae.config.input_norm == "dataset", "the original stays as it is"


@pytest.mark.parametrize("screen", [None, "bfloat16"])
def test_bounds_are_carried_from_step_to_step(name, screen, monkeypatch):
    warm, choose = [], affine.choose
    monkeypatch.setattr(affine, "choose", lambda *args, **named: warm.append(args[3].warm) or choose(*args, **named))
    t = ap.Trainer(new(name, aux="none", init="random"), ap.TrainConfig(batch_tokens=64, screen=screen))
    for seed in range(2):
        t.step(activations(seed=seed))
    first, second = warm
    assert first is None and (second is None) == (name == "topk") and (t.learners[0].bounds is None) == (name == "topk")

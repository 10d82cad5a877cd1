"""JumpReLU: gradients against dense twins and smoothed expectations, traps of public code, reaching the set-point."""

from __future__ import annotations

from itertools import pairwise
from math import erf, sqrt

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import apportion as ap
from apportion.allocation import StepContext, reference
from apportion.architectures.base import Pass
from apportion.training.objective import TrainingContext, local_reconstruction

D_IN, D_SAE, K, TOKENS = 12, 50, 4, 63
OBJECTIVES = ("l0", "l0_target", "tanh")


def activations(n: int = TOKENS, seed: int = 2) -> torch.Tensor:
    return torch.randn(n, D_IN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def new(objective: str = "l0", **settings: object) -> ap.SAE:
    """In general position: no unit rows, every latent with a threshold of its own, some windows that touch zero."""
    given = {"d_in": D_IN, "d_sae": D_SAE, "k": K, "seed": 0, "input_norm": "none", "bandwidth": 0.5}
    sae = ap.create("jumprelu", objective=objective, **{**given, **settings}).double()
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p, size in ((sae.b_dec, 0.3), (sae.b_enc, 0.2), (sae.W_enc, 0.1), (sae.W_dec, 0.1)):
            p.add_(size * torch.randn(p.shape, generator=g))
        sae.log_threshold.copy_((0.1 + 1.5 * torch.rand(D_SAE, generator=g)).log())
    return sae


def terms_of(sae: ap.SAE, x: torch.Tensor, context: StepContext | None = None) -> dict[str, torch.Tensor]:
    return local_reconstruction([sae], ap.Batch(x), TrainingContext((context or StepContext(),)))


def gradients(sae: ap.SAE, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    sae.zero_grad()
    loss.backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in sae.named_parameters()}


def dense_terms(sae: ap.SAE, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """All terms on dense matrices, straight-through gradients as surrogates that are zero in value."""
    c, theta, eps = sae.config, sae.log_threshold.exp(), sae.config.bandwidth
    a = (x - sae.b_dec if c.subtract_b_dec else x) @ sae.W_enc.T + sae.b_enc
    active = (a > theta).double().detach()
    near = ((a - theta).abs() < eps / 2).double().detach()
    of_step = -near / eps * theta
    of_code = theta.detach() * of_step
    z = a * active + of_code - of_code.detach()
    step = active + of_step - of_step.detach()
    terms = {"reconstruction": (z @ sae.W_dec + sae.b_dec - x).square().mean()}
    norms, value = sae.W_dec.norm(dim=1), sae.coefficient.value
    if c.coefficient is None:
        terms["set_point"] = c.set_point_weight * (step.sum(1).mean() / c.k - 1) ** 2
    if c.objective == "l0":
        terms["sparsity"] = value * step.sum(1).mean()
    elif c.objective == "tanh":
        penalty = (c.tanh_scale * (a * active) * norms).tanh()
        of_penalty = (c.tanh_scale * theta * norms).tanh().detach() * of_step
        terms["sparsity"] = value * (penalty + of_penalty - of_penalty.detach()).sum(1).mean()
        weight = c.pre_act_weight * value * c.k / c.d_sae
        terms["pre_act"] = weight * ((theta - a).relu() * norms).sum(1).mean()
    return terms


@pytest.mark.parametrize("subtract_b_dec", [True, False])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_equals_dense_autograd(objective, subtract_b_dec):
    sae, x = new(objective, pre_act_weight=0.01, subtract_b_dec=subtract_b_dec), activations()
    near = sae.forward_scaled(x, StepContext()).near
    assert bool((near.values < 0).any()), "some windows reach below zero"
    got, wanted = terms_of(sae, x), dense_terms(sae, x)
    assert got.keys() == wanted.keys()
    for term in wanted:
        assert got[term].item() == pytest.approx(wanted[term].item(), rel=1e-12), term
        a = gradients(sae, terms_of(sae, x)[term])
        b = gradients(sae, dense_terms(sae, x)[term])
        assert bool(b["allocation.log_threshold"].any()), term
        for name in b:
            assert (a[name] - b[name]).abs().max() <= 1e-9 * max(b[name].abs().max(), 1e-12), (term, name)


@pytest.mark.parametrize("term", ["sparsity", "set_point"])
def test_l0_moves_nothing_but_thresholds(term):
    sae = new("l0")
    moved = gradients(sae, terms_of(sae, activations())[term])
    assert [name for name, g in moved.items() if bool(g.any())] == ["allocation.log_threshold"]


def test_the_tanh_objective_moves_everything_that_makes_codes():
    sae = new("tanh")
    for term in ("sparsity", "pre_act"):
        moved = gradients(sae, terms_of(sae, activations())[term])
        assert all(bool(g.any()) for g in moved.values()), term
    assert sae.unit_rows() == [] and new("l0").unit_rows() != []


def test_a_fixed_coefficient_leaves_out_the_set_point():
    assert terms_of(new("l0", coefficient=0.1), activations()).keys() == {"reconstruction", "sparsity"}
    assert terms_of(new("tanh", coefficient=0.1), activations()).keys() == {"reconstruction", "sparsity", "pre_act"}
    assert terms_of(new("l0_target"), activations()).keys() == {"reconstruction", "set_point"}


def test_latents_and_codes_follow_the_definition():
    for sae in (new(), new().eval()):
        x = activations()
        a = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
        mask = reference.threshold(a, sae.log_threshold.exp())
        assert torch.allclose(sae.encode(x).dense(), a * mask, rtol=1e-12)
        assert torch.allclose(sae.forward_scaled(x, StepContext()).latents.dense(), a * mask, rtol=1e-12)


class Products(TorchDispatchMode):
    """Records dense matrix products, forward and backward, and how many entries each has."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if func.__name__.startswith(("mm", "addmm", "bmm", "baddbmm", "addmv", "mv")):
            self.made.append((func.__name__, found.numel()))
        return found


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_one_dense_product_is_all(objective):
    """Of forward and backward pass together; sums over matches are no products."""
    sae = ap.create("jumprelu", d_in=16, d_sae=4096, k=8, objective=objective, input_norm="none", seed=0)
    x = torch.randn(256, 16, generator=torch.Generator().manual_seed(0))
    with Products() as products:
        torch.stack(list(terms_of(sae, x).values())).sum().backward()
    of_matrices = [(name, entries) for name, entries in products.made if not name.startswith("mv")]
    assert {name for name, _ in of_matrices} == {"addmm.out"}, "in tiles"
    assert sum(entries for _, entries in of_matrices) == 256 * 4096, "every entry once"
    assert objective == "tanh" or products.made == of_matrices


def gaussian(n: int) -> torch.Tensor:
    """Quantiles of the standard normal distribution: averages over them are expectations, without noise."""
    return torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n)[:, None]


def one_wide(theta: float, **settings: object) -> ap.SAE:
    """A scalar input and two latents; the thresholds of the second do not matter here."""
    sae = ap.create("jumprelu", d_in=1, d_sae=2, k=1, input_norm="none", bandwidth=0.02, **settings).double()
    with torch.no_grad():
        sae.W_enc.copy_(torch.tensor([[1.0], [-1.0]]))
        sae.W_dec.copy_(torch.tensor([[0.8], [-0.6]]))
        sae.log_threshold.copy_(torch.tensor([theta, 0.3]).log())
    return sae


@pytest.mark.parametrize("theta", [0.005, 0.5, 1.5])
def test_straight_through_gradients_are_those_of_the_smoothed_expectation(theta):
    """d/d theta of the mean loss over a Gaussian pre-activation, against its difference quotient over the window.

    With theta = 0.005 the window reaches below zero.
    """
    x, half = gaussian(400_001), 0.01
    sae = one_wide(theta, objective="l0", coefficient=1.0)
    got = {}
    for name in ("reconstruction", "sparsity"):
        got[name] = gradients(sae, terms_of(sae, x)[name])["allocation.log_threshold"][0].item() / theta
    losses = []
    for at in (theta - half, theta + half):
        # Below zero no SAE can be; the definition is written out instead.
        z = x * (x > at)
        other = -x * (-x > 0.3)
        losses.append(((0.8 * z - 0.6 * other - x).square().mean(), (x > at).double().mean()))
    quotient = [((b - a) / (2 * half)).item() for a, b in zip(*losses, strict=True)]
    density = (erf((theta + half) / sqrt(2)) - erf((theta - half) / sqrt(2))) / 2 / (2 * half)
    assert quotient[1] == pytest.approx(-density, rel=1e-3)
    assert got["sparsity"] == pytest.approx(quotient[1], rel=1e-3)
    assert got["reconstruction"] == pytest.approx(quotient[0], rel=0.01, abs=1e-4)


def test_any_leading_dimensions_give_the_same_gradients():
    sae, x = new().train(), activations(60)
    goal = activations(60, seed=3)
    flat = gradients(sae, ((sae(x) - goal) ** 2).sum())
    lead = gradients(sae, ((sae(x.reshape(3, 4, 5, D_IN)) - goal.reshape(3, 4, 5, D_IN)) ** 2).sum())
    wanted = gradients(sae, (dense_terms(sae, x)["reconstruction"] * 0).sum())
    assert torch.equal(flat["allocation.log_threshold"], lead["allocation.log_threshold"])
    assert bool(flat["allocation.log_threshold"].any()) and not bool(wanted["W_enc"].any())


def test_without_gradients_training_mode_reconstructs_alike():
    sae, x = new().train(), activations()
    with torch.no_grad():
        quiet = sae(x)
    assert torch.allclose(quiet, sae(x), rtol=1e-12) and torch.allclose(quiet, sae.eval()(x), rtol=1e-12)
    assert sae(x.float()).dtype == torch.float32


# Training


def superposition(n: int, seed: int) -> torch.Tensor:
    """48 features in 24 dimensions, about 3 active at a time, some often and some seldom."""
    g = torch.Generator().manual_seed(0)
    directions = torch.randn(48, 24, generator=g)
    directions /= directions.norm(dim=1, keepdim=True)
    often = 1 / (torch.arange(48) + 5.0)
    g = torch.Generator().manual_seed(seed)
    active = torch.rand(n, 48, generator=g) < 3 * often / often.sum()
    return (active * (1 + 0.3 * torch.randn(n, 48, generator=g)).abs()) @ directions


def trained(steps: int = 300, k: float = 3, **settings: object) -> ap.SAE:
    sae = ap.create("jumprelu", d_in=24, d_sae=96, k=k, seed=0, **settings)
    trainer = ap.Trainer(sae, ap.TrainConfig(lr=3e-3, batch_tokens=256, total_tokens=256 * steps))
    for x in superposition(256 * steps, seed=1).split(256):
        trainer.step(x)
    sae.calibrate(superposition(20_000, seed=2))
    return sae.eval()


@pytest.mark.few(1)
@pytest.mark.parametrize("k", [3, *(pytest.param(k, marks=pytest.mark.slow) for k in (2, 5))])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_reaches_the_set_point_with_thresholds_of_their_own(objective, k):
    """About 3 features are active: where latents are scarce, each is worth more than where they are not."""
    sae = trained(objective=objective, k=k, init="random")
    theta = sae.log_threshold.exp()
    assert sae.info["calibration"]["l0"] == pytest.approx(k, rel=0.05)
    assert theta.std() > 0.1 * theta.mean()
    still = torch.isclose(theta, torch.tensor(sae.config.initial_threshold), rtol=0.02)
    assert still.double().mean() < 0.1


def test_thresholds_have_a_learning_rate_of_their_own():
    """Adam's first step is the learning rate, for whatever has a gradient."""
    sae = ap.create("jumprelu", d_in=24, d_sae=96, k=3, seed=0, threshold_lr=7.0, init="random")
    before = {n: p.detach().clone() for n, p in sae.named_parameters()}
    ap.Trainer(sae, ap.TrainConfig(lr=1e-3, batch_tokens=256)).step(superposition(256, seed=1))
    moved = {n: (p - before[n]).abs().max().item() for n, p in sae.named_parameters()}
    assert moved["allocation.log_threshold"] == pytest.approx(7e-3, rel=0.01)
    assert moved["b_enc"] == pytest.approx(1e-3, rel=0.01)


def test_l0_falls_when_the_coefficient_rises():
    l0 = [trained(150, objective="l0", coefficient=c).info["calibration"]["l0"] for c in (1e-3, 1e-2, 1e-1)]
    assert all(a > 1.05 * b for a, b in pairwise(l0)), l0


# Folding and settings


@pytest.mark.parametrize("subtract_b_dec", [True, False])
def test_folding_takes_thresholds_and_bandwidth_along(subtract_b_dec):
    sae = new(input_norm="dataset", subtract_b_dec=subtract_b_dec)
    x = 7 * activations(500) + 3
    sae.fit_input(x)
    folded = sae.eval().folded()
    assert torch.allclose(folded.log_threshold, sae.log_threshold - sae.scale.log(), rtol=1e-12, atol=1e-12)
    assert folded.bandwidth.item() == pytest.approx((sae.bandwidth / sae.scale).item())
    assert torch.allclose(folded.encode(x).dense() * sae.scale, sae.encode(x).dense(), rtol=1e-9)
    assert torch.allclose(folded(x), sae(x), rtol=1e-9, atol=1e-9)
    for a, b in zip(
        *(s.train().forward_scaled(s.input.apply_to(x), StepContext()).near.rows() for s in (sae, folded)),
        strict=True,
    ):
        assert a == b


def test_saving_keeps_thresholds_bandwidth_and_coefficient(tmp_path):
    sae = new().float()
    sae.coefficient.value.fill_(0.123)
    sae.save(tmp_path)
    loaded = ap.load(tmp_path)
    assert torch.equal(loaded.log_threshold, sae.log_threshold) and torch.equal(loaded.bandwidth, sae.bandwidth)
    assert loaded.coefficient.value == sae.coefficient.value and loaded.k == K


def test_sweeps_divide_thresholds():
    sae, x = new().eval(), activations()
    rule = sae.allocation.relaxed(2.0)
    assert torch.allclose(rule.threshold, sae.log_threshold.exp() / 2, rtol=1e-12)
    assert sae.encode_scaled(x, sae.selection(rule=rule)).nnz > sae.encode(x).nnz


def test_initial_thresholds():
    """Gaussian pre-activations have an L0 of about k / 2 to begin with, at any width."""
    for d_sae, k in ((1024, 8), (16384, 32)):
        sae = ap.create("jumprelu", d_in=64, d_sae=d_sae, k=k, seed=0)
        x = torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
        assert 0.3 * k < sae.encode(x).l0().double().mean() < k
    assert ap.create("jumprelu", d_in=64, d_sae=8, k=8).config.initial_threshold == pytest.approx(0.008)
    given = ap.create("jumprelu", d_in=64, d_sae=8, k=8, threshold=0.5)
    assert torch.allclose(given.log_threshold.exp(), torch.tensor(0.5))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": 0.0}, "threshold must be positive"),
        ({"bandwidth": -1.0}, "bandwidth must be positive"),
        ({"threshold_lr": 0.0}, "threshold_lr must be positive"),
        ({"pre_act_weight": -1.0}, "pre_act_weight must be at least 0"),
        ({"affinity": "code_times_decoder_norm"}, "code"),
        ({"objective": "l0_target", "coefficient": 1.0}, "set_point_weight"),
        ({"objective": "l1"}, "objective cannot be 'l1'"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(ValueError, match=message):
        ap.create("jumprelu", **{"d_in": 8, "d_sae": 40, "k": 4, **settings})


def test_an_empty_batch():
    sae = new()
    made = sae.forward_scaled(activations(0), StepContext())
    assert isinstance(made, Pass) and made.y_hat.shape == (0, D_IN) and made.latents.nnz == 0

"""Switch SAEs against a dense float64 twin that computes all experts and masks them."""

from __future__ import annotations

import math

import pytest
import torch

import apportion as ap
from apportion import blocks, losses
from apportion.allocation import StepContext, reference
from apportion.architectures import rebuild
from apportion.metrics import entropy, load

D_IN, D_SAE, K, E = 6, 28, 3, 4
ALLOCATIONS = ["topk", "mutual_choice", "feature_choice", "threshold"]


def new(allocation: str = "topk", **settings: object) -> ap.SAE:
    budget = {"theta": 0.2} if allocation == "threshold" else {"k": K}
    settings = {"num_experts": E, "input_norm": "none", "seed": 0, **budget, **settings}
    sae = rebuild("switch", d_in=D_IN, d_sae=D_SAE, allocation=allocation, **settings).double()
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in (sae.b_dec, sae.b_enc, sae.b_router, sae.W_enc):
            p.add_(0.3 * torch.randn(p.shape, generator=g))
        sae.W_dec *= torch.linspace(0.5, 2, D_SAE)[:, None]
    return sae


def activations(n: int = 33, seed: int = 2) -> torch.Tensor:
    return torch.randn(n, D_IN, generator=torch.Generator().manual_seed(seed)).double()


class Twin:
    """All experts, dense. Its gradients are autograd's."""

    def __init__(self, sae: ap.SAE, x: torch.Tensor) -> None:
        self.sae, experts = sae, sae.num_experts
        self.p = torch.softmax((x - sae.b_router) @ sae.W_router.T, dim=1)
        self.expert = self.p.argmax(1)
        centred = x - sae.b_dec if sae.config.subtract_b_dec else x
        codes = (centred @ sae.W_enc.T + sae.b_enc).relu()
        mine = torch.arange(sae.d_sae) // (sae.d_sae // experts) == self.expert[:, None]
        self.gated = codes * self.p.amax(1, keepdim=True) * mine
        norms = sae.W_dec.norm(dim=1) if sae.config.affinity == "code_times_decoder_norm" else 1
        self.affinity = (self.gated * norms).detach()

    def chosen(self, allocation: str) -> torch.Tensor:
        rule = self.sae.allocation
        if allocation == "topk":
            return reference.token_choice(self.affinity, K)
        if allocation == "threshold" or not rule.training:
            return reference.threshold(self.affinity, rule.threshold)
        by_definition = {"mutual_choice": reference.mutual_choice, "feature_choice": reference.feature_choice}
        return by_definition[allocation](self.affinity, rule.budget(len(self.affinity)))

    def z(self, allocation: str) -> torch.Tensor:
        return self.gated * self.chosen(allocation)

    def x_hat(self, allocation: str) -> torch.Tensor:
        return self.z(allocation) @ self.sae.W_dec + self.sae.b_dec


def gradients(sae: ap.SAE, loss: torch.Tensor, x: torch.Tensor) -> dict[str, torch.Tensor]:
    sae.zero_grad()
    x.grad = None
    loss.backward()
    named = {**dict(sae.named_parameters()), "x": x}
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone().to_dense() for name, p in named.items()}


def assert_equal_gradients(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    for name in wanted:
        assert (got[name] - wanted[name]).abs().max() <= 1e-9 * wanted[name].abs().max(), name


@pytest.mark.parametrize("rows", [0, 1, 33], ids=lambda n: f"{n} rows")
@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize(
    "settings", [{}, {"affinity": "code_times_decoder_norm"}, {"subtract_b_dec": False}, {"num_experts": 1}], ids=str
)
@pytest.mark.parametrize("of_x", [True, False], ids=["gradients of x too", "x is data"])
def test_codes_and_gradients_equal_the_dense_twin(rows, allocation, settings, of_x, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_ENTRIES", 20)
    monkeypatch.setattr(blocks, "MIN_BLOCK_ROWS", 1)
    sae, x = new(allocation, **settings), activations(rows).requires_grad_(of_x)
    made, twin = sae.forward_scaled(x, StepContext()), Twin(sae, x)
    z = made.latents.dense()
    wanted = twin.z(allocation)
    assert torch.equal(z != 0, wanted != 0) and torch.allclose(z, wanted, rtol=1e-12)
    assert torch.allclose(made.y_hat, twin.x_hat(allocation), rtol=1e-12)
    if not rows:
        return
    got = losses.reconstruction(x, made.y_hat) + sum(sae.own_terms(x, x, made, StepContext()).values())
    share = torch.nn.functional.one_hot(twin.expert, sae.num_experts).double().mean(0)
    balance = sae.num_experts * (share * twin.p.mean(0)).sum()
    expected = (x - twin.x_hat(allocation)).square().mean() + sae.config.balance_weight * balance
    assert got.item() == pytest.approx(expected.item(), rel=1e-12)
    wanted = gradients(sae, expected, x)
    if sae.num_experts > 1 and rows > 1:
        assert all(bool(wanted[name].any()) for name in wanted if of_x or name != "x")
    assert_equal_gradients(gradients(sae, got, x), wanted)


def test_the_router_learns_from_the_reconstruction():
    """Without the balance loss, too; through the gate alone."""
    sae, x = new(), activations().requires_grad_()
    loss = losses.reconstruction(x, sae.forward_scaled(x, StepContext()).y_hat)
    grads = gradients(sae, loss, x)
    assert bool(grads["W_router"].any()) and bool(grads["b_router"].any())
    assert_equal_gradients(grads, gradients(sae, (x - Twin(sae, x).x_hat("topk")).square().mean(), x))


def test_one_expert_is_a_plain_sae():
    """p = 1: the same codes and gradients, and nothing for the router to learn."""
    sae, x = new(num_experts=1), activations().requires_grad_()
    plain = ap.create("topk", d_in=D_IN, d_sae=D_SAE, k=K, input_norm="none").double()
    plain.load_state_dict({n: t for n, t in sae.state_dict().items() if "router" not in n})
    assert torch.equal(sae.encode(x).dense(), plain.encode(x).dense())
    got = gradients(sae, losses.reconstruction(x, sae(x)), x)
    assert not bool(got["W_router"].any())
    assert_equal_gradients(got, gradients(plain, losses.reconstruction(x, plain(x)), x))


def test_experts_without_tokens():
    sae, x = new("mutual_choice"), activations().requires_grad_()
    with torch.no_grad():
        sae.W_router.zero_()
        sae.W_router[2] = 1.0
        sae.b_router.fill_(-50.0)
    assert sae.experts(x).unique().tolist() == [2]
    latents = sae.encode(x)
    assert latents.nnz > K and set((latents.indices // 7).tolist()) == {2}
    assert_equal_gradients(
        gradients(sae, losses.reconstruction(x, sae(x)), x),
        gradients(sae, (x - Twin(sae, x).x_hat("mutual_choice")).square().mean(), x),
    )


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_eval_mode_does_not_look_at_other_tokens(allocation):
    sae = new(allocation)
    sae.calibrate(activations(3000, seed=3))
    sae.eval()
    x = activations(40)
    together = sae.encode(x).dense()
    singly = torch.cat([sae.encode(row[None]).dense() for row in x])
    assert torch.allclose(together, singly, rtol=1e-12) and bool((together > 0).any())
    assert torch.allclose(together, Twin(sae, x).z(allocation), rtol=1e-12)


def test_calibrated_l0_is_k():
    sae = new("mutual_choice")
    assert sae.calibrate(activations(20_000, seed=3)) == pytest.approx(K, rel=0.01)
    assert sae.eval().encode(activations(20_000, seed=4)).l0().double().mean().item() == pytest.approx(K, rel=0.05)


@pytest.mark.parametrize("subtract_b_dec", [True, False])
@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_folding_keeps_routes_codes_and_reconstructions(allocation, subtract_b_dec):
    sae, x = new(allocation, input_norm="dataset", subtract_b_dec=subtract_b_dec), 5 * activations(500) + 3
    sae.fit_input(x)
    sae.calibrate(5 * activations(3000, seed=3) + 3)
    sae.eval()
    folded = sae.folded()
    prepared = sae.input.apply_to(x)
    logits = ((v - s.b_router) @ s.W_router.T for s, v in ((sae, prepared), (folded, x)))
    assert torch.allclose(*logits, rtol=1e-10)
    assert torch.equal(folded.experts(x), sae.experts(x)) and len(sae.experts(x).unique()) == E
    codes, raw = sae.encode(x).dense(), folded.encode(x).dense()
    assert torch.allclose(codes / sae.scale, raw, rtol=1e-9) and torch.allclose(sae(x), folded(x), rtol=1e-9)


def test_the_balance_loss_in_closed_form():
    even = torch.arange(8) % 4
    one_hot = torch.nn.functional.one_hot(even, 4).double()
    balance = losses.load_balance
    assert balance(one_hot, even).item() == 1, "even load"
    assert balance(torch.full((8, 4), 0.25).double(), torch.zeros(8).long()).item() == 1, "even probabilities"
    assert balance(one_hot[:1].expand(8, 4), torch.zeros(8).long()).item() == 4, "everything to one expert"
    p = torch.tensor([[0.6, 0.4], [0.7, 0.3], [0.2, 0.8]], dtype=torch.float64, requires_grad=True)
    loss = balance(p, p.argmax(1))
    assert loss.item() == pytest.approx(2 * (2 / 3 * 0.5 + 1 / 3 * 0.5))
    loss.backward()
    assert torch.allclose(p.grad, torch.tensor([2 * 2 / 9, 2 / 9]).double().expand(3, 2)), "loads are constants"


def test_the_balance_loss_spreads_the_load():
    """From a router that sends nearly all tokens to one expert: with it all are used, without it they stay idle."""
    entropies = []
    for weight in (3.0, 0.0):
        sae = ap.create("switch", d_in=D_IN, d_sae=D_SAE, k=K, num_experts=E, balance_weight=weight, seed=0)
        with torch.no_grad():
            sae.b_router.copy_(-6 * sae.W_router[1])
        x = activations(2000, seed=5).float()
        trainer = ap.Trainer(sae, ap.TrainConfig(lr=3e-3, batch_tokens=200))
        for rows in x.repeat(10, 1).split(200):
            terms = trainer.step(rows)
        assert ("load_balance" in terms) == (weight > 0)
        entropies.append(entropy(load(sae.experts(x), E)))
    assert entropies[0] > 0.9 * math.log(E) > 1.5 * entropies[1]


@pytest.mark.parametrize("k_aux", [2, 9])
@pytest.mark.parametrize("affinity", ["code", "code_times_decoder_norm"])
def test_the_auxiliary_loss_revives_silent_latents_of_the_tokens_own_expert(k_aux, affinity):
    sae, x = new(aux="aux_k", k_aux=k_aux, balance_weight=0.0, affinity=affinity), activations()
    silent = torch.zeros(D_SAE, dtype=torch.bool)
    silent[[0, 1, 2, 3, 9, 15, 16]] = True
    made = sae.forward_scaled(x, StepContext())
    term = sae.own_terms(x, x, made, StepContext(dead=silent))["aux_k"]
    twin = Twin(sae, x)
    error = (x - made.y_hat).detach()
    affinity_of_silent = twin.affinity * silent
    gate = twin.p.amax(1, keepdim=True).detach()
    codes = (x - sae.b_dec.detach()) @ sae.W_enc.T + sae.b_enc
    error_hat = (gate * codes * reference.token_choice(affinity_of_silent, k_aux)) @ sae.W_dec
    share = min(1.0, 7 / k_aux)
    wanted = sae.config.aux_weight * share * (error - error_hat).square().sum() / (error - error.mean(0)).square().sum()
    assert term.item() == pytest.approx(wanted.item(), rel=1e-12)
    x.requires_grad_()
    assert_equal_gradients(gradients(sae, term, x), gradients(sae, wanted, x))


def test_the_screen_finds_the_same_codes():
    sae = ap.create("switch", d_in=32, d_sae=256, k=8, num_experts=4, allocation="mutual_choice", seed=0)
    x = torch.randn(200, 32, generator=torch.Generator().manual_seed(0))
    exact = sae.encode(x)
    sae.screen = "bfloat16"
    assert torch.allclose(sae.encode(x).dense(), exact.dense(), rtol=1e-5)


def test_wrong_settings_are_refused_with_a_remedy():
    with pytest.raises(ValueError, match=r"num_experts = 5 does not divide d_sae = 28.*num_experts = 4"):
        new(num_experts=5)
    with pytest.raises(ValueError, match="num_experts = 0"):
        new(num_experts=0)
    with pytest.raises(ValueError, match=r"k = 8.*7 latents of its expert"):
        new(k=8)
    assert new(k=7).k == 7


@pytest.mark.parametrize(
    ("d_sae", "k", "wanted"), [(16384, 32, 16), (2304, 32, 16), (40, 4, 2), (5000, 32, 10), (7, 2, 1), (64, 20, 1)]
)
def test_default_experts(d_sae, k, wanted):
    """16, or fewer that divide the latents and leave each token four times k of them."""
    sae = ap.create("switch", d_in=2, d_sae=d_sae, k=k)
    assert sae.num_experts == wanted == sae.settings()["num_experts"]


def test_save_and_load(tmp_path):
    sae, x = new("mutual_choice"), activations()
    sae.calibrate(activations(2000))
    sae.save(tmp_path)
    loaded = ap.load(tmp_path)
    assert loaded.settings() == sae.settings() and torch.equal(loaded(x), sae.eval()(x))
    assert torch.equal(loaded.experts(x.reshape(3, 11, D_IN)), sae.experts(x).reshape(3, 11))

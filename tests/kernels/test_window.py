"""Gradients for thresholds from matches near them: against dense float64 twins, and the traps of public code."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from apportion import blocks
from apportion.allocation import Selection, Threshold
from apportion.kernels import dispatch, select, window
from apportion.kernels.window import felt_by_thresholds, reach, with_jumps
from apportion.latents import Latents

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}


@dataclass
class Case:
    tokens: int
    d_in: int
    d_sae: int
    d_out: int
    theta: float
    bandwidth: float

    def tensors(self, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
        """x, W_enc, b_enc, log_threshold, W_dec; pre-activations have a variance of about 1."""
        g = torch.Generator().manual_seed(0)
        shapes = [(self.tokens, self.d_in), (self.d_sae, self.d_in), (self.d_sae,), (self.d_sae,)]
        x, W, b, t = (torch.randn(*s, generator=g, dtype=torch.float64) for s in shapes)
        W_dec = torch.randn(self.d_sae, self.d_out, generator=g, dtype=torch.float64)
        t = 0.3 * t + torch.tensor(self.theta).log()
        return tuple(v.to(dtype) for v in (x, W / self.d_in**0.5, 0.1 * b, t, W_dec))

    def width(self, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        return torch.tensor(self.bandwidth, dtype=dtype)


CASES = {
    "awkward": Case(63, 60, 1000, 60, theta=2.0, bandwidth=0.2),
    "window touches zero": Case(63, 60, 1000, 60, theta=0.05, bandwidth=0.2),
    "window holds everything": Case(17, 6, 21, 5, theta=1.0, bandwidth=30.0),
    "window holds nothing": Case(17, 6, 21, 5, theta=1.0, bandwidth=1e-9),
    "nothing is active": Case(17, 6, 21, 5, theta=1e6, bandwidth=0.1),
    "no rows": Case(0, 6, 21, 5, theta=1.0, bandwidth=0.5),
    "one of everything": Case(1, 1, 1, 1, theta=0.5, bandwidth=5.0),
}


@pytest.fixture(params=CASES)
def case(request) -> Case:
    return CASES[request.param]


def dense_masks(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, W, b, t, _ = case.tensors()
    a = x @ W.T + b
    return a, a > t.exp(), (a - t.exp()).abs() < case.bandwidth / 2


@pytest.mark.parametrize("block", [None, 130])
def test_reach_finds_both_lists(case, block, monkeypatch):
    if block:
        monkeypatch.setattr(blocks, "BLOCK_ENTRIES", block)
        monkeypatch.setattr(blocks, "MIN_BLOCK_ROWS", 1)
    x, W, b, t, _ = case.tensors()
    a, active, near = dense_masks(case)
    for got, wanted in zip(reach(x, W, b, t.exp(), case.width()), (active, near), strict=True):
        rows, indices = wanted.nonzero(as_tuple=True)
        assert torch.equal(got.rows(), rows) and torch.equal(got.indices, indices)
        assert torch.allclose(got.values, a[rows, indices], rtol=1e-12, atol=1e-12)


def test_both_lists_are_strict():
    """Whole numbers: a match at its threshold is near it and not active, one half a window away is neither."""
    a = torch.arange(-2.0, 5.0)[:, None].double()
    active, near = reach(
        a, torch.ones(1, 1).double(), torch.zeros(1).double(), torch.ones(1).double(), torch.tensor(2.0)
    )
    assert active.values.tolist() == [2, 3, 4]
    assert near.values.tolist() == [1]


def test_the_window_is_about_pre_activations():
    """Its lower half is there, and where it touches zero it holds negative pre-activations, but no heap of zeros."""
    x, W, b, t, _ = CASES["window touches zero"].tensors()
    a, _, near = dense_masks(CASES["window touches zero"])
    _, found = reach(x, W, b, t.exp(), CASES["window touches zero"].width())
    below = found.values < t.exp()[found.indices]
    assert 0.35 < below.double().mean() < 0.65
    assert bool((found.values < 0).any())
    assert found.nnz == int(near.sum()) < 0.15 * a.numel()


def test_one_product(monkeypatch):
    made = []
    blocks = select.Product.blocks
    monkeypatch.setattr(select.Product, "blocks", lambda self, dtype: made.append(dtype) or blocks(self, dtype))
    x, W, b, t, _ = CASES["awkward"].tensors()
    reach(x, W, b, t.exp(), CASES["awkward"].width())
    assert made == [torch.float64]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_gradient_through_the_reconstruction(case, dtype):
    a, active, near = dense_masks(case)
    t, W_dec = case.tensors()[3:]
    g = torch.randn(case.tokens, case.d_out, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    t.requires_grad_()
    surrogate = -(t.detach().exp() / case.bandwidth) * near * t.exp()
    z = a * active + surrogate - surrogate.detach()
    (wanted,) = torch.autograd.grad((z @ W_dec * g).sum(), t)

    t = case.tensors(dtype)[3].requires_grad_()
    found = Latents.from_dense(near.to(dtype))
    y_hat = (a * active @ W_dec).to(dtype).requires_grad_()
    felt = felt_by_thresholds(y_hat, t, W_dec.to(dtype), found, case.width(dtype))
    assert torch.equal(felt, y_hat)
    got, passed_on = torch.autograd.grad((felt * g.to(dtype)).sum(), (t, y_hat))
    assert torch.equal(passed_on, g.to(dtype))
    assert (got - wanted).abs().max() <= TOLERANCE[dtype] * wanted.abs().max()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_gradient_of_l0(case, dtype):
    _, active, near = dense_masks(case)
    t = case.tensors()[3].requires_grad_()
    surrogate = -(near.double() / case.bandwidth) * t.exp()
    (wanted,) = torch.autograd.grad(3 * (active + surrogate - surrogate.detach()).sum(), t)

    t = case.tensors(dtype)[3].requires_grad_()
    found = Latents.from_dense(near.to(dtype))
    l0 = with_jumps(active.sum().to(dtype), t, found, torch.ones(found.nnz, dtype=dtype), case.width(dtype))
    assert l0.item() == int(active.sum())
    (got,) = torch.autograd.grad(3 * l0, t)
    assert (got - wanted).abs().max() <= TOLERANCE[dtype] * wanted.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sums_do_not_run_in_sixteen_bits(dtype):
    """5000 matches of one latent, 1 / 1000 each: in bfloat16 the sum would stop at 256 / 1000."""
    found = Latents.from_dense(torch.ones(5000, 1, dtype=dtype))
    t = torch.zeros(1, dtype=dtype, requires_grad=True)
    width = torch.tensor(1.0, dtype=dtype)
    (got,) = torch.autograd.grad(
        with_jumps(torch.zeros((), dtype=dtype), t, found, torch.full((5000,), 1 / 1000, dtype=dtype), width), t
    )
    assert got.item() == pytest.approx(-5, rel=0.01)
    y_hat = torch.zeros(5000, 1, dtype=dtype, requires_grad=True)
    felt = felt_by_thresholds(y_hat, t, torch.ones(1, 1, dtype=dtype), found, width)
    (got,) = torch.autograd.grad((felt / 1000).sum(), t)
    assert got.item() == pytest.approx(-5, rel=0.01)


def test_sixteen_bit_weights_see_negative_pre_activations():
    x, W, b, t, _ = CASES["window touches zero"].tensors(torch.bfloat16)
    active, found = reach(x, W, b, t.exp(), torch.tensor(0.2, dtype=torch.bfloat16))
    assert bool((found.values < 0).any()) and found.values.dtype == active.values.dtype == torch.bfloat16


@pytest.mark.parametrize("share", [0.0, 2.0], ids=["dense blocks", "lists"])
def test_lists_and_dense_blocks_agree(share, monkeypatch):

    monkeypatch.setattr(dispatch, "DENSE_SHARE", share)
    _, _, near = dense_masks(CASES["awkward"])
    t = CASES["awkward"].tensors()[3].requires_grad_()
    W_dec = CASES["awkward"].tensors()[4]
    y_hat = torch.zeros(63, 60, dtype=torch.float64)
    felt = felt_by_thresholds(y_hat, t, W_dec, Latents.from_dense(near.double()), CASES["awkward"].width())
    (got,) = torch.autograd.grad(felt.sum(), t)
    wanted = -(t.detach().exp() ** 2) / 0.2 * near.sum(0) * W_dec.sum(1)
    assert (got - wanted).abs().max() <= 1e-9 * wanted.abs().max()


def test_a_frozen_threshold_gets_no_gradient():
    found = Latents.from_dense(torch.ones(4, 2))
    y_hat = torch.zeros(4, 3, requires_grad=True)
    felt = felt_by_thresholds(y_hat, torch.zeros(2), torch.ones(2, 3), found, torch.tensor(1.0))
    felt.sum().backward()
    assert torch.equal(y_hat.grad, torch.ones(4, 3))
    assert window.with_jumps(torch.tensor(1.0), torch.zeros(2), found, torch.ones(8), torch.tensor(1.0)).item() == 1


@pytest.mark.parametrize("screen", ["bfloat16", "int8"])
@pytest.mark.parametrize("name", CASES)
def test_a_screen_finds_the_same_where_the_window_lies_above_zero(name: str, screen: str, monkeypatch) -> None:
    case = CASES[name]
    x, W, b, t, _ = case.tensors(torch.float32)
    products, tiles = [], select.Product.blocks
    monkeypatch.setattr(
        select.Product,
        "blocks",
        lambda self, precision, **more: products.append(precision) or tiles(self, precision, **more),
    )
    theta, width = t.exp(), case.width(torch.float32)
    selection = Selection(Threshold.at(theta, case.d_sae), screen=screen, margin=0.1)  # type: ignore[arg-type]
    plain, screened = reach(x, W, b, theta, width), reach(x, W, b, theta, width, selection)
    above_zero = bool((theta > width / 2).all())
    assert products == [
        torch.float32,
        {"bfloat16": torch.bfloat16, "int8": "int8"}[screen] if above_zero else torch.float32,
    ]
    for one, other in zip(plain, screened, strict=True):
        assert torch.equal(one.indices, other.indices) and torch.equal(one.offsets, other.offsets)
        assert torch.allclose(one.values, other.values, atol=1e-5)

"""Products of whole numbers: what they say, and that looking at groups finds what looking at every entry does."""

from __future__ import annotations

import pytest
import torch

from apportion.kernels import scan
from apportion.kernels.product import Experts, Product, WholeNumbers
from apportion.kernels.scan import above


def problem(tokens: int = 40, d_in: int = 24, d_sae: int = 96, seed: int = 0) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    size = 10.0 ** torch.linspace(-1, 1, d_in)  # dimensions of very different size
    x = torch.randn(tokens, d_in, generator=g) * size
    W = torch.randn(d_sae, d_in, generator=g) / size * torch.rand(d_sae, 1, generator=g)
    return x, W, torch.randn(d_sae, generator=g)


@pytest.mark.parametrize("shared", [True, False])
def test_whole_numbers_are_near_the_product(shared):
    x, W, b = problem()
    product = Product(x, W, b)
    product.shared_scales = shared
    (_, block), *more = product.blocks("int8")
    assert not more and isinstance(block, WholeNumbers)
    exact = x.double() @ W.double().T + b.double()
    error = (block.codes - exact).square().mean(0).sqrt()
    size = exact.std() if shared else exact.std(0)  # of a group the largest latent decides
    assert (error / size).max() < 0.02
    assert block.affinity is block.codes


def test_large_dimensions_do_not_take_the_digits_of_the_others(monkeypatch):
    """With e_d the error is smaller than without."""
    x, W, b = problem()
    x[:, 0] *= 30
    exact = x.double() @ W.double().T + b.double()
    errors = []
    for even in (True, False):
        product = Product(x, W, b)
        if not even:
            monkeypatch.setattr(torch.Tensor, "isfinite", lambda t: torch.zeros_like(t, dtype=torch.bool))
        ((_, block),) = product.blocks("int8")
        errors.append((block.codes - exact).square().mean().sqrt())
    assert errors[0] < 0.5 * errors[1]


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("kind", ["scalar", "each latent", "each row"])
def test_groups_find_what_single_entries_do(kind, norms, gated, monkeypatch):
    monkeypatch.setattr(scan, "LEAST_ENTRIES", 0)
    monkeypatch.setattr(scan, "FEW", 1.0)
    x, W, b = problem(seed=3)
    g = torch.Generator().manual_seed(1)
    scale = torch.rand(len(W), generator=g) * (torch.arange(len(W)) % 7 > 0) if norms else None
    experts = None
    if gated:
        experts = Experts(
            torch.zeros(len(x), dtype=torch.int64), 0.1 + torch.rand(len(x), generator=g), torch.tensor([0, 96])
        )
    ((_, block),) = Product(x, W, b, scale, experts).blocks("int8")
    assert isinstance(block, WholeNumbers)
    usual = block.affinity.flatten().quantile(0.97)
    size = {"scalar": (), "each latent": (len(W),), "each row": (len(x), 1)}[kind]
    bounds = usual * (0.8 + 0.4 * torch.rand(size, generator=g))
    groups = []
    in_groups = scan._in_groups
    monkeypatch.setattr(scan, "_in_groups", lambda *args: groups.append(in_groups(*args)) or groups[-1])
    rows, columns, codes, affinity = above(block, bounds)
    assert groups[0] is not None, "that way was taken"
    wanted = (block.affinity > bounds).nonzero(as_tuple=True)
    assert len(rows) > 20 and torch.equal(rows, wanted[0]) and torch.equal(columns, wanted[1])
    assert torch.allclose(codes, block.codes[wanted], rtol=1e-5) and torch.allclose(affinity, block.affinity[wanted])
    assert (affinity is codes) == (not norms and not gated)


def test_where_much_exceeds_the_bounds_every_entry_is_looked_at():
    x, W, b = problem(tokens=400)
    ((_, block),) = Product(x, W, b).blocks("int8")
    rows, *_ = above(block, torch.tensor(0.0))
    assert len(rows) == int((block.affinity > 0).sum()) > 10_000


def test_rows_and_latents_of_zeros():
    x, W, b = problem()
    x[3], W[5] = 0, 0
    ((_, block),) = Product(x, W, b).blocks("int8")
    assert torch.equal(block.codes[3], b) and torch.allclose(block.codes[:, 5], b[5].expand(len(x)))
    assert bool(block.codes.isfinite().all())


def test_a_latent_of_norm_zero_hides_no_other(monkeypatch):
    """Where its bound is zero too, the quotient of the two is no number."""
    monkeypatch.setattr(scan, "LEAST_ENTRIES", 0)
    monkeypatch.setattr(scan, "FEW", 1.0)
    x, W, b = problem()
    norms = torch.ones(len(W))
    norms[::8] = 0
    ((_, block),) = Product(x, W, b, norms).blocks("int8")
    bounds = torch.full((len(W),), float(block.affinity.quantile(0.9))) * norms
    rows, columns, *_ = above(block, bounds)
    wanted = (block.affinity > bounds).nonzero(as_tuple=True)
    assert len(rows) > 100 and torch.equal(rows, wanted[0]) and torch.equal(columns, wanted[1])

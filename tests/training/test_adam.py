"""The blocked optimiser is torch's Adam with projection, scaling and renormalisation around it."""

import pytest
import torch

from apportion.training import adam as adam_file
from apportion.training.adam import Adam


def parameters(seed: int = 0) -> list[torch.nn.Parameter]:
    """A matrix with unit rows, a free matrix, a vector."""
    generator = torch.Generator().manual_seed(seed)
    unit, free, bias = (torch.randn(*shape, generator=generator) for shape in ((37, 12), (37, 12), (12,)))
    unit /= unit.norm(dim=1, keepdim=True)
    return [torch.nn.Parameter(t) for t in (unit, free, bias)]


def gradients(seed: int, of: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + seed)
    found = [torch.randn(p.shape, generator=generator) for p in of]
    found[0][5] = 0  # a latent that did not fire
    return found


@pytest.mark.parametrize("block", [12, 60, 10**6])
def test_it_equals_torch_with_separate_passes(block, monkeypatch):
    monkeypatch.setattr(adam_file, "BLOCK_ENTRIES", block)
    ours, theirs = parameters(), parameters()
    optimizer = Adam(ours, unit_rows=ours[:1], beta1=0.8, beta2=0.99)
    reference = torch.optim.Adam(theirs, betas=(0.8, 0.99), foreach=True)
    for step in range(6):
        lr, scale = 0.1 / (step + 1), 0.5 + 0.1 * step
        found = gradients(step, ours)
        for p, q, g in zip(ours, theirs, found, strict=True):
            p.grad, q.grad = g.clone(), g.clone()
        norm = optimizer.gradient_norm()
        optimizer.step(lr, torch.tensor(scale, dtype=torch.float64))
        with torch.no_grad():
            unit = theirs[0]
            unit.grad -= (unit.grad * unit).sum(1, keepdim=True) * unit
            assert norm.item() == pytest.approx(
                torch.nn.utils.get_total_norm([q.grad for q in theirs]).item(), rel=1e-6
            )
            for q in theirs:
                q.grad *= scale
            reference.param_groups[0]["lr"] = lr
            reference.step()
            unit /= unit.norm(dim=1, keepdim=True)
        for p, q in zip(ours, theirs, strict=True):
            assert torch.allclose(p, q, rtol=1e-5, atol=1e-6)
            assert p.grad is None, "spent"


def test_a_gradient_along_the_rows_moves_nothing():
    unit, *_ = parameters()
    optimizer = Adam([unit], unit_rows=[unit])
    before = unit.detach().clone()
    unit.grad = 1e3 * before
    assert optimizer.gradient_norm().item() < 1e-3 * unit.grad.norm().item()
    unit.grad = torch.zeros_like(before)
    assert optimizer.gradient_norm().item() == 0
    optimizer.step(0.1, torch.tensor(1.0))
    assert torch.allclose(unit, before, atol=1e-7)


def test_the_projection_cannot_be_forgotten():
    unit, free, _ = parameters()
    optimizer = Adam([unit, free], unit_rows=[unit])
    for p in (unit, free):
        p.grad = torch.ones_like(p)
    with pytest.raises(AssertionError, match="gradient_norm"):
        optimizer.step(0.1, torch.tensor(1.0))


def test_a_zero_row_stays_zero():
    unit, *_ = parameters()
    with torch.no_grad():
        unit[3] = 0
    optimizer = Adam([unit], unit_rows=[unit])
    unit.grad = torch.ones_like(unit)
    unit.grad[3] = 0
    optimizer.gradient_norm()
    optimizer.step(0.1, torch.tensor(1.0))
    assert not bool(unit[3].any()) and torch.allclose(unit.norm(dim=1), (torch.arange(37) != 3).float())


def test_frozen_parameters_and_those_without_gradient_stay():
    unit, free, bias = parameters()
    free.requires_grad_(False)
    optimizer = Adam([unit, free, bias], unit_rows=[unit])
    before = [p.detach().clone() for p in (unit, free)]
    bias.grad = torch.ones_like(bias)
    assert optimizer.gradient_norm().item() == pytest.approx(12**0.5)
    optimizer.step(0.1, torch.tensor(1.0))
    assert torch.equal(unit, before[0]) and torch.equal(free, before[1])
    assert optimizer.state(free) == {} and optimizer.state(bias)["step"] == 1


def test_its_state_restores_it(monkeypatch):
    monkeypatch.setattr(adam_file, "BLOCK_ENTRIES", 60)
    runs = []
    for interrupted in (False, True):
        ps = parameters()
        optimizer = Adam(ps, unit_rows=ps[:1])
        for step in range(4):
            if interrupted and step == 2:
                states = [optimizer.state(p) for p in ps]
                optimizer = Adam(ps, unit_rows=ps[:1])
                for p, state in zip(ps, states, strict=True):
                    optimizer.load_state(p, state)
            for p, g in zip(ps, gradients(step, ps), strict=True):
                p.grad = g
            optimizer.gradient_norm()
            optimizer.step(0.1, torch.tensor(1.0))
        runs.append(ps)
    assert all(torch.equal(p, q) for p, q in zip(*runs, strict=True))

"""What is chosen and lost over several processes, here threads, is what one process with all rows chooses and loses."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import apportion as ap
from apportion.allocation import Selection, StepContext
from apportion.architectures import SAE, SAES
from apportion.group import Group
from apportion.kernels.product import Product
from apportion.kernels.select import _Scan
from apportion.training import TrainingContext, local_reconstruction

RANKS, ROWS, D_IN, D_SAE, K = 3, 48, 8, 32, 4
SHARES = (20, 9, 19)
"""Rows of each process."""


class Exchange:
    """A place where threads put a value each and take all of them."""

    def __init__(self, ranks: int) -> None:
        self.barrier, self.values = threading.Barrier(ranks, timeout=20), [None] * ranks

    def all(self, rank: int, value: Any) -> list[Any]:
        self.values[rank] = value
        self.barrier.wait()
        found = list(self.values)
        self.barrier.wait()
        return found


class OneOfMany(Group):
    def __init__(self, exchange: Exchange, rank: int) -> None:
        self.exchange, self.rank = exchange, rank

    def total(self, part: Tensor) -> Tensor:
        others = [t for rank, t in enumerate(self.exchange.all(self.rank, part.detach())) if rank != self.rank]
        return part + sum(others, torch.zeros_like(part))

    def count(self, number: int) -> int:
        return sum(self.exchange.all(self.rank, number))

    def highest(self, part: Tensor) -> Tensor:
        return torch.stack(self.exchange.all(self.rank, part)).amax(0)

    def mean(self, of_part: Tensor, number: int) -> Tensor:
        return self.total(of_part * number) / self.count(number)

    def joined(self, part: Tensor) -> tuple[Tensor, slice]:
        parts = self.exchange.all(self.rank, part.detach())
        start = sum(map(len, parts[: self.rank]))
        return torch.cat(parts), slice(start, start + len(part))


def together(work: Callable[[int, Group], Any]) -> list[Any]:
    """What each process returns; the first error, if there is one."""
    exchange = Exchange(RANKS)
    results: list[Any] = [None] * RANKS

    def run(rank: int) -> None:
        try:
            results[rank] = work(rank, OneOfMany(exchange, rank))
        except BaseException as error:
            exchange.barrier.abort()
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(RANKS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    errors = [r for r in results if isinstance(r, BaseException)]
    for error in sorted(errors, key=lambda e: isinstance(e, threading.BrokenBarrierError)):
        raise error
    return results


SUBJECTS: dict[str, dict[str, Any]] = {
    name: {"name": name}
    for name, entry in SAES.items()
    if entry.architecture.row_kind != "pair" and name not in ("pca", "neurons")
} | {
    "topk aux_zipf": {"name": "topk", "aux": "aux_zipf"},
    "mutual_choice aux_k": {"name": "mutual_choice", "aux": "aux_k"},
    "feature_choice zipf": {"name": "feature_choice", "budgets": "zipf"},
    "switch mutual": {"name": "switch", "allocation": "mutual_choice", "num_experts": 4, "aux": "aux_k"},
    "relu annealed": {"name": "relu", "p_end": 0.5},
    "jumprelu l0": {"name": "jumprelu", "objective": "l0", "aux": "aux_k"},
}


def new(settings: dict[str, Any]) -> SAE:
    own = dict(settings)
    entry = SAES[own["name"]].architecture
    sae = ap.create(own.pop("name"), d_in=D_IN, d_sae=entry.d_sae_for(D_IN) or D_SAE, k=K, seed=0, **own).double()
    sae.fit_input(rows(sae, 500, seed=5))
    with torch.no_grad():
        for p in sae.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)).to(p) * p.abs().mean())
    return sae


def rows(sae: SAE, n: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, *sae.row_shape, generator=g, dtype=torch.float64) * torch.linspace(0.2, 2, n)[:, None].view(
        n, *[1] * len(sae.row_shape)
    )


def step(sae: SAE, x: Tensor, warm: Tensor | None, group: Group) -> tuple[dict[str, float], dict[str, Tensor], Any]:
    """Losses, gradients, and codes of a training step."""
    dead = torch.arange(sae.d_sae) % 3 == 0
    context = StepContext(
        progress=0.7, batch_tokens=ROWS, dead=dead, density=torch.where(dead, 0.0, K / sae.d_sae).double(), l0=K + 1.0,
        selection=Selection(sae.allocation, warm, group=group),
    )  # fmt: skip
    sae.train().begin_step(replace(context, selection=None))
    seen = TrainingContext((context,))
    terms = local_reconstruction([sae], ap.Batch(x), seen)
    torch.stack(list(terms.values())).sum().backward()
    gradients = {n: p.grad for n, p in sae.named_parameters() if p.grad is not None}
    return {n: t.item() for n, t in terms.items()}, gradients, (seen.seen[0][0].dense(), context.selection)


@pytest.mark.parametrize("warm", [None, 0.0, 1.0, 50.0])
@pytest.mark.parametrize("subject", SUBJECTS)
def test_several_processes_make_the_step_of_one(subject, warm):
    whole = new(SUBJECTS[subject])
    bounds = None if warm is None else torch.tensor(warm, dtype=torch.float64)
    x = rows(whole, ROWS)
    terms, gradients, (codes, selection) = step(whole, x, bounds, Group())
    parts = x.split(SHARES)
    found = together(lambda rank, group: step(new(SUBJECTS[subject]), parts[rank], bounds, group))
    assert torch.equal(torch.cat([f[2][0] for f in found]) != 0, codes != 0)
    for own_terms, _, (_, own_selection) in found:
        assert own_terms == pytest.approx(terms, rel=1e-9)
        if selection.next_warm is not None:
            assert torch.allclose(own_selection.next_warm, selection.next_warm)
    for name, wanted in gradients.items():
        got = torch.stack([own[name] for _, own, _ in found]).sum(0)
        assert (got - wanted).abs().max() <= 1e-9 * wanted.abs().max().clamp_min(1e-12), name


def test_the_comparison_would_notice_a_local_choice(monkeypatch):
    """Each process with a budget of its own chooses something else."""
    monkeypatch.setattr(OneOfMany, "joined", lambda self, part: (part, slice(None)))
    with pytest.raises(AssertionError):
        test_several_processes_make_the_step_of_one("mutual_choice", None)


def test_one_process_that_gives_up_the_screen_moves_the_bounds_of_all():
    """Else it alone would look again, and the others would wait for it for ever."""
    sae = new({"name": "mutual_choice"}).float()
    x = [part.float() for part in rows(sae, ROWS).split(SHARES)]
    bounds = torch.tensor(0.5)

    def look(rank: int, group: Group) -> Tensor | None:
        selection = Selection(sae.allocation, bounds, screen="bfloat16", group=group)
        scan = _Scan(Product(x[rank], sae.W_enc.detach(), sae.b_enc.detach()), selection)
        if rank == 1:
            scan.rows = lambda at, rows=scan.rows: (setattr(scan, "screened", False), rows(at))[1]
        return scan.look(bounds)[1]

    assert {float(found) for found in together(look) if found is not None} == {0.5}

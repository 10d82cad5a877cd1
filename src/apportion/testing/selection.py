"""Checks of the selection: exact, within budget, independent of the batch in eval mode, calibrated."""

from __future__ import annotations

from unittest.mock import patch

import torch
from jaxtyping import Float
from torch import Tensor

from apportion import blocks
from apportion.allocation import StepContext, Threshold
from apportion.architectures import SAE
from apportion.architectures.inputs import PER_TOKEN
from apportion.latents import Latents
from apportion.testing.subject import D_SAE, K, Subject, difference, require, same


def budget_in_training(s: Subject) -> None:
    """In train mode a rule with a budget spends it: all of it, or every positive match if there are fewer."""
    sae = s.fitted(torch.float64)
    for tokens in (1, 7, 64):
        x = prepared(sae, s, tokens)
        positive = everything(sae, x).dense() > 0
        rule = sae.allocation.in_force()
        budget, got = rule.budget(tokens), sae.encode_scaled(x, sae.selection()).dense() != 0
        if budget is None:
            return
        limit = sae.d_sae if rule.row_limit is None else rule.row_limit
        require(int(got.sum(1).max()) <= limit, f"{tokens} rows: one has {int(got.sum(1).max())} matches of {limit}")
        if isinstance(budget, Tensor):
            wanted, spent = torch.minimum(budget, positive.sum(0)), got.sum(0)
        else:
            wanted, spent = positive.sum(1).clamp_max(limit).sum().clamp_max(budget), got.sum()
        off = int((wanted - spent).abs().sum())
        require(off == 0, f"{tokens} rows: {int(spent.sum())} matches instead of {int(wanted.sum())} ({off} misplaced)")


def selection_equals_reference(s: Subject) -> None:
    """The matches are those of the rule's own dense `reference`, in one row block or in many."""
    for sae in (s.fitted(torch.float64), s.ready(torch.float64)):
        x = prepared(sae, s, 50)
        found = everything(sae, x)
        affinity = found.with_values(sae.affinities(found)).dense()
        rule = sae.allocation.in_force()
        wanted = rule.reference(affinity)
        whole = sae.encode_scaled(x, sae.selection()).dense()
        with patch.multiple(blocks, BLOCK_ENTRIES=3 * D_SAE, MIN_BLOCK_ROWS=1):  # three rows at a time
            assert blocks.block_rows(sae.d_sae, x) < len(x), "several blocks"
            blocked = sae.encode_scaled(x, sae.selection()).dense()
        require(difference(blocked, whole) <= 1e-9, "codes depend on the size of row blocks")
        wrong = int(((whole != 0) != wanted).sum())
        require(wrong == 0, f"{wrong} of {int(wanted.sum())} matches differ from those of the dense definition")
        require(difference(whole, found.dense() * wanted) <= 1e-9, "codes of matches depend on the selection")


def decode_adds_up(s: Subject) -> None:
    """A reconstruction is that of no latent at all plus what each latent adds on its own."""
    sae = s.ready(torch.float64)
    x = s.rows(1).double()
    code = torch.rand(1, sae.d_sae, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    code[:, ::3] = 0
    each = torch.diag(code[0])
    alone, nothing, got = (sae.decode(z, x.expand(len(z), *s.row_shape)) for z in (each, torch.zeros_like(code), code))
    require(difference(got[0], nothing[0] + (alone - nothing).sum(0)) <= 1e-9, "decode does not add up")


def training_pass_is_encode(s: Subject) -> None:
    """The training step's codes and reconstruction are those of encode and decode in train mode."""
    sae = s.fitted(torch.float64)
    batch = s.batch(32)
    x, y = sae.prepare(batch.x, batch.target)
    made = sae.forward_scaled(x, StepContext(batch_tokens=len(x)))
    z = sae.encode_scaled(x, sae.selection())
    require(difference(made.latents.dense(), z.dense()) <= 1e-9, "forward_scaled has other codes than encode_scaled")
    y_hat = sae.decode_scaled(z, x)
    require(made.y_hat.shape == y.shape, f"y_hat has shape {list(made.y_hat.shape)}, y {list(y.shape)}")
    require(difference(made.y_hat, y_hat) <= 1e-9, "forward_scaled has another reconstruction than decode_scaled")


def independent_of_the_batch(s: Subject) -> None:
    """In eval mode a row has the same code whatever rows come with it, in whatever order, alone or together."""
    sae = s.ready(torch.float64)
    compare_batches(sae, s.rows(60).double(), "")


def independent_of_the_batch_with_ties(s: Subject) -> None:
    """The same on whole numbers, where products are exact and ties abound. (Not under a normalisation of each row.)"""
    sae = s.fresh().eval()
    if sae.input.kind in PER_TOKEN:
        return
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in sae.parameters():
            p.copy_(torch.randint(-2, 3, p.shape, generator=g))
        if sae.allocation.batch_coupled:
            sae.allocation.threshold.copy_(torch.randint(2, 9, sae.allocation.threshold.shape, generator=g))
    x = torch.randint(-2, 3, (60, *s.row_shape), generator=g).float()
    compare_batches(sae, x, "on whole numbers ")


def compare_batches(sae: SAE, x: Tensor, when: str) -> None:
    together = sae.encode(x).dense()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    others = {
        "another order": sae.encode(x[order]).dense()[order.argsort()],
        "batches of 7": torch.cat([sae.encode(part).dense() for part in x.split(7)]),
        "rows on their own": torch.cat([sae.encode(part).dense() for part in x.split(1)]),
        "louder neighbours": sae.encode(torch.cat([x, 10 * x]))[: len(x)].dense(),
    }
    for name, z in others.items():
        require(same(z != 0, together != 0), f"{when}other latents are active with {name}")
        require(difference(z, together) <= 1e-6, f"{when}codes differ with {name}")


def calibration_hits_k(s: Subject) -> None:
    """calibrate returns and records the L0 of these rows; with a budget it is k there, and nearly k on other rows."""
    sae = s.fitted()
    x = s.rows(4000, seed=3)
    told = sae.calibrate(x)
    l0 = sae.eval().encode(x).nnz / len(x)
    require(abs(told - l0) <= 0.002 * l0, f"calibrate says L0 = {told:.4f}, it is {l0:.4f}")
    require(sae.info["calibration"] == {"tokens": len(x), "l0": told}, f"info says {sae.info.get('calibration')}")
    if sae.allocation.batch_coupled and sae.k is not None:
        available = everything(sae, sae.input.apply_to(x)).nnz / len(x)
        k = min(sae.k, available)
        require(abs(l0 - k) <= 0.01 * k, f"L0 = {l0:.3f} on the rows of calibration, k = {k:g}")
        other = sae.encode(s.rows(4000, seed=4)).nnz / 4000
        require(abs(other - k) <= 0.05 * k, f"L0 = {other:.3f} on other rows, k = {k:g}")


def the_setting_k(s: Subject) -> None:
    """sae.k is what the factory was asked for."""
    sae = s.fresh()
    require(sae.k == K, f"sae.k is {sae.k}, asked for {K}")


def prepared(sae: SAE, s: Subject, tokens: int) -> Tensor:
    batch = s.batch(tokens)
    return sae.prepare(batch.x.to(sae.dtype), batch.target)[0]


def everything(sae: SAE, x: Float[Tensor, " tokens *row"]) -> Latents:
    """All positive matches."""
    all_positive = sae.selection(rule=Threshold.at(x.new_zeros(()), sae.d_sae))
    return sae.encode_scaled(x, all_positive).detach()

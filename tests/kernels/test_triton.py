"""The Triton kernels against their definitions in plain torch: on the GPU if there is one, else interpreted on the CPU.

What the interpreter cannot tell, whether the kernels compile, is tried for a Hopper GPU without one.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import apportion as ap
from apportion.allocation import FeatureChoice, MutualChoice, Selection, Threshold, TokenChoice
from apportion.allocation.feature_choice import FeatureChoiceConfig
from apportion.allocation.mutual_choice import MutualChoiceConfig
from apportion.allocation.token_choice import TokenChoiceConfig
from apportion.kernels import choose, decode_matches, dispatch, encode_matches
from apportion.latents import from_matches
from apportion.training import adam as adam_file

INTERPRETED = not torch.cuda.is_available()
DEVICE = "cpu" if INTERPRETED else "cuda"

with pytest.MonkeyPatch.context() as at_import:  # triton looks at this variable when it is imported
    at_import.setenv("TRITON_INTERPRET", str(int(INTERPRETED)))
    tl = pytest.importorskip("triton.language", reason="triton is made for Linux only")
    from apportion.kernels import triton_gradients
    from apportion.kernels import triton_kernels as kernels
    from apportion.kernels.triton_gradients import gradients

    is_interpreted = type(tl.sum).__name__ == type(kernels._adam_rows).__name__ == "InterpretedFunction"
    assert is_interpreted == INTERPRETED, "something imported triton before this file; import it later"

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 1e-2}
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
CHUNK = 32


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", str(int(INTERPRETED)))
    monkeypatch.setattr(kernels, "CHUNK", CHUNK)  # popular latents are summed in pieces, at sizes for the interpreter


@pytest.fixture(autouse=True)
def nothing_is_left_unwritten(monkeypatch):
    """Fresh tensors hold NaN or a number that is no valid result, not zeros."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(torch.nan if tensor.is_floating_point() else -(10**6))

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture
def launched(monkeypatch) -> set[str]:
    """Names of the kernels that run."""
    names, launch = set(), kernels._launch

    def watched(kernel, *args, **shape):
        names.add(kernel.__name__)
        launch(kernel, *args, **shape)

    monkeypatch.setattr(kernels, "_launch", watched)
    return names


def randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE, dtype)


def integers(high: int, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def offsets_of(lengths: list[int] | torch.Tensor) -> torch.Tensor:
    lengths = torch.as_tensor(lengths, dtype=torch.int64)
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(DEVICE)


def assert_close(got: torch.Tensor, wanted: torch.Tensor, tolerance: float, scale: torch.Tensor | None = None) -> None:
    """Errors relative to the largest entry, or to the largest entry of `scale` (a sum without cancellation)."""
    assert got.shape == wanted.shape and bool(got.isfinite().all())
    if got.numel():
        largest = (wanted if scale is None else scale).abs().max()
        assert (got.double() - wanted).abs().max() <= tolerance * largest


def assert_rounded(got: torch.Tensor, wanted: torch.Tensor) -> None:
    """To bfloat16, up (as the interpreter does not) or down."""
    torch.testing.assert_close(got.double(), wanted.double(), rtol=2**-7, atol=1e-4)


# Sums and dot products


def naive_sums(indices, offsets, weights, table):
    """In float64: one row after the other."""
    out = torch.zeros(offsets.numel() - 1, table.shape[1], dtype=torch.float64, device=DEVICE)
    group = torch.arange(len(out), device=DEVICE).repeat_interleave(offsets.diff())
    return out.index_add_(0, group, weights.double()[:, None] * table.double()[indices])


SUMS = {  # lengths of the groups, entries of the table, d
    "awkward": ([0, *torch.arange(62).remainder(41).tolist()], 1000, 60),
    "one very popular": ([3, 0, 5 * CHUNK + 7, 0, 1], 63, 60),
    "cut at chunks": ([CHUNK, CHUNK - 1, 1, 2 * CHUNK, CHUNK + 1, 2 * CHUNK - 1], 7, 5),
    "whole chunks, moved": ([1, 2 * CHUNK, 2 * CHUNK - 1], 7, 5),
    "more pieces than fit at once": ([5, 20 * CHUNK], 7, 3),
    "several column blocks": ([4, 0, 9], 11, 530),
    "d 1": ([4, 0, 9], 11, 1),
    "one match": ([1], 1, 1),
    "all groups empty": ([0] * 7, 11, 60),
    "no groups": ([], 11, 5),
}


@pytest.mark.few(8)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SUMS.values(), ids=list(SUMS))
def test_weighted_sums(case, dtype):
    lengths, entries, d = case
    nnz = sum(lengths)
    indices, offsets = integers(entries, nnz), offsets_of(lengths)
    # A bfloat16 table goes with float32 weights, as a bfloat16 copy of the parameters would.
    weights = randn(nnz, dtype=torch.float32 if dtype == torch.bfloat16 else dtype, seed=1)
    table = randn(entries, d, dtype=dtype, seed=2)
    got = kernels.weighted_sums(indices, offsets, weights, table)
    assert got.dtype == weights.dtype
    scale = naive_sums(indices, offsets, weights.abs(), table.abs())
    assert_close(got, naive_sums(indices, offsets, weights, table), TOLERANCE[got.dtype], scale)
    assert not bool(got[offsets.diff() == 0].any())


def test_weighted_sums_writes_everywhere_into_out_and_repeats_bit_by_bit():
    lengths, entries, d = SUMS["one very popular"]
    nnz, f = sum(lengths), torch.float32
    arguments = integers(entries, nnz), offsets_of(lengths), randn(nnz, dtype=f), randn(entries, d, dtype=f)
    out = torch.full((len(lengths), d), torch.nan, device=DEVICE)
    assert kernels.weighted_sums(*arguments, out=out) is out
    assert torch.equal(out, kernels.weighted_sums(*arguments))
    rounded = torch.full((len(lengths), d), torch.nan, dtype=torch.bfloat16, device=DEVICE)
    assert_rounded(kernels.weighted_sums(*arguments, out=rounded), out)


PAIRED = [name for name in SUMS if name != "several column blocks"]


@pytest.mark.few(8)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*PAIRED, "wide"])
def test_both_gradients_in_one_pass(case, dtype):
    lengths, tokens, d = SUMS.get(case, ([CHUNK + 3, 0, 5], 11, 530))
    nnz, f = sum(lengths), torch.float32 if dtype == torch.bfloat16 else dtype
    rows, offsets = integers(tokens, nnz), offsets_of(lengths)
    order = torch.randperm(nnz, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    values, g, table = (
        randn(nnz, dtype=f, seed=1),
        randn(tokens, d, dtype=dtype, seed=2),
        randn(len(lengths), d, dtype=f),
    )
    products, sums = gradients(order, rows, offsets, values, g, table)
    assert products.dtype == sums.dtype == f
    by_latent = values.double()[order]
    scale = naive_sums(rows, offsets, by_latent.abs(), g.abs())
    assert_close(sums, naive_sums(rows, offsets, by_latent, g), TOLERANCE[f], scale)
    group = torch.arange(len(lengths), device=DEVICE).repeat_interleave(offsets.diff())
    each = g.double()[rows] * table.double()[group]
    assert_close(products[order], each.sum(1), TOLERANCE[f], each.abs().sum(1))
    again = gradients(order, rows, offsets, values, g, table)
    assert torch.equal(products, again[0]) and torch.equal(sums, again[1])


def test_wider_than_fits_at_once_is_done_in_two(monkeypatch, launched):
    monkeypatch.setattr(dispatch, "DENSE_SHARE", 1.0)
    rows, indices = random_mask(5, 7, 0.5).nonzero(as_tuple=True)
    latents = from_matches(rows, indices, randn(len(rows)), 7, (5,))
    found = []
    for widest in (64, 8):
        monkeypatch.setattr(triton_gradients, "WIDEST", widest)
        values, table = latents.values.clone().requires_grad_(), randn(7, 20, seed=4).requires_grad_()
        with dispatch.use("triton"):
            decoded = decode_matches(latents.map(lambda _, own=values: own), table)
            found.append(torch.autograd.grad(decoded.pow(2).sum(), [values, table]))
        assert ("_dot_products" in launched) == (widest == 8) and "_pair_groups" in launched
    for one, other in zip(*found, strict=True):
        assert_close(one, other.double(), 1e-9)


DOTS = {  # matches, tokens, entries of the table, d
    "awkward": (501, 63, 1000, 60),
    "several column blocks": (37, 5, 11, 530),
    "d 1": (37, 5, 11, 1),
    "one match": (1, 1, 1, 1),
    "no matches": (0, 5, 11, 60),
}


@pytest.mark.parametrize("in_order", [True, False], ids=["in order", "out of order"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", DOTS.values(), ids=list(DOTS))
def test_dot_products(case, dtype, in_order):
    nnz, tokens, entries, d = case
    rows, indices = integers(tokens, nnz), integers(entries, nnz, seed=1)
    rows = rows.sort().values if in_order else rows
    g = randn(tokens, d, dtype=torch.float32 if dtype == torch.bfloat16 else dtype, seed=2)
    table = randn(entries, d, dtype=dtype, seed=3)
    got = kernels.dot_products(rows, indices, g, table)
    assert got.dtype == g.dtype
    products = g.double()[rows] * table.double()[indices]
    assert_close(got, products.sum(1), TOLERANCE[got.dtype], products.abs().sum(1))


def test_both_in_bfloat16_accumulate_in_float32():
    rows, indices = integers(5, 40), integers(11, 40, seed=1)
    g, table = randn(5, 530, dtype=torch.bfloat16), randn(11, 530, dtype=torch.bfloat16, seed=1)
    got = kernels.dot_products(rows, indices, g, table)
    assert got.dtype == torch.bfloat16
    assert_rounded(got, (g.double()[rows] * table.double()[indices]).sum(1))


# Encoder and decoder on fixed matches


def random_mask(tokens: int, d_sae: int, density: float) -> torch.Tensor:
    return (torch.rand(tokens, d_sae, generator=torch.Generator().manual_seed(0)) < density).to(DEVICE)


def awkward_mask() -> torch.Tensor:
    """Empty rows, silent latents and one that fires wherever anything does."""
    mask = random_mask(31, 250, 0.02)
    mask[:, 117] = True
    mask[[0, 5, 6, 30]] = False
    return mask


MASKS = {
    "awkward": (awkward_mask(), 60),
    "most tokens share two latents": (torch.arange(3, device=DEVICE).expand(90, 3) != 1, 5),
    "dense, d 1": (torch.ones(7, 11, dtype=torch.bool, device=DEVICE), 1),
    "no matches": (torch.zeros(7, 11, dtype=torch.bool, device=DEVICE), 5),
}


@pytest.mark.few(2)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("case", MASKS)
def test_gradients_equal_float64_autograd(case, dtype, monkeypatch, launched):
    monkeypatch.setattr(dispatch, "DENSE_SHARE", 1.0)
    mask, d = MASKS[case]
    rows, indices = mask.nonzero(as_tuple=True)

    def by_lists(x, W, b, W_dec):
        values = kernels.dot_products(rows, indices, x.detach(), W.detach()) + b.detach()[indices]
        with dispatch.use("triton"):
            latents = encode_matches(x, W, b, from_matches(rows, indices, values, len(W), (len(x),)))
            return latents.values.pow(3), decode_matches(latents, W_dec)

    def dense(x, W, b, W_dec):
        z = (x @ W.T + b) * mask
        return z[mask].pow(3), z @ W_dec

    found = []
    for model, at in ((by_lists, dtype), (dense, torch.float64)):
        shapes = [(len(mask), d), (mask.shape[1], d), (mask.shape[1],), (mask.shape[1], d)]
        # The float64 twin starts from the same (rounded) numbers.
        parameters = [randn(*s, dtype=dtype, seed=i).to(at).requires_grad_() for i, s in enumerate(shapes)]
        cubes, x_hat = model(*parameters)
        loss = (x_hat - 1).square().sum() + 0.1 * cubes.sum() + (parameters[0] * x_hat).sum()
        with dispatch.use("triton"):
            found.append([cubes.detach(), x_hat.detach(), *torch.autograd.grad(loss, parameters)])
    assert {"_sum_groups", "_pair_groups"} <= launched
    for got, wanted in zip(*found, strict=True):
        assert got.dtype == dtype
        assert_close(got, wanted, TOLERANCE[dtype])


def test_strided_tables_and_expanded_gradients(monkeypatch):
    """As autograd and callers hand them over; the kernels themselves take contiguous tensors."""
    monkeypatch.setattr(dispatch, "DENSE_SHARE", 1.0)
    mask = random_mask(7, 11, 0.4)
    rows, indices = mask.nonzero(as_tuple=True)

    def strided(t: torch.Tensor) -> torch.Tensor:
        return t.t().contiguous().t() if t.ndim == 2 else torch.stack([t, t], 1)[:, 0]

    results = []
    for backend, change in (("torch", torch.clone), ("triton", strided)):
        x, W, b, W_dec = (change(randn(*s)).requires_grad_() for s in ((7, 5), (11, 5), (11,), (11, 3)))
        factors = torch.ones((), dtype=torch.float64, device=DEVICE).expand(len(rows)).requires_grad_()
        with dispatch.use(backend):
            values = ((x[rows] * W[indices]).sum(1) + b[indices]).detach()
            latents = encode_matches(x, W, b, from_matches(rows, indices, values, 11, (7,)))
            x_hat = decode_matches(latents.map(lambda v, by=factors: v * by), W_dec)
            assert torch.equal(x_hat, decode_matches(latents, W_dec))
            results.append(torch.autograd.grad(x_hat.sum() + (x_hat.t() @ x).sum(), [x, W, b, W_dec]))
    for plain, other in zip(*results, strict=True):
        assert_close(other, plain, 1e-9)


# Selection


def naive_above(affinity: torch.Tensor, bounds: torch.Tensor | float) -> torch.Tensor:
    return (affinity > bounds).view(-1).nonzero().squeeze(-1)


BOUNDS = {
    "a number": lambda d_sae: 1.5,
    "0-d": lambda d_sae: torch.tensor(1.5),
    "one per latent": lambda d_sae: torch.arange(d_sae) % 5 / 2,
    "one per row": lambda d_sae: torch.tensor([0.5, 1, 1.5, 2, torch.inf])[:, None],
    "nothing exceeds": lambda d_sae: torch.inf,
    "everything exceeds": lambda d_sae: -torch.inf,
    "two latents open": lambda d_sae: torch.where(torch.arange(d_sae) % (d_sae - 1 or 1) == 0, 0.0, torch.inf),
}


@pytest.mark.few(8)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bounds", BOUNDS.values(), ids=list(BOUNDS))
def test_above(monkeypatch, bounds, dtype):
    """Entries are multiples of a half, so that many equal the bound; rows of one tile, of several, and none."""
    monkeypatch.setattr(kernels, "SCAN_ENTRIES", 64)
    for shape in ((5, 100), (1, 33), (2, 1), (0, 7)):
        affinity = (2 * randn(*shape)).round().div(2).to(dtype)
        at = bounds(shape[1])
        if isinstance(at, torch.Tensor):
            at = (at[: shape[0]] if at.ndim == 2 else at).to(DEVICE, dtype)
        got = kernels.above(affinity, at)
        assert got.dtype == torch.int64 and torch.equal(got, naive_above(affinity, at)), shape


def test_above_at_the_usual_tile():
    affinity = randn(63, 1000, dtype=torch.float32)
    bounds = randn(1000, dtype=torch.float32, seed=1) + 2
    assert torch.equal(kernels.above(affinity, bounds), naive_above(affinity, bounds))


def test_nan_exceeds_nothing():
    affinity = randn(5, 9000, dtype=torch.float32)
    affinity[1, ::7] = torch.nan
    affinity[2] = -1
    assert torch.equal(kernels.above(affinity, 0.5), naive_above(affinity, 0.5))


RULES = {
    "topk": lambda: TokenChoice(TokenChoiceConfig(k=3), 40),
    "mutual": lambda: MutualChoice(MutualChoiceConfig(k=3), 40),
    "feature": lambda: FeatureChoice(FeatureChoiceConfig(k=3, budgets="zipf"), 40),
    "threshold": lambda: Threshold.at(torch.arange(40) % 7 / 2, 40),
}


@pytest.mark.few(3)
@pytest.mark.parametrize("screen", [None, "bfloat16"])
@pytest.mark.parametrize("make", RULES.values(), ids=list(RULES))
def test_choose_equals_torch(make, screen, launched):
    """Whole numbers, so that ties abound, from a cold start; then others with bounds carried over."""
    rule = make().to(DEVICE)
    start = torch.full((40,) if isinstance(rule, FeatureChoice) else (), 0.7, device=DEVICE)
    for bounds in (None, start):
        x, W, b = (randn(*s, dtype=torch.float32, seed=i) for i, s in enumerate(((21, 6), (40, 6), (40,))))
        x, W, b = (t.round() if bounds is None else t for t in (x, W, b))
        norms = 2 ** randn(40, dtype=torch.float32, seed=3).round()
        found = []
        for backend in ("torch", "triton"):
            selection = Selection(rule, bounds, screen)
            with dispatch.use(backend):
                m = choose(x, W, b, selection, norms=norms)
            found.append((m.rows, m.latents, m.values, start if selection.next_warm is None else selection.next_warm))
        for wanted, got in zip(*found, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    assert "_mark_above" in launched and (screen is None or "_dot_products" in launched)


@pytest.mark.parametrize("make", RULES.values(), ids=list(RULES))
@pytest.mark.parametrize("enough", [True, False])
def test_choose_equals_torch_in_several_blocks(make, enough, monkeypatch, launched):
    """Also where more is above the bounds than there is room for."""
    monkeypatch.setattr("apportion.blocks.CUDA_BLOCK_BYTES", 4 * 40 * 7)  # three blocks of seven rows
    rule, found = make().to(DEVICE), []
    if not enough:
        monkeypatch.setattr("apportion.kernels.select.SPARE_CANDIDATES", 4 - 2 * (rule.total(21) or 0))
    x, W, b = (randn(*s, dtype=torch.float32, seed=i) for i, s in enumerate(((21, 6), (40, 6), (40,))))
    low = torch.full((40,) if isinstance(rule, FeatureChoice) else (), 1e-3, device=DEVICE)
    for backend in ("torch", "triton"):
        with dispatch.use(backend):
            m = choose(x, W, b, Selection(rule, low))
        found.append((m.rows, m.latents, m.values))
    for wanted, got in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    assert "_append" in launched and ("_write_positions" in launched) != enough


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_what_only_the_screen_takes_for_positive_is_not_chosen(backend):
    """2 x 1.004 - 2.0077 - 0.001 < 0, in bfloat16 2 x 1.0078 - 2 > 0; the budget would have room for it."""
    x, W = torch.ones(4, 3, device=DEVICE), torch.tensor([[1.004, 1.004, -2.0077], [0, 0, 1], [0, 0, -1]])
    W, b, warm = W.to(DEVICE), torch.tensor([-0.001, 0, 0], device=DEVICE), torch.zeros((), device=DEVICE)
    rule = MutualChoice(MutualChoiceConfig(k=3), 3).to(DEVICE)
    with dispatch.use(backend):
        found = choose(x, W, b, Selection(rule, warm, "bfloat16"))
    assert found.latents.tolist() == [1] * 4


def test_a_match_list_takes_what_fits_and_counts_the_rest(launched):
    blocks = [randn(5, 70, dtype=torch.float32, seed=seed) for seed in range(3)]
    bounds = torch.tensor(0.3, device=DEVICE)
    wanted = torch.cat([naive_above(block, bounds) + 350 * i for i, block in enumerate(blocks)])
    whole = torch.cat(blocks)
    for capacity in (2 * len(wanted), len(wanted), len(wanted) // 2, 0):
        found = kernels.MatchList(capacity, whole, weighted=True)
        for i, block in enumerate(blocks):
            found.add(2 * block, block, bounds, 350 * i, 70)
        n = min(capacity, len(wanted))
        assert int(found.count) == len(wanted)
        assert torch.equal(found.places[:n], wanted[:n])
        assert torch.equal(found.affinity[:n], whole.view(-1)[wanted[:n]])
        assert torch.equal(found.values[:n], 2 * found.affinity[:n])
        assert (found.places[n:] == -(10**6)).all(), "nothing is written behind what was found"


# The optimiser


@pytest.mark.parametrize("unit_rows", [False, True], ids=["free rows", "unit rows"])
@pytest.mark.parametrize("shape", [(63, 60), (5, 700), (7, 1), (1, 1), (0, 4)], ids=str)
def test_adam_rows_equals_torch(shape, unit_rows):
    p = randn(*shape, dtype=torch.float32)
    p = p / p.norm(dim=1, keepdim=True) if unit_rows else p
    twin = p.clone().requires_grad_()
    lr, betas, eps = 0.01, (0.9, 0.98), 1e-8
    optimizer = torch.optim.Adam([twin], lr=lr, betas=betas, eps=eps, foreach=True)
    exp_avg, exp_avg_sq = torch.zeros_like(p), torch.zeros_like(p)
    for step in range(1, 4):
        grad, scale = randn(*shape, dtype=torch.float32, seed=step), torch.tensor(1 / step, device=DEVICE)
        twin.grad = grad.clone()
        if unit_rows:
            twin.grad.addcmul_((twin.grad * twin.detach()).sum(1, keepdim=True), twin.detach(), value=-1)
        twin.grad.mul_(scale)
        optimizer.step()
        if unit_rows:
            with torch.no_grad():
                twin.div_(twin.norm(dim=1, keepdim=True))
        given = grad.clone()
        kernels.adam_rows(p, grad, exp_avg, exp_avg_sq, step, lr, *betas, eps, scale, unit_rows)
        assert torch.equal(grad, given)
        state = optimizer.state[twin]
        for got, wanted in ((exp_avg, state["exp_avg"]), (exp_avg_sq, state["exp_avg_sq"]), (p, twin.detach())):
            torch.testing.assert_close(got, wanted, rtol=2e-6, atol=2e-7)


def test_adam_rows_takes_parameters_of_any_shape():
    p = torch.nn.Parameter(randn(4099, dtype=torch.float32))
    before, version = p.detach().clone(), p._version
    grad, scale = randn(4099, dtype=torch.float32, seed=1), torch.tensor(1.0, device=DEVICE)
    kernels.adam_rows(p, grad, torch.zeros_like(grad), torch.zeros_like(grad), 1, 0.5, 0.9, 0.999, 1e-8, scale, False)
    torch.testing.assert_close(p.detach(), before - 0.5 * grad / (grad.abs() + 1e-8), rtol=1e-5, atol=1e-6)
    assert p._version > version, "autograd notices that the parameter has changed"


@pytest.mark.filterwarnings("ignore:invalid value encountered in divide")
def test_adam_rows_does_not_let_padding_into_the_norm():
    """Without eps the padding of a row is 0 / 0."""
    p, grad = randn(3, 5, dtype=torch.float32), randn(3, 5, dtype=torch.float32, seed=1)
    p /= p.norm(dim=1, keepdim=True)
    scale = torch.tensor(1.0, device=DEVICE)
    kernels.adam_rows(p, grad, torch.zeros_like(p), torch.zeros_like(p), 1, 0.5, 0.9, 0.999, 0.0, scale, True)
    torch.testing.assert_close(p.norm(dim=1), torch.ones(3, device=DEVICE))


def test_a_zero_row_stays_zero():
    p = torch.eye(3, 5, device=DEVICE)
    p[1] = 0
    grad, scale = torch.ones_like(p), torch.tensor(1.0, device=DEVICE)
    grad[1] = 0
    kernels.adam_rows(p, grad, torch.zeros_like(p), torch.zeros_like(p), 1, 0.5, 0.9, 0.999, 1e-8, scale, True)
    torch.testing.assert_close(p.norm(dim=1), torch.tensor([1.0, 0, 1], device=DEVICE))


def test_the_optimiser_equals_its_path_in_blocks(launched):
    runs = []
    for backend in ("torch", "triton"):
        unit = randn(37, 12, dtype=torch.float32)
        ps = [torch.nn.Parameter(t) for t in (unit / unit.norm(dim=1, keepdim=True), randn(12, dtype=torch.float32))]
        optimizer = adam_file.Adam(ps, unit_rows=ps[:1])
        with dispatch.use(backend):
            for step in range(3):
                for p in ps:
                    p.grad = randn(*p.shape, dtype=torch.float32, seed=step + 1)
                optimizer.step(0.1, 0.5 / optimizer.gradient_norm())
        runs.append(ps)
    for p, q in zip(*runs, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-5, atol=1e-6)
    assert "_adam_rows" in launched


# A training step


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("name", "k_aux", "screen"),
    [
        ("mutual_choice", 2, None),
        ("mutual_choice", 8, "bfloat16"),
        ("topk", 8, None),
        ("feature_choice", 2, None),
        ("switch", 2, None),
    ],
)
def test_training_steps_equal_those_in_torch(name, k_aux, screen, launched):
    """With an auxiliary loss, for the first steps: rounding grows from one to the next. Of ten silent latents hardly a
    row has eight positive ones."""
    runs, own = [], {"num_experts": 2} if name == "switch" else {}
    for backend in ("torch", "triton"):
        sae = ap.create(name, d_in=8, d_sae=48, k=3, aux="aux_k", k_aux=k_aux, seed=0, **own).to(DEVICE)
        trainer = ap.Trainer(sae, ap.TrainConfig(batch_tokens=32, screen=screen, dead_window_tokens=1000))
        trainer.learners[0].activity.silent_tokens[::5] = 1000
        with dispatch.use(backend):
            metrics = [trainer.step(randn(32, 8, dtype=torch.float32, seed=seed) + 1) for seed in range(2)]
        assert metrics[0]["aux_k"] > 0
        runs.append([*(m[key] for m in metrics for key in ("loss", "l0", "grad_norm")), *sae.state_dict().values()])
    for wanted, got in zip(*runs, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert {"_mark_above", "_sum_groups", "_pair_groups", "_adam_rows"} <= launched


# What is refused, and what needs other means than the interpreter


def test_wrong_dtypes_and_layouts_are_refused():
    indices, offsets, weights, table = integers(4, 6), offsets_of([2, 4]), randn(6), randn(4, 4)
    scale = torch.tensor(1.0, device=DEVICE)
    f = randn(4, 4, dtype=torch.float32)
    for refused in (
        lambda: kernels.weighted_sums(indices.int(), offsets, weights, table),
        lambda: kernels.weighted_sums(indices, offsets, weights, table.half()),
        lambda: kernels.weighted_sums(indices, offsets, weights, table.T),
        lambda: kernels.weighted_sums(indices, offsets, weights[:5], table),
        lambda: kernels.weighted_sums(indices, offsets, weights, table, out=table),
        lambda: kernels.dot_products(indices, indices, table.T, table),
        lambda: kernels.dot_products(indices, indices.int(), table, table),
        lambda: kernels.dot_products(indices, indices, table[:, :3].contiguous(), table),
        lambda: kernels.above(table.T, 0.0),
        lambda: kernels.above(table, torch.zeros(4, device=DEVICE)),
        lambda: kernels.above(table, table[0, :3]),
        lambda: kernels.adam_rows(f, f.T, f, f, 1, 0.1, 0.9, 0.99, 1e-8, scale, True),
        lambda: kernels.adam_rows(f, f.double(), f, f, 1, 0.1, 0.9, 0.99, 1e-8, scale, True),
        lambda: kernels.adam_rows(f, f, f, f, 0, 0.1, 0.9, 0.99, 1e-8, scale, True),
        lambda: kernels.adam_rows(f[0], f[0], f[0], f[0], 1, 0.1, 0.9, 0.99, 1e-8, scale, True),
    ):
        with pytest.raises(AssertionError):
            refused()


@pytest.mark.skipif(INTERPRETED, reason="needs 20 GB of a GPU")
def test_tables_of_more_than_2_31_entries():
    rows, d = 2**20 + 2**14, 2040
    table = torch.zeros(rows, d, dtype=torch.bfloat16, device=DEVICE)
    table[-1] = 1
    table[-1, -1] = 3
    last = torch.tensor([0, rows - 1, rows - 2], device=DEVICE)
    ones = torch.ones(3, device=DEVICE)
    assert torch.equal(kernels.weighted_sums(last, offsets_of([1, 2]), ones, table), table[last[:2]].float())
    assert kernels.dot_products(last, last, table, table).tolist() == [0, d + 8, 0]
    assert torch.equal(kernels.above(table, 1.5), torch.tensor([rows * d - 1], device=DEVICE))
    sums = kernels.weighted_sums(last[1:2] * 0, offsets_of([0] * (rows - 1) + [1]), ones[:1], ones.new_full((1, d), 2))
    assert sums[-1].sum() == 2 * d and sums.count_nonzero() == d


COMPILE = """
import torch, triton
from apportion.kernels import triton_gradients as paired
from apportion.kernels import triton_kernels as kernels

NAMES = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.int64: "i64", torch.int32: "i32"}
compiled = set()

def compile_only(kernel, grid, *arguments, **shape):
    given = dict(zip(kernel.arg_names, arguments)) | shape
    options = {name: given.pop(name) for name in list(given) if name not in kernel.arg_names}
    constants = {p.name: given[p.name] for p in kernel.params if p.is_constexpr}
    kinds = {int: lambda v: "i32", float: lambda v: "fp32", torch.Tensor: lambda v: "*" + NAMES[v.dtype]}
    signature = {n: "constexpr" if n in constants else kinds[type(v)](v) for n, v in given.items()}
    source = triton.compiler.ASTSource(kernel, {n: signature[n] for n in kernel.arg_names}, constants)
    triton.compile(source, target=triton.backends.compiler.GPUTarget("cuda", 90, 32), options=options)
    compiled.add(kernel.__name__)

kernels._launch = compile_only
torch.empty = torch.ones
ids, p, scale = torch.zeros(300, dtype=torch.int64), torch.zeros(2, 60), torch.tensor(1.0)
for dtype in (torch.float32, torch.bfloat16):
    kernels.weighted_sums(ids, torch.tensor([0, 300]), torch.zeros(300), p.to(dtype))
    kernels.dot_products(ids, ids, p, p.to(dtype))
    for bounds in (torch.zeros(60, dtype=dtype), torch.zeros(2, 1, dtype=dtype)):
        kernels.above(p.to(dtype), bounds)
        for weighted in (True, False):
            kernels.MatchList(9, p, weighted).add(p.to(dtype), p.to(dtype), bounds, 0, 60)
kernels.above(p, 0.0)
for unit_rows in (True, False):
    kernels.adam_rows(p, p, p, p, 1, 0.1, 0.9, 0.99, 1e-8, scale, unit_rows)
for dtype in (torch.float32, torch.bfloat16):
    paired.gradients(ids, ids, torch.tensor([0, 300, 300]), torch.zeros(300), p.to(dtype), p.to(dtype))
    paired.gradients(ids, ids, torch.tensor([0, 300]), torch.zeros(300), torch.zeros(2, 3000), torch.zeros(1, 3000))
everything = {n for room in (kernels, paired) for n, f in vars(room).items() if isinstance(f, triton.JITFunction)}
assert everything - compiled == {"_add_matches", "_add_pairs", "_count_bits"}, everything - compiled
"""


@pytest.mark.slow
@pytest.mark.skipif(not INTERPRETED, reason="a GPU has compiled them already")
def test_kernels_compile_for_hopper(tmp_path):
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

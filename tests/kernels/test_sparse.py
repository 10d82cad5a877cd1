"""Sparse encoder and decoder on fixed matches: values and every gradient against dense float64 autograd."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from apportion import blocks
from apportion.kernels import decode_matches, dispatch, encode_matches, rows_of, sparse
from apportion.latents import Latents, from_matches

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
NAMES = ("x", "W_enc", "b_enc", "W_dec")


@dataclass
class Case:
    tokens: int
    d_in: int
    d_sae: int
    d_out: int
    mask: torch.Tensor
    """[tokens, d_sae], True where there is a match."""

    def parameters(self, dtype: torch.dtype) -> list[torch.Tensor]:
        g = torch.Generator().manual_seed(0)
        shapes = [(self.tokens, self.d_in), (self.d_sae, self.d_in), (self.d_sae,), (self.d_sae, self.d_out)]
        return [torch.randn(*s, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]

    def factors(self, dtype: torch.dtype) -> torch.Tensor:
        """One for each match, as a gate between encoder and decoder would supply."""
        g = torch.Generator().manual_seed(1)
        return torch.randn(int(self.mask.sum()), generator=g, dtype=torch.float64).to(dtype).requires_grad_()

    def goal(self, dtype: torch.dtype) -> torch.Tensor:
        g = torch.Generator().manual_seed(2)
        return torch.randn(self.tokens, self.d_out, generator=g, dtype=torch.float64).to(dtype)


def random_mask(tokens: int, d_sae: int, density: float, seed: int = 0) -> torch.Tensor:
    return torch.rand(tokens, d_sae, generator=torch.Generator().manual_seed(seed)) < density


def awkward() -> Case:
    mask = random_mask(63, 1000, 0.02)
    mask[[0, 5, 6, 62]] = False
    return Case(63, 60, 1000, 60, mask)


def popular() -> Case:
    mask = random_mask(63, 1000, 0.002)
    mask[:, 417] = True
    return Case(63, 60, 1000, 60, mask)


def experts() -> Case:
    """Each token has latents of one of ten experts; some have none."""
    expert = torch.randint(0, 10, (63, 1), generator=torch.Generator().manual_seed(3))
    mask = random_mask(63, 1000, 0.1) & (torch.arange(1000) // 100 == expert)
    mask[[0, 5, 6, 62]] = False
    return Case(63, 60, 1000, 60, mask)


CASES = {
    "experts": experts(),
    "awkward": awkward(),
    "popular latent": popular(),
    "other output width": Case(7, 5, 11, 3, random_mask(7, 11, 0.4)),
    "dense": Case(7, 5, 11, 5, torch.ones(7, 11, dtype=torch.bool)),
    "no matches": Case(7, 5, 11, 5, torch.zeros(7, 11, dtype=torch.bool)),
    "no rows": Case(0, 5, 11, 5, torch.zeros(0, 11, dtype=torch.bool)),
    "one of everything": Case(1, 1, 1, 1, torch.ones(1, 1, dtype=torch.bool)),
    "last latent only": Case(4, 5, 11, 5, torch.arange(11).expand(4, 11) == 10),
}


def matches(case: Case, x: torch.Tensor, W: torch.Tensor, b: torch.Tensor) -> Latents:
    """The fixed matches with their codes, as selection would hand them over."""
    rows, indices = case.mask.nonzero(as_tuple=True)
    with torch.no_grad():
        values = ((x[rows] * W[indices]).sum(1) + b[indices]).detach()
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), case.mask.sum(1).cumsum(0)])
    return Latents(values, indices, offsets, case.d_sae, (case.tokens,))


def dense_loss(case, x, W, b, W_dec, factors, goal):
    """A loss that is curved in codes and outputs, written densely."""
    z = (x @ W.T + b) * case.mask
    gate = torch.zeros(case.mask.shape, dtype=x.dtype).masked_scatter(case.mask, factors)
    x_hat = (z * gate) @ W_dec
    return ((x_hat - goal) ** 2).sum() + 0.1 * (z**3).sum() + (x * x_hat.sum(1, keepdim=True)).sum(), z, x_hat


def sparse_loss(case, x, W, b, W_dec, factors, goal):
    latents = encode_matches(x, W, b, matches(case, x, W, b))
    x_hat = decode_matches(latents.map(lambda v: v * factors), W_dec)
    loss = ((x_hat - goal) ** 2).sum() + 0.1 * (latents.values**3).sum() + (x * x_hat.sum(1, keepdim=True)).sum()
    return loss, latents.dense(), x_hat


def assert_close(name: str, got: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> None:
    assert got.shape == wanted.shape and got.dtype == dtype, name
    if not wanted.numel():
        return
    largest = wanted.abs().max().item()
    assert (got.double() - wanted).abs().max().item() <= TOLERANCE[dtype] * largest, name


PATHS = {
    "as it chooses": (0.1, 2**22),
    "lists": (1.0, 2**22),
    "dense": (-1.0, 2**22),
    "small dense": (-1.0, 3000),
    "dense, short last block": (-1.0, 5000),
    "dense, short last block of few latents": (-1.0, 44),
}
"""DENSE_SHARE and BLOCK_ENTRIES. Blocks of 5 rows leave 3 of 63 for the last, blocks of 4 leave 3 of 7."""


@pytest.mark.parametrize("path", PATHS.values(), ids=list(PATHS))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_values_and_gradients(case, dtype, path, monkeypatch):
    monkeypatch.setattr(dispatch, "DENSE_SHARE", path[0])
    monkeypatch.setattr(blocks, "BLOCK_ENTRIES", path[1])
    monkeypatch.setattr(blocks, "MIN_BLOCK_ROWS", 1)
    got, wanted = [], []
    for loss_of, at, into in ((sparse_loss, dtype, got), (dense_loss, torch.float64, wanted)):
        # The float64 twin starts from the same (rounded) numbers.
        parameters = [p.detach().to(at).requires_grad_() for p in case.parameters(dtype)]
        factors = case.factors(dtype).detach().to(at).requires_grad_()
        loss, z, x_hat = loss_of(case, *parameters, factors, case.goal(dtype).to(at))
        into += [z.detach(), x_hat.detach(), *torch.autograd.grad(loss, [*parameters, factors])]
    for name, a, b in zip(("codes", "x_hat", *NAMES, "factors"), got, wanted, strict=True):
        assert_close(name, a, b, dtype)


def test_rows_and_latents_without_matches_get_exact_zeros():
    case = CASES["awkward"]
    x, W, b, W_dec = case.parameters(torch.float32)
    x_hat = decode_matches(encode_matches(x, W, b, matches(case, x, W, b)), W_dec)
    x_hat.square().sum().backward()
    empty, idle = ~case.mask.any(1), ~case.mask.any(0)
    assert bool(empty.any()) and bool(idle.any())
    assert not bool(x_hat[empty].any()) and not bool(x.grad[empty].any())
    for grad in (W.grad, b.grad, W_dec.grad):
        assert not bool(grad[idle].any()) and bool(grad[~idle].any())


def test_local_latents_are_recognised():
    for name, local in {"experts": True, "last latent only": True, "awkward": False, "no matches": False}.items():
        case = CASES[name]
        assert sparse._is_local(matches(case, *(p.detach() for p in case.parameters(torch.float32)[:3]))) == local, name


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_the_centre_gets_the_gradient_of_what_was_subtracted(case):
    x, W, b, _ = (p.detach() for p in case.parameters(torch.float64))
    W.requires_grad_(), b.requires_grad_()
    centre = torch.linspace(-1, 1, case.d_in, dtype=torch.float64, requires_grad=True)
    grads = []
    for given in (None, centre):
        rows = x - centre if given is None else (x - centre).detach()
        codes = encode_matches(rows, W, b, matches(case, x - centre.detach(), W, b), given)
        grads.append(torch.autograd.grad((codes.values**3).sum(), [centre, W, b]))
    for name, a, wanted in zip(("centre", "W_enc", "b_enc"), *reversed(grads), strict=True):
        assert_close(name, a, wanted, torch.float64)


@pytest.mark.parametrize("wanted", NAMES)
def test_one_gradient_at_a_time(wanted):
    """Parameters that need no gradient may be frozen in any combination."""
    case = CASES["other output width"]
    parameters = dict(zip(NAMES, case.parameters(torch.float64), strict=True))
    goal, factors = case.goal(torch.float64), case.factors(torch.float64).detach()
    everything = torch.autograd.grad(
        sparse_loss(case, *parameters.values(), factors, goal)[0], list(parameters.values())
    )[NAMES.index(wanted)]
    frozen = {name: p.detach().requires_grad_(name == wanted) for name, p in parameters.items()}
    loss = sparse_loss(case, *frozen.values(), factors, goal)[0]
    assert torch.allclose(torch.autograd.grad(loss, frozen[wanted])[0], everything, rtol=1e-12)


def test_encode_leaves_the_given_matches_alone():
    case = CASES["other output width"]
    x, W, b, _ = case.parameters(torch.float64)
    given = matches(case, x, W, b)
    before = given.values.clone()
    encoded = encode_matches(x, W, b, given)
    with torch.no_grad():
        encoded.values.zero_()
    assert torch.equal(given.values, before)


class OnAGpu(torch.Tensor):
    """Says that it lies there."""

    is_cuda = True


def test_blocks_are_as_large_as_the_device_likes():
    on_a_gpu = torch.zeros(1, dtype=torch.bfloat16).as_subclass(OnAGpu)
    assert blocks.block_rows(65_536, on_a_gpu) == 2**28 // 65_536
    for width, rows in ((16_384, 256), (8192, 512), (2**22, 256), (0, 2**22)):
        assert blocks.block_rows(width, torch.zeros(1)) == rows


def test_strided_inputs_and_gradients():
    """Non-contiguous x, weights and incoming gradients."""
    case = CASES["dense"]

    def strided(t: torch.Tensor) -> torch.Tensor:
        return t.t().contiguous().t() if t.ndim == 2 else torch.stack([t, t], 1)[:, 0]

    results = []
    for change in (torch.clone, strided):
        parameters = [change(p.detach()).requires_grad_() for p in case.parameters(torch.float64)]
        x_hat = decode_matches(encode_matches(*parameters[:3], matches(case, *parameters[:3])), parameters[3])
        (x_hat.t() @ torch.arange(7.0, dtype=torch.float64)).sum().backward()  # an expanded, strided gradient
        results.append([p.grad for p in parameters])
    for plain, other in zip(*results, strict=True):
        assert torch.allclose(plain, other, rtol=1e-12)


def test_totals_of_latents_are_the_same_in_either_way():
    """On GPUs they are added up in order, where index_add_ would be another number every time."""
    latents = from_matches(
        torch.tensor([0, 0, 1, 3, 3, 3]), torch.tensor([2, 5, 2, 0, 2, 6]), torch.arange(6.0), 8, (4,)
    )
    g = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    wanted = torch.tensor([8.0, 0, 21, 0, 0, 2, 32, 0])
    assert torch.equal(sparse.totals_by_latent(latents, g), wanted)
    assert torch.equal(sparse._totals_in_order(latents, g), wanted)
    none = from_matches(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), torch.zeros(0), 8, (4,))
    assert torch.equal(sparse._totals_in_order(none, g[:0]), torch.zeros(8))


@pytest.mark.parametrize("first", ["dense", "sparse"])
@pytest.mark.parametrize("shape", [(12, 5), (12, 2, 5), (12,)])
def test_rows_have_a_gradient_of_their_own_size(shape, first):
    """Which is added to that of the whole table, whichever comes first."""
    g = torch.Generator().manual_seed(0)
    table = torch.randn(shape, generator=g, requires_grad=True)
    ids, other, some = (
        torch.tensor([1, 4, 11]),
        torch.randn(shape, generator=g),
        torch.randn(3, *shape[1:], generator=g),
    )
    (rows_of(table, ids) * some).sum().backward()
    assert torch.equal(rows_of(table, ids), table[ids]) and table.grad.is_sparse
    assert table.grad.coalesce().values().shape == some.shape
    wanted = torch.zeros(shape).index_copy(0, ids, some)
    assert torch.equal(table.grad.to_dense(), wanted)
    table.grad = None
    terms = [(table * other).sum(), (rows_of(table, ids) * some).sum()]
    (terms[0] + terms[1] if first == "dense" else terms[1] + terms[0]).backward()
    assert not table.grad.is_sparse and torch.allclose(table.grad, other + wanted)

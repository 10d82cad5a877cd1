"""The sparse matrix against the dense one it stands for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apportion.latents import Latents, concatenated, from_matches


def code(*shape: int, seed: int = 0, density: float = 0.4) -> torch.Tensor:
    """A dense code with about `density` non-zeros, all different, and empty rows where there are several."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.rand(*shape, generator=generator) + 0.1
    z *= torch.rand(*shape, generator=generator) < density
    if z.ndim > 1 and z.shape[0] > 2:
        z[0] = 0
        z[-1] = 0
    return z


@given(tokens=st.integers(0, 7), d_sae=st.integers(1, 9), density=st.floats(0, 1), seed=st.integers(0, 99))
@settings(deadline=None, derandomize=True, max_examples=60)
def test_dense_round_trip(tokens, d_sae, density, seed):
    z = code(tokens, d_sae, seed=seed, density=density)
    latents = Latents.from_dense(z)
    assert torch.equal(latents.dense(), z)
    assert latents.nnz == int((z != 0).sum())
    assert torch.equal(latents.l0(), (z != 0).sum(-1))
    assert torch.equal(latents.counts(), (z != 0).sum(0))
    assert torch.equal(latents.rows(), z.nonzero()[:, 0])
    assert latents.offsets.dtype == torch.int64 and latents.offsets.shape == (tokens + 1,)


def test_leading_dimensions_are_kept():
    z = code(2, 3, 5)
    latents = Latents.from_dense(z)
    assert latents.shape == (2, 3) and latents.tokens == 6
    assert torch.equal(latents.dense(), z)
    assert torch.equal(latents.l0(), (z != 0).sum(-1))
    single = Latents.from_dense(z[1, 1])
    assert single.shape == () and torch.equal(single.dense(), z[1, 1]) and single.l0().shape == ()


def test_zero_rows_and_no_matches():
    none = Latents.from_dense(torch.zeros(0, 4))
    assert none.dense().shape == (0, 4) and none.l0().shape == (0,) and none.nnz == 0
    empty = Latents.from_dense(torch.zeros(3, 4))
    assert torch.equal(empty.dense(), torch.zeros(3, 4)) and empty.l0().tolist() == [0, 0, 0]
    assert empty[1:].tokens == 2 and empty[..., :2].d_sae == 2
    assert "nnz=0" in repr(none)


SLICES = {
    "slice": slice(1, 5, 2),
    "empty slice": slice(2, 2),
    "int": 3,
    "negative int": -2,
    "ids": torch.tensor([4, 0, 4, 1]),
    "list": [5, 2],
    "mask": torch.tensor([True, False, True, True, False, True]),
    "all": slice(None),
}


@pytest.mark.parametrize("which", SLICES.values(), ids=list(SLICES))
@pytest.mark.parametrize("shape", [(6, 7), (6, 3, 7), (6, 2, 2, 7)], ids=str)
def test_slicing_tokens(which, shape):
    z = code(*shape)
    part = Latents.from_dense(z)[which]
    assert part.shape == z[which].shape[:-1]
    assert torch.equal(part.dense(), z[which])


def test_slicing_several_leading_dimensions():
    z = code(4, 3, 5)
    latents = Latents.from_dense(z)
    assert torch.equal(latents[1:3, 0].dense(), z[1:3, 0])
    assert torch.equal(latents[:, torch.tensor([2, 0])].dense(), z[:, [2, 0]])
    mask = code(4, 3, seed=1) > 0
    assert torch.equal(latents[mask].dense(), z[mask])


LATENT_SLICES = {
    "slice": slice(1, 6, 2),
    "unsorted ids": torch.tensor([6, 0, 3]),
    "list": [2, 5, 1],
    "mask": torch.tensor([True, False, True, True, False, True, False]),
    "none": torch.tensor([], dtype=torch.int64),
}


@pytest.mark.parametrize("which", LATENT_SLICES.values(), ids=list(LATENT_SLICES))
@pytest.mark.parametrize("shape", [(6, 7), (2, 3, 7)], ids=str)
def test_slicing_latents(which, shape):
    z = code(*shape, density=0.7)
    part = Latents.from_dense(z)[..., which]
    assert torch.equal(part.dense(), z[..., which])
    rows = part.rows() * part.d_sae + part.indices
    assert bool((rows.diff() > 0).all()), "indices ascend within a row"


def test_one_latent_is_a_column():
    z = code(6, 7)
    assert torch.equal(Latents.from_dense(z)[..., 2].dense(), z[..., 2:3])


def test_slicing_latents_needs_distinct_ids():
    latents = Latents.from_dense(code(6, 7))
    with pytest.raises(ValueError, match="distinct"):
        latents[..., torch.tensor([1, 1])]
    with pytest.raises(ValueError, match=r"latents\[\.\.\., ids\]"):
        latents[..., 1, 2]


def test_slices_carry_gradients():
    z = code(5, 6).double().requires_grad_()
    latents = Latents.from_dense(z)
    weights = torch.arange(12.0).double().reshape(4, 3)
    part = latents[torch.tensor([1, 2, 2, 3])][..., torch.tensor([5, 0, 2])]
    (part.dense() * weights).sum().backward()
    wanted = torch.autograd.grad((z[[1, 2, 2, 3]][:, [5, 0, 2]] * weights).sum(), z)[0] * (z != 0)
    assert torch.equal(z.grad, wanted) and bool(wanted.any())


def test_with_values_drops_zeros_and_keeps_gradients():
    z = code(5, 6)
    latents = Latents.from_dense(z)
    values = torch.linspace(-1, 1, latents.nnz).round(decimals=1).requires_grad_()
    with torch.no_grad():
        values[1] = 0
    changed = latents.with_values(2 * values)
    assert changed.nnz == int((values != 0).sum()) < latents.nnz
    assert bool((changed.values != 0).all())
    wanted = torch.zeros_like(z)
    wanted[z != 0] = 2 * values.detach()
    assert torch.equal(changed.dense(), wanted)
    assert torch.equal(changed.l0(), (wanted != 0).sum(-1))
    changed.values.sum().backward()
    assert torch.equal(values.grad, 2.0 * (values != 0))


def test_with_values_refuses_another_count():
    latents = Latents.from_dense(code(5, 6))
    with pytest.raises(ValueError, match=str(latents.nnz)):
        latents.with_values(torch.ones(latents.nnz + 1))


def test_map_where_detach_to():
    z = code(5, 6)
    latents = Latents.from_dense(z.clone().requires_grad_())
    assert torch.equal(latents.map(lambda v: 3 * v).dense(), 3 * z)
    large = latents.where(latents.values > 0.5)
    assert torch.equal(large.dense(), z * (z > 0.5))
    assert latents.values.requires_grad and not latents.detach().values.requires_grad
    double = latents.to(torch.float64)
    assert double.values.dtype == torch.float64 and double.indices.dtype == torch.int64
    assert torch.equal(double.dense(), z.double())


def test_from_dense_gradient_is_dense_gradient_on_the_matches():
    z = code(5, 6).double()
    weights = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    through = z.clone().requires_grad_()
    (Latents.from_dense(through).map(lambda v: v**2).dense() * weights).sum().backward()
    assert torch.allclose(through.grad, 2 * z * weights, rtol=1e-12)


def test_by_latent_is_the_transpose():
    z = code(9, 7)
    latents = Latents.from_dense(z)
    order, rows, offsets = latents.by_latent()
    columns, tokens = z.T.nonzero(as_tuple=True)
    assert torch.equal(rows, tokens) and torch.equal(latents.indices[order], columns)
    assert torch.equal(offsets.diff(), (z != 0).sum(0)) and offsets[0] == 0 and offsets.dtype == torch.int64


def test_what_is_computed_in_inference_mode_serves_gradients_later():
    z = code(5, 6).requires_grad_()
    latents = Latents.from_dense(z)
    with torch.inference_mode():
        latents.rows(), latents.by_latent()
    assert not any(t.is_inference() for t in (latents.rows(), *latents.by_latent()))
    latents.dense().square().sum().backward()
    assert torch.equal(z.grad, 2 * z.detach())


def test_from_matches_counts_rows():
    latents = from_matches(torch.tensor([0, 0, 2]), torch.tensor([1, 3, 0]), torch.ones(3), 4, (2, 2))
    assert latents.offsets.tolist() == [0, 2, 2, 3, 3] and latents.l0().tolist() == [[2, 0], [1, 0]]


def test_concatenated_rows_of_several():
    parts = [code(4, 6), code(0, 6), code(2, 3, 6, seed=1), code(1, 6, density=0)]
    joined = concatenated([Latents.from_dense(z) for z in parts])
    assert joined.shape == (11,)
    assert torch.equal(joined.dense(), torch.cat([z.reshape(-1, 6) for z in parts]))
    assert torch.equal(concatenated([joined]).dense(), joined.dense())

"""Weights come in the dtype of their file, in every format, or in the one that is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from library_files import wave
from naive import CLOSE, differs
from test_hostile import MADE, D, Made

import apportion as ap

HALVES = (torch.float16, torch.bfloat16)
X = 2 * wave(9, D, seed=9)


def of(made: Made, dtype: torch.dtype, folder: Path) -> Path:
    if made.weights.endswith(".npz") and dtype == torch.bfloat16:
        pytest.skip("numpy has no bfloat16")
    return made.write(folder, {name: t.to(dtype) for name, t in made.tensors.items()})


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64])
@pytest.mark.parametrize("made", MADE.values(), ids=list(MADE))
def test_the_dtype_of_the_file(made: Made, dtype: torch.dtype, tmp_path: Path) -> None:
    sae = ap.load(of(made, dtype, tmp_path))
    assert {p.dtype for p in sae.parameters()} == {dtype} == {sae.dtype}
    assert {b.dtype for b in sae.buffers() if b.is_floating_point()} <= {dtype}
    assert sae.encode(X).values.dtype == dtype and sae(X).isfinite().all()
    sae.save(tmp_path / "ours")
    assert ap.load(tmp_path / "ours").dtype == dtype


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("made", MADE.values(), ids=list(MADE))
def test_another_one_is_exact(made: Made, dtype: torch.dtype, tmp_path: Path) -> None:
    """Scales are folded before weights are rounded: in float32 nothing is lost, in halves no more than a rounding."""
    folder = of(made, dtype, tmp_path / "half")
    rounded = made.write(tmp_path / "float", {name: t.to(dtype).float() for name, t in made.tensors.items()})
    wanted, found = ap.load(rounded), ap.load(folder, dtype=torch.float32)
    assert found.dtype == torch.float32
    assert torch.equal(found.encode(X).dense(), wanted.encode(X).dense()) and torch.equal(found(X), wanted(X))
    half = ap.load(folder).float()
    for name, p in wanted.named_parameters():
        assert torch.allclose(half.get_parameter(name), p, rtol=torch.finfo(dtype).eps, atol=1e-6), name


def test_the_finest_counts(tmp_path: Path) -> None:
    made = MADE["sae_lens"]
    tensors = {name: t.bfloat16() for name, t in made.tensors.items()} | {"b_dec": made.tensors["b_dec"]}
    assert ap.load(made.write(tmp_path / "a", tensors)).dtype == torch.float32
    tensors["b_dec"] = tensors["b_dec"].half()
    assert ap.load(made.write(tmp_path / "b", tensors)).dtype == torch.float32, "neither half holds the other"


def test_what_float16_cannot_hold_is_refused(tmp_path: Path) -> None:
    """Folding decoder norms makes a bias larger than any of float16."""
    made = MADE["llama_scope"]
    tensors = {name: t.half() for name, t in made.tensors.items()}
    tensors["encoder.bias"] = torch.full_like(tensors["encoder.bias"], 6e4)
    folder = made.write(tmp_path, tensors)
    with pytest.raises(ValueError, match=r"b_enc has numbers that float16 does not hold: load\(.*dtype=torch\.float32"):
        ap.load(folder)
    assert ap.load(folder, dtype=torch.float32).b_enc.max() > 65504


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", ["topk", "mutual_choice", "feature_choice", "relu", "jumprelu", "gated", "switch"])
def test_halves_compute(name: str, dtype: torch.dtype) -> None:
    """Codes and reconstructions are those of float32 but for rounding, and inputs of any dtype are taken."""
    sae = ap.create(name, d_in=D, d_sae=20, k=5, seed=0, **({"num_experts": 2} if name == "switch" else {}))
    sae.fit_input(X)
    sae.calibrate(X)
    half = ap.create(name, **sae.settings()).to(dtype)
    half.load_state_dict(sae.state_dict())
    sae.eval(), half.eval()
    wanted = sae(X)
    for x in (X, X.to(dtype), X.double()):
        found = half(x)
        assert found.dtype == x.dtype
        assert (found.float() - wanted).norm() < 0.1 * wanted.norm()
    assert half.encode(X).values.dtype == dtype
    assert differs(half(X), wanted) > CLOSE, "they are halves"

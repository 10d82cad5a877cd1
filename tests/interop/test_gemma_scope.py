"""Gemma Scope and Gemma Scope 2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from library_files import check, refused, refused_if_damaged, rows, wave
from naive import D_IN, D_SAE
from safetensors.torch import save_file
from torch import Tensor

import apportion as ap

D_OUT = 5


def tensors(d_out: int = D_IN) -> dict[str, Tensor]:
    return {
        "W_enc": wave(D_IN, D_SAE, seed=1),
        "W_dec": wave(D_SAE, d_out, seed=2),
        "b_enc": wave(D_SAE, seed=3, size=0.3),
        "b_dec": wave(d_out, seed=4),
        "threshold": wave(D_SAE, seed=5) + 0.5,  # some are negative, and mean 0
    }


def forward(w: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    w, x = {name: t.double() for name, t in w.items()}, x.double()
    a = x @ w["W_enc"] + w["b_enc"]
    z = a.relu() * (a > w["threshold"])
    skip = x @ w["affine_skip_connection"] if "affine_skip_connection" in w else 0
    return z, z @ w["W_dec"] + w["b_dec"] + skip


def write_npz(folder: Path, stored: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "params.npz", **{name: t.numpy() for name, t in stored.items()})
    return folder / "params.npz"


def write_second(folder: Path, stored: dict[str, Tensor], file: str = "params.safetensors", **settings: Any) -> Path:
    """With small letters, and a configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({f"w{n[1:]}" if n[0] == "W" else n: t.contiguous() for n, t in stored.items()}, folder / file)
    config = {"architecture": "jump_relu", "width": D_SAE, "l0": 7, "model_name": "gemma-v3-1b", **settings}
    (folder / "config.json").write_text(json.dumps(config))
    return folder / file


def test_codes_and_reconstructions_are_theirs(tmp_path: Path) -> None:
    write_npz(tmp_path, tensors())
    sae = ap.load(tmp_path)
    assert (sae.name, sae.info["format"], sae.hookpoint) == ("jumprelu", "gemma_scope", None)
    check(sae, rows(), *forward(tensors(), rows()), tmp_path)


@pytest.mark.parametrize(
    ("place", "name", "hookpoint", "target"),
    [
        ("gemma-scope-2b-pt-res/layer_20", "jumprelu", "model.layers.20", None),
        ("models--google--gemma-scope-9b-it-att/x/layer_3", "jumprelu", "model.layers.3.self_attn.o_proj:in", None),
        ("gemma-scope-2b-pt-transcoders/layer_3", "transcoder", None, "model.layers.3.post_feedforward_layernorm"),
    ],
)
def test_place_and_l0_follow_from_the_path(
    tmp_path: Path, place: str, name: str, hookpoint: str | None, target: str | None
) -> None:
    folder = tmp_path / place / "width_16k" / "average_l0_7"
    write_npz(folder, tensors())
    sae = ap.load(folder)
    assert (sae.name, sae.hookpoint, getattr(sae, "target_hookpoint", None)) == (name, hookpoint, target)
    assert "gemma-2-" in sae.info["source"]["model"]["name_or_path"]
    assert name == "transcoder" or sae.k == 7
    check(sae, rows(), *forward(tensors(), rows()), tmp_path)


def test_a_transcoder_can_be_told(tmp_path: Path) -> None:
    write_npz(tmp_path, tensors(D_OUT))
    sae = ap.load(tmp_path, config={"transcoder": True})
    assert sae.name == "transcoder"
    check(sae, rows(), *forward(tensors(D_OUT), rows()), tmp_path)
    with pytest.raises(ValueError, match="w_dec has shape"):
        ap.load(tmp_path)


def test_the_second_release_says_where_it_belongs(tmp_path: Path) -> None:
    write_second(tmp_path, tensors(), hf_hook_point_in="model.layers.9.output")
    sae = ap.load(tmp_path)
    assert (sae.name, sae.hookpoint, sae.k) == ("jumprelu", "model.layers.9", 7)
    assert sae.info["source"]["model"]["name_or_path"] == "google/gemma-3-1b"
    check(sae, rows(), *forward(tensors(), rows()), tmp_path)


@pytest.mark.parametrize("affine", [True, False])
def test_transcoders_of_the_second_release(tmp_path: Path, affine: bool) -> None:
    stored = tensors(D_OUT)
    if affine:
        stored["affine_skip_connection"] = wave(D_IN, D_OUT, seed=6)
    write_second(
        tmp_path,
        stored,
        affine_connection=affine,
        hf_hook_point_in="model.layers.5.pre_feedforward_layernorm.output",
        hf_hook_point_out="model.layers.5.post_feedforward_layernorm.output",
    )
    sae = ap.load(tmp_path)
    assert sae.name == ("skip_transcoder" if affine else "transcoder")
    assert sae.hookpoint == "model.layers.5.pre_feedforward_layernorm"
    assert sae.target_hookpoint == "model.layers.5.post_feedforward_layernorm"
    check(sae, rows(), *forward(stored, rows()), tmp_path)


def test_cross_layer_transcoders_are_refused(tmp_path: Path) -> None:
    several = tensors() | {"W_dec": wave(D_SAE, 3, D_IN, seed=2)}
    for file, settings in (
        ("layer_0.safetensors", {}),
        ("params.safetensors", {"type": "clt"}),
        ("params.safetensors", {}),
    ):
        path = write_second(tmp_path / str(len(settings)) / file, several, file, **settings)
        refused(path, format="gemma_scope", names="part of a cross-layer transcoder")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": D_SAE + 1}, "w_enc has shape"),
        ({"architecture": "topk"}, "architecture 'topk' is unknown"),
        ({"affine_connection": True}, "affine_skip_connection is missing"),
    ],
)
def test_a_configuration_that_lies_is_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    refused(write_second(tmp_path, tensors(), **settings), format="gemma_scope", names=message)


def test_a_factor_that_is_not_1_is_refused(tmp_path: Path) -> None:
    ap.load(write_npz(tmp_path, tensors() | {"scaling_factor": torch.ones(D_SAE)}))
    refused(
        write_npz(tmp_path, tensors() | {"scaling_factor": torch.full((D_SAE,), 2.0)}),
        format="gemma_scope",
        names="scaling_factor is not 1",
    )


def test_objects_among_the_arrays_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "params.npz", **tensors(), extra=np.array([{}], dtype=object))
    refused(tmp_path / "params.npz", format="gemma_scope", names="cannot be read as arrays of numbers")


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    refused_if_damaged(lambda stored: write_npz(tmp_path, stored), tensors(), "gemma_scope")
    refused_if_damaged(lambda stored: write_second(tmp_path / "2", stored), tensors(), "gemma_scope")

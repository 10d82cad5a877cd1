"""mlsae."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from library_files import check, refused, refused_if_damaged, rows, standardised, wave
from naive import D_IN, D_SAE, K, keep_largest
from safetensors.torch import save_file
from torch import Tensor

import apportion as ap


def settings(**others: Any) -> dict[str, Any]:
    return {"n_inputs": D_IN, "n_latents": D_SAE, "k": K, "standardize": True, "auxk": 8} | others


def tensors() -> dict[str, Tensor]:
    return {
        "encoder.weight": wave(D_SAE, D_IN, seed=1),
        "decoder.weight": wave(D_IN, D_SAE, seed=2),
        "pre_encoder_bias": wave(D_IN, seed=3),
        "last_nonzero": torch.arange(D_SAE),
    }


def forward(stored: dict[str, Tensor], x: Tensor, standardize: bool) -> tuple[Tensor, Tensor]:
    w = {name: t.double() for name, t in stored.items()}
    x, mean, std = standardised(x.double()) if standardize else (x.double(), 0, 1)
    z = keep_largest((x - w["pre_encoder_bias"]) @ w["encoder.weight"].T, K).relu()
    return z, (z @ w["decoder.weight"].T + w["pre_encoder_bias"]) * std + mean


def write(folder: Path, stored: dict[str, Tensor], config: dict[str, Any]) -> Path:
    save_file(stored, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder / "model.safetensors"


@pytest.mark.parametrize("standardize", [True, False])
def test_codes_and_reconstructions_are_theirs(tmp_path: Path, standardize: bool) -> None:
    write(tmp_path, tensors(), settings(standardize=standardize))
    sae = ap.load(tmp_path)
    assert (sae.name, sae.info["format"]) == ("mlsae", "mlsae")
    x = rows()[:30].reshape(3, 2, 5, D_IN)  # layer, batch, pos
    check(sae, x, *forward(tensors(), x, standardize), tmp_path)


def test_a_transformer_beside_it_is_refused(tmp_path: Path) -> None:
    stored = {f"autoencoder.{name}": t for name, t in tensors().items()} | {"transformer.wte": torch.ones(2, 2)}
    refused(write(tmp_path, stored, {"k": K}), format="mlsae", names="of the same name without -tfm")


def test_a_transform_per_layer_is_refused(tmp_path: Path) -> None:
    stored = tensors() | {"encoder_lens.0.weight": torch.eye(D_IN)}
    refused(write(tmp_path, stored, settings(lens=True)), format="mlsae", names="transform for each layer")
    refused(write(tmp_path, stored, settings()), format="mlsae", names="transform for each layer")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"n_inputs": 99}, "encoder.weight has shape"),
        ({"n_latents": "many"}, "encoder.weight has shape"),
        ({"k": D_SAE + 1}, "k must lie between"),
        ({"k": None}, "k = None"),
    ],
)
def test_a_configuration_that_lies_is_refused(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    refused(write(tmp_path, tensors(), settings(**changed)), format="mlsae", names=message)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    needed = {name: t for name, t in tensors().items() if name != "last_nonzero"}
    refused_if_damaged(lambda stored: write(tmp_path, stored, settings()), needed, "mlsae")

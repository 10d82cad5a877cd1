"""Llama Scope, from files written by formula: the release for Llama 3.1 and the one for R1-Distill."""

from __future__ import annotations

import json
from math import sqrt
from pathlib import Path
from typing import Any

import pytest
import torch
from library_files import check, refused, refused_if_damaged, rows, wave
from naive import D_IN, D_SAE, K, keep_largest
from safetensors.torch import save_file
from torch import Tensor

import apportion as ap

HOOK, OUT = "blocks.8.hook_resid_post", "blocks.8.hook_mlp_out"
THETA = 0.9


def settings(**others: Any) -> dict[str, Any]:
    known = {
        "d_model": D_IN,
        "d_sae": D_SAE,
        "hook_point_in": HOOK,
        "hook_point_out": HOOK,
        "act_fn": "jumprelu",
        "jump_relu_threshold": THETA,
        "top_k": K,
        "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": 6.3, "out": 6.3},
        "sparsity_include_decoder_norm": True,
        "apply_decoder_bias_to_pre_encoder": False,
        "use_decoder_bias": True,
        "use_glu_encoder": False,
    }
    return known | others


def tensors() -> dict[str, Tensor]:
    return {
        "encoder.weight": wave(D_SAE, D_IN, seed=1),
        "encoder.bias": wave(D_SAE, seed=2, size=0.3),
        "decoder.weight": wave(D_IN, D_SAE, seed=3, size=0.5) * (1 + torch.arange(D_SAE) % 3),
        "decoder.bias": wave(D_IN, seed=4),
    }


def forward(config: dict[str, Any], stored: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """In the way of training: scaled activations in and out, and codes brought to raw units at the end."""
    w, x = {name: t.double() for name, t in stored.items()}, x.double()
    norms = config["dataset_average_activation_norm"]
    f_in, f_out = (sqrt(D_IN) / norms[side] for side in ("in", "out"))
    b_dec = w.get("decoder.bias", torch.zeros(D_IN).double())
    scaled = f_in * x - (b_dec if config["apply_decoder_bias_to_pre_encoder"] else 0)
    a = scaled @ w["encoder.weight"].T + w["encoder.bias"]
    n = (w["decoder.weight"] * f_in / f_out).norm(dim=0) if config["sparsity_include_decoder_norm"] else torch.ones(())
    raw = n * a / f_in
    z = {
        "relu": lambda: raw.relu(),
        "jumprelu": lambda: raw.relu() * (raw > config["jump_relu_threshold"]),
        "topk": lambda: keep_largest(raw, config["top_k"]).relu(),
    }[config["act_fn"]]()
    return z, ((z * f_in / n) @ w["decoder.weight"].T + b_dec) / f_out


def write(folder: Path, stored: dict[str, Tensor], config: dict[str, Any]) -> Path:
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    file = folder / "checkpoints" / "final.safetensors"
    save_file({name: t.contiguous() for name, t in stored.items()}, file)
    (folder / "hyperparams.json").write_text(json.dumps(config))
    return file


@pytest.mark.parametrize(
    "others",
    [
        {},
        {"sparsity_include_decoder_norm": False},
        {"apply_decoder_bias_to_pre_encoder": True},
        {"act_fn": "relu"},
        {"act_fn": "topk"},
        {"hook_point_out": OUT, "dataset_average_activation_norm": {"in": 2.0, "out": 0.4}},
    ],
)
def test_codes_and_reconstructions_are_theirs(tmp_path: Path, others: dict[str, Any]) -> None:
    config = settings(**others)
    file = write(tmp_path, tensors(), config)
    x = 2 * rows()
    z, y_hat = forward(config, tensors(), x)
    for path in (tmp_path, file):
        sae = ap.load(path)
        assert sae.info["format"] == "llama_scope"
        assert (sae.name == "transcoder") == ("hook_point_out" in others)
        check(sae, x, z, y_hat, tmp_path)


def test_scales_fold_into_bfloat16_exactly_in_float32(tmp_path: Path) -> None:
    stored = {name: t.bfloat16() for name, t in tensors().items()}
    write(tmp_path, stored, settings())
    assert ap.load(tmp_path).dtype == torch.bfloat16
    sae = ap.load(tmp_path, dtype=torch.float32)
    assert sae.dtype == torch.float32
    check(sae, 2 * rows(), *forward(settings(), stored, 2 * rows()), tmp_path)


def test_the_place_follows_from_the_name_of_the_folder(tmp_path: Path) -> None:
    write(tmp_path / "Llama3_1-8B-Base-L8R-8x", tensors(), settings())
    sae = ap.load(tmp_path, subfolder="Llama3_1-8B-Base-L8R-8x")
    assert sae.hookpoint == "model.layers.8"
    assert sae.info["source"]["hook_name"] == HOOK


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"d_sae": D_SAE + 1}, "decoder.weight has shape"),
        ({"jump_relu_threshold": None}, "jump_relu_threshold .* must be a number"),
        ({"jump_relu_threshold": float("nan")}, "jump_relu_threshold .* must be a number"),
        ({"dataset_average_activation_norm": None}, "does not say by how much"),
        ({"dataset_average_activation_norm": {"in": 0, "out": 1}}, "must be positive"),
        ({"dataset_average_activation_norm": {"in": 1.0}, "hook_point_out": OUT}, "does not say by how much"),
        ({"norm_activation": "batch-wise"}, "batch-wise"),
        ({"use_glu_encoder": True}, "GLU encoder"),
        ({"use_decoder_bias": False}, "unexpected decoder.bias"),
        ({"apply_decoder_bias_to_pre_encoder": True, "hook_point_out": OUT}, "subtracts its output's bias"),
    ],
)
def test_a_configuration_that_lies_is_refused(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    refused(write(tmp_path, tensors(), settings(**changed)), format="llama_scope", names=message)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    refused_if_damaged(lambda stored: write(tmp_path, stored, settings()), tensors(), "llama_scope")


DISTILLED = {
    "d_model": D_IN,
    "expansion_factor": (D_SAE + 0.1) / D_IN,
    "act_fn": "jumprelu",
    "norm_activation": "dataset-wise",
    "sparsity_include_decoder_norm": True,
    "hook_point_in": HOOK,
    "hook_point_out": HOOK,
}


def distilled() -> dict[str, Tensor]:
    return tensors() | {
        "log_jumprelu_threshold": wave(D_SAE, seed=5),
        f"dataset_average_activation_norm.{HOOK}": torch.tensor(6.3),
    }


def write_distilled(folder: Path, stored: dict[str, Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(stored, folder / "sae_weights.safetensors")
    (folder / "config.json").write_text(json.dumps(DISTILLED))
    return folder / "sae_weights.safetensors"


def test_the_release_for_r1_distill_has_a_threshold_per_latent(tmp_path: Path) -> None:
    write_distilled(tmp_path, distilled())
    sae = ap.load(tmp_path)
    assert (sae.name, sae.info["format"]) == ("jumprelu", "llama_scope")
    w, f, x = {name: t.double() for name, t in distilled().items()}, sqrt(D_IN) / 6.3, 2 * rows().double()
    a = f * x @ w["encoder.weight"].T + w["encoder.bias"]
    z = a.relu() * (a * w["decoder.weight"].norm(dim=0) > w["log_jumprelu_threshold"].exp())
    check(sae, 2 * rows(), z, (z @ w["decoder.weight"].T + w["decoder.bias"]) / f, tmp_path)


def test_its_scale_can_be_given(tmp_path: Path) -> None:
    write_distilled(tmp_path / "with", distilled())
    stored = {name: t for name, t in distilled().items() if not name.startswith("dataset")}
    write_distilled(tmp_path / "without", stored)
    a = ap.load(tmp_path / "with")
    b = ap.load(tmp_path / "without", config={"norm_scaling_factor": sqrt(D_IN) / torch.tensor(6.3).item()})
    assert torch.equal(a(rows()), b(rows()))


def test_damaged_files_of_that_release_are_refused(tmp_path: Path) -> None:
    refused_if_damaged(lambda stored: write_distilled(tmp_path, stored), distilled(), "llama_scope")

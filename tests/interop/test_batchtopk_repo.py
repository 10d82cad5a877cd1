"""The BatchTopK repository."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from library_files import check, refused, refused_if_damaged, refused_if_it_would_execute, rows, standardised, wave
from naive import D_IN, D_SAE, K, keep_largest
from torch import Tensor

import apportion as ap

TYPES = {"vanilla": "relu", "topk": "topk", "batchtopk": "mutual_choice", "jumprelu": "jumprelu"}


def settings(**others: Any) -> dict[str, Any]:
    known = {"act_size": D_IN, "dict_size": D_SAE, "top_k": K, "input_unit_norm": True, "sae_type": "topk"}
    return known | {"model_name": "gpt2-small", "hook_point": "blocks.8.hook_resid_pre"} | others


def tensors(sae_type: str) -> dict[str, Tensor]:
    stored = {
        "W_enc": wave(D_IN, D_SAE, seed=1),
        "W_dec": wave(D_SAE, D_IN, seed=2),
        "b_enc": wave(D_SAE, seed=3),
        "b_dec": wave(D_IN, seed=4),
    }
    return stored | ({"jumprelu.log_threshold": wave(D_SAE, seed=5)} if sae_type == "jumprelu" else {})


def forward(config: dict[str, Any], stored: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    w = {name: t.double() for name, t in stored.items()}
    x, mean, std = standardised(x.double()) if config["input_unit_norm"] else (x.double(), 0, 1)
    centred = ((x - w["b_dec"]) @ w["W_enc"]).relu()
    z = {
        "vanilla": lambda: ((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu(),
        "topk": lambda: keep_largest(centred, K),
        "batchtopk": lambda: keep_largest(centred.flatten(), K * len(x)).reshape(centred.shape),
        "jumprelu": lambda: (a := (x @ w["W_enc"] + w["b_enc"]).relu()) * (a > w["jumprelu.log_threshold"].exp()),
    }[config["sae_type"]]()
    return z, (z @ w["W_dec"] + w["b_dec"]) * std + mean


def write(folder: Path, stored: dict[str, Tensor], config: dict[str, Any]) -> Path:
    torch.save(stored, folder / "sae.pt")
    (folder / "config.json").write_text(json.dumps(config))
    return folder / "sae.pt"


@pytest.mark.parametrize("input_unit_norm", [True, False])
@pytest.mark.parametrize("sae_type", TYPES)
def test_codes_and_reconstructions_are_theirs(tmp_path: Path, sae_type: str, input_unit_norm: bool) -> None:
    config = settings(sae_type=sae_type, input_unit_norm=input_unit_norm)
    write(tmp_path, tensors(sae_type), config)
    sae = ap.load(tmp_path)
    assert (sae.name, sae.info["format"], sae.hookpoint) == (TYPES[sae_type], "batchtopk_repo", "transformer.h.8:in")
    assert not sae.training
    check(sae.train(sae_type == "batchtopk"), rows(), *forward(config, tensors(sae_type), rows()), tmp_path)


def test_batchtopk_asks_for_calibration(tmp_path: Path) -> None:
    write(tmp_path, tensors("batchtopk"), settings(sae_type="batchtopk"))
    sae = ap.load(tmp_path)
    with pytest.raises(ValueError, match="calibrate"):
        sae.encode(rows())
    assert abs(sae.calibrate(rows()) - K) < 0.5
    assert sae.encode(rows()).nnz > 0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sae_type": "quantile"}, "sae_type = 'quantile' is unknown"),
        ({"act_size": 7}, "W_enc has shape"),
        ({"dict_size": 10**12}, "W_enc has shape"),
        ({"top_k": -1}, "k = -1"),
        ({"top_k": 10**6}, "k must lie between"),
        ({"use_encoder_bias": True}, "use_encoder_bias = True of an early version"),
        ({"activation": "gelu"}, "activation = 'gelu' of an early version"),
    ],
)
def test_a_configuration_that_lies_is_refused(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    refused(write(tmp_path, tensors("topk"), settings(**changed)), format="batchtopk_repo", names=message)


def test_the_type_can_be_told(tmp_path: Path) -> None:
    torch.save(tensors("vanilla"), tmp_path / "sae.pt")
    sae = ap.load(tmp_path, format="batchtopk_repo", config={"sae_type": "vanilla", "input_unit_norm": True})
    check(sae, rows(), *forward(settings(sae_type="vanilla"), tensors("vanilla"), rows()), tmp_path)


@pytest.mark.parametrize("sae_type", ["topk", "jumprelu"])
def test_damaged_and_hostile_files_are_refused(tmp_path: Path, sae_type: str) -> None:
    config = settings(sae_type=sae_type)
    refused_if_damaged(lambda stored: write(tmp_path, stored, config), tensors(sae_type), "batchtopk_repo")
    refused_if_it_would_execute(tensors(sae_type), tmp_path / "sae.pt", "batchtopk_repo")


@pytest.mark.parametrize("theta", [0.0, 1.5])
@pytest.mark.parametrize("sae_type", ["batch-topk", "global-matryoshka-topk", "BatchTopK", "global_matryoshka_topk"])
def test_with_a_threshold_of_their_own(sae_type: str, theta: float, tmp_path: Path) -> None:
    """As the successor of the repository saves it: what codes exceed in eval mode; 0 until there was a batch."""
    stored = tensors("batchtopk") | {"threshold": torch.tensor(theta)}
    groups = {"group_sizes": "[5, 15]", "dict_size": D_SAE if "matryoshka" not in sae_type else 4 * D_SAE}
    write(tmp_path, stored, settings(sae_type=sae_type, **groups))
    sae = ap.load(tmp_path)
    assert (sae.name, sae.k) == ("mutual_choice", K)
    if not theta:
        with pytest.raises(ValueError, match="calibrate"):
            sae.encode(rows())
        return
    x, mean, std = standardised(rows().double())
    a = (x - stored["b_dec"].double()) @ stored["W_enc"].double()
    z = a.relu() * (a > theta)
    y = (z @ stored["W_dec"].double() + stored["b_dec"]) * std + mean
    check(sae, rows(), z, y, tmp_path)


@pytest.mark.parametrize("sae_type", ["batchtopkjumprelu", "BatchTopKJumpReLU"])
def test_a_batchtopk_with_thresholds_that_were_found_later(sae_type: str, tmp_path: Path) -> None:
    """It subtracts b_dec, as it was trained, where a jumprelu does not."""
    stored = tensors("jumprelu")
    write(tmp_path, stored, settings(sae_type=sae_type, input_unit_norm=False))
    w, x = {name: t.double() for name, t in stored.items()}, rows().double()
    a = ((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu()
    z = a * (a > w["jumprelu.log_threshold"].exp())
    check(ap.load(tmp_path), rows(), z, z @ w["W_dec"] + w["b_dec"], tmp_path)

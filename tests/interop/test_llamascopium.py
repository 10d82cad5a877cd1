"""llamascopium, from files written by formula."""

from __future__ import annotations

import json
from math import sqrt
from pathlib import Path
from typing import Any

import pytest
import torch
from library_files import check, refused, refused_if_damaged, refused_if_it_would_execute, rows, wave
from naive import D_IN, D_SAE, K, keep_largest
from safetensors.torch import save_file
from torch import Tensor

import apportion as ap

HOOK, OUT = "blocks.3.ln2.hook_normalized", "blocks.3.hook_mlp_out"
NORMS = {HOOK: 4.0, OUT: 0.7}
NORM = "dataset_average_activation_norm."
THRESHOLD = "activation_function.log_jumprelu_threshold"


def settings(**others: Any) -> dict[str, Any]:
    known = {
        "sae_type": "sae",
        "d_model": D_IN,
        "expansion_factor": D_SAE / D_IN + 1e-6,
        "act_fn": "jumprelu",
        "norm_activation": "dataset-wise",
        "sparsity_include_decoder_norm": True,
        "use_decoder_bias": True,
        "top_k": K,
        "hook_point_in": HOOK,
        "hook_point_out": HOOK,
    }
    return known | others


def tensors(config: dict[str, Any]) -> dict[str, Tensor]:
    stored = {
        "W_E": wave(D_IN, D_SAE, seed=1),
        "b_E": wave(D_SAE, seed=2, size=0.3),
        "W_D": wave(D_SAE, D_IN, seed=3) * (1 + torch.arange(D_SAE)[:, None] % 3),
    }
    if config["use_decoder_bias"]:
        stored["b_D"] = wave(D_IN, seed=4)
    if config["act_fn"] == "jumprelu":
        stored[THRESHOLD] = wave(D_SAE, seed=5)
    if config["norm_activation"] == "dataset-wise":
        stored |= {NORM + hook: torch.tensor(norm) for hook, norm in NORMS.items()}
    return stored


def forward(config: dict[str, Any], stored: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    w, x = {name: t.double() for name, t in stored.items()}, x.double()
    f_in = f_out = torch.ones(())
    if config["norm_activation"] == "dataset-wise":
        f_in, f_out = (sqrt(D_IN) / w[NORM + config[f"hook_point_{side}"]] for side in ("in", "out"))
    if config["norm_activation"] == "token-wise":
        f_in = f_out = sqrt(D_IN) / x.norm(dim=1, keepdim=True)
    a = f_in * x @ w["W_E"] + w["b_E"]
    h = a * w["W_D"].norm(dim=1) if config["sparsity_include_decoder_norm"] else a
    z = (
        a.relu()
        * {
            "relu": lambda: torch.ones_like(h),
            "jumprelu": lambda: h > w[THRESHOLD].exp(),
            "topk": lambda: keep_largest(h, config["top_k"]) != 0,
            "batchtopk": lambda: (keep_largest(h.flatten(), config["top_k"] * len(h)) != 0).reshape(h.shape),
        }[config["act_fn"]]()
    )
    return z, (z @ w["W_D"] + w.get("b_D", 0)) / f_out


def write(folder: Path, stored: dict[str, Tensor], config: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({name: t.contiguous() for name, t in stored.items()}, folder / "sae_weights.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder / "sae_weights.safetensors"


@pytest.mark.parametrize("include_norm", [True, False])
@pytest.mark.parametrize("act_fn", ["relu", "jumprelu", "topk", "batchtopk"])
@pytest.mark.parametrize("norm", ["dataset-wise", "inference", "token-wise"])
def test_codes_and_reconstructions_are_theirs(tmp_path: Path, norm: str, act_fn: str, include_norm: bool) -> None:
    config = settings(act_fn=act_fn, norm_activation=norm, sparsity_include_decoder_norm=include_norm)
    write(tmp_path, tensors(config), config)
    sae = ap.load(tmp_path)
    assert sae.info["format"] == "llamascopium"
    check(sae.train(act_fn == "batchtopk"), rows(), *forward(config, tensors(config), rows()), tmp_path)


def test_include_norm_changes_what_is_kept() -> None:
    """Else the test above would not see whether it is heeded."""
    for act_fn in ("jumprelu", "topk", "batchtopk"):
        kept = []
        for include in (True, False):
            config = settings(act_fn=act_fn, sparsity_include_decoder_norm=include)
            kept.append(forward(config, tensors(config), rows())[0] != 0)
        assert not torch.equal(*kept)


@pytest.mark.parametrize("norm", ["dataset-wise", "inference"])
def test_transcoders_have_another_scale_at_the_output(tmp_path: Path, norm: str) -> None:
    config = settings(hook_point_out=OUT, act_fn="topk", norm_activation=norm, use_decoder_bias=False)
    write(tmp_path, tensors(config), config)
    sae = ap.load(tmp_path)
    assert sae.name == "transcoder"
    check(sae, rows(), *forward(config, tensors(config), rows()), tmp_path)


def test_weights_may_lie_in_a_pt(tmp_path: Path) -> None:
    config = settings()
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save({"sae": tensors(config), "version": "2.0"}, tmp_path / "sae_weights.pt")
    check(ap.load(tmp_path), rows(), *forward(config, tensors(config), rows()), tmp_path)


def test_the_scale_can_be_given(tmp_path: Path) -> None:
    config = settings()
    stored = tensors(config)
    file = write(tmp_path, {name: t for name, t in stored.items() if not name.startswith(NORM)}, config)
    refused(file, format="llamascopium", names="does not say by how much")
    sae = ap.load(tmp_path, config={"norm_scaling_factor": sqrt(D_IN) / NORMS[HOOK]})
    check(sae, rows(), *forward(config, stored, rows()), tmp_path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sae_type": "crosscoder"}, "a 'crosscoder' has no counterpart"),
        ({"sae_type": "clt"}, "a 'clt' has no counterpart"),
        ({"use_glu_encoder": True}, "GLU encoder"),
        ({"act_fn": "layertopk"}, "act_fn = 'layertopk'"),
        ({"norm_activation": "batch-wise"}, "batch-wise"),
        ({"d_model": D_IN + 1}, "W_E has shape"),
        ({"d_model": 10**9}, "W_E has shape"),
        ({"expansion_factor": 100}, "W_E has shape"),
        ({"use_decoder_bias": False}, "unexpected b_D"),
        ({"act_fn": "topk"}, "unexpected activation_function"),
        ({"hook_point_in": "elsewhere", "hook_point_out": "elsewhere"}, "does not say by how much"),
    ],
)
def test_what_has_no_counterpart_is_refused(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    refused(write(tmp_path, tensors(settings()), settings(**changed)), format="llamascopium", names=message)


@pytest.mark.parametrize("norm", [0.0, -1.0, torch.nan, torch.inf])
def test_a_norm_that_is_none_is_refused(tmp_path: Path, norm: float) -> None:
    stored = tensors(settings()) | {NORM + HOOK: torch.tensor(norm)}
    refused(write(tmp_path, stored, settings()), format="llamascopium", names="must be positive")


def test_checkpoints_in_pieces_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(settings()))
    (tmp_path / "sae_weights.dcp").mkdir()
    refused(tmp_path, format="llamascopium", names=r"save \.dcp checkpoints")


def test_damaged_and_hostile_files_are_refused(tmp_path: Path) -> None:
    config = settings()
    stored = {name: t for name, t in tensors(config).items() if name != NORM + OUT}
    refused_if_damaged(lambda stored: write(tmp_path, stored, config), stored, "llamascopium")
    (tmp_path / "pt").mkdir()
    (tmp_path / "pt" / "config.json").write_text(json.dumps(config))
    refused_if_it_would_execute({"sae": stored}, tmp_path / "pt" / "sae_weights.pt", "llamascopium")

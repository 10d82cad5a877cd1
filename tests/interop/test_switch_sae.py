"""switch_sae."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from library_files import check, refused_if_damaged, refused_if_it_would_execute, rows, wave
from naive import D_IN, D_SAE, K, keep_largest
from torch import Tensor

import apportion as ap

EXPERTS = 5


def tensors(experts: int = EXPERTS) -> dict[str, Tensor]:
    return {
        "encoder.weight": wave(D_SAE, D_IN, seed=1),
        "router.weight": wave(experts, D_IN, seed=2, size=0.2),
        "decoder": wave(D_SAE, D_IN, seed=3),
        "b_dec": wave(D_IN, seed=4),
        "b_router": wave(D_IN, seed=5),
    }


def forward(stored: dict[str, Tensor], x: Tensor, k: int, heaviside: bool) -> tuple[Tensor, Tensor]:
    """As published: all experts are computed and masked, then the k largest of all latents are kept."""
    w, x = {name: t.double() for name, t in stored.items()}, x.double()
    p = ((x - w["b_router"]) @ w["router.weight"].T).softmax(-1)
    gate = keep_largest(p, 1)
    gate = (gate > 0).double() if heaviside else gate
    f = ((x - w["b_dec"]) @ w["encoder.weight"].T).relu()
    z = keep_largest(f * gate.repeat_interleave(D_SAE // p.shape[-1], dim=-1), k)
    return z, z @ w["decoder"] + w["b_dec"]


@pytest.mark.parametrize("heaviside", [False, True])
@pytest.mark.parametrize("k", [1, K, 4])
def test_codes_and_reconstructions_are_theirs(tmp_path: Path, k: int, heaviside: bool) -> None:
    torch.save(tensors(), tmp_path / "ae.pt")
    sae = ap.load(tmp_path, config={"k": k, "experts": EXPERTS, "heaviside": heaviside})
    assert (sae.name, sae.info["format"]) == ("switch", "switch_sae")
    z, y_hat = forward(tensors(), rows(), k, heaviside)
    assert len({int(row.nonzero()[0]) // (D_SAE // EXPERTS) for row in z if row.any()}) > 1, "several experts are used"
    check(sae, rows(), z, y_hat, tmp_path)


def test_gates_matter() -> None:
    gated, plain = (forward(tensors(), rows(), K, heaviside)[0] for heaviside in (False, True))
    assert (gated < 0.9 * plain).any()


def test_an_expert_may_have_fewer_latents_than_k(tmp_path: Path) -> None:
    torch.save(tensors(), tmp_path / "ae.pt")
    sae = ap.load(tmp_path / "ae.pt", config={"k": 7})
    assert sae.k == D_SAE // EXPERTS
    check(sae, rows(), *forward(tensors(), rows(), 7, False), tmp_path)


def test_settings_are_taken_from_the_file_beside_it(tmp_path: Path) -> None:
    torch.save(tensors(), tmp_path / "ae.pt")
    trainer = {"k": K, "experts": EXPERTS, "heaviside": True, "activation_dim": D_IN, "dict_size": D_SAE}
    (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer | {"lm_name": "pythia-70m"}}))
    sae = ap.load(tmp_path)
    assert sae.info["source"]["model"]["name_or_path"] == "EleutherAI/pythia-70m"
    check(sae, rows(), *forward(tensors(), rows(), K, True), tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "k = None"),
        ({"k": K, "experts": 4}, r"router\.weight has shape"),
        ({"k": 0}, "k = 0"),
        ({"k": K, "depth": 2}, "depth mean nothing"),
    ],
)
def test_what_is_not_stored_has_to_be_said_and_to_fit(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    torch.save(tensors(), tmp_path / "ae.pt")
    with pytest.raises(ValueError, match=message):
        ap.load(tmp_path, config=config)


def test_experts_that_do_not_divide_the_latents_are_refused(tmp_path: Path) -> None:
    torch.save(tensors(experts=7), tmp_path / "ae.pt")
    with pytest.raises(ValueError, match="does not divide d_sae"):
        ap.load(tmp_path, config={"k": 2})


def test_damaged_and_hostile_files_are_refused(tmp_path: Path) -> None:
    def write(stored: dict[str, Tensor]) -> Path:
        torch.save(stored, tmp_path / "ae.pt")
        return tmp_path / "ae.pt"

    refused_if_damaged(write, tensors(), "switch_sae", config={"k": K, "experts": EXPERTS})
    refused_if_it_would_execute(tensors(), tmp_path / "ae.pt", "switch_sae", config={"k": K})

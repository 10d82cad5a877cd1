"""e2e_sae."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from library_files import check, refused_if_damaged, refused_if_it_would_execute, rows, wave
from naive import D_IN, D_SAE
from torch import Tensor

import apportion as ap

HERE, THERE = "blocks.6.hook_resid_pre", "blocks.9.hook_mlp_out"


def tensors(position: str, seed: float = 0) -> dict[str, Tensor]:
    prefix = position.replace(".", "-")
    return {
        f"{prefix}.encoder.0.weight": wave(D_SAE, D_IN, seed=seed + 1),
        f"{prefix}.encoder.0.bias": wave(D_SAE, seed=seed + 2, size=0.3),
        f"{prefix}.decoder.weight": wave(D_IN, D_SAE, seed=seed + 3, size=3),  # far from unit norm
        f"{prefix}.decoder.bias": wave(D_IN, seed=seed + 4),
    }


def forward(stored: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    W_enc, b_enc, W_dec, b_dec = (t.double() for t in stored.values())
    z = (x.double() @ W_enc.T + b_enc).relu()
    return z, z @ (W_dec / W_dec.norm(dim=0)).T + b_dec


def test_codes_and_reconstructions_are_theirs(tmp_path: Path) -> None:
    torch.save(tensors(HERE), tmp_path / "samples_400000.pt")
    sae = ap.load(tmp_path)
    assert (sae.name, sae.info["format"], sae.hookpoint) == ("relu", "e2e_sae", None)
    assert sae.info["source"]["hook_name"] == HERE
    check(sae, rows(), *forward(tensors(HERE), rows()), tmp_path)


@pytest.mark.parametrize(("position", "seed"), [(HERE, 0), (THERE, 10), (THERE.replace(".", "-"), 10)])
def test_which_of_several_has_to_be_said(tmp_path: Path, position: str, seed: float) -> None:
    torch.save(tensors(HERE) | tensors(THERE, seed=10), tmp_path / "samples_1.pt")
    (tmp_path / "final_config.yaml").write_text("seed: 0\ntlens_model_name: gpt2-small\ntlens_model_path: null\n")
    with pytest.raises(ValueError, match=rf"SAEs at {HERE}, {THERE}\. Say which"):
        ap.load(tmp_path)
    with pytest.raises(ValueError, match=r"and none at 'blocks\.7"):
        ap.load(tmp_path, config={"position": "blocks.7.hook_resid_pre"})
    sae = ap.load(tmp_path, config={"position": position})
    assert sae.hookpoint == ("transformer.h.6:in" if seed == 0 else "transformer.h.9.mlp")
    check(sae, rows(), *forward(tensors(position, seed), rows()), tmp_path)


def test_which_of_several_checkpoints_has_to_be_said(tmp_path: Path) -> None:
    for n in (1, 2):
        torch.save(tensors(HERE), tmp_path / f"samples_{n}.pt")
    with pytest.raises(ValueError, match=r"several files: samples_1\.pt, samples_2\.pt"):
        ap.load(tmp_path)


def test_what_else_the_sae_has_is_not_ignored(tmp_path: Path) -> None:
    prefix = HERE.replace(".", "-")
    torch.save(tensors(HERE) | {f"{prefix}.encoder.2.weight": torch.ones(2)}, tmp_path / "samples_1.pt")
    with pytest.raises(ValueError, match=r"unexpected encoder\.2\.weight"):
        ap.load(tmp_path)


def test_damaged_and_hostile_files_are_refused(tmp_path: Path) -> None:
    def write(stored: dict[str, Tensor]) -> Path:
        torch.save(stored, tmp_path / "samples_1.pt")
        return tmp_path / "samples_1.pt"

    refused_if_damaged(write, tensors(HERE), "e2e_sae")
    refused_if_it_would_execute(tensors(HERE), tmp_path / "samples_1.pt", "e2e_sae")

"""OpenAI's sparse_autoencoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from library_files import check, refused_if_damaged, refused_if_it_would_execute, rows, standardised, wave
from naive import D_IN, D_SAE, K, keep_largest
from torch import Tensor

import apportion as ap


def tensors(**others: Tensor) -> dict[str, Tensor]:
    stored = {
        "pre_bias": wave(D_IN, seed=1),
        "latent_bias": wave(D_SAE, seed=2, size=0.3),
        "encoder.weight": wave(D_SAE, D_IN, seed=3),
        "decoder.weight": wave(D_IN, D_SAE, seed=4),
        "stats_last_nonzero": torch.arange(D_SAE),
        "latents_activation_frequency": torch.ones(D_SAE),
    }
    return stored | others


TOPK = {"activation": "TopK", "activation_state_dict": {"k": K, "postact_fn": "ReLU"}}


def forward(stored: dict[str, Tensor], x: Tensor, k: int | None) -> tuple[Tensor, Tensor]:
    w = {name: t.double() for name, t in stored.items()}
    x, mean, std = standardised(x.double()) if k else (x.double(), 0, 1)
    z = (x - w["pre_bias"]) @ w["encoder.weight"].T + w["latent_bias"]
    z = (keep_largest(z, k) if k else z).relu()
    return z, (z @ w["decoder.weight"].T + w["pre_bias"]) * std + mean


@pytest.mark.parametrize("k", [K, None])
def test_codes_and_reconstructions_are_theirs(tmp_path: Path, k: int | None) -> None:
    torch.save(tensors() | (TOPK if k else {"activation": "ReLU"}), tmp_path / "ae.pt")
    sae = ap.load(tmp_path)
    assert (sae.name, sae.info["format"]) == ("topk" if k else "relu", "openai")
    check(sae, rows(), *forward(tensors(), rows(), k), tmp_path)


def test_without_a_name_the_activation_is_relu(tmp_path: Path) -> None:
    torch.save(tensors(), tmp_path / "0.pt")
    check(ap.load(tmp_path / "0.pt"), rows(), *forward(tensors(), rows(), None), tmp_path)


def test_what_the_library_cannot_read_itself_is_ignored(tmp_path: Path) -> None:
    torch.save(
        tensors() | TOPK | {"activation.k": torch.tensor(K), "activation.postact_fn": "ReLU"}, tmp_path / "ae.pt"
    )
    check(ap.load(tmp_path), rows(), *forward(tensors(), rows(), K), tmp_path)


def test_a_tied_decoder_is_the_encoder(tmp_path: Path) -> None:
    tied = tensors()
    del tied["decoder.weight"]
    torch.save(tied | {"decoder.linear.weight": tied["encoder.weight"]} | TOPK, tmp_path / "ae.pt")
    sae = ap.load(tmp_path)
    check(sae, rows(), *forward(tied | {"decoder.weight": tied["encoder.weight"].T}, rows(), K), tmp_path)
    assert sae.W_enc.data_ptr() != sae.W_dec.data_ptr()
    torch.save(tied | {"decoder.linear.weight": tied["encoder.weight"] + 1}, tmp_path / "ae.pt")
    with pytest.raises(ValueError, match="differs from encoder"):
        ap.load(tmp_path)


@pytest.mark.parametrize(
    ("folder", "hookpoint"),
    [("resid_post_attn_v5_32k", "transformer.h.6.ln_2:in"), ("mlp_post_act", "transformer.h.6.mlp.act"), ("x", None)],
)
def test_the_place_follows_from_the_path(tmp_path: Path, folder: str, hookpoint: str | None) -> None:
    file = tmp_path / folder / "autoencoders" / "6.pt"
    file.parent.mkdir(parents=True)
    torch.save(tensors() | TOPK, file)
    assert ap.load(file).hookpoint == hookpoint


@pytest.mark.parametrize(
    "activation",
    [{"activation": "Identity"}, {"activation": "TopK", "activation_state_dict": {"k": 3, "postact_fn": "Identity"}}],
)
def test_codes_that_could_be_negative_are_refused(tmp_path: Path, activation: dict[str, Any]) -> None:
    torch.save(tensors() | activation, tmp_path / "ae.pt")
    with pytest.raises(ValueError, match=r"ae\.pt: the activation .* has no counterpart"):
        ap.load(tmp_path)


@pytest.mark.parametrize("k", [D_SAE + 1, 0, 2.5, "many", None])
def test_an_impossible_k_is_refused(tmp_path: Path, k: Any) -> None:
    torch.save(tensors() | {"activation": "TopK", "activation_state_dict": {"k": k}}, tmp_path / "ae.pt")
    with pytest.raises(ValueError, match="k"):
        ap.load(tmp_path)


def test_which_of_several_files_has_to_be_said(tmp_path: Path) -> None:
    for layer in (0, 1):
        torch.save(tensors() | TOPK, tmp_path / f"{layer}.pt")
    with pytest.raises(ValueError, match=r"several files: 0\.pt, 1\.pt\. Give one"):
        ap.load(tmp_path)


def test_damaged_and_hostile_files_are_refused(tmp_path: Path) -> None:
    def write(stored: dict[str, Tensor]) -> Path:
        torch.save(stored | TOPK, tmp_path / "ae.pt")
        return tmp_path / "ae.pt"

    needed = {name: t for name, t in tensors().items() if not name.startswith(("stats", "latents"))}
    refused_if_damaged(write, needed, "openai")
    refused_if_it_would_execute(tensors() | TOPK, tmp_path / "ae.pt", "openai")

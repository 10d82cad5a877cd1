"""sparsify: sparse autoencoders, transcoders and skips, from files made by formula."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from naive import D_IN, D_SAE, K, assert_loads_as, inputs, keep_largest, rand
from safetensors.torch import save_file
from torch import Tensor

import apportion as ap

SETTINGS = {
    "activation": "topk",
    "expansion_factor": 32,
    "normalize_decoder": True,
    "num_latents": D_SAE,
    "k": K,
    "multi_topk": False,
    "skip_connection": False,
    "transcode": False,
    "d_in": D_IN,
}


def tensors_of(settings: dict[str, Any], d_sae: int = D_SAE) -> dict[str, Tensor]:
    stored = {
        "encoder.weight": rand(d_sae, D_IN, seed=1),
        "encoder.bias": rand(d_sae, seed=2, scale=0.3),
        "W_dec": rand(d_sae, D_IN, seed=3),
        "b_dec": rand(D_IN, seed=4, scale=0.3),
    }
    return stored | ({"W_skip": rand(D_IN, D_IN, seed=5)} if settings.get("skip_connection") else {})


def forward(stored: dict[str, Tensor], settings: dict[str, Any], x: Tensor) -> tuple[Tensor, Tensor]:
    t, x = {name: tensor.double() for name, tensor in stored.items()}, x.double()
    inside = x if settings.get("transcode") else x - t["b_dec"]
    z = keep_largest((inside @ t["encoder.weight"].T + t["encoder.bias"]).relu(), settings["k"])
    y = z @ t["W_dec"] + t["b_dec"]
    return z, y + x @ t["W_skip"].T if "W_skip" in t else y


def write(folder: Path, settings: dict[str, Any], stored: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps(settings))
    save_file(stored, folder / "sae.safetensors")
    return folder


KINDS = {
    "an SAE": ({}, "topk"),
    "trained at 4 k, too": ({"multi_topk": True}, "topk"),
    "a transcoder": ({"transcode": True}, "transcoder"),
    "a transcoder with a skip": ({"transcode": True, "skip_connection": True}, "skip_transcoder"),
    "an SAE with a skip": ({"skip_connection": True}, "skip_transcoder"),
}


@pytest.mark.parametrize(("more", "name"), KINDS.values(), ids=list(KINDS))
def test_kinds(more, name, tmp_path):
    settings, x = SETTINGS | more, inputs()
    stored = tensors_of(settings)
    folder = write(tmp_path / "layers.3.mlp", settings, stored)
    sae = assert_loads_as(folder, x, *forward(stored, settings, x), tmp_path)
    assert sae.name == name and sae.info == {"original": settings, "format": "sparsify"}


def test_width_by_expansion_and_older_configurations(tmp_path):
    settings, x = {"expansion_factor": 4, "normalize_decoder": True, "k": K, "signed": False, "d_in": D_IN}, inputs()
    stored = tensors_of(settings, 4 * D_IN)
    for changed in (settings, settings | {"num_latents": 0}):
        assert_loads_as(write(tmp_path, changed, stored), x, *forward(stored, settings, x), tmp_path)


@pytest.mark.parametrize(
    ("model", "folder", "hookpoint"),
    [
        ("EleutherAI/pythia-160m", "layers.3.mlp", "gpt_neox.layers.3.mlp"),
        ("EleutherAI/pythia-160m", "layers.3/seed1", "gpt_neox.layers.3"),
        ("meta-llama/Llama-3.1-8B", "layers.10", "model.layers.10"),
        ("openai-community/gpt2", "h.5.attn", "transformer.h.5.attn"),
        ("somebody/unknown", "layers.3", None),
        ("openai-community/gpt2", "embed", None),
        (None, "layers.3", None),
    ],
)
def test_the_hookpoint_is_the_name_of_the_folder(model, folder, hookpoint, tmp_path):
    transcoder = SETTINGS | {"transcode": True}
    place = write(tmp_path / "run" / folder, transcoder, tensors_of(transcoder))
    (tmp_path / "run" / "config.json").write_text(json.dumps({"model": model, "batch_size": 32}))
    sae = ap.load(tmp_path / "run", subfolder=folder)
    assert sae.target_hookpoint == hookpoint
    assert sae.hookpoint == (hookpoint and f"{hookpoint}:in")
    assert sae.source.to_json() == ({"model": {"name_or_path": model}} if model else {})
    write(place, SETTINGS, tensors_of(SETTINGS))
    assert ap.load(place / "sae.safetensors").hookpoint == hookpoint


REFUSED = {
    "groups": ({"activation": "groupmax"}, {}, "'groupmax'.*no counterpart"),
    "signs": ({"signed": True}, {}, "signed = True has no counterpart"),
    "an enormous width": ({"num_latents": 10**15}, {}, r"expected \[1000000000000000, 6\]"),
    "another width": ({"d_in": 7}, {}, r"encoder.weight has shape \[20, 6\], expected \[20, 7\]"),
    "a width in words": ({"d_in": "6"}, {}, "expected"),
    "no k": ({"k": None}, {}, "k = None"),
    "no skip": ({"skip_connection": True}, {}, "W_skip is missing"),
    "a skip that nobody mentions": ({}, {"W_skip": torch.ones(D_IN, D_IN)}, "unexpected W_skip"),
    "transposed": ({}, {"W_dec": torch.ones(D_IN, D_SAE)}, r"W_dec has shape \[6, 20\], expected \[20, 6\]"),
    "infinite": ({}, {"encoder.bias": torch.full((D_SAE,), torch.inf)}, "encoder.bias holds NaN or infinity"),
    "whole numbers": ({}, {"b_dec": torch.ones(D_IN, dtype=torch.int64)}, "b_dec holds torch.int64"),
}


@pytest.mark.parametrize(("lie", "change", "message"), REFUSED.values(), ids=list(REFUSED))
def test_refused(lie, change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        ap.load(write(tmp_path, SETTINGS | lie, tensors_of(SETTINGS) | change))


@pytest.mark.parametrize("more", [settings for settings, _ in KINDS.values()], ids=list(KINDS))
def test_what_the_library_writes(more, tmp_path):
    """The package itself, where it is installed."""
    pytest.importorskip("sparsify")
    from sparsify import SparseCoder
    from sparsify.config import SparseCoderConfig

    theirs, x = SparseCoder(D_IN, SparseCoderConfig(num_latents=D_SAE, k=K, **more)), inputs()
    with torch.no_grad():
        for i, p in enumerate(theirs.parameters()):
            p.copy_(rand(*p.shape, seed=i))
        theirs.save_to_disk(tmp_path / "theirs")
        found = theirs.encode(x)
        y = theirs.decode(found.top_acts, found.top_indices)
        y = y if theirs.W_skip is None else y + x @ theirs.W_skip.T
    z = torch.zeros(len(x), D_SAE).scatter(1, found.top_indices, found.top_acts)
    assert_loads_as(tmp_path / "theirs", x, z.detach(), y, tmp_path)

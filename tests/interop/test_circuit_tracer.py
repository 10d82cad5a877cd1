"""circuit-tracer: transcoders of one layer each, from files made by formula."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from library_files import check, refused, refused_if_damaged, rows, wave
from naive import D_IN, D_SAE, K, keep_largest
from safetensors.torch import save_file
from torch import Tensor

import apportion as ap

CONFIG = """# made by hand
model_name: "Qwen/Qwen3-4B"   # on the Hub
model_kind: transcoder_set
scan: null
transcoders:
- "hf://org/repo/layer_0.safetensors"
feature_input_hook: mlp.hook_in
feature_output_hook: 'mlp.hook_out'
"""
D_OUT = 5


def tensors(kind: str = "relu", d_out: int = D_IN) -> dict[str, Tensor]:
    stored = {
        "W_enc": wave(D_SAE, D_IN, seed=1),
        "W_dec": wave(D_SAE, d_out, seed=2),
        "b_enc": wave(D_SAE, seed=3),
        "b_dec": wave(d_out, seed=4),
    }
    if "threshold" in kind:
        stored[kind] = wave(D_SAE, seed=5).abs()
    if kind == "skip":
        stored["W_skip"] = wave(d_out, D_IN, seed=6)
    return stored | ({"k": torch.tensor(K)} if kind == "k" else {})


def forward(stored: dict[str, Tensor], x: Tensor, k: int | None = None) -> tuple[Tensor, Tensor]:
    w, x = {name: t.double() for name, t in stored.items()}, x.double()
    a = x @ w["W_enc"].T + w["b_enc"]
    theta = w.get("activation_function.threshold", w.get("threshold", torch.zeros(1)))
    z = a.relu() * (a > theta)
    z = z if k is None else keep_largest(z, k)
    y = z @ w["W_dec"] + w["b_dec"]
    return z, y + x @ w["W_skip"].T if "W_skip" in w else y


def write(folder: Path, stored: dict[str, Tensor], config: str | None = CONFIG, name: str = "layer_3") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(stored, folder / f"{name}.safetensors")
    if config is not None:
        (folder / "config.yaml").write_text(config)
    return folder / f"{name}.safetensors"


@pytest.mark.parametrize("d_out", [D_IN, D_OUT])
@pytest.mark.parametrize("kind", ["relu", "activation_function.threshold", "threshold", "skip", "k"])
def test_codes_and_outputs_are_theirs(kind: str, d_out: int, tmp_path: Path) -> None:
    file, stored = write(tmp_path / "set", tensors(kind, d_out)), tensors(kind, d_out)
    sae = ap.load(file)
    check(sae, rows(), *forward(stored, rows(), K if kind == "k" else None), tmp_path)
    assert (sae.name, sae.needs_target) == ("skip_transcoder" if kind == "skip" else "transcoder", True)
    assert (sae.info["format"], sae.d_out) == ("circuit_tracer", d_out)
    assert (sae.hookpoint, sae.target_hookpoint) == ("model.layers.3.mlp:in", "model.layers.3.mlp")
    assert sae.info["source"]["model"] == {"name_or_path": "Qwen/Qwen3-4B"}
    assert sae.info["original"]["model_kind"] == "transcoder_set" and "scan" not in sae.info["original"]


def test_topk_by_the_configuration(tmp_path: Path) -> None:
    file = write(tmp_path / "a", tensors(), CONFIG + f"activation: topk\nk: {K}\n")
    check(ap.load(file), rows(), *forward(tensors(), rows(), K), tmp_path)
    file = write(tmp_path / "b", tensors(), CONFIG + "activation: topk\n")
    refused(file, format="circuit_tracer", names="config={'k': 32}")
    check(ap.load(file, config={"k": K}), rows(), *forward(tensors(), rows(), K), tmp_path / "b")


@pytest.mark.parametrize(
    ("model", "into", "out", "hookpoint", "target"),
    [
        ("meta-llama/Llama-3.2-1B", "mlp.hook_in", "mlp.hook_out", "model.layers.3.mlp:in", "model.layers.3.mlp"),
        ("meta-llama/Llama-3.2-1B", "hook_resid_mid", "hook_mlp_out",
         "model.layers.3.post_attention_layernorm:in", "model.layers.3.mlp"),
        ("google/gemma-2-2b", "ln2.hook_normalized", "hook_mlp_out", None, "model.layers.3.post_feedforward_layernorm"),
        ("google/gemma-2-2b", "mlp.hook_in", "mlp.hook_out", "model.layers.3.mlp:in", "model.layers.3.mlp"),
        ("gpt2", "hook_mlp_in", "hook_mlp_out", "transformer.h.3.ln_2:in", "transformer.h.3.mlp"),
        ("my/model", "mlp.hook_in", "mlp.hook_out", None, None),
    ],
)  # fmt: skip
def test_places(model, into, out, hookpoint, target, tmp_path: Path) -> None:
    config = f"model_name: {model}\nfeature_input_hook: {into}\nfeature_output_hook: {out}\n"
    sae = ap.load(write(tmp_path, tensors(), config))
    assert (sae.hookpoint, sae.target_hookpoint) == (hookpoint, target)
    assert sae.info["source"]["hook_name"] == f"blocks.3.{into}"


def test_without_a_configuration(tmp_path: Path) -> None:
    sae = ap.load(write(tmp_path / "a", tensors(), None))
    check(sae, rows(), *forward(tensors(), rows()), tmp_path)
    assert sae.hookpoint is None


def test_a_folder_of_several_layers(tmp_path: Path) -> None:
    for layer in (0, 2, 10):
        stored = tensors()
        stored["b_dec"] += layer
        write(tmp_path, stored, name=f"layer_{layer}")
    names = (
        r"3 layers: layer_0\.safetensors, layer_2\.safetensors, layer_10\.safetensors\. Name one: .*subfolder='layer_0"
    )
    refused(tmp_path, format="circuit_tracer", names=names)
    sae = ap.load(tmp_path, "layer_10.safetensors")
    assert torch.allclose(sae.b_dec, tensors()["b_dec"] + 10) and sae.hookpoint == "model.layers.10.mlp:in"


def test_the_only_layer_of_a_folder(tmp_path: Path) -> None:
    write(tmp_path, tensors())
    assert ap.load(tmp_path).hookpoint == "model.layers.3.mlp:in"


def test_cross_layer_transcoders_are_refused(tmp_path: Path) -> None:
    encoder = {"W_enc_0": tensors()["W_enc"], "b_enc_0": tensors()["b_enc"], "b_dec_0": tensors()["b_dec"]}
    file = write(tmp_path / "a", encoder, name="W_enc_0")
    save_file({"W_dec_0": wave(D_SAE, 4, D_IN, seed=1)}, tmp_path / "a" / "W_dec_0.safetensors")
    for path in (file, tmp_path / "a", tmp_path / "a" / "W_dec_0.safetensors"):
        refused(path, format="circuit_tracer", names="cross-layer transcoder, which writes to several layers")
    file = write(tmp_path / "b", tensors(), CONFIG.replace("transcoder_set", "cross_layer_transcoder"))
    refused(file, format="circuit_tracer", names="cross-layer transcoder")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("activation: gelu\n", "the activation 'gelu' has no counterpart here"),
        ("activation: topk\nk: many\n", "k = None"),
    ],
)
def test_what_is_not_known(config: str, message: str, tmp_path: Path) -> None:
    refused(write(tmp_path, tensors(), config), format="circuit_tracer", names=message)


def test_damaged_files(tmp_path: Path) -> None:
    refused_if_damaged(lambda t: write(tmp_path, t), tensors(), "circuit_tracer")
    for shape in ((D_OUT, D_IN), (D_IN, D_IN + 1)):
        skip = {"W_skip": wave(*shape, seed=7)}
        refused(write(tmp_path, tensors() | skip), format="circuit_tracer", names="W_skip has shape")


def test_a_transcoder_goes_on_to_sae_lens_with_names_of_one_kind(tmp_path: Path) -> None:
    import json

    ap.export(ap.load(write(tmp_path / "a", tensors("skip"))), tmp_path / "b", "sae_lens")
    metadata = json.loads((tmp_path / "b" / "cfg.json").read_text())["metadata"]
    assert (metadata["hook_name"], metadata["hook_name_out"]) == ("blocks.3.mlp.hook_in", "blocks.3.hook_mlp_out")
    hf = (metadata["hf_hook_name"], metadata["hf_hook_name_out"])
    assert hf == ("model.layers.3.post_attention_layernorm", "model.layers.3.mlp")

"""SAEs of models with centred writing weights: right codes on models that are not centred, and a word on the rest."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import Hub, Repo
from naive import CLOSE, D_IN, D_SAE, differs, inputs
from safetensors.torch import save
from test_sae_lens import METADATA, forward, settings_of, tensors_of, write

import apportion as ap
from apportion.interop.hook_names import LAYER_NORM, is_centred
from apportion.interop.releases import CENTRED, RELEASES
from apportion.language.hook_names import LAYERS, STREAM, WITHIN, to_hookpoint
from apportion.language.hookpoints import hooked

CENTRE = {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
X = inputs() + 3 * torch.arange(len(inputs()))[:, None]
"""Every token with another mean over the width."""


def centred(x: torch.Tensor) -> torch.Tensor:
    return x - x.mean(-1, keepdim=True)


def folder_of(tmp_path: Path, architecture: str, place: dict[str, Any], **more: Any) -> tuple[Path, dict[str, Any]]:
    settings = settings_of(architecture, metadata=METADATA | CENTRE | place, **more)
    return write(tmp_path / "theirs", settings, tensors_of(architecture)), settings


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.WARNING, logger="apportion")
    return caplog


@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu", "gated"])
def test_codes_are_those_of_centred_activations(architecture, subtract, tmp_path, said):
    folder, settings = folder_of(tmp_path, architecture, {}, apply_b_dec_to_input=subtract)
    z, y = forward(tensors_of(architecture), settings, centred(X))
    sae = ap.load(folder)
    for x in (X, centred(X)):
        found = sae.encode(x)
        assert differs(found.dense(), z) < CLOSE and torch.equal(found.dense() != 0, z != 0)
        assert differs(sae.decode(found), y) < CLOSE, "reconstructions stay centred"
    assert len(said.records) == 1 and "mean counts as not reconstructed" in said.text and str(folder) in said.text
    ap.load(folder)
    assert len(said.records) == 2, "each time"


@pytest.mark.parametrize("rescale", [True, False])
def test_after_everything_else_is_folded(rescale, tmp_path):
    """Centring comes before the scale, decoder norms and a whitening: all of these are about what is left."""
    folder, settings = folder_of(tmp_path, "topk", {}, rescale_acts_by_decoder_norm=rescale)
    (folder / "activation_scaler.json").write_text(json.dumps({"scaling_factor": 0.4}))
    _, y = forward(tensors_of("topk"), settings, 0.4 * centred(X))
    assert differs(ap.load(folder)(X), y / 0.4) < CLOSE


@pytest.mark.parametrize(("norm", "folds"), [("layer_norm", True), ("constant_norm_rescale", False)])
def test_tokens_that_are_normalised_singly(norm, folds, tmp_path, said):
    """A LayerNorm of its own removes means by itself and puts them back; a norm does not fold, which is said."""
    folder, settings = folder_of(tmp_path, "standard", {}, normalize_activations=norm)
    sae = ap.load(folder)
    if folds:
        z, y = forward(tensors_of("standard"), settings, X)
        assert differs(sae.encode(X).dense(), z) < CLOSE and differs(sae(X), y) < CLOSE
        assert not said.records
    else:
        assert "could not be folded" in said.text


PLACES = {
    "the stream": ("pythia-70m", "blocks.3.hook_resid_pre", True),
    "between": ("gpt2-small", "blocks.3.hook_resid_mid", True),
    "attention": ("gpt2-small", "blocks.3.hook_attn_out", True),
    "MLP": ("gpt2-small", "blocks.3.hook_mlp_out", True),
    "heads": ("gpt2-small", "blocks.3.attn.hook_z", False),
    "neurons": ("gpt2-small", "blocks.3.mlp.hook_post", False),
    "behind a norm": ("gpt2-small", "blocks.3.mlp.hook_in", False),
    "RMSNorm": ("google/gemma-2-2b", "blocks.3.hook_resid_post", False),
}


@pytest.mark.parametrize(("model", "hook", "folds"), PLACES.values(), ids=list(PLACES))
def test_where_there_is_something_to_centre(model, hook, folds, tmp_path, said):
    folder, settings = folder_of(tmp_path, "standard", {"model_name": model, "hook_name": hook})
    z, _ = forward(tensors_of("standard"), settings, centred(X) if folds else X)
    assert differs(ap.load(folder).encode(X).dense(), z) < CLOSE
    assert bool(said.records) == folds


def test_a_model_that_is_not_known_is_left_to_the_caller(tmp_path, said):
    folder, settings = folder_of(tmp_path, "standard", {"model_name": "my/own"})
    assert differs(ap.load(folder).encode(X).dense(), forward(tensors_of("standard"), settings, X)[0]) < CLOSE
    assert "give it centred activations" in said.text


def test_files_that_do_not_say_so_are_read_as_before(tmp_path, said):
    settings = settings_of("standard")
    folder = write(tmp_path / "theirs", settings, tensors_of("standard"))
    assert differs(ap.load(folder).encode(X).dense(), forward(tensors_of("standard"), settings, X)[0]) < CLOSE
    assert not said.records


def test_a_transcoder_of_the_stream(tmp_path, said):
    place = {"model_name": "gpt2", "hook_name": "blocks.3.hook_resid_mid", "hook_name_out": "blocks.3.hook_mlp_out"}
    folder, settings = folder_of(tmp_path, "skip_transcoder", place)
    z, y = forward(tensors_of("skip_transcoder"), settings, centred(X))
    sae = ap.load(folder)
    assert differs(sae.encode(X).dense(), z) < CLOSE and differs(sae(X), y) < CLOSE
    assert (sae.hookpoint, sae.target_hookpoint) == ("transformer.h.3.ln_2:in", "transformer.h.3.mlp")
    assert said.records


def test_the_setting_travels_and_folding_again_changes_nothing(tmp_path):
    folder, _ = folder_of(tmp_path, "gated", {})
    sae = ap.load(folder)
    sae.save(tmp_path / "ours")
    ap.export(ap.load(tmp_path / "ours"), tmp_path / "back", "sae_lens")
    metadata = json.loads((tmp_path / "back" / "cfg.json").read_text())["metadata"]
    assert metadata["model_from_pretrained_kwargs"] == {"center_writing_weights": True}
    again = ap.load(tmp_path / "back")
    assert differs(again.encode(X).dense(), sae.encode(X).dense()) < CLOSE and differs(again(X), sae(X)) < CLOSE


def test_what_is_told_by_the_caller(tmp_path):
    settings = settings_of("standard")
    folder = write(tmp_path / "theirs", settings, tensors_of("standard"))
    sae = ap.load(folder, config=CENTRE)
    assert differs(sae.encode(X).dense(), forward(tensors_of("standard"), settings, centred(X))[0]) < CLOSE
    ap.export(sae, tmp_path / "back", "sae_lens")
    told = json.loads((tmp_path / "back" / "cfg.json").read_text())["metadata"]
    assert told["model_from_pretrained_kwargs"] == CENTRE["model_from_pretrained_kwargs"]


@pytest.mark.parametrize("hook", ["mlp.hook_in", "attn.hook_z"])
def test_what_else_is_folded_into_a_model_leaves_no_hookpoint(hook, tmp_path):
    folding = {"mlp.hook_in": "fold_ln", "attn.hook_z": "fold_value_biases"}[hook]
    for value, hookpoint in ((True, None), (False, to_hookpoint(f"blocks.1.{hook}", "gpt2"))):
        place = {"model_name": "gpt2", "hook_name": f"blocks.1.{hook}"}
        kwargs = {"model_from_pretrained_kwargs": {folding: value}}
        settings = settings_of("standard", metadata=METADATA | place | kwargs)
        assert ap.load(write(tmp_path / str(value), settings, tensors_of("standard"))).hookpoint == hookpoint


def test_names_that_write_to_the_stream() -> None:
    models = {"gpt2": "gpt2", "gpt_neox": "pythia-70m", "llama": "meta-llama/Llama-3.1-8B"}
    for family, model in models.items():
        for name in [*STREAM, *WITHIN[family]]:
            wanted = name.startswith("hook_") and family in LAYER_NORM
            assert is_centred(f"blocks.0.{name}", model) is wanted, (family, name)
    assert is_centred("blocks.0.hook_resid_pre", "no/such") is None and is_centred(None, "gpt2") is False
    assert set(LAYER_NORM) <= set(LAYERS)


class TestReleases:
    """The list of SAELens says it of some repositories whose files do not."""

    @pytest.fixture
    def hub(self, monkeypatch, tmp_path):
        constants = pytest.importorskip("huggingface_hub.constants")
        hub = Hub()
        for name, value in {"HF_ENDPOINT": hub.url, "HF_TOKEN": "nobody", "NO_PROXY": "127.0.0.1"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield hub
        hub.close()

    @pytest.mark.parametrize("name", ["gpt2-small-res-jb", "jbloom/GPT2-Small-SAEs-Reformatted", "org/other"])
    def test_by_alias_and_by_repository(self, name, hub, said):
        place = "blocks.8.hook_resid_pre"
        config = {"d_in": D_IN, "d_sae": D_SAE, "model_name": "gpt2-small", "hook_name": place}
        stored = {n: t.contiguous() for n, t in tensors_of("standard").items()}
        files = {f"{place}/cfg.json": json.dumps(config).encode(), f"{place}/sae_weights.safetensors": save(stored)}
        hub.repos[RELEASES[name].repo if name in RELEASES else name] = Repo(files)
        sae = ap.load(name, place)
        settings = settings_of("standard")
        z, _ = forward(tensors_of("standard"), settings, X if name == "org/other" else centred(X))
        assert differs(sae.encode(X).dense(), z) < CLOSE
        assert bool(said.records) == (name != "org/other")

    def test_those_that_the_list_names(self):
        aliases = {name for name, release in RELEASES.items() if release.repo in CENTRED}
        assert aliases == {"gpt2-small-res-jb", "gpt2-small-res-jb-feature-splitting"}


@torch.no_grad()
def test_a_model_with_layer_norms_does_not_notice(tmp_path):
    """Cross-entropy with centred reconstructions is that with the means put back, which is why splicing is right."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_layer=2, n_head=2, n_embd=D_IN, n_positions=16)).eval()
    for p in model.parameters():
        p.add_(0.3 * torch.randn_like(p))
    folder, _ = folder_of(tmp_path, "standard", {"model_name": "gpt2", "hook_name": "blocks.1.hook_resid_pre"})
    sae, ids = ap.load(folder), torch.arange(8)[None]
    logits = {}
    for name, change in {
        "centred": lambda x: sae(x),
        "with means": lambda x: sae(x) + x.mean(-1, keepdim=True),
        "without the SAE": lambda x: x,
    }.items():
        with hooked(model, {sae.hookpoint: change}):
            logits[name] = model(ids).logits
    assert torch.allclose(logits["centred"], logits["with means"], atol=1e-4)
    assert not torch.allclose(logits["centred"], logits["without the SAE"], atol=1e-2)


class TestLibrariesThatProcessModels:
    """Their files do not say so: numbers stay as they are in the file, and a warning says what may have been done."""

    @pytest.mark.parametrize(("model", "warned"), [("gpt2-small", True), ("google/gemma-2-2b", False), (None, False)])
    def test_e2e_sae(self, model, warned, tmp_path, said):
        stored = tensors_of("standard")
        names = {"encoder.0.weight": stored["W_enc"].T, "encoder.0.bias": stored["b_enc"]}
        names |= {"decoder.weight": stored["W_dec"].T, "decoder.bias": stored["b_dec"]}
        torch.save({f"blocks-1-hook_resid_pre.{n}": t for n, t in names.items()}, tmp_path / "samples_5.pt")
        if model is not None:
            (tmp_path / "final_config.yaml").write_text(f"seed: 0\ntlens_model_name: {model}\n")
        z, _ = forward(stored, settings_of("standard", apply_b_dec_to_input=False), X)
        assert differs(ap.load(tmp_path / "samples_5.pt").encode(X).dense(), z) < CLOSE
        assert bool(said.records) == warned and ("from_pretrained" in said.text) == warned

    @pytest.mark.parametrize(
        ("changed", "warned"),
        [
            ({}, True),
            ({"input_unit_norm": True}, False),
            ({"hook_point": "blocks.8.mlp.hook_post"}, False),
            ({"sae_type": "batch-topk"}, False),
        ],
    )
    def test_batchtopk_repo(self, changed, warned, tmp_path, said):
        settings = {"act_size": D_IN, "dict_size": D_SAE, "top_k": 3, "input_unit_norm": False, "sae_type": "vanilla"}
        settings |= {"model_name": "gpt2-small", "hook_point": "blocks.8.hook_resid_pre"} | changed
        stored = tensors_of("standard")
        if settings["sae_type"] == "batch-topk":
            stored["threshold"] = torch.tensor(0.3)
        torch.save(stored, tmp_path / "sae.pt")
        (tmp_path / "config.json").write_text(json.dumps(settings))
        ap.load(tmp_path)
        assert bool(said.records) == warned

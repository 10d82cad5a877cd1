"""Ours in the files of other libraries: equal numbers where a format fits, one clear error where it does not."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from naive import CLOSE, D_IN, D_SAE, differs
from safetensors.torch import load_file
from trained import DATA, SAES, trained

import apportion as ap
from apportion.interop import sparsify
from apportion.interop.assemble import take_apart
from apportion.interop.export import unit, writable

FORMATS = ["sae_lens", "dictionary_learning", "sparsify", "gemma_scope"]
THRESHOLDS = ("mutual_choice", "feature_choice", "jumprelu", "relu", "threshold")


def fits(name: str, settings: dict[str, Any], format: str) -> bool:
    """What the table in export.py promises."""
    transcoder, rule = "transcoder" in name, settings.get("allocation", name)
    thresholds = rule in THRESHOLDS or name == "matryoshka"
    per_token = name == "mlsae" or settings.get("input_norm", "").startswith("token")
    if name == "switch" or (per_token and format != "sae_lens"):
        return False
    if format == "sae_lens":
        return thresholds or not transcoder
    if format == "dictionary_learning":
        return not transcoder
    if format == "gemma_scope":
        return thresholds
    return not thresholds and name != "gated" and "d_out" not in settings


@pytest.mark.few(10)
@pytest.mark.parametrize(("name", "settings"), SAES, ids=str)
def test_every_format_holds_it_or_says_why_not(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    sae = trained(name, **settings)
    x = DATA[:40]
    z = sae.encode(x)
    assert 0 < z.nnz < z.tokens * D_SAE
    for format in FORMATS:
        folder = tmp_path / format
        if not fits(name, settings, format):
            with pytest.raises(ValueError, match=r"sae\.save"):
                ap.export(sae, folder, format)
            assert not list(tmp_path.iterdir())
            continue
        ap.export(sae, folder, format)
        for again in (ap.load(folder), ap.load(folder, format=format)):
            assert not again.training
            found = again.encode(x)
            assert torch.equal(found.dense() != 0, z.dense() != 0), format
            assert differs(found.dense(), z.dense() * unit(sae)) < CLOSE, format
            assert differs(again.decode(found, x), sae.decode(z, x)) < CLOSE, format
            assert again.needs_target == sae.needs_target
        again.save(tmp_path / "ours")
        assert torch.equal(ap.load(tmp_path / "ours")(x), again(x))
        for made in (folder, tmp_path / "ours"):
            for file in made.iterdir():
                file.unlink()
            made.rmdir()


@pytest.mark.parametrize("format", FORMATS)
def test_each_format_was_written_at_least_five_times_and_refused_as_often(format: str) -> None:
    """The table above tests something."""
    routes = [fits(name, settings, format) for name, settings in SAES]
    assert routes.count(True) >= 5 and routes.count(False) >= 5


@pytest.mark.parametrize("name", ["mutual_choice", "feature_choice"])
def test_thresholds_become_those_of_jumprelu(name: str, tmp_path: Path) -> None:
    """In raw units: theta / s."""
    sae = trained(name)
    ap.export(sae, tmp_path / "a", "sae_lens")
    theta = load_file(tmp_path / "a" / "sae_weights.safetensors")["threshold"]
    assert torch.allclose(theta, (sae.allocation.threshold / sae.scale).expand(D_SAE))
    assert (theta.unique().numel() == 1) == (name == "mutual_choice")


def test_a_fractional_k_has_no_batch_topk_class(tmp_path: Path) -> None:
    for k, wanted in ((2.5, "JumpReluAutoEncoder"), (3, "BatchTopKSAE")):
        ap.export(trained("mutual_choice", k=k), tmp_path / str(k), "dictionary_learning")
        assert json.loads((tmp_path / str(k) / "config.json").read_text())["trainer"]["dict_class"] == wanted


@pytest.mark.parametrize(
    ("settings", "unit_rows", "wanted"),
    [
        ({"subtract_b_dec": True}, True, "AutoEncoder"),
        ({"subtract_b_dec": True}, False, "AutoEncoderNew"),
        ({}, True, "AutoEncoderNew"),
    ],
)
def test_the_class_of_a_relu_sae(settings: dict[str, Any], unit_rows: bool, wanted: str, tmp_path: Path) -> None:
    """AutoEncoder.from_pretrained makes decoder rows of unit norm, which would change codes."""
    sae = trained("relu", **settings)
    if unit_rows:
        sae.W_dec.data /= sae.W_dec.norm(dim=1, keepdim=True)
    ap.export(sae, tmp_path / "a", "dictionary_learning")
    assert json.loads((tmp_path / "a" / "config.json").read_text())["trainer"]["dict_class"] == wanted


def test_files_of_gemma_scope(tmp_path: Path) -> None:
    sae = trained("jumprelu")
    ap.export(sae, tmp_path / "sae", "gemma_scope")
    with np.load(tmp_path / "sae" / "params.npz", allow_pickle=False) as arrays:
        shapes = {name: (arrays[name].shape, str(arrays[name].dtype)) for name in arrays.files}
    wanted = {
        "W_enc": (D_IN, D_SAE),
        "W_dec": (D_SAE, D_IN),
        "b_enc": (D_SAE,),
        "threshold": (D_SAE,),
        "b_dec": (D_IN,),
    }
    assert shapes == {name: (shape, "float32") for name, shape in wanted.items()}
    hooks = {"hookpoint": "model.layers.3.mlp:in", "target_hookpoint": "model.layers.3.mlp"}
    ap.export(trained("skip_transcoder", allocation="threshold", **hooks), tmp_path / "transcoder", "gemma_scope")
    assert {f.name for f in (tmp_path / "transcoder").iterdir()} == {"params.safetensors", "config.json"}
    again = ap.load(tmp_path / "transcoder")
    assert (again.hookpoint, again.target_hookpoint) == tuple(hooks.values())


@pytest.mark.parametrize(
    ("model", "hookpoint", "hook_name", "back"),
    [
        ({"name_or_path": "openai-community/gpt2"}, "transformer.h.2", "blocks.2.hook_resid_post", True),
        ({"name_or_path": "HuggingFaceTB/SmolLM2-135M"}, "model.layers.5:in", "blocks.5.hook_resid_pre", True),
        ({"name_or_path": "/here", "class": "LlamaForCausalLM"}, "model.layers.5", "blocks.5.hook_resid_post", False),
        ({"name_or_path": "google/gemma-2-2b"}, "model.layers.5.self_attn.o_proj:in", "blocks.5.attn.hook_z", True),
        ({"name_or_path": "google/gemma-2-2b"}, "model.layers.5.mlp", "model.layers.5.mlp", False),
        ({"name_or_path": "mine/own"}, "encoder.4", "encoder.4", False),
    ],
)
def test_what_sae_lens_is_told(
    model: dict[str, str], hookpoint: str, hook_name: str, back: bool, tmp_path: Path
) -> None:
    sae = trained("topk")
    source = {"model": model, "hookpoint": hookpoint, "context_tokens": 64, "bos": "never"}
    sae.info |= {"source": source | {"text": {"where": "a/corpus"}}, "training": {"tokens": 1234}}
    ap.export(sae, tmp_path / "a", "sae_lens")
    settings = json.loads((tmp_path / "a" / "cfg.json").read_text())
    told = settings["metadata"]
    assert told["hook_name"] == hook_name and told["model_name"] == model["name_or_path"].split("community/")[-1]
    assert (told["context_size"], told["prepend_bos"], told["dataset_path"]) == (64, False, "a/corpus")
    assert told["training_tokens"] == 1234
    assert told["model_class_name"] == ("HookedTransformer" if "blocks" in hook_name else "AutoModelForCausalLM")
    assert told["apportion"]["sae"] == "topk" and told["apportion"]["settings"]["k"] == 3
    assert settings["reshape_activations"] == ("hook_z" if hook_name.endswith("hook_z") else "none")
    if back:
        again = ap.load(tmp_path / "a")
        assert again.hookpoint == hookpoint and again.info["source"]["model"] == {"name_or_path": model["name_or_path"]}


def test_where_a_dictionary_comes_from(tmp_path: Path) -> None:
    sae = trained("topk", hookpoint="gpt_neox.layers.3")
    sae.info["source"] = {"model": {"name_or_path": "EleutherAI/pythia-70m"}}
    ap.export(sae, tmp_path / "a", "dictionary_learning")
    trainer = json.loads((tmp_path / "a" / "config.json").read_text())["trainer"]
    assert (trainer["layer"], trainer["submodule_name"]) == (3, "resid_post_layer_3")
    assert ap.load(tmp_path / "a").hookpoint == "gpt_neox.layers.3"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    """Coarse weights are written, and folded, in float32; fine ones as they are."""
    sae = trained("mutual_choice").to(dtype)
    ap.export(sae, tmp_path / "a", "sae_lens")
    again = ap.load(tmp_path / "a")
    assert again.dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)
    precise = sae.float() if dtype == torch.bfloat16 else sae
    x = DATA[:40].to(precise.dtype)
    assert differs(again(x), precise(x)) < (CLOSE if dtype == torch.bfloat16 else 1e-12)


def test_nothing_changes_in_the_sae(tmp_path: Path) -> None:
    sae = trained("topk", affinity="code_times_decoder_norm").train()
    sae.info["note"] = {"deep": [1]}
    before = {name: t.clone() for name, t in sae.state_dict().items()}
    for format in ("sae_lens", "dictionary_learning", "sparsify"):
        ap.export(sae, tmp_path / format, format)
    assert sae.training and sae.info.keys() == {"calibration", "note"}
    assert all(torch.equal(t, before[name]) for name, t in sae.state_dict().items())


def test_our_own_format(tmp_path: Path) -> None:
    sae = ap.create("crosscoder", d_in=D_IN, d_sae=D_SAE, k=3, num_sites=2)
    ap.export(sae, tmp_path / "a", "apportion")
    assert torch.equal(ap.load(tmp_path / "a").W_enc, sae.W_enc)


REFUSED = {
    "several sites": ("crosscoder", {}, "sae_lens", "No other library's format holds a crosscoder"),
    "not calibrated": ("mutual_choice", {}, "sae_lens", "calibrate"),
    "a way round": ("topk", {}, "gemma_scope", "to_jumprelu"),
    "no way round": ("topk", {"input_norm": "token_norm"}, "gemma_scope", "normalise each token .* sae_lens can"),
    "only read": ("topk", {}, "openai", "openai is read, and not written; written are: apportion, sae_lens"),
    "unknown": ("topk", {}, "saelens", "no format 'saelens' to write; there are: apportion, sae_lens"),
}


@pytest.mark.parametrize(("name", "settings", "format", "message"), REFUSED.values(), ids=list(REFUSED))
def test_refused(name: str, settings: dict[str, Any], format: str, message: str, tmp_path: Path) -> None:
    sae = ap.create(name, d_in=D_IN, d_sae=D_SAE, k=3, **settings)
    with pytest.raises(ValueError, match=message):
        ap.export(sae, tmp_path / "a", format)
    assert not list(tmp_path.iterdir())


def test_weights_that_are_no_numbers(tmp_path: Path) -> None:
    sae = trained("gated")
    with torch.no_grad():
        sae.r_mag[3] = torch.nan
    with pytest.raises(ValueError, match=r"r_mag .* NaN"):
        ap.export(sae, tmp_path / "a", "sae_lens")


def test_the_folder_is_new_or_empty(tmp_path: Path) -> None:
    sae = trained("topk")
    (tmp_path / "empty").mkdir()
    ap.export(sae, tmp_path / "empty", "sparsify")
    ap.export(sae, tmp_path / "deep" / "er", "sparsify")
    assert sparsify.recognises(tmp_path / "empty") and sparsify.recognises(tmp_path / "deep" / "er")
    other = tmp_path / "other"
    other.mkdir()
    assert stat.S_IMODE((tmp_path / "empty").stat().st_mode) == stat.S_IMODE(other.stat().st_mode)
    with pytest.raises(ValueError, match="empty exists and is not empty"):
        ap.export(sae, tmp_path / "empty", "sae_lens")
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(ValueError, match="file is a file"):
        ap.export(sae, file, "sae_lens")
    assert file.read_text() == "mine"
    assert {p.name for p in (tmp_path / "empty").iterdir()} == {"cfg.json", "sae.safetensors"}


def test_nothing_is_left_of_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(sparsify, "write_json", full)
    with pytest.raises(OSError, match="No space"):
        ap.export(trained("topk"), tmp_path / "a", "sparsify")
    assert not list(tmp_path.iterdir())


def test_all_that_is_written_is_tested() -> None:
    assert writable() == ["apportion", *FORMATS]


def test_a_decoder_bias_far_from_zero_folds_without_loss(tmp_path: Path) -> None:
    """Attention sinks shift means by hundreds: b_enc - W_enc b_dec must not lose what is small."""
    data = DATA + 300
    sae = trained("feature_choice", data=data)
    ap.export(sae, tmp_path / "a", "gemma_scope")
    parts = take_apart(sae)
    with np.load(tmp_path / "a" / "params.npz") as arrays:
        exact = parts.b_enc.double() - parts.W_enc.double() @ parts.b_dec.double()
        assert torch.equal(torch.from_numpy(arrays["b_enc"]), exact.float())


class TestFolding:
    """SAEDashboard and Neuronpedia fold decoder norms into what they load; a TopK has to say that they may."""

    @staticmethod
    def rescaled(folder: Path, sae: ap.SAE) -> bool:
        ap.export(sae, folder, "sae_lens")
        return json.loads((folder / "cfg.json").read_text())["rescale_acts_by_decoder_norm"]

    def test_rows_of_unit_norm(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        sae = trained("topk")
        sae.constrain()
        assert self.rescaled(tmp_path / "a", sae) is True and not caplog.records

    def test_competing_by_code_times_norm(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        """Norms are folded into the encoder, so that rows have unit norm; a latent without a row never fires."""
        sae = trained("topk", affinity="code_times_decoder_norm")
        with torch.no_grad():
            sae.W_dec[7] = 0
        assert self.rescaled(tmp_path / "a", sae) is True and not caplog.records
        stored = load_file(tmp_path / "a" / "sae_weights.safetensors")
        assert torch.allclose(stored["W_dec"].norm(dim=1), torch.ones(D_SAE)), "its norm is divided by"
        again = ap.load(tmp_path / "a")
        assert not again.encode(DATA).dense()[:, 7].any()
        assert differs(again(DATA), sae(DATA)) < CLOSE

    def test_rows_of_other_norms_would_choose_others(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        sae = trained("topk")
        assert self.rescaled(tmp_path / "a", sae) is False
        assert "cannot fold" in caplog.text and "sae.constrain()" in caplog.text
        assert torch.equal(ap.load(tmp_path / "a").encode(DATA).dense() != 0, sae.encode(DATA).dense() != 0)

    @pytest.mark.parametrize(("off", "unit"), [(3e-6, True), (3e-5, False)])
    def test_rows_are_of_unit_norm_up_to_rounding_only(self, off: float, unit: bool, tmp_path: Path) -> None:
        """Norms further from 1 move the cut between matches."""
        sae = trained("topk")
        sae.constrain()
        with torch.no_grad():
            sae.W_dec[7] *= 1 + off
        assert self.rescaled(tmp_path / "a", sae) is unit

    def test_a_row_without_norm_that_fires_is_no_unit_row(self, tmp_path: Path) -> None:
        sae = trained("topk")
        sae.constrain()
        with torch.no_grad():
            sae.W_dec[7] = 0
        assert self.rescaled(tmp_path / "a", sae) is False


NAMES = {
    "an MLP": ("model.layers.3.mlp:in", "model.layers.3.mlp", "blocks.3.mlp.hook_in", "blocks.3.hook_mlp_out"),
    "no name": ("model.layers.3.mlp.act_fn", "model.layers.3.mlp",
                "model.layers.3.mlp.act_fn", "model.layers.3.mlp"),
    "one name": ("model.layers.3", "model.layers.3.mlp.act_fn", "model.layers.3", "model.layers.3.mlp.act_fn"),
}  # fmt: skip


@pytest.mark.parametrize(("into", "out", "hook", "hook_out"), NAMES.values(), ids=list(NAMES))
def test_hooks_of_a_transcoder_are_of_one_kind(into: str, out: str, hook: str, hook_out: str, tmp_path: Path) -> None:
    sae = trained("transcoder", allocation="mutual_choice", hookpoint=into, target_hookpoint=out)
    sae.info["source"] = {"model": {"name_or_path": "HuggingFaceTB/SmolLM2-135M"}, "bos_prepended": False}
    ap.export(sae, tmp_path / "a", "sae_lens")
    told = json.loads((tmp_path / "a" / "cfg.json").read_text())["metadata"]
    assert (told["hook_name"], told["hook_name_out"]) == (hook, hook_out)
    assert told["model_class_name"] == ("HookedTransformer" if hook.startswith("blocks.") else "AutoModelForCausalLM")
    again = ap.load(tmp_path / "a")
    assert (again.hookpoint, again.target_hookpoint) == (into, out)


class TestModelClass:
    """Who is to run the model decides what hooks are called."""

    @pytest.fixture
    def sae(self) -> ap.SAE:
        sae = trained("mutual_choice", hookpoint="model.layers.5:in")
        sae.info["source"] = {"model": {"name_or_path": "HuggingFaceTB/SmolLM2-135M"}, "bos_prepended": False}
        return sae

    @pytest.mark.parametrize(
        ("wanted", "hook"),
        [
            (None, "blocks.5.hook_resid_pre"),
            ("HookedTransformer", "blocks.5.hook_resid_pre"),
            ("AutoModelForCausalLM", "model.layers.4"),
        ],
    )
    def test_a_choice(self, sae: ap.SAE, wanted: str | None, hook: str, tmp_path: Path) -> None:
        ap.export(sae, tmp_path / "a", "sae_lens", model_class_name=wanted)
        told = json.loads((tmp_path / "a" / "cfg.json").read_text())["metadata"]
        assert (told["hook_name"], told["hf_hook_name"]) == (hook, "model.layers.4")
        assert told["model_class_name"] == (wanted or "HookedTransformer")
        assert ap.load(tmp_path / "a").hookpoint == "model.layers.5:in"

    def test_mistakes(self, sae: ap.SAE, tmp_path: Path) -> None:
        for name, format, message in (
            ("HookedMamba", "sae_lens", "known are HookedTransformer, AutoModelForCausalLM"),
            ("HookedTransformer", "gemma_scope", "for sae_lens only|to sae_lens only"),
        ):
            with pytest.raises(ValueError, match=message):
                ap.export(sae, tmp_path / "a", format, model_class_name=name)
        heads = trained("mutual_choice", hookpoint="model.layers.5.self_attn.o_proj:in")
        heads.info = dict(sae.info)
        with pytest.raises(
            ValueError, match=r"AutoModelForCausalLM has no hook for model\.layers\.5\.self_attn\.o_proj"
        ):
            ap.export(heads, tmp_path / "a", "sae_lens", model_class_name="AutoModelForCausalLM")
        other = trained("mutual_choice", hookpoint="model.layers.5.mlp.act_fn")
        other.info = dict(sae.info)
        with pytest.raises(ValueError, match="HookedTransformer has no hook for"):
            ap.export(other, tmp_path / "a", "sae_lens", model_class_name="HookedTransformer")
        assert not list(tmp_path.iterdir())

    def test_a_place_that_no_tool_can_hook_is_said(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        sae = trained("mutual_choice", hookpoint="encoder.4:in")
        ap.export(sae, tmp_path / "a", "sae_lens")
        assert "has a hook for encoder.4:in" in caplog.text
        assert json.loads((tmp_path / "a" / "cfg.json").read_text())["metadata"]["hook_name"] == "encoder.4:in"
        assert ap.load(tmp_path / "a").hookpoint == "encoder.4:in"

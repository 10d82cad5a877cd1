"""SAELens: every architecture, normalisation and age of a configuration, from files made by formula."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from naive import D_IN, D_SAE, K, assert_computes, assert_loads_as, inputs, keep_best_of_batch, keep_largest, rand
from safetensors.torch import load_file, save_file
from torch import Tensor

import apportion as ap
from apportion.interop.sae_lens import KINDS

D_OUT = 5
METADATA = {"sae_lens_version": "6.54.12", "model_name": "pythia-70m", "hook_name": "blocks.3.hook_resid_post"}
PER_TOKEN = ("layer_norm", "constant_norm_rescale")


def tensors_of(architecture: str) -> dict[str, Tensor]:
    d_out = D_OUT if "transcoder" in architecture else D_IN
    stored = {
        "W_enc": rand(D_IN, D_SAE, seed=1),
        "W_dec": rand(D_SAE, d_out, seed=2),
        "b_enc": rand(D_SAE, seed=3, scale=0.3),
        "b_dec": rand(d_out, seed=4, scale=0.3),
    }
    if architecture == "gated":
        stored["b_gate"] = stored.pop("b_enc")
        stored |= {"r_mag": rand(D_SAE, seed=5, scale=0.3), "b_mag": rand(D_SAE, seed=6, scale=0.3)}
    if "jumprelu" in architecture:
        stored["threshold"] = rand(D_SAE, seed=7).abs() - 0.1
    if "skip" in architecture:
        stored["W_skip"] = rand(D_OUT, D_IN, seed=8)
    return stored


def settings_of(architecture: str, **more: Any) -> dict[str, Any]:
    settings = {
        "architecture": architecture,
        "d_in": D_IN,
        "d_sae": D_SAE,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": "transcoder" not in architecture,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": METADATA,
    }
    if "topk" in architecture:
        settings["k"] = K
    if "transcoder" in architecture:
        settings["d_out"] = D_OUT
    return settings | more


def write(folder: Path, settings: dict[str, Any], stored: dict[str, Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps(settings))
    save_file({name: t.contiguous() for name, t in stored.items()}, folder / "sae_weights.safetensors")
    return folder


def forward(t: dict[str, Tensor], settings: dict[str, Any], x: Tensor) -> tuple[Tensor, Tensor]:
    """Latents and output as the library computes them, densely, in float64."""
    t = {name: tensor.double() for name, tensor in t.items()}
    raw = x.double()
    mean, size = torch.zeros(len(x), 1), torch.ones(len(x), 1)
    inside = raw
    if settings["normalize_activations"] == "layer_norm":
        mean, size = raw.mean(1, keepdim=True), raw.std(1, keepdim=True)
        inside = (raw - mean) / (size + 1e-5)
    if settings["normalize_activations"] == "constant_norm_rescale":
        size = raw.norm(dim=1, keepdim=True) / D_IN**0.5
        inside = raw / size
    if settings["apply_b_dec_to_input"]:
        inside = inside - t["b_dec"]
    norms = t["W_dec"].norm(dim=1) if settings.get("rescale_acts_by_decoder_norm") else torch.ones(D_SAE)
    if settings["architecture"] == "gated":
        gate = inside @ t["W_enc"] + t["b_gate"] > 0
        z = gate * (inside @ (t["W_enc"] * t["r_mag"].exp()) + t["b_mag"]).relu()
    else:
        pre = inside @ t["W_enc"] + t["b_enc"]
        z = (pre * norms).relu()
        if settings["architecture"] == "topk":
            z = keep_largest(z, settings["k"])
        if "threshold" in t:
            z = z * (pre > t["threshold"])
    y = (z / norms) @ t["W_dec"] + t["b_dec"]
    if "transcoder" not in settings["architecture"]:
        y = y * size + mean
    return z, y + raw @ t["W_skip"].T if "W_skip" in t else y


def check(tmp_path: Path, settings: dict[str, Any], stored: dict[str, Tensor], x: Tensor | None = None) -> ap.SAE:
    x = inputs() if x is None else x
    folder = write(tmp_path / "theirs", settings, stored)
    return assert_loads_as(folder, x, *forward(stored, settings, x), tmp_path)


EVERY = [
    (architecture, norm)
    for architecture in KINDS
    for norm in ["none", "expected_average_only_in", *PER_TOKEN]
    if "batchtopk" not in architecture and not ("skip" in architecture and norm in PER_TOKEN)
]


@pytest.mark.parametrize(("architecture", "norm"), EVERY)
def test_every_architecture_and_normalisation(architecture, norm, tmp_path):
    for subtract in [True, False] if "transcoder" not in architecture else [False]:
        settings = settings_of(architecture, normalize_activations=norm, apply_b_dec_to_input=subtract)
        sae = check(tmp_path, settings, tensors_of(architecture))
        assert sae.hookpoint == "gpt_neox.layers.3" and sae.info["format"] == "sae_lens"
        assert sae.info["source"]["model"] == {"name_or_path": "EleutherAI/pythia-70m"}
        assert sae.info["original"] == settings


@pytest.mark.parametrize("norm", ["none", *PER_TOKEN])
def test_topk_that_rescales_by_decoder_norms(norm, tmp_path):
    settings = settings_of("topk", rescale_acts_by_decoder_norm=True, normalize_activations=norm)
    sae = check(tmp_path, settings, tensors_of("topk"))
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(D_SAE), atol=1e-6)


def test_float64_is_kept_and_halves_are_exact_in_float32(tmp_path):
    stored = tensors_of("jumprelu")
    double = {name: tensor.double() for name, tensor in stored.items()}
    settings = settings_of("jumprelu")
    sae = check(tmp_path, settings, double, inputs().double())
    assert {p.dtype for p in sae.parameters()} == {torch.float64}
    half = {name: tensor.bfloat16() for name, tensor in stored.items()}
    assert_loads_as(
        write(tmp_path / "half", settings, half),
        inputs(),
        *forward(half, settings, inputs()),
        tmp_path,
        dtype=torch.float32,
    )


def test_a_width_of_output_of_its_own(tmp_path):
    settings = settings_of("transcoder", metadata=METADATA | {"hook_name_out": "blocks.3.hook_mlp_out"})
    sae = check(tmp_path, settings, tensors_of("transcoder"))
    assert sae.d_out == D_OUT and sae.target_hookpoint == "gpt_neox.layers.3.mlp"


def test_flattened_heads(tmp_path):
    metadata = METADATA | {"model_name": "gpt2-small", "hook_name": "blocks.1.attn.hook_z"}
    sae = check(
        tmp_path, settings_of("standard", reshape_activations="hook_z", metadata=metadata), tensors_of("standard")
    )
    assert sae.hookpoint == "transformer.h.1.attn.c_proj:in"
    assert sae.info["source"]["model"] == {"name_or_path": "openai-community/gpt2"}


@pytest.mark.parametrize(
    ("model", "hook"),
    [("pythia-70m", "blocks.1.ln2.hook_normalized"), ("tiny-stories-1L-21M", "blocks.0.hook_mlp_out"), (None, None)],
)
def test_a_hook_that_no_module_stands_for_is_kept_as_it_is(model, hook, tmp_path):
    metadata = METADATA | {"model_name": model, "hook_name": hook}
    sae = check(tmp_path, settings_of("standard", metadata=metadata), tensors_of("standard"))
    assert sae.hookpoint is None and sae.info["source"].get("hook_name") == hook


class TestTrainingCheckpoints:
    """Activations were multiplied by a scale, or whitened, before the SAE saw them."""

    @pytest.mark.parametrize("scale", [None, 0.4])
    @pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu", "gated"])
    def test_scale(self, architecture, scale, tmp_path):
        stored, x = tensors_of(architecture), inputs()
        settings = settings_of(architecture, normalize_activations="expected_average_only_in")
        folder = write(tmp_path / "theirs", settings, stored)
        (folder / "activation_scaler.json").write_text(json.dumps({"scaling_factor": scale, "has_whitening": False}))
        s = scale or 1
        z, y = forward(stored, settings, s * x)
        assert_loads_as(folder, x, z, y / s, tmp_path)

    def test_a_scale_that_the_caller_knows(self, tmp_path):
        stored, x = tensors_of("standard"), inputs()
        settings = settings_of("standard", normalize_activations="expected_average_only_in")
        folder = write(tmp_path / "theirs", settings, stored)
        z, y = forward(stored, settings, 0.3 * x)
        assert_loads_as(folder, x, z, y / 0.3, tmp_path, config={"norm_scaling_factor": 0.3})

    @pytest.mark.parametrize("rescale", [False, True])
    @pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka_batchtopk"])
    def test_batchtopk(self, architecture, rescale, tmp_path):
        """Folding the scale divides decoder norms, and so what codes and threshold are in with `rescale`."""
        scale, theta, x = 0.4, 1.3, inputs()
        stored = tensors_of("topk") | {"topk_threshold": torch.tensor(theta, dtype=torch.float64)}
        settings = settings_of(architecture, k=2.5, rescale_acts_by_decoder_norm=rescale)
        folder = write(tmp_path / "theirs", settings, stored)
        (folder / "activation_scaler.json").write_text(json.dumps({"scaling_factor": scale}))
        z, _ = forward(stored, settings | {"architecture": "standard"}, scale * x)
        z = z * (z > theta)
        norms = stored["W_dec"].double().norm(dim=1) if rescale else torch.ones(D_SAE)
        y = ((z / norms) @ stored["W_dec"].double() + stored["b_dec"]) / scale
        sae = assert_loads_as(folder, x, z / scale if rescale else z, y, tmp_path)
        assert sae.name == "mutual_choice" and sae.k == 2.5

    @pytest.mark.parametrize("rescale", [False, True])
    def test_batchtopk_without_a_threshold_asks_for_calibration(self, rescale, tmp_path):
        stored, x = tensors_of("topk"), inputs()
        settings = settings_of("batchtopk", rescale_acts_by_decoder_norm=rescale)
        folder = write(tmp_path / "theirs", settings, stored | {"topk_threshold": torch.tensor(0.0).double()})
        sae = ap.load(folder)
        with pytest.raises(ValueError, match="calibrate"):
            sae.encode(x)
        z, _ = forward(stored, settings | {"architecture": "standard"}, x)
        z = keep_best_of_batch(z, K)
        norms = stored["W_dec"].double().norm(dim=1) if rescale else torch.ones(D_SAE)
        assert_computes(sae.train(), x, z, (z / norms) @ stored["W_dec"].double() + stored["b_dec"])
        assert sae.calibrate(inputs()) == K and sae.eval().encode(x).l0().sum() == K * len(x)

    def test_log_thresholds_of_older_checkpoints(self, tmp_path):
        stored, x = tensors_of("jumprelu"), inputs()
        stored["threshold"] = stored["threshold"].clamp_min(0.05)
        old = {name: t for name, t in stored.items() if name != "threshold"} | {
            "log_threshold": stored["threshold"].log()
        }
        folder = write(tmp_path / "theirs", settings_of("jumprelu"), old)
        assert_loads_as(folder, x, *forward(stored, settings_of("jumprelu"), x), tmp_path)

    @pytest.mark.parametrize("subtract", [False, True])
    @pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu", "gated"])
    def test_whitening(self, architecture, subtract, tmp_path):
        stored, x = tensors_of(architecture), inputs()
        more = {"rescale_acts_by_decoder_norm": True} if architecture == "topk" else {}
        settings = settings_of(architecture, normalize_activations="covariance_whitening", **more)
        settings["apply_b_dec_to_input"] = subtract
        folder = write(tmp_path / "theirs", settings, stored)
        mean, matrix = rand(D_IN, seed=20).double(), rand(D_IN, D_IN, seed=21).double() + 2 * torch.eye(D_IN).double()
        (folder / "activation_scaler.json").write_text(json.dumps({"scaling_factor": None, "has_whitening": True}))
        whitening = {"mean": mean, "matrix": matrix, "inverse_matrix": matrix.inverse().contiguous()}
        save_file(whitening, folder / "activation_whitening.safetensors")
        z, y = forward(stored, settings, (x - mean) @ matrix)
        assert_loads_as(folder, x, z, y @ matrix.inverse() + mean, tmp_path)


class TestBeforeVersion6:
    """Flat configurations, with other names."""

    FLAT: ClassVar = {"d_in": D_IN, "d_sae": D_SAE, "model_name": "gpt2-small", "hook_layer": 8, "prepend_bos": True}

    def check(self, tmp_path: Path, flat: dict[str, Any], architecture: str, **means: Any) -> ap.SAE:
        stored, x = tensors_of(architecture), inputs()
        folder = write(tmp_path / "theirs", self.FLAT | flat, stored)
        return assert_loads_as(folder, x, *forward(stored, settings_of(architecture, **means), x), tmp_path)

    @pytest.mark.parametrize("hook", ["hook_name", "hook_point"])
    def test_defaults(self, hook, tmp_path):
        sae = self.check(tmp_path, {hook: "blocks.8.hook_resid_pre"}, "standard")
        assert sae.hookpoint == "transformer.h.8:in"

    def test_no_subtraction(self, tmp_path):
        self.check(tmp_path, {"apply_b_dec_to_input": False}, "standard", apply_b_dec_to_input=False)

    @pytest.mark.parametrize("name", ["activation_fn_str", "activation_fn"])
    def test_topk_is_an_activation_function(self, name, tmp_path):
        sae = self.check(tmp_path, {name: "topk", "activation_fn_kwargs": {"k": K}}, "topk")
        assert sae.name == "topk" and sae.k == K

    @pytest.mark.parametrize("architecture", ["jumprelu", "gated"])
    def test_architectures(self, architecture, tmp_path):
        flat = {"architecture": architecture, "activation_fn_str": "relu", "activation_fn_kwargs": {}}
        self.check(tmp_path, flat, architecture)

    @pytest.mark.parametrize("norm", [True, False, None, "none", "layer_norm"])
    def test_normalisation_could_be_a_boolean(self, norm, tmp_path):
        means = norm if isinstance(norm, str) else "none"
        self.check(tmp_path, {"normalize_activations": norm}, "standard", normalize_activations=means)

    @pytest.mark.parametrize("used", [True, False])
    def test_finetuning_factors(self, used, tmp_path):
        stored, x = tensors_of("standard"), inputs()
        factors = rand(D_SAE, seed=9).abs() + 0.5 if used else torch.ones(D_SAE)
        flat = self.FLAT | {"finetuning_scaling_factor": used}
        folder = write(tmp_path / "theirs", flat, stored | {"scaling_factor": factors})
        z, _ = forward(stored, settings_of("standard"), x)
        assert_loads_as(folder, x, z, (z * factors) @ stored["W_dec"].double() + stored["b_dec"], tmp_path)
        with pytest.raises(ValueError, match="scaling_factor is not 1"):
            ap.load(write(folder, self.FLAT, stored | {"scaling_factor": factors + 1}))

    def test_another_activation_function(self, tmp_path):
        folder = write(tmp_path / "theirs", self.FLAT | {"activation_fn_str": "tanh-relu"}, tensors_of("standard"))
        with pytest.raises(ValueError, match="'tanh-relu' has no counterpart"):
            ap.load(folder)


REFUSED = {
    "temporal": ("standard", {"architecture": "temporal"}, "'temporal' has no counterpart here; known are standard"),
    "pursuit": ("standard", {"architecture": "matching_pursuit"}, "'matching_pursuit' has no counterpart"),
    "signed": ("topk", {"architecture": "abstopk"}, "'abstopk' has no counterpart"),
    "odd architecture": ("standard", {"architecture": ["standard"]}, "does not fit|no counterpart"),
    "normalisation": ("standard", {"normalize_activations": "zscore"}, "'zscore' is unknown; known are none"),
    "whitening gone": ("standard", {"normalize_activations": "covariance_whitening"}, "no activation_whitening"),
    "skip and tokens": ("skip_transcoder", {"normalize_activations": "layer_norm"}, "skip beside tokens"),
    "no k": ("topk", {"k": None}, r"k = None.*Say it: load\(..., config="),
    "k of a half": ("topk", {"k": 2.5}, "whole number of active latents"),
    "too large a k": ("topk", {"k": D_SAE + 1}, "between 0 and d_sae"),
    "k in words": ("topk", {"k": "many"}, "k = 'many'"),
    "k of nothing": ("topk", {"k": 0}, "k = 0"),
    "another width": ("standard", {"d_in": D_IN + 1}, r"W_enc has shape \[6, 20\], expected \[7, 20\]"),
    "an enormous width": ("standard", {"d_sae": 10**15}, r"W_enc has shape \[6, 20\], expected \[6, 1000"),
    "width in words": ("standard", {"d_sae": "20"}, "expected"),
    "another output": ("transcoder", {"d_out": D_IN}, r"W_dec has shape \[20, 5\], expected \[20, 6\]"),
    "wrong architecture": ("standard", {"architecture": "jumprelu"}, "threshold is missing"),
    "and the other way": ("jumprelu", {"architecture": "standard"}, "unexpected threshold"),
    "not gated": ("standard", {"architecture": "gated"}, "b_gate is missing"),
}  # fmt: skip


@pytest.mark.parametrize(("architecture", "lie", "message"), REFUSED.values(), ids=list(REFUSED))
def test_refused(architecture, lie, message, tmp_path):
    folder = write(tmp_path / "theirs", settings_of(architecture) | lie, tensors_of(architecture))
    with pytest.raises(ValueError, match=message):
        ap.load(folder)


@pytest.mark.parametrize("scale", [0, -1.0, "1", float("nan"), float("inf"), [2]])
def test_scales_that_are_none(scale, tmp_path):
    folder = write(tmp_path / "theirs", settings_of("standard"), tensors_of("standard"))
    (folder / "activation_scaler.json").write_text(json.dumps({"scaling_factor": scale}))
    with pytest.raises(ValueError, match="must be a positive number"):
        ap.load(folder)


@pytest.mark.parametrize(
    "architecture", ["standard", "topk", "jumprelu", "gated", "batchtopk", "matryoshka_batchtopk", "skip_transcoder"]
)
def test_what_the_library_writes(architecture, tmp_path):
    """The package itself, where it is installed."""
    pytest.importorskip("sae_lens")
    from sae_lens import SAE
    from sae_lens.registry import get_sae_class, get_sae_training_class

    if "transcoder" in architecture:
        make, config = get_sae_class(architecture)
        theirs = make(config(d_in=D_IN, d_sae=D_SAE, d_out=D_OUT, apply_b_dec_to_input=False))
    else:
        make, config = get_sae_training_class(architecture)
        more = {"k": K} if "topk" in architecture else {}
        more |= {"matryoshka_widths": [5, D_SAE]} if "matryoshka" in architecture else {}
        theirs = make(config(d_in=D_IN, d_sae=D_SAE, **more))
    with torch.no_grad():
        for i, (name, p) in enumerate(theirs.named_parameters()):
            p.copy_(rand(*p.shape, seed=i).abs() if "threshold" in name else rand(*p.shape, seed=i))
    if "batchtopk" in architecture:
        theirs.topk_threshold = torch.tensor(1.1, dtype=torch.float64)
    (theirs.save_model if "transcoder" in architecture else theirs.save_inference_model)(tmp_path / "theirs")
    theirs, x = SAE.load_from_disk(tmp_path / "theirs"), inputs()
    with torch.no_grad():
        assert_loads_as(tmp_path / "theirs", x, theirs.encode(x), theirs(x), tmp_path)


def test_the_file_is_left_alone(tmp_path):
    folder = write(tmp_path / "theirs", settings_of("topk", rescale_acts_by_decoder_norm=True), tensors_of("topk"))
    before = load_file(folder / "sae_weights.safetensors")
    ap.load(folder)
    after = load_file(folder / "sae_weights.safetensors")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())

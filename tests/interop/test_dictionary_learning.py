"""dictionary_learning: its seven classes and the backup of a run, from files made by formula."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from naive import D_IN, D_SAE, K, assert_computes, assert_loads_as, inputs, keep_best_of_batch, keep_largest, rand
from torch import Tensor

import apportion as ap
from apportion.interop.dictionary_learning import CLASSES

THETA = 1.2
BATCH = ("BatchTopKSAE", "MatryoshkaBatchTopKSAE")


def state_of(name: str) -> dict[str, Tensor]:
    W_enc, W_dec = rand(D_SAE, D_IN, seed=1), rand(D_SAE, D_IN, seed=2)
    b_enc, b_dec = rand(D_SAE, seed=3, scale=0.3), rand(D_IN, seed=4, scale=0.3)
    budget = {"k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(THETA)}
    if name == "MatryoshkaBatchTopKSAE":
        budget["group_sizes"] = torch.tensor([5, D_SAE - 5])
    if name in ("JumpReluAutoEncoder", "MatryoshkaBatchTopKSAE"):
        more = budget if name in BATCH else {"threshold": rand(D_SAE, seed=7).abs()}
        return {"W_enc": W_enc.T.contiguous(), "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec} | more
    state = {"encoder.weight": W_enc, "decoder.weight": W_dec.T.contiguous()}
    if name == "GatedAutoEncoder":
        names = ("r_mag", "gate_bias", "mag_bias")
        return state | {"decoder_bias": b_dec} | {n: rand(D_SAE, seed=i, scale=0.3) for i, n in enumerate(names)}
    where = {"AutoEncoder": "bias", "AutoEncoderNew": "decoder.bias"}.get(name, "b_dec")
    return state | {"encoder.bias": b_enc, where: b_dec} | (budget if "TopK" in name else {})


def forward(name: str, state: dict[str, Tensor], x: Tensor, trained: bool = True) -> tuple[Tensor, Tensor]:
    """Latents and output as the library's `encode` and `decode` compute them, densely, in float64."""
    s, x = {key: t.double() for key, t in state.items()}, x.double()
    if name == "AutoEncoder":
        z = ((x - s["bias"]) @ s["encoder.weight"].T + s["encoder.bias"]).relu()
        return z, z @ s["decoder.weight"].T + s["bias"]
    if name == "AutoEncoderNew":
        z = (x @ s["encoder.weight"].T + s["encoder.bias"]).relu()
        return z, z @ s["decoder.weight"].T + s["decoder.bias"]
    if name == "GatedAutoEncoder":
        u = (x - s["decoder_bias"]) @ s["encoder.weight"].T
        z = (u + s["gate_bias"] > 0) * (s["r_mag"].exp() * u + s["mag_bias"]).relu()
        return z, z @ s["decoder.weight"].T + s["decoder_bias"]
    if name == "JumpReluAutoEncoder":
        pre = x @ s["W_enc"] + s["b_enc"]
        z = (pre * (pre > s["threshold"])).relu()
        return z, z @ s["W_dec"] + s["b_dec"]
    W_enc = s["W_enc"] if "W_enc" in s else s["encoder.weight"].T
    W_dec = s["W_dec"] if "W_dec" in s else s["decoder.weight"].T
    z = ((x - s["b_dec"]) @ W_enc + s["b_enc" if "b_enc" in s else "encoder.bias"]).relu()
    if name == "AutoEncoderTopK":
        z = keep_largest(z, K)
    else:
        z = z * (z > s["threshold"]) if trained else keep_best_of_batch(z, K)
    return z, z @ W_dec + s["b_dec"]


def trainer_of(name: str, **more: Any) -> dict[str, Any]:
    known = {"dict_class": name, "activation_dim": D_IN, "dict_size": D_SAE, "lm_name": "EleutherAI/pythia-70m"}
    return known | {"layer": 3, "submodule_name": "resid_post_layer_3", "k": K} | more


def write(folder: Path, content: Any, trainer: dict[str, Any] | None = None, file: str = "ae.pt") -> Path:
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, folder / file)
    if trainer is not None:
        (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"io": "out"}}))
    return folder


@pytest.mark.parametrize("name", CLASSES)
def test_every_class(name, tmp_path):
    x, state = inputs(), state_of(name)
    folder = write(tmp_path / "theirs", state, trainer_of(name))
    sae = assert_loads_as(folder, x, *forward(name, state, x), tmp_path)
    assert sae.info["format"] == "dictionary_learning" and sae.hookpoint == "gpt_neox.layers.3"
    assert sae.info["original"]["dict_class"] == name
    assert_loads_as(folder / "ae.pt", x, *forward(name, state, x), tmp_path)


@pytest.mark.parametrize("name", ["AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "JumpReluAutoEncoder", BATCH[1]])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_the_class_by_its_tensors(name, zipped, tmp_path):
    x, state = inputs(), state_of(name)
    torch.save(state, tmp_path / "ae.pt", _use_new_zipfile_serialization=zipped)
    assert_loads_as(tmp_path, x, *forward(name, state, x), tmp_path)


def test_two_classes_have_the_same_tensors(tmp_path):
    x, state = inputs(), state_of("BatchTopKSAE")
    write(tmp_path, state)
    with pytest.raises(ValueError, match=r"AutoEncoderTopK or a BatchTopKSAE.*dict_class"):
        ap.load(tmp_path)
    for name in ("BatchTopKSAE", "AutoEncoderTopK"):
        assert_computes(ap.load(tmp_path, config={"dict_class": name}), x, *forward(name, state, x))


def test_a_checkpoint_of_a_run(tmp_path):
    x, state = inputs(), state_of("AutoEncoderTopK")
    folder = write(tmp_path, state, trainer_of("AutoEncoderTopK"), file="checkpoints/ae_500.pt")
    assert_computes(ap.load(folder / "checkpoints" / "ae_500.pt"), x, *forward("AutoEncoderTopK", state, x))
    assert_computes(ap.load(folder, subfolder="checkpoints"), x, *forward("AutoEncoderTopK", state, x))


@pytest.mark.parametrize("name", BATCH)
def test_without_a_threshold_it_asks_for_calibration(name, tmp_path):
    x, state = inputs(), state_of(name)
    state["threshold"] = torch.tensor(-1.0)
    sae = ap.load(write(tmp_path, state, trainer_of(name)))
    with pytest.raises(ValueError, match="calibrate"):
        sae.encode(x)
    assert_computes(sae.train(), x, *forward(name, state, x, trained=False))


def test_a_topk_from_before_there_were_thresholds(tmp_path):
    x, state = inputs(), state_of("AutoEncoderTopK")
    wanted = forward("AutoEncoderTopK", state, x)
    del state["threshold"], state["k"]
    assert_computes(ap.load(write(tmp_path, state, trainer_of("AutoEncoderTopK"))), x, *wanted)
    with pytest.raises(ValueError, match="k = None"):
        ap.load(write(tmp_path, state, trainer_of("AutoEncoderTopK", k=None)))
    assert_computes(ap.load(tmp_path, config={"k": K}), x, *wanted)


@pytest.mark.parametrize("factor", [2.5, 1.0, None])
@pytest.mark.parametrize("with_config", [True, False])
@pytest.mark.parametrize("name", CLASSES)
def test_the_backup_of_a_run(name, with_config, factor, tmp_path):
    """It was trained on x / norm_factor: z(x / f) f are its codes of x, and y(x / f) f its reconstruction."""
    x, state = inputs(), state_of(name)
    weights = [torch.nn.Parameter(t.clone()) for t in state.values() if t.ndim == 2]
    optimizer = torch.optim.Adam(weights)
    sum((w**2).sum() for w in weights).backward()
    optimizer.step()
    backup = {"step": 7, "ae": state, "optimizer": optimizer.state_dict(), "config": trainer_of(name)}
    folder = write(tmp_path / "theirs", backup | {"norm_factor": factor}, trainer_of(name) if with_config else None)
    f = factor or 1
    z, y = forward(name, state, x / f)
    sae = assert_loads_as(folder, x, z * f, y * f, tmp_path)
    assert sae.hookpoint == "gpt_neox.layers.3"


@pytest.mark.parametrize(
    ("trainer", "hookpoint"),
    [
        ({"lm_name": "google/gemma-2-2b", "submodule_name": "resid_post_layer_12"}, "model.layers.12"),
        ({"submodule_name": "mlp_layer_3"}, None),
        ({"submodule_name": None}, None),
        ({"lm_name": "somebody/unknown"}, None),
        ({"lm_name": None}, None),
    ],
)
def test_hookpoints(trainer, hookpoint, tmp_path):
    sae = ap.load(write(tmp_path, state_of("AutoEncoder"), trainer_of("AutoEncoder", **trainer)))
    assert sae.hookpoint == hookpoint


def without(name: str, tensor: str) -> dict[str, Tensor]:
    return {key: t for key, t in state_of(name).items() if key != tensor}


REFUSED = {
    "unknown class": (state_of("AutoEncoder"), trainer_of("CrossCoder"), "'CrossCoder' has no counterpart"),
    "another class": (state_of("AutoEncoder"), trainer_of("GatedAutoEncoder"), "decoder_bias is missing"),
    "and the other way": (state_of("GatedAutoEncoder"), trainer_of("AutoEncoder"), "missing"),
    "missing": (without("AutoEncoder", "bias"), trainer_of("AutoEncoder"), "bias is missing"),
    "extra": (state_of("AutoEncoder") | {"W": torch.ones(2)}, trainer_of("AutoEncoder"), "unexpected W"),
    "misshapen": (state_of("AutoEncoder") | {"bias": torch.ones(3)}, trainer_of("AutoEncoder"), r"bias has shape"),
    "a lie": (state_of("AutoEncoder"), trainer_of("AutoEncoder", dict_size=10**14), r"expected \[100000000000000, 6\]"),
    "two k": (state_of("BatchTopKSAE"), trainer_of("BatchTopKSAE", k=5), "k is 3, and elsewhere it is said to be 5"),
    "k of none": (state_of("BatchTopKSAE") | {"k": torch.ones(2)}, None, "dict_class|k should be one number"),
    "no dict": (torch.ones(3), trainer_of("AutoEncoder"), "holds a Tensor, not a state dict"),
    "a list": ([torch.ones(3)], trainer_of("AutoEncoder"), "holds a list"),
    "a backup of nothing": ({"ae": None}, trainer_of("AutoEncoder"), "NoneType"),
    "a negative factor": ({"ae": {}, "norm_factor": -1.0}, trainer_of("AutoEncoder"), "positive number, got -1.0"),
    "a factor in words": ({"ae": {}, "norm_factor": "2"}, trainer_of("AutoEncoder"), "positive number, got '2'"),
    "NaN": (
        state_of("AutoEncoder") | {"bias": torch.full((D_IN,), torch.nan)}, trainer_of("AutoEncoder"), "bias holds NaN"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("content", "trainer", "message"), REFUSED.values(), ids=list(REFUSED))
def test_refused(content, trainer, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        ap.load(write(tmp_path, content, trainer))


def test_a_config_that_says_nothing_leaves_it_to_the_tensors(tmp_path):
    x, state = inputs(), state_of("AutoEncoder")
    write(tmp_path, state)
    for config in ("[]", "{", "{}", '{"trainer": 3}'):
        (tmp_path / "config.json").write_text(config)
        assert_computes(ap.load(tmp_path), x, *forward("AutoEncoder", state, x))


@pytest.mark.parametrize("name", CLASSES)
def test_what_the_library_writes(name, tmp_path):
    """The package itself, where it is installed."""
    pytest.importorskip("dictionary_learning")
    from dictionary_learning import dictionary
    from dictionary_learning.trainers import batch_top_k, matryoshka_batch_top_k, top_k

    modules = [dictionary, batch_top_k, matryoshka_batch_top_k, top_k]
    make = next(getattr(module, name) for module in modules if hasattr(module, name))
    budget = [K] if "TopK" in name else []
    theirs = make(D_IN, D_SAE, *budget, *([[5, D_SAE - 5]] if "Matryoshka" in name else []))
    with torch.no_grad():
        for i, p in enumerate(theirs.parameters()):
            p.copy_(rand(*p.shape, seed=i))
        if budget:
            theirs.threshold.fill_(THETA)
        x = inputs()
        folder = write(tmp_path / "theirs", theirs.state_dict(), trainer_of(name))
        z = theirs.encode(x)
        assert_loads_as(folder, x, z, theirs.decode(z), tmp_path)

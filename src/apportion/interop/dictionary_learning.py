"""dictionary_learning (saprmarks): ae.pt, with the name of its class in config.json beside it.

    AutoEncoder              relu, b_dec subtracted                  encoder.*, decoder.weight, bias (on both sides)
    AutoEncoderNew           relu, nothing subtracted                encoder.*, decoder.*
    GatedAutoEncoder         gated, b_dec subtracted                 encoder.weight, decoder.weight, decoder_bias,
                                                                     r_mag, gate_bias, mag_bias
    JumpReluAutoEncoder      jumprelu, nothing subtracted            W_enc, b_enc, W_dec, b_dec, threshold
    AutoEncoderTopK          topk, b_dec subtracted                  encoder.*, decoder.weight, b_dec, k, threshold
    BatchTopKSAE             one threshold, b_dec subtracted         the same names; threshold -1: none yet
    MatryoshkaBatchTopKSAE   as BatchTopKSAE                         W_enc, b_enc, W_dec, b_dec, k, threshold,
                                                                     group_sizes

encoder.weight is [d_sae, d_in], decoder.weight [d_in, d_sae], W_enc [d_in, d_sae], W_dec [d_sae, d_in]. Codes are those
of `encode`, in raw units. While a run goes on, ae.pt may be a backup {step, ae, optimizer, config, norm_factor},
trained on x / norm_factor; then biases and thresholds are multiplied by norm_factor, as at the end of a run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import Any

import torch

from apportion.disk import replacing, write_json
from apportion.interop.folding import fold_b_dec
from apportion.interop.hook_names import about_model, family_of, hub_name
from apportion.interop.parts import Parts
from apportion.interop.peek import first_file, names_in, settings_in
from apportion.interop.reading import Tensors, read_pt, tensor_dict
from apportion.interop.writing import SAVE, carried, check_fits, dict_of, layer_of, model_of, over, stored
from apportion.language.hook_names import LAYERS

FILES = ["ae.pt", "ae_*.pt"]
CLASSES = {
    "GatedAutoEncoder": {"encoder.weight", "decoder.weight", "decoder_bias", "r_mag", "gate_bias", "mag_bias"},
    "MatryoshkaBatchTopKSAE": {"W_enc", "b_enc", "W_dec", "b_dec", "group_sizes"},
    "JumpReluAutoEncoder": {"W_enc", "b_enc", "W_dec", "b_dec", "threshold"},
    "AutoEncoderTopK": {"encoder.weight", "encoder.bias", "decoder.weight", "b_dec"},
    "BatchTopKSAE": {"encoder.weight", "encoder.bias", "decoder.weight", "b_dec"},
    "AutoEncoderNew": {"encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"},
    "AutoEncoder": {"encoder.weight", "encoder.bias", "decoder.weight", "bias"},
}
"""Tensors of each class, those first that would pass for another."""
B_DEC = {"AutoEncoder": "bias", "AutoEncoderNew": "decoder.bias", "GatedAutoEncoder": "decoder_bias"}
"""Its names of b_dec where it is not called so."""
GATE = {"b_gate": "gate_bias", "r_mag": "r_mag", "b_mag": "mag_bias"}
"""Our names of the tensors of a gate, and its own."""
UNIT = 5e-6
"""How far norms may lie from 1 and still be left alone by its `normalize_decoder`."""


def recognises(path: Path) -> bool:
    names = names_in(file := first_file(path, FILES))
    known = any(tensors <= names for tensors in CLASSES.values())
    return known or (file is not None and _trainer(file).get("dict_class") in CLASSES)


def read(path: Path, config: dict[str, Any], trust: bool) -> Parts:
    file = first_file(path, FILES)
    if file is None:
        raise ValueError(f"{path} has no ae.pt.")
    content, trainer, factor = read_pt(file, trust), _trainer(file), 1.0
    if isinstance(content, Mapping) and "ae" in content:
        trainer = trainer or dict_of(content.get("config"))
        factor = content.get("norm_factor") or 1.0
        if not isinstance(factor, int | float) or not isfinite(factor) or factor <= 0:
            raise ValueError(f"{file}: norm_factor must be a positive number, got {factor!r}.")
        content = content["ae"]
    tensors = tensor_dict(content, file)
    trainer = trainer | {name: config.pop(name) for name in ("dict_class", "k") if name in config}
    parts = _parts(_class_of(trainer, tensors, file), tensors, trainer, file)
    if factor != 1:
        _scale_biases(parts, factor)
    _describe(parts, trainer)
    return parts


def _trainer(file: Path) -> dict[str, Any]:
    """What config.json says of the training, beside the file or above its folder of checkpoints; empty if nothing."""
    folder = file.parent.parent if file.parent.name == "checkpoints" else file.parent
    return dict_of(settings_in(folder / "config.json").get("trainer"))


def _class_of(trainer: dict[str, Any], tensors: Mapping[str, Any], file: Path) -> str:
    said = trainer.get("dict_class")
    if said in CLASSES:
        return said
    if said is not None:
        raise ValueError(f"{file}: the class {said!r} has no counterpart here; known are {', '.join(CLASSES)}.")
    fitting = [name for name, wanted in CLASSES.items() if wanted <= tensors.keys()]
    if not fitting:
        raise ValueError(f"{file} holds {', '.join(sorted(tensors)) or 'no tensors'}, which is none of its classes.")
    if fitting[0] == "AutoEncoderTopK":
        raise ValueError(
            f"{file} may be an AutoEncoderTopK or a BatchTopKSAE, and there is no config.json that says which. "
            'Say it: load(..., config={"dict_class": "BatchTopKSAE"}).'
        )
    return fitting[0]


def _parts(name: str, stored: dict[str, Any], trainer: dict[str, Any], file: Path) -> Parts:
    sizes = {ours: trainer.get(theirs) for ours, theirs in (("d_in", "activation_dim"), ("d_sae", "dict_size"))}
    tensors = Tensors(stored, file, **sizes)
    b_enc = None if name == "GatedAutoEncoder" else "encoder.bias"
    weights = (
        ("W_enc.T", "W_dec", "b_enc") if "W_enc" in CLASSES[name] else ("encoder.weight", "decoder.weight.T", b_enc)
    )
    parts = Parts(
        kind="relu",
        **tensors.weights(*weights, B_DEC.get(name, "b_dec")),
        subtract_b_dec=name not in ("AutoEncoderNew", "JumpReluAutoEncoder"),
    )
    if name == "GatedAutoEncoder":
        parts.kind = "gated"
        parts.gate = {ours: tensors.take(theirs, "d_sae") for ours, theirs in GATE.items()}
    elif name == "JumpReluAutoEncoder":
        parts.kind, parts.threshold = "jumprelu", tensors.take("threshold", "d_sae")
    elif "TopK" in name:
        _budget(parts, name, tensors, trainer)
    parts.dtype = tensors.finish()
    return parts


def _budget(parts: Parts, name: str, tensors: Tensors, trainer: dict[str, Any]) -> None:
    stored = tensors.number("k") if "k" in tensors else None
    parts.k = trainer.get("k", stored)
    if stored is not None and parts.k != stored:
        raise ValueError(f"{tensors.file}: k is {stored:g}, and elsewhere it is said to be {parts.k!r}.")
    threshold = tensors.number("threshold") if "threshold" in tensors else -1.0
    parts.kind = "topk" if name == "AutoEncoderTopK" else "batch_topk"
    if parts.kind == "batch_topk" and threshold >= 0:
        parts.threshold = parts.b_enc.new_tensor(threshold)
    tensors.drop("group_sizes")


def _scale_biases(parts: Parts, factor: float) -> None:
    """From x / factor to x; the encoder is homogeneous, so that weights stay."""
    for bias in (parts.b_enc, parts.b_dec, *(parts.gate[name] for name in ("b_gate", "b_mag") if parts.gate)):
        bias.mul_(factor)
    if parts.threshold is not None:
        parts.threshold = parts.threshold * factor


def _describe(parts: Parts, trainer: dict[str, Any]) -> None:
    """The hookpoint can be told from the name of a residual stream; other places in a model have no fixed names."""
    model, place = trainer.get("lm_name"), trainer.get("submodule_name")
    if isinstance(model, str):
        parts.source = about_model(hub_name(model))
    layer = re.fullmatch(r"resid_post_layer_(\d+)", str(place))
    family = family_of(str(model))
    if layer and family:
        parts.hookpoint = f"{LAYERS[family]}.{layer[1]}"
    plain = {name: value for name, value in trainer.items() if isinstance(value, str | int | float | bool | None)}
    parts.info = {"original": plain}


def write(parts: Parts, folder: Path) -> None:
    """ae.pt and config.json, in the class that computes what the parts say."""
    if parts.transcoder:
        raise ValueError(f"dictionary_learning has no class for transcoders; gemma_scope and sae_lens do, or {SAVE}.")
    check_fits(parts, "dictionary_learning", ("relu", "topk", "jumprelu", "gated"))
    name = _class_for(parts)
    fold_b_dec(parts, name not in ("AutoEncoderNew", "JumpReluAutoEncoder"))
    tensors = {B_DEC.get(name, "b_dec"): parts.b_dec}
    if name == "JumpReluAutoEncoder":
        tensors |= {"W_enc": parts.W_enc.T, "b_enc": parts.b_enc, "W_dec": parts.W_dec, "threshold": _threshold(parts)}
    else:
        tensors |= {"encoder.weight": parts.W_enc, "decoder.weight": parts.W_dec.T}
        gate = {GATE[ours]: tensor for ours, tensor in parts.gate.items()}
        tensors |= gate or {"encoder.bias": parts.b_enc}
    if "TopK" in name:
        tensors["k"] = torch.tensor(int(parts.k or 0), dtype=torch.int)
        tensors["threshold"] = torch.tensor(-1.0) if parts.kind == "topk" else _threshold(parts)[0]
    with replacing(folder / "ae.pt") as partial:
        torch.save(stored(tensors), partial)
    trainer = over(carried(parts, "dictionary_learning"), _settings(parts, name))
    write_json(folder / "config.json", {"trainer": trainer, "buffer": {}})


def _class_for(parts: Parts) -> str:
    """AutoEncoder only with decoder rows of unit norm: `from_pretrained` makes them so, and codes would change."""
    if parts.kind == "relu":
        unit = bool(((parts.W_dec.norm(dim=1) - 1).abs() < UNIT).all())
        return "AutoEncoder" if parts.subtract_b_dec and unit else "AutoEncoderNew"
    if parts.kind == "jumprelu":
        one = bool((_threshold(parts) == _threshold(parts)[0]).all())
        return "BatchTopKSAE" if one and parts.k is not None and parts.k == int(parts.k) else "JumpReluAutoEncoder"
    return {"topk": "AutoEncoderTopK", "gated": "GatedAutoEncoder"}[parts.kind]


def _threshold(parts: Parts) -> torch.Tensor:
    assert parts.threshold is not None
    return parts.threshold.expand(len(parts.W_enc))


def _settings(parts: Parts, name: str) -> dict[str, Any]:
    model, layer = model_of(parts)[0], layer_of(parts)
    stream = layer is not None and str(parts.hookpoint).endswith(f".{layer}")
    return {
        "dict_class": name,
        "activation_dim": parts.W_enc.shape[1],
        "dict_size": parts.W_enc.shape[0],
        "k": int(parts.k) if "TopK" in name and parts.k else None,
        "layer": layer,
        "lm_name": model,
        "submodule_name": f"resid_post_layer_{layer}" if stream else parts.hookpoint,
    }

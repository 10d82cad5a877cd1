"""SAELens: cfg.json and sae_weights.safetensors, of version 6 or before, for inference or a training checkpoint.

Stored                W_enc [d_in, d_sae], W_dec [d_sae, d_out], biases; gated: b_gate, r_mag, b_mag and no b_enc
standard              relu(W_enc (x - b_dec) + b_enc); b_dec only if apply_b_dec_to_input, never for transcoders
topk                  the k largest of each token, then relu. With rescale_acts_by_decoder_norm its codes are
                      ||W_dec_j|| as large, and decoded with unit rows: fold_norms
jumprelu              threshold [d_sae], or log_threshold in older training checkpoints
batchtopk, matryoshka for inference saved as jumprelu; a training checkpoint has topk_threshold, 0 until there is one,
                      in units of the codes
transcoders           nothing is subtracted, and normalisation is of the input alone

Normalisation: layer_norm and constant_norm_rescale are done at run time. expected_average_only_in and
covariance_whitening are not: their statistics lie beside a training checkpoint (activation_scaler.json) until they are
folded, which is done here. Without that file `config={"norm_scaling_factor": ...}` gives the factor, else it is 1.

Before version 6 the configuration was flat, with other names and no word for some defaults.

Metadata can say that the model was loaded with `center_writing_weights`: see centring.py.
"""

from __future__ import annotations

import logging
from math import isfinite
from pathlib import Path
from typing import Any

from apportion.architectures.inputs import InputNorm
from apportion.disk import read_json, write_json, write_tensors
from apportion.interop.centring import centre
from apportion.interop.contexts import with_contexts
from apportion.interop.folding import fold_norms, fold_scale, fold_whitening
from apportion.interop.hook_names import is_processed, origin
from apportion.interop.lens_metadata import RENAMED, lens_metadata
from apportion.interop.parts import Kind, Parts
from apportion.interop.peek import beside, first_file
from apportion.interop.reading import Tensors, file_in, read_safetensors
from apportion.interop.writing import check_fits, dict_of, dtype_name, stored

logger = logging.getLogger(__name__)

WEIGHTS, CONFIG = "sae_weights.safetensors", "cfg.json"
VERSION = "6.54.12"
"""Whose files we write; without one, they would count as older than 6."""
UNIT = 1e-5
"""How far norms of decoder rows may lie from 1: as far as rounding moves the cut between matches."""
KINDS: dict[str, Kind] = {
    "standard": "relu",
    "topk": "topk",
    "jumprelu": "jumprelu",
    "gated": "gated",
    "batchtopk": "batch_topk",
    "matryoshka_batchtopk": "batch_topk",
    "transcoder": "relu",
    "skip_transcoder": "relu",
    "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
}
INPUT_NORMS: dict[str, InputNorm] = {
    "none": "none",
    "expected_average_only_in": "none",
    "covariance_whitening": "none",
    "layer_norm": "token_standardise",
    "constant_norm_rescale": "token_norm",
}
NORMALISED = {"none": "none", "token_standardise": "layer_norm", "token_norm": "constant_norm_rescale"}
"""How it calls our preparations of x when it is written."""


def recognises(path: Path) -> bool:
    """The weights have a name of their own; without cfg.json they may be llamascopium's."""
    alone = not beside(path, "config.json").exists()
    return first_file(path, [WEIGHTS]) is not None and (beside(path, CONFIG).exists() or alone)


def read(path: Path, config: dict[str, Any], trust: bool) -> Parts:
    folder = path if path.is_dir() else path.parent
    file = file_in(folder, WEIGHTS)
    original = read_json(file_in(folder, CONFIG))
    settings = current_settings(original)
    settings |= {name: config.pop(name) for name in ("k", "model_from_pretrained_kwargs") if name in config}
    kind = _kind(settings, file)
    parts = _weights(settings, kind, file)
    scale = _scale(folder, config)
    if scale is not None:
        fold_scale(parts, scale)
    if settings.get("rescale_acts_by_decoder_norm") and kind in ("topk", "batch_topk"):
        threshold, parts.threshold = parts.threshold, None
        fold_norms(parts)
        parts.threshold = threshold if threshold is None or scale is None else threshold / scale
    if settings["normalize_activations"] == "covariance_whitening":
        _whiten(parts, folder)
    _describe(parts, settings, original)
    if dict_of(settings.get("model_from_pretrained_kwargs")).get("center_writing_weights"):
        places = (settings.get("hook_name"), settings.get("hook_name_out"))
        centre(parts, settings.get("model_name"), *places, file)
    return parts


def current_settings(original: dict[str, Any]) -> dict[str, Any]:
    """The configuration with the names and defaults of version 6, and its metadata at the same level."""
    metadata = original.get("metadata")
    named = dict_of(metadata) | original
    settings = {RENAMED.get(name, name): value for name, value in named.items() if name != "metadata"}
    settings.setdefault("architecture", "standard")
    settings.setdefault("apply_b_dec_to_input", True)
    activation, more = settings.get("activation_fn"), settings.get("activation_fn_kwargs")
    if isinstance(more, dict) and more.get("k") is not None:
        settings.setdefault("k", more["k"])
    if activation == "topk":
        settings["architecture"] = "topk"
    elif activation not in (None, "relu"):
        raise ValueError(
            f"{CONFIG}: the activation function {activation!r} has no counterpart here; relu and topk have."
        )
    if metadata is None:
        settings.setdefault("prepend_bos", True)
    norm = settings.get("normalize_activations") or "none"
    settings["normalize_activations"] = "expected_average_only_in" if norm is True else norm
    if "hook_z" in str(settings.get("hook_name")):
        settings.setdefault("reshape_activations", "hook_z")
    return settings


def _kind(settings: dict[str, Any], file: Path) -> Kind:
    architecture, norm = settings["architecture"], settings["normalize_activations"]
    if architecture not in KINDS:
        raise ValueError(
            f"{file.parent / CONFIG}: the architecture {architecture!r} has no counterpart here; known are "
            f"{', '.join(KINDS)}."
        )
    if norm not in INPUT_NORMS:
        raise ValueError(
            f"{file.parent / CONFIG}: normalize_activations = {norm!r} is unknown; known are {', '.join(INPUT_NORMS)}."
        )
    return KINDS[architecture]


def _weights(settings: dict[str, Any], kind: Kind, file: Path) -> Parts:
    """As they are stored, before anything is folded."""
    sizes = {name: settings.get(name) for name in ("d_in", "d_sae", "d_out")}
    transcoder = settings["architecture"].endswith("transcoder")
    tensors = Tensors(read_safetensors(file), file, **sizes)
    b_enc = None if kind == "gated" else "b_enc"
    parts = Parts(
        kind=kind,
        **tensors.weights("W_enc.T", "W_dec", b_enc, "b_dec", d_out="d_out" if transcoder else "d_in"),
        subtract_b_dec=bool(settings["apply_b_dec_to_input"]) and not transcoder,
        input_norm=INPUT_NORMS[settings["normalize_activations"]],
        transcoder=transcoder,
        k=settings.get("k"),
    )
    if kind == "gated":
        parts.gate = {name: tensors.take(name, "d_sae") for name in ("b_gate", "r_mag", "b_mag")}
    if kind == "jumprelu" and "log_threshold" in tensors:
        parts.threshold = tensors.take("log_threshold", "d_sae").exp()
    elif kind == "jumprelu":
        parts.threshold = tensors.take("threshold", "d_sae")
    if kind == "batch_topk" and (theta := tensors.number("topk_threshold")) > 0:
        parts.threshold = parts.b_enc.new_tensor(theta)
    if "skip" in settings["architecture"]:
        parts.W_skip = tensors.take("W_skip", "d_out", "d_in")
        if parts.input_norm != "none":
            raise ValueError(f"{file}: a skip beside tokens that are normalised singly has no counterpart here.")
    if "scaling_factor" in tensors:
        _finetuning(parts, settings, tensors)
    parts.dtype = tensors.finish()
    return parts


def _finetuning(parts: Parts, settings: dict[str, Any], tensors: Tensors) -> None:
    """Before version 6 codes could be decoded times a factor each; for a while the factors were saved, used or not."""
    factors = tensors.take("scaling_factor", "d_sae")
    if bool((factors == 1).all()):
        return
    if not settings.get("finetuning_scaling_factor"):
        raise ValueError(f"{tensors.file}: scaling_factor is not 1, and {CONFIG} does not say that it is to be used.")
    parts.W_dec.mul_(factors[:, None])


def _scale(folder: Path, config: dict[str, Any]) -> float | None:
    """What activations were multiplied by while training, if that is not folded yet."""
    stored = read_json(file) if (file := folder / "activation_scaler.json").is_file() else {}
    scale = config.pop("norm_scaling_factor", stored.get("scaling_factor"))
    if scale is not None and not (isinstance(scale, int | float) and isfinite(scale) and scale > 0):
        raise ValueError(f"{folder}: a scaling factor of activations must be a positive number, got {scale!r}.")
    return scale


def _whiten(parts: Parts, folder: Path) -> None:
    file = file_in(folder, "activation_whitening.safetensors")
    tensors = Tensors(read_safetensors(file), file, d_in=parts.W_enc.shape[1])
    mean, matrix = tensors.take("mean", "d_in"), tensors.take("matrix", "d_in", "d_in")
    fold_whitening(parts, mean, matrix, tensors.take("inverse_matrix", "d_in", "d_in"))


def _describe(parts: Parts, settings: dict[str, Any], original: dict[str, Any]) -> None:
    """Where it comes from, as far as the file says so."""
    trained = dict_of(settings.get("training_architecture_details")).get("k")
    if parts.k is None and isinstance(trained, int | float):
        parts.k = trained
    model, processing = settings.get("model_name"), dict_of(settings.get("model_from_pretrained_kwargs"))
    places = {}
    for ours, theirs in (("target_hookpoint", "hook_name_out"), ("hookpoint", "hook_name")):
        found, parts.source = origin(model, settings.get(theirs))
        said = settings.get(ours)  # in files that we wrote
        known = said if isinstance(said, str) else found
        places[ours] = None if is_processed(settings.get(theirs), processing) else known
    parts.hookpoint, parts.target_hookpoint = places["hookpoint"], places["target_hookpoint"]
    parts.source = with_contexts(parts.source, settings)
    parts.info = {"original": _complete(original, settings)}


def _complete(original: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """What the file says, and what the caller or a release says of how the model was loaded."""
    if not (processing := settings.get("model_from_pretrained_kwargs")):
        return original
    metadata = dict_of(original.get("metadata")) | {"model_from_pretrained_kwargs": processing}
    return original | ({"metadata": metadata} if "metadata" in original else metadata)


def write(parts: Parts, folder: Path, model_class_name: str | None = None) -> None:
    """cfg.json and sae_weights.safetensors as of version 6."""
    kinds: tuple[Kind, ...] = ("relu", "jumprelu") if parts.transcoder else ("relu", "topk", "jumprelu", "gated")
    check_fits(parts, "sae_lens", kinds, per_token=True)
    foldable = parts.kind == "topk" and _has_unit_rows(parts)
    tensors = {"W_enc": parts.W_enc.T, "W_dec": parts.W_dec, "b_dec": parts.b_dec}
    tensors |= parts.gate if parts.kind == "gated" else {"b_enc": parts.b_enc}
    metadata = {"sae_lens_version": VERSION, "sae_lens_training_version": None} | lens_metadata(parts, model_class_name)
    settings: dict[str, Any] = {
        "architecture": _architecture(parts),
        "d_in": parts.W_enc.shape[1],
        "d_sae": parts.W_enc.shape[0],
        "dtype": dtype_name(parts),
        "device": "cpu",
        "apply_b_dec_to_input": parts.subtract_b_dec,
        "normalize_activations": NORMALISED[parts.input_norm],
        "reshape_activations": "hook_z" if str(metadata["hook_name"]).endswith("hook_z") else "none",
        "metadata": metadata,
    }
    if parts.transcoder:
        settings["d_out"] = parts.W_dec.shape[1]
    if parts.kind == "topk":
        settings |= {"k": parts.k, "rescale_acts_by_decoder_norm": foldable}
    write_tensors(folder / WEIGHTS, stored(tensors | {"threshold": parts.threshold, "W_skip": parts.W_skip}))
    write_json(folder / CONFIG, settings)


def _has_unit_rows(parts: Parts) -> bool:
    """Can SAELens take a TopK's codes times decoder norms? Where these are 1 it makes no difference, and it lets others
    fold them in, which SAEDashboard and Neuronpedia always do.

    Latents that never fire and have no decoder row get one, for SAELens divides by its norm.
    """
    norms = parts.W_dec.norm(dim=1)
    idle = (norms == 0) & ~parts.W_enc.any(dim=1) & (parts.b_enc <= 0)
    if bool(((norms - 1).abs()[~idle] < UNIT).all()):
        parts.W_dec[idle, 0] = 1
        return True
    logger.warning(
        "Decoder rows of this TopK SAE have norms from %.4g to %.4g, and its choice of latents does not go by them: "
        "SAELens cannot fold them in, and SAEDashboard and Neuronpedia refuse it. With rows of norm 1 "
        "(sae.constrain()) it is another SAE, that they take.",
        norms.min(),
        norms.max(),
    )
    return False


def _architecture(parts: Parts) -> str:
    if not parts.transcoder:
        return {"relu": "standard"}.get(parts.kind, parts.kind)
    words = ["jumprelu"] * (parts.kind == "jumprelu") + ["skip"] * (parts.W_skip is not None)
    return "_".join([*words, "transcoder"])

"""What the writers of all formats share: can the format hold it, and what other libraries call things.

Writers get Parts from `take_apart`: float32 or float64, on the CPU, in raw units, with none of them NaN.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apportion.interop.hook_names import LAYERS, family_of_model, from_hookpoint
from apportion.interop.parts import Kind, Parts

SAVE = "save it in ours with sae.save"


def check_fits(parts: Parts, format: str, kinds: tuple[Kind, ...], *, per_token: bool = False) -> None:
    """ValueError, with what can be done instead, unless the format has this kind and this preparation of x."""
    if parts.input_norm != "none" and not per_token:
        raise ValueError(
            f"{format} cannot normalise each token ({parts.input_norm}), and that does not fold into weights; "
            f"sae_lens can, or {SAVE}."
        )
    if parts.kind not in kinds:
        remedy = SAVE
        if parts.kind == "topk" and "jumprelu" in kinds and not parts.transcoder:
            remedy = f"make it a JumpReLU SAE with ap.to_jumprelu(sae, x), or {remedy}"
        what = "transcoders" if parts.transcoder else "SAEs"
        raise ValueError(f"{format} has no {what} of kind {parts.kind}, only {', '.join(kinds)}; {remedy}.")


def stored(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As files hold them: in order of their dimensions, and nothing besides."""
    return {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}


def dtype_name(parts: Parts) -> str:
    return str(parts.W_enc.dtype).removeprefix("torch.")


def model_of(parts: Parts) -> tuple[str | None, str | None]:
    """Name and family of the model that x comes from, as far as they are known."""
    model = _dict(_dict(parts.info.get("source")).get("model"))
    return model.get("name_or_path"), family_of_model(model)


def layer_of(parts: Parts) -> int | None:
    """The number of the block that x comes from."""
    _, family = model_of(parts)
    start = re.escape(LAYERS[family]) if family in LAYERS else r"[\w.]*?"
    found = re.match(start + r"\.(\d+)(\.|:|$)", parts.hookpoint or "")
    return int(found[1]) if found else None


def hook_name(parts: Parts, hookpoint: str | None) -> str | None:
    """What TransformerLens calls it; where it has no name, the hookpoint itself."""
    _, family = model_of(parts)
    if hookpoint is not None and family is not None:
        with suppress(ValueError):
            return from_hookpoint(hookpoint, family)
    if hookpoint is None:  # of another library's file, whose name no module here stands for
        return _dict(parts.info.get("source")).get("hook_name")
    return hookpoint


def lens_metadata(parts: Parts) -> dict[str, Any]:
    """What tools of SAELens' family want to know: the model, the place in it, and how text was cut into contexts."""
    source = _dict(parts.info.get("source"))
    model, _ = model_of(parts)
    name = hook_name(parts, parts.hookpoint)
    text, bos = _dict(source.get("text")), source.get("bos", "auto")
    exported = _dict(parts.info.get("exported"))
    known = name is None or name.startswith("blocks.")
    return {
        "model_name": None if model is None else model.removeprefix("openai-community/"),
        "model_class_name": "HookedTransformer" if known else "AutoModelForCausalLM",
        "model_from_pretrained_kwargs": {},
        "hook_name": name,
        "hook_name_out": hook_name(parts, parts.target_hookpoint) if parts.target_hookpoint else None,
        "hook_head_index": None,
        "context_size": source.get("context_tokens"),
        "prepend_bos": bos not in ("never", False),
        "seqpos_slice": [None],
        "dataset_path": text.get("where"),
        "training_tokens": _dict(parts.info.get("training")).get("tokens"),
        "training_architecture": exported.get("sae"),
        "training_architecture_details": {} if parts.k is None else {"k": parts.k},
        "neuronpedia_id": None,
        "hookpoint": parts.hookpoint,
        "target_hookpoint": parts.target_hookpoint,
        "apportion_version": version("apportion"),
        "apportion": exported,
    }


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def empty_folder(folder: str | Path) -> Path:
    """The folder, which does not exist or is empty; ValueError if it is not so."""
    path = Path(folder).resolve()
    if path.exists() and not path.is_dir():
        raise ValueError(f"{folder} is a file. Give a new folder.")
    if path.exists() and any(path.iterdir()):
        raise ValueError(f"{folder} exists and is not empty. Give a new folder.")
    return path

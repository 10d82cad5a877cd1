"""What the writers of all formats share: can the format hold it, and what other libraries call things.

Writers get Parts from `take_apart`: float32 or float64, on the CPU, in raw units, with none of them NaN.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apportion.disk import occupied
from apportion.interop.hook_names import family_of_model
from apportion.interop.parts import Kind, Parts
from apportion.language.hook_names import LAYERS
from apportion.trust import resolved

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


def stored(tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """Those that there are as files hold them: in order of their dimensions, and nothing besides."""
    there = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    return {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in there.items()}


def dtype_name(parts: Parts) -> str:
    return str(parts.W_enc.dtype).removeprefix("torch.")


def model_of(parts: Parts) -> tuple[str | None, str | None]:
    """Name and family of the model that x comes from, as far as they are known."""
    model = parts.source.lm.model
    return model.name_or_path, family_of_model(model)


def layer_of(parts: Parts) -> int | None:
    """The number of the block that x comes from."""
    _, family = model_of(parts)
    start = re.escape(LAYERS[family]) if family in LAYERS else r"[\w.]*?"
    found = re.match(start + r"\.(\d+)(\.|:|$)", parts.hookpoint or "")
    return int(found[1]) if found else None


def carried(parts: Parts, format: str) -> dict[str, Any]:
    """What a file of the same format said of an SAE that was read from one and not trained since: its settings."""
    return {} if "training" in parts.info or parts.info.get("format") != format else dict_of(parts.info.get("original"))


def over(original: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings over those of the file that an SAE was read from; what is not known leaves what was said there."""
    return {**original, **{name: v for name, v in settings.items() if v is not None or name not in original}}


def dict_of(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}


def empty_folder(folder: str | Path) -> Path:
    """The folder, which does not exist or is empty; ValueError if it is not so."""
    path = resolved(folder)
    if path.exists() and not path.is_dir():
        raise ValueError(f"{folder} is a file. Give a new folder.")
    if occupied(path):
        raise ValueError(f"{folder} exists and is not empty. Give a new folder.")
    return path

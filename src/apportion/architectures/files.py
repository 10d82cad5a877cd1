"""A released SAE on disk: config.json and model.safetensors. Nothing is ever unpickled.

config.json         {"format": "apportion", "version": 1, "sae": name, "settings": {...}, "info": {...}}
model.safetensors   parameters, input description, thresholds and densities, under their names in the module
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from apportion.architectures.affine import blank_weights
from apportion.architectures.base import SAE

VERSION = 1
SIZES = [
    ("d_sae", "W_enc", 0),
    ("d_in", "W_enc", -1),
    ("d_out", "W_dec", -1),
    ("num_sites", "W_enc", -2),
    ("num_experts", "W_router", 0),
]
"""Settings that are sizes, and the dimension of a tensor that each is."""


def save(sae: SAE, folder: Path) -> None:
    """Write both files; each appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.detach().contiguous().cpu() for name, t in sae.state_dict().items()}
    config = {"format": "apportion", "version": VERSION, "sae": sae.name, "settings": sae.settings(), "info": sae.info}
    write_tensors(folder / "model.safetensors", tensors)
    write_json(folder / "config.json", config)


def load(path: str | Path, subfolder: str | None = None) -> SAE:
    """Read an SAE saved with `sae.save`; it comes in eval mode.

    Raises ValueError, naming the file and the reason, for anything that is not a complete, consistent SAE.
    """
    from apportion.architectures import rebuild

    folder = Path(path) / subfolder if subfolder else Path(path)
    config_file, tensor_file = folder / "config.json", folder / "model.safetensors"
    for file in (config_file, tensor_file):
        if not file.is_file() and (folder / "run.json").is_file():
            raise ValueError(f"{folder} is a run that has not finished. Go on with it: apportion train ... --resume")
        if not file.is_file():
            raise ValueError(f"{folder} is not a saved SAE: {file.name} is missing. Give a folder that sae.save wrote.")
    config = read_json(config_file)
    if config.get("format") != "apportion":
        raise ValueError(f"{config_file} was not written by apportion (format {config.get('format')!r}).")
    if not isinstance(found := config.get("version"), int) or found > VERSION:
        raise ValueError(f"{config_file} has version {found}; this apportion reads up to {VERSION}. Upgrade.")
    settings, info = config.get("settings"), config.get("info", {})
    if not isinstance(settings, dict) or not isinstance(info, dict):
        raise ValueError(f"{config_file} has no settings, or none that are a JSON object.")
    try:
        tensors = load_file(tensor_file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{tensor_file} is damaged: {error}") from None
    _check_sizes(settings, tensors, tensor_file)
    try:
        with blank_weights():
            sae = rebuild(config.get("sae", ""), **settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{config_file} does not describe an SAE: {error}") from error
    wanted = sae.state_dict()
    wrong = sorted(wanted.keys() ^ tensors.keys())
    if wrong:
        raise ValueError(f"{tensor_file} does not fit its config: missing or unexpected {', '.join(wrong)}.")
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape:
            raise ValueError(
                f"{tensor_file}: {name} has shape {list(tensor.shape)}, its config says {list(wanted[name].shape)}."
            )
        if tensor.dtype.is_floating_point != wanted[name].dtype.is_floating_point:
            raise ValueError(f"{tensor_file}: {name} holds {tensor.dtype}, {wanted[name].dtype} is expected.")
    for name in [*dict(sae.named_parameters()), *(name for name in tensors if name.startswith("input."))]:
        if not all_finite(tensors[name]):
            raise ValueError(f"{tensor_file}: {name} holds NaN or infinity.")
    sae.to(tensors["W_dec"].dtype)
    sae.load_state_dict(tensors)
    sae.info = info
    return sae.eval()


def _check_sizes(settings: dict[str, Any], tensors: dict[str, torch.Tensor], file: Path) -> None:
    """Before anything is made in the sizes that a config asks for: they are those of the weights."""
    for name, weights, dimension in SIZES:
        said = settings.get(name)
        if said is None:
            continue
        if weights not in tensors:
            raise ValueError(f"{file} does not fit its config: missing {weights}.")
        found = list(tensors[weights].shape)
        if len(found) < 2 or said != found[dimension]:
            raise ValueError(f"{file}: {weights} has shape {found}, its config says {name} = {said!r}.")


def all_finite(x: torch.Tensor) -> bool:
    """Without a copy in the usual case, where even the sum is finite."""
    return bool(torch.isfinite(x.sum())) or bool(torch.isfinite(x).all())


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Atomic: a crash leaves the old file or the new one."""
    write_text(file, json.dumps(_finite(content), indent=2, allow_nan=False) + "\n")


def write_text(file: Path, content: str) -> None:
    """Atomic: a crash leaves the old file or the new one."""
    partial = file.with_name(file.name + ".partial")
    partial.write_text(content, encoding="utf-8")
    partial.replace(file)


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_tensors(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Atomic: a crash leaves the old file or the new one."""
    partial = file.with_name(file.name + ".partial")
    save_file(tensors, partial)
    partial.replace(file)


def read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} does not hold a JSON object.")
    return content

"""Reading a saved SAE (files.py says what its files hold); whatever they hold, nothing is unpickled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from apportion.architectures.affine import blank_weights
from apportion.architectures.base import SAE
from apportion.architectures.checks import DECIDING, check_info, check_tensors
from apportion.architectures.files import CONFIG, OWN_CONFIG, VERSION, WEIGHTS
from apportion.architectures.table import named, rebuild
from apportion.disk import damaged, parse_json, read_json
from apportion.torch_state import usual
from apportion.trust import within

SIZES = [
    ("d_sae", "W_enc", 0),
    ("d_in", "W_enc", -1),
    ("d_out", "W_dec", -1),
    ("num_sites", "W_enc", -2),
    ("num_experts", "W_router", 0),
]
"""Settings that are sizes, and the dimension of a tensor that each is."""


@usual(learning=True)
def load(path: str | Path, subfolder: str | None = None) -> SAE:
    """Read an SAE saved with `sae.save`; it comes in eval mode.

    Raises ValueError, naming the file and the reason, for anything that is not a complete, consistent SAE.
    """
    folder = within(Path(path), subfolder) if subfolder else Path(path)
    config_file, tensor_file = folder / CONFIG, folder / WEIGHTS
    if (folder / "run.json").is_file() and not any((folder / file).is_file() for file in (CONFIG, "finished.json")):
        raise ValueError(f"{folder} is a run that has not finished. Go on with it: apportion train ... --resume")
    for file in (config_file, tensor_file):
        if not file.is_file():
            raise ValueError(f"{folder} is not a saved SAE: {file.name} is missing. Give a folder that sae.save wrote.")
    config = _config_of(config_file, tensor_file)
    if config.get("format") != "apportion":
        raise ValueError(f"{config_file} was not written by apportion (format {config.get('format')!r}).")
    if not isinstance(found := config.get("version"), int) or found > VERSION:
        raise ValueError(f"{config_file} has version {found}; this apportion reads up to {VERSION}. Upgrade.")
    settings, info = config.get("settings"), config.get("info", {})
    if not isinstance(settings, dict):
        raise ValueError(f"{config_file} has no settings, or none that are a JSON object.")
    try:
        tensors = load_file(tensor_file)
    except (SafetensorError, OSError, RuntimeError) as error:
        raise damaged(tensor_file, error) from None
    _check_sizes(settings, tensors, tensor_file)
    try:
        check_info(info)
        _check_deciding(name := str(config.get("sae")), settings)
        with blank_weights():
            sae = rebuild(name, **settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{config_file} does not describe an SAE: {error}") from error
    try:
        sae.to(check_tensors(sae, tensors))
    except ValueError as error:
        raise ValueError(f"{tensor_file}: {error}") from None
    sae.load_state_dict(tensors)
    sae.info = info
    return sae.eval()


def _check_deciding(name: str, settings: dict[str, Any]) -> None:
    """ValueError if the config lacks a setting that decides what the SAE computes."""
    known = named(name).settings(settings.get("allocation"), to_train=False)
    if missing := [setting for setting in DECIDING if setting in known and setting not in settings]:
        raise ValueError(f"its settings lack {', '.join(missing)}.")


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


def _config_of(config_file: Path, tensor_file: Path) -> dict[str, Any]:
    """The config that belongs to the weights: from them, if a crash kept it from replacing the one in its file."""
    config = read_json(config_file)
    try:
        with safe_open(tensor_file, framework="pt") as opened:
            own = parse_json((opened.metadata() or {})[OWN_CONFIG], str(tensor_file))
    except (SafetensorError, OSError, KeyError, ValueError):  # none of ours, or damaged, which is said elsewhere
        return config
    return own if "id" in config and config["id"] != own.get("id") else config

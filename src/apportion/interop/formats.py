"""The table of formats of other libraries. To add one: write one file in this folder, and one line below.

A format's file has

    recognises(path) -> bool                 is it one of mine? From the names in it (peek.py): cheap, and never raises
    read(path, config, trust) -> Parts       `path` as given, a folder or a file; reading.py has what it takes
    write(parts, folder) -> None             only where the format can hold an SAE of ours; ValueError where it cannot

`config` is what the caller knows and the file does not store (k, say): `config.pop("k", stored)`. What nobody takes is
a ValueError in the end, so that no word of the caller is lost. `trust` goes to `read_pt`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from apportion.interop.parts import Parts


@dataclass(frozen=True)
class Format:
    name: str
    recognises: Callable[[Path], bool]
    read: Callable[[Path, dict[str, Any], bool], Parts]
    write: Callable[[Parts, Path], None] | None
    files: str
    """What it is recognised by; for messages."""


def _format(name: str, files: str) -> Format:
    """That of the file of this name in this folder."""
    module = import_module(f"apportion.interop.{name}")
    return Format(name, module.recognises, module.read, getattr(module, "write", None), files)


FORMATS: dict[str, Format] = {
    name: _format(name, files)
    for name, files in {
        "sae_lens": "cfg.json and sae_weights.safetensors",
        "dictionary_learning": "ae.pt",
        "sparsify": "cfg.json and sae.safetensors",
        "openai": "a .pt with pre_bias and latent_bias",
        "gemma_scope": "params.npz or params.safetensors",
        "llama_scope": "hyperparams.json and checkpoints/",
        "llamascopium": "config.json with an sae_type",
        "mlsae": "config.json and model.safetensors with pre_encoder_bias",
        "switch_sae": "ae.pt with router.weight",
        "e2e_sae": "samples_*.pt",
        "batchtopk_repo": "sae.pt and config.json",
        "circuit_tracer": "layer_N.safetensors",
    }.items()
}
"""In the order in which they are asked."""

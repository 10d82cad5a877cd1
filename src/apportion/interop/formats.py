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
from pathlib import Path
from types import ModuleType
from typing import Any

from apportion.interop import (
    batchtopk_repo,
    circuit_tracer,
    dictionary_learning,
    e2e_sae,
    gemma_scope,
    llama_scope,
    llamascopium,
    mlsae,
    openai,
    sae_lens,
    sparsify,
    switch_sae,
)
from apportion.interop.parts import Parts


@dataclass(frozen=True)
class Format:
    name: str
    recognises: Callable[[Path], bool]
    read: Callable[[Path, dict[str, Any], bool], Parts]
    write: Callable[[Parts, Path], None] | None
    files: str
    """What it is recognised by; for messages."""


def _format(module: ModuleType, files: str) -> Format:
    """The format of a file of this folder, under its name."""
    name = module.__name__.rpartition(".")[2]
    return Format(name, module.recognises, module.read, getattr(module, "write", None), files)


FORMATS: dict[str, Format] = {
    known.name: known
    for known in (
        _format(sae_lens, "cfg.json and sae_weights.safetensors"),
        _format(dictionary_learning, "ae.pt"),
        _format(sparsify, "cfg.json and sae.safetensors"),
        _format(openai, "a .pt with pre_bias and latent_bias"),
        _format(gemma_scope, "params.npz or params.safetensors"),
        _format(llama_scope, "hyperparams.json and checkpoints/"),
        _format(llamascopium, "config.json with an sae_type"),
        _format(mlsae, "config.json and model.safetensors with pre_encoder_bias"),
        _format(switch_sae, "ae.pt with router.weight"),
        _format(e2e_sae, "samples_*.pt"),
        _format(batchtopk_repo, "sae.pt and config.json"),
        _format(circuit_tracer, "layer_N.safetensors"),
    )
}
"""In the order in which they are asked."""

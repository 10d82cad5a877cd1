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
    write: Callable[[Parts, Path], None] | None = None
    files: str = ""
    """What it is recognised by; for messages."""


FORMATS: dict[str, Format] = {
    known.name: known
    for known in (
        Format(
            "sae_lens", sae_lens.recognises, sae_lens.read, sae_lens.write, files="cfg.json and sae_weights.safetensors"
        ),
        Format(
            "dictionary_learning",
            dictionary_learning.recognises,
            dictionary_learning.read,
            dictionary_learning.write,
            files="ae.pt",
        ),
        Format("sparsify", sparsify.recognises, sparsify.read, sparsify.write, files="cfg.json and sae.safetensors"),
        Format("openai", openai.recognises, openai.read, files="a .pt with pre_bias and latent_bias"),
        Format(
            "gemma_scope",
            gemma_scope.recognises,
            gemma_scope.read,
            gemma_scope.write,
            files="params.npz or params.safetensors",
        ),
        Format("llama_scope", llama_scope.recognises, llama_scope.read, files="hyperparams.json and checkpoints/"),
        Format("llamascopium", llamascopium.recognises, llamascopium.read, files="config.json with an sae_type"),
        Format("mlsae", mlsae.recognises, mlsae.read, files="config.json and model.safetensors with pre_encoder_bias"),
        Format("switch_sae", switch_sae.recognises, switch_sae.read, files="ae.pt with router.weight"),
        Format("e2e_sae", e2e_sae.recognises, e2e_sae.read, files="samples_*.pt"),
        Format("batchtopk_repo", batchtopk_repo.recognises, batchtopk_repo.read, files="sae.pt and config.json"),
        Format("circuit_tracer", circuit_tracer.recognises, circuit_tracer.read, files="layer_N.safetensors"),
    )
}
"""In the order in which they are asked."""

"""`ap.export`: one of our SAEs in the files of another library, so that its tools take it.

What the files hold is in raw units, whatever the input description was: codes are 1 / s as large as ours (`unit`), and
reconstructions are equal. Which SAE fits where:

    sae_lens              relu, topk, jumprelu, gated; transcoders of relu and jumprelu; tokens normalised singly
    dictionary_learning   relu, topk, jumprelu, gated
    sparsify              topk; transcoders with it
    gemma_scope           relu, jumprelu; transcoders of both

Mutual Choice, Feature Choice and whatever else has thresholds in eval mode is jumprelu, once calibrated.
"""

from __future__ import annotations

from copy import deepcopy
from importlib.metadata import version
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from apportion.allocation import TokenChoice
from apportion.architectures import SAE
from apportion.architectures.affine import Affine
from apportion.disk import all_finite, whole_folder
from apportion.interop.assemble import take_apart
from apportion.interop.formats import FORMATS
from apportion.interop.parts import Parts
from apportion.interop.writing import empty_folder

OURS = "apportion"
PRECISE = (torch.float32, torch.float64)
"""What files are written in; coarser weights become float32."""


def writable() -> list[str]:
    """The names of formats that can be written."""
    return [OURS, *(name for name, known in FORMATS.items() if known.write is not None)]


def export(sae: SAE, folder: str | Path, format: str) -> None:
    """Write `sae` as another library saves its own: sae_lens, dictionary_learning, sparsify or gemma_scope.

    `folder` must be new or empty; it appears whole or not at all. Raises ValueError if the format cannot hold this SAE,
    saying what to do instead, and for SAEs that need thresholds and were never calibrated.
    """
    check_format(format)
    target = empty_folder(folder)
    if format == OURS:
        with whole_folder(target) as partial:
            sae.save(partial)
        return
    parts = take_apart(sae if sae.dtype in PRECISE else deepcopy(sae).float())
    _check_finite(parts)
    settings = sae.settings()
    parts.info["exported"] = {"sae": sae.name, "settings": settings, "version": version("apportion")}
    write = FORMATS[format].write
    assert write is not None
    with whole_folder(target) as partial:
        write(parts, partial)


def check_format(format: str) -> None:
    """ValueError unless the format can be written."""
    if format in FORMATS and format not in writable():
        raise ValueError(f"{format} is read, and not written; written are: {', '.join(writable())}.")
    if format not in writable():
        raise ValueError(f"There is no format {format!r} to write; there are: {', '.join(writable())}.")


def _check_finite(parts: Parts) -> None:
    names = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold", "W_skip")
    for name, tensor in ({name: getattr(parts, name) for name in names} | parts.gate | parts.router).items():
        if tensor is not None and not all_finite(tensor):
            raise ValueError(f"{name} of this SAE holds NaN or infinity; no file should.")


@torch.no_grad()
def unit(sae: SAE) -> Float[Tensor, " d_sae"]:
    """How many times as large each latent's codes are in exported files as those of `sae`."""
    size = torch.ones(sae.d_sae, dtype=sae.dtype, device=sae.mean.device) / sae.scale
    by_norm = isinstance(sae, Affine) and sae.config.affinity == "code_times_decoder_norm"
    if by_norm and isinstance(sae.allocation, TokenChoice):
        folded = sae.folded() if sae.input.kind == "dataset" else sae
        assert isinstance(folded, Affine)
        size = size * folded.decoder_norms()
    return size

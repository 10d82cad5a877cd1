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

import logging
from copy import deepcopy
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from apportion.architectures import SAE
from apportion.architectures.affine import Affine
from apportion.disk import all_finite, whole_folder
from apportion.interop import sae_lens
from apportion.interop.assemble import take_apart
from apportion.interop.contexts import outlier_limit
from apportion.interop.formats import FORMATS
from apportion.interop.lens_metadata import MODEL_CLASSES
from apportion.interop.parts import Parts
from apportion.interop.writing import empty_folder
from apportion.rows.filter import trained_filter

logger = logging.getLogger(__name__)
OURS = "apportion"
PRECISE = (torch.float32, torch.float64)
"""What files are written in; coarser weights become float32."""


def writable() -> list[str]:
    """The names of formats that can be written."""
    return [OURS, *(name for name, known in FORMATS.items() if known.write is not None)]


def export(sae: SAE, folder: str | Path, format: str, *, model_class_name: str | None = None) -> None:
    """Write `sae` as another library saves its own: sae_lens, dictionary_learning, sparsify or gemma_scope.

    `folder` must be new or empty; it appears whole or not at all. `model_class_name` says what sae_lens is to run the
    model with: HookedTransformer (hooks in TransformerLens's names) or AutoModelForCausalLM (modules of transformers);
    None: the former for models that it loads by name. What of the token filter of training the format has no words for
    is said in a warning. Raises ValueError if the format cannot hold this SAE, saying what to do instead, and for SAEs
    that need thresholds and were never calibrated.
    """
    check_format(format)
    check_model_class(model_class_name, format)
    target = empty_folder(folder)
    if format == OURS:
        with whole_folder(target, locked=True) as unfinished:
            sae.save(unfinished)
        return
    parts = take_apart(sae if sae.dtype in PRECISE else deepcopy(sae).float())
    _check_finite(parts)
    parts.info["exported"] = {"sae": sae.name, "settings": sae.settings(), "version": version("apportion")}
    write = FORMATS[format].write
    assert write is not None
    if model_class_name is not None:
        write = partial(sae_lens.write, model_class_name=model_class_name)
    with whole_folder(target, locked=True) as unfinished:
        write(parts, unfinished)
    _warn_of_filter(parts, format)


def check_format(format: str) -> None:
    """ValueError unless the format can be written."""
    if format in FORMATS and format not in writable():
        raise ValueError(f"{format} is read, and not written; written are: {', '.join(writable())}.")
    if format not in writable():
        raise ValueError(f"There is no format {format!r} to write; there are: {', '.join(writable())}.")


def check_model_class(name: str | None, format: str) -> None:
    """ValueError for a class that SAELens does not run, or beside another format."""
    if name is None:
        return
    if format != "sae_lens":
        raise ValueError(
            f"model_class_name = {name!r} means something to sae_lens only, not to {format}; leave it out."
        )
    if name not in MODEL_CLASSES:
        raise ValueError(f"model_class_name = {name!r} is unknown; known are {', '.join(MODEL_CLASSES)}.")


def _warn_of_filter(parts: Parts, format: str) -> None:
    """Whoever evaluates the file shows it rows that it was not trained on: say which."""
    left_out = trained_filter(parts.source, parts.hookpoint)
    limit = outlier_limit(parts.source, parts.hookpoint)
    if left_out is None:
        return
    rows = [] if limit is None else [f"rows with a norm above {limit:.4g}"]
    if format != "sae_lens":
        rows += ["position 0 of each context"] * left_out.first_position
        rows += ["special tokens"] * (left_out.special_tokens and bool(left_out.special_ids))
    if rows:
        logger.warning(
            "%s were left out while training, and %s files have no word for that: tools that show them to the SAE get "
            "poor figures. Leave them out there as well.",
            _listed(rows),
            format,
        )


def _listed(items: list[str]) -> str:
    text = f"{', '.join(items[:-1])} and {items[-1]}" if len(items) > 1 else items[0]
    return text[0].upper() + text[1:]


def _check_finite(parts: Parts) -> None:
    names = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold", "W_skip")
    for name, tensor in ({name: getattr(parts, name) for name in names} | parts.gate | parts.router).items():
        if tensor is not None and not all_finite(tensor):
            raise ValueError(f"{name} of this SAE holds NaN or infinity; no file should.")


@torch.no_grad()
def unit(sae: SAE) -> Float[Tensor, " d_sae"]:
    """How many times as large each latent's codes are in exported files as those of `sae`."""
    size = torch.ones(sae.d_sae, dtype=sae.dtype, device=sae.device) / sae.scale
    by_norm = isinstance(sae, Affine) and sae.config.affinity == "code_times_decoder_norm"
    if by_norm and sae.allocation.eval_form == "topk":
        folded = sae.folded() if sae.input.kind == "dataset" else sae
        assert isinstance(folded, Affine)
        size = size * folded.decoder_norms()
    return size

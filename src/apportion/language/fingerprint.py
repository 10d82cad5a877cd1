"""Which model was this? A record that recognises it again: later, on another machine, by another transformers.

    weights_sha256   a few numbers of every parameter, as bfloat16: the same whatever precision it is loaded in
    probe            what the model makes of a fixed row of tokens: a few of its outputs, centred, of unit norm

Names of settings and of parameters change with the version of transformers, and many settings change nothing that is
computed. So what counts is what is computed: two models are the same if they have the same weights and the same probe,
up to rounding; or another set of parameters (some versions store several in one) and nearly the same probe. Records
from before there were probes tell the class and the sizes apart. same_model.py compares.
"""

from __future__ import annotations

import hashlib
import logging
from typing import Any

import torch
from torch import Tensor

from apportion.about import ModelRecord, TokenizerRecord
from apportion.language.model import check_context_tokens
from apportion.language.passes import alone, inputs_for, parameters_of, text_config
from apportion.language.tokens import special_ids
from apportion.torch_state import in_eval_mode

logger = logging.getLogger(__name__)

SAMPLES = 16
"""Numbers of each parameter that enter the digest."""
PROBE_TOKENS = 48
PROBE_OUTPUTS = 24


def model_fingerprint(model: Any) -> ModelRecord:
    """Name, class, sizes, digest of the weights and probe (None for a model that does not run on token ids
    alone, or not to numbers)."""
    config, text = getattr(model, "config", None), text_config(model)
    weights = next(model.parameters(), None)
    return ModelRecord(
        name_or_path=str(getattr(config, "_name_or_path", "") or type(model).__name__),
        class_name=type(model).__name__,
        hidden_size=getattr(text, "hidden_size", None),
        num_layers=getattr(text, "num_hidden_layers", None),
        dtype=None if weights is None else str(weights.dtype).removeprefix("torch."),
        weights_sha256=_weights_digest(model),
        probe=_probe(model),
    )


def _weights_digest(model: Any) -> str:
    """Order and names do not enter, because both change."""
    parts = []
    for weights in model.parameters():
        if weights.is_meta:
            continue
        at = torch.linspace(0, weights.numel() - 1, SAMPLES, dtype=torch.float64).long()
        sample = _flat(weights.detach())[at.to(weights.device)].float().bfloat16().float().cpu()
        parts.append(f"{list(weights.shape)} {sample.tolist()}")
    return hashlib.sha256("\n".join(sorted(parts)).encode()).hexdigest()


def _flat(weights: Tensor) -> Tensor:
    """One number after the other; those of quantised weights that are tensors of a kind of their own are made first."""
    try:
        return weights.flatten()
    except NotImplementedError:
        return weights.dequantize().flatten()


@torch.no_grad()
def _probe(model: Any) -> tuple[float, ...] | None:
    size = getattr(text_config(model), "vocab_size", None)
    if not isinstance(size, int) or "input_ids" not in parameters_of(model):
        return None
    ids = (torch.arange(PROBE_TOKENS) * 7919 + 13) % size
    try:
        check_context_tokens(model, PROBE_TOKENS)
    except ValueError:
        ids = ids[:2]
    try:
        with alone(model), in_eval_mode(model):
            result = model(**inputs_for(model, ids[None]))
    except Exception as error:  # a model may want anything besides
        logger.debug("%s does not run on token ids alone: %s", type(model).__name__, error)
        return None
    out = getattr(result, "logits", None)
    out = getattr(result, "last_hidden_state", None) if out is None else out
    if not isinstance(out, Tensor) or not out.is_floating_point():
        return None
    last = out.reshape(-1, out.shape[-1])[-1].double().cpu()
    some = last[torch.linspace(0, len(last) - 1, PROBE_OUTPUTS).long()]
    some = some - some.mean()
    if not some.isfinite().all():  # which whoever collects is told of
        return None
    return tuple(round(value, 6) for value in (some / some.norm().clamp_min(1e-12)).tolist())


def tokenizer_fingerprint(tokenizer: Any) -> TokenizerRecord:
    """Which tokenizer this was; without a name and a size where there was none."""
    return TokenizerRecord(
        name_or_path=str(getattr(tokenizer, "name_or_path", "")),
        vocab_size=len(tokenizer) if hasattr(tokenizer, "__len__") else None,
        special_ids=special_ids(tokenizer),
    )

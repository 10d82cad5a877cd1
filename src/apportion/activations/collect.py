"""Collect: text -> language model -> activations in a cache on disk.

    model, tokenizer = load_model("HuggingFaceTB/SmolLM2-135M")
    collect(model, tokenizer, "model.layers.15", "corpus.txt", tokens=1_000_000, out="acts")

The model runs in inference mode on packed contexts and stops after the last hookpoint, so the upper layers and the
language-model head cost nothing. Everything that can be wrong with the request is checked before the work starts (a
two-token pass finds the widths); an interrupted or failed collection leaves nothing behind.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from apportion.activations.filter import TokenFilter
from apportion.activations.fingerprint import model_fingerprint, tokenizer_fingerprint
from apportion.activations.hookpoints import expand
from apportion.activations.model import (
    check_context_tokens,
    check_finite,
    run_contexts,
)
from apportion.activations.model import load_model as load_model
from apportion.activations.progress import progress_bar
from apportion.activations.store import torch_dtype
from apportion.activations.text import TextSource
from apportion.activations.tokens import contexts as packed_contexts
from apportion.activations.tokens import num_contexts_for
from apportion.activations.writer import StoreWriter, check_free_disk, refuse_existing
from apportion.torch_state import usual

log = logging.getLogger(__name__)


def batched_contexts(
    blocks: Iterable[np.ndarray], batch_contexts: int, limit: int
) -> Iterator[Int[Tensor, "n context_tokens"]]:
    """The first `limit` contexts, regrouped into batches."""
    rest: np.ndarray | None = None
    for block in blocks:
        rest = block if rest is None else np.concatenate([rest, block])
        while len(rest) >= min(batch_contexts, limit) > 0:
            take = min(batch_contexts, limit)
            yield torch.from_numpy(rest[:take].copy())
            rest, limit = rest[take:], limit - take
        if limit <= 0:
            return
    if rest is not None and len(rest):
        yield torch.from_numpy(rest[:limit].copy())


@usual()
def collect(
    model: Any,
    tokenizer: Any,
    hookpoints: str | Iterable[str],
    text: TextSource | str | Path | Iterable[str],
    *,
    tokens: int,
    out: str | Path,
    context_tokens: int = 256,
    batch_contexts: int = 16,
    dtype: str = "bfloat16",
    bos: str = "auto",
    token_filter: TokenFilter | None = None,
) -> dict[str, Any]:
    """Write the activations of the first `tokens` tokens of `text` (in whole contexts) to the cache `out`.

    Returns the manifest. A text that ends early is collected as far as it goes, which the manifest and the log say.
    """
    out, text = Path(out), TextSource.of(text)
    refuse_existing(out)
    store_dtype = torch_dtype(dtype)
    check_context_tokens(model, context_tokens)
    if batch_contexts < 1:
        raise ValueError(f"batch_contexts={batch_contexts} must be at least 1")
    names = expand(model, hookpoints)
    limit = num_contexts_for(tokens, context_tokens)
    batches = batched_contexts(packed_contexts(tokenizer, text, context_tokens, bos), batch_contexts, limit)
    first = next(batches)  # an empty or too short text fails here
    widths = {name: x.shape[1] for name, x in run_contexts(model, names, first[:2, :2]).items()}
    most_tokens = min(limit * context_tokens, text.num_bytes() or limit * context_tokens)
    check_free_disk(out, most_tokens * (sum(widths.values()) * store_dtype.itemsize + len(names) + 12))

    token_filter, special_ids = token_filter or TokenFilter(), tuple(tokenizer.all_special_ids)
    started = perf_counter()
    with StoreWriter(out, widths, dtype=dtype, token_filter=token_filter, special_ids=special_ids) as writer:
        num_contexts = _fill(writer, model, tokenizer, chain([first], batches), limit * context_tokens)
        if num_contexts < limit:
            log.warning("the text ended after %d of the %d tokens asked for", num_contexts * context_tokens, tokens)
        seconds = perf_counter() - started
        return writer.finish(
            {
                "model": model_fingerprint(model),
                "model_dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
                "tokenizer": tokenizer_fingerprint(tokenizer),
                "text": text.describe(),
                "bos": bos,
                "context_tokens": context_tokens,
                "contexts": num_contexts,
                "tokens_asked": tokens,
                "text_ended_early": num_contexts < limit,
                "seconds": round(seconds, 1),
                "tokens_per_s": round(num_contexts * context_tokens / seconds, 1),
            }
        )


def _fill(
    writer: StoreWriter, model: Any, tokenizer: Any, batches: Iterable[Int[Tensor, "n context_tokens"]], total: int
) -> int:
    """Run every batch of contexts through the model and write its rows; returns the number of contexts."""
    num_contexts = 0
    with progress_bar("collecting", total) as show:
        for ids in batches:
            acts = {name: x.to(writer.dtype) for name, x in run_contexts(model, list(writer.stats), ids).items()}
            for name, x in acts.items():
                check_finite(name, x, ids, range(num_contexts, num_contexts + len(ids)), tokenizer)
            positions = torch.arange(ids.shape[1]).repeat(len(ids))
            context_ids = torch.arange(num_contexts, num_contexts + len(ids)).repeat_interleave(ids.shape[1])
            writer.add(acts, ids.flatten(), positions, context_ids)
            num_contexts += len(ids)
            show(num_contexts * ids.shape[1])
    return num_contexts

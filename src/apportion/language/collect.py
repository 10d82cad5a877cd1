"""Collect: text -> language model -> activations in a cache on disk.

    model, tokenizer = load_model("HuggingFaceTB/SmolLM2-135M")
    collect(model, tokenizer, "model.layers.15", "corpus.txt", tokens=1_000_000, out="acts")

The model runs in inference mode on packed contexts and stops after the last hookpoint, so the upper layers and the
language-model head cost nothing. Everything that can be wrong with the request is checked before the work starts (a
two-token pass finds the widths). A collection that fails leaves nothing behind; one that is interrupted, or whose text
comes from a stream that fails for good, leaves a whole cache of the contexts collected so far, and says so.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from apportion.about import About, Language
from apportion.interrupt import GivenUp, Interrupted, Interrupts
from apportion.language.documents import Reading
from apportion.language.fingerprint import model_fingerprint, tokenizer_fingerprint
from apportion.language.hookpoints import expand
from apportion.language.model import check_context_tokens, check_finite, run_contexts
from apportion.language.model import load_model as load_model
from apportion.language.text import Text, TextSource
from apportion.language.tokens import PackedContexts, num_contexts_for, special_ids, vocabulary_size
from apportion.progress import progress_bar
from apportion.rows.filter import TokenFilter
from apportion.rows.manifest import about_manifest, torch_dtype
from apportion.rows.writer import StoreWriter, check_free_disk, check_out
from apportion.torch_state import usual

log = logging.getLogger(__name__)


def batched_contexts(
    blocks: Iterable[np.ndarray], batch_contexts: int, limit: int
) -> Iterator[Int[Tensor, "n context_tokens"]]:
    """The first `limit` contexts, regrouped into batches."""
    contexts = islice(chain.from_iterable(blocks), limit)
    while batch := list(islice(contexts, batch_contexts)):
        yield torch.from_numpy(np.stack(batch))


@usual()
def collect(
    model: Any,
    tokenizer: Any,
    hookpoints: str | Iterable[str],
    text: Text,
    *,
    tokens: int,
    out: str | Path,
    context_tokens: int = 256,
    batch_contexts: int = 16,
    dtype: str = "bfloat16",
    bos: str = "auto",
    token_filter: TokenFilter | None = None,
    keep_interrupted: bool = True,
) -> dict[str, Any]:
    """Write the activations of the first `tokens` tokens of `text` (in whole contexts) to the cache `out`.

    `text` is whatever a `TextSource` takes; where it is token ids, `tokenizer` may be None. Returns the manifest. A
    text that ends early is collected as far as it goes, which the manifest and the log say. Ctrl-C keeps what there is
    and raises `Interrupted`, whose message says where; without `keep_interrupted` nothing is left, for callers who take
    a cache that is there for a complete one.
    """
    place, text, entry_bytes = check_out(out), TextSource.of(text), torch_dtype(dtype).itemsize
    check_context_tokens(model, context_tokens)
    if batch_contexts < 1:
        raise ValueError(f"batch_contexts={batch_contexts} must be at least 1")
    names, limit = expand(model, hookpoints), num_contexts_for(tokens, context_tokens)
    contexts = PackedContexts(tokenizer, text, context_tokens, bos, vocabulary_size(model))
    batches = batched_contexts(contexts, batch_contexts, limit)
    first = next(batches)  # an empty or too short text fails here
    widths = {name: x.shape[1] for name, x in run_contexts(model, names, first[:2, :2], whole=True).items()}
    most_tokens = min(limit, 1 + (text.most_tokens() or limit * context_tokens) // contexts.body) * context_tokens
    check_free_disk(place, most_tokens * (sum(widths.values()) * entry_bytes + len(names) + 12))

    filters = {"token_filter": token_filter or TokenFilter(), "special_ids": special_ids(tokenizer)}
    started = perf_counter()
    with Interrupts() as interrupts, StoreWriter(place, widths, dtype=dtype, **filters) as writer:
        num_contexts = _fill(writer, model, tokenizer, chain([first], batches), limit * context_tokens, interrupts)
        if num_contexts == 0 or (interrupts.arrived and not keep_interrupted):
            raise Interrupted(f"stopped after {num_contexts} contexts; nothing is left at {out}")
        seconds = perf_counter() - started
        language = Language(
            model=model_fingerprint(model),
            model_dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
            tokenizer=tokenizer_fingerprint(tokenizer),
            text=text.describe(),
            bos=bos,
            bos_prepended=contexts.bos_prepended,
            context_tokens=context_tokens,
            contexts=num_contexts,
            tokens_asked=tokens,
            seconds=round(seconds, 1),
            tokens_per_s=round(num_contexts * context_tokens / seconds, 1),
            **_read(contexts.reading, num_contexts < limit, interrupts.arrived),
        )
        manifest = writer.finish(language.to_json())
    _warn(contexts.reading, about := about_manifest(manifest))
    if interrupts.arrived:
        raise Interrupted(_kept(about, out))
    return manifest


def _read(reading: Reading, early: bool, interrupted: bool) -> dict[str, Any]:
    """What was left out, and how the collection ended, as the manifest says it."""
    reason = f"stream: {reading.stopped}" if reading.stopped else "text"
    ended = "complete" if not early else "interrupted" if interrupted else reason
    counts = {"text_skipped": dict(reading.skipped), "text_repaired": dict(reading.repaired)}
    return {"ended": ended, "text_ended_early": early and not interrupted, **counts}


def _warn(reading: Reading, about: About) -> None:
    """Log what one would not expect of the cache."""
    reading.warn()
    if about.lm.text_ended_early:
        log.warning("the text ended after %d of the %d tokens asked for", about.rows, about.lm.tokens_asked)


def _kept(about: About, out: str | Path) -> str:
    """What a Ctrl-C left, and what to do next."""
    kept = f"stopped: {about.rows:,} of {about.lm.tokens_asked:,} tokens are kept in {out}, a whole cache"
    return kept if about.lm.ended == "complete" else f"{kept}. For more, collect again, or the rest, elsewhere"


def _fill(
    writer: StoreWriter,
    model: Any,
    tokenizer: Any,
    batches: Iterator[Int[Tensor, "n context_tokens"]],
    total: int,
    interrupts: Interrupts,
) -> int:
    """Run every batch of contexts through the model and write its rows; returns the number of contexts, which after an
    interruption are those that were written."""
    num_contexts = 0
    with progress_bar("collecting", total) as show:
        while True:
            try:
                with interrupts.let_through():
                    if (ids := next(batches, None)) is None:
                        return num_contexts
                    made = run_contexts(model, list(writer.stats), ids)
                    acts = {name: x.to(writer.dtype) for name, x in made.items()}
            except GivenUp:
                raise
            except KeyboardInterrupt:
                interrupts.caught()
                return num_contexts
            for name, x in acts.items():
                check_finite(name, x, ids, range(num_contexts, num_contexts + len(ids)), tokenizer)
            positions = torch.arange(ids.shape[1]).repeat(len(ids))
            context_ids = torch.arange(num_contexts, num_contexts + len(ids)).repeat_interleave(ids.shape[1])
            writer.add(acts, ids.flatten(), positions, context_ids)
            num_contexts += len(ids)
            show(num_contexts * ids.shape[1])

"""Collect: text -> language model -> activations in a cache on disk.

    model, tokenizer = load_model("HuggingFaceTB/SmolLM2-135M")
    collect(model, tokenizer, "model.layers.15", "corpus.txt", tokens=1_000_000, out="acts")

The model runs in inference mode on packed contexts and stops after the last hookpoint, so the upper layers and the
language-model head cost nothing. Everything that can be wrong with the request is checked before the work starts (a
two-token pass finds the widths).

Nothing is lost: behind each shard the cache is whole (rows/writer.py), and one that is interrupted, or whose text comes
from a stream that fails for good, has all contexts collected so far. The same call goes on behind them, with the same
bytes in the end: the text is read again from its beginning and compared, and the model runs over the same contexts
together as it would have, for its rounding depends on that. One that fails before there is a shard leaves nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from safetensors import safe_open
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
from apportion.rows.manifest import (
    GOES_ON,
    MANIFEST,
    UNFINISHED,
    about_manifest,
    read_manifest,
    token_file,
    torch_dtype,
)
from apportion.rows.writer import StoreWriter, cache_at, check_free_disk, shard_rows
from apportion.torch_state import usual
from apportion.trust import resolved

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
    append: bool = False,
) -> dict[str, Any]:
    """Write the activations of the first `tokens` tokens of `text` (in whole contexts) to the cache `out`.

    `text` is whatever a `TextSource` takes; where it is token ids, `tokenizer` may be None. Returns the manifest. A
    text that ends early is collected as far as it goes, which the manifest and the log say. Ctrl-C keeps what there is
    and raises `Interrupted`, whose message says where. If `out` has a cache that was interrupted, or whose process was
    killed, it goes on with that; `append` does so with a complete one, for more tokens of the same text. ValueError if
    it was made with other settings, of another model or text.
    """
    found, text, entry_bytes = cache_at(out, append), TextSource.of(text), torch_dtype(dtype).itemsize
    check_context_tokens(model, context_tokens)
    if batch_contexts < 1:
        raise ValueError(f"batch_contexts={batch_contexts} must be at least 1")
    names, limit = expand(model, hookpoints), num_contexts_for(tokens, context_tokens)
    contexts = PackedContexts(tokenizer, text, context_tokens, bos, vocabulary_size(model))
    batches = batched_contexts(contexts, batch_contexts, limit)
    first = next(batches)  # an empty or too short text fails here
    widths = {name: x.shape[1] for name, x in run_contexts(model, names, first[:2, :2], whole=True).items()}
    most_tokens = min(limit, 1 + (text.most_tokens() or limit * context_tokens) // contexts.body) * context_tokens
    there = 0 if found is None else found["rows"]
    check_free_disk(resolved(out), (most_tokens - there) * (sum(widths.values()) * entry_bytes + len(names) + 12))

    started, asked = perf_counter(), token_filter or TokenFilter()
    language = Language(
        model=model_fingerprint(model),
        model_dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        tokenizer=tokenizer_fingerprint(tokenizer),
        text=text.describe(),
        bos=bos,
        context_tokens=context_tokens,
        tokens_asked=tokens,
    )
    plan = _plan(language, widths, {"dtype": dtype, "batch_contexts": batch_contexts, "filter": asked.to_dict()})
    keep = 0 if found is None else _kept_rows(found, plan, limit * context_tokens, tokens, out)

    def about(ended: str) -> dict[str, Any]:
        """What the manifest says of the rows in whole shards, or at the end of all."""
        rows = writer.rows if ended != UNFINISHED else sum(shard["rows"] for shard in writer.shards)
        seconds, new = perf_counter() - started, max(0, rows - keep)
        early = ended not in ("complete", *GOES_ON)
        counts = {"text_skipped": dict(contexts.reading.skipped), "text_repaired": dict(contexts.reading.repaired)}
        said = replace(
            language,
            bos_prepended=contexts.bos_prepended,
            contexts=-(-rows // context_tokens),
            seconds=round(seconds, 1),
            tokens_per_s=round(new / seconds, 1),
            ended=ended,
            text_ended_early=early,
            **counts,
        )
        return {**said.to_json(), "plan": plan}

    writer = StoreWriter(
        out, widths, dtype=dtype, token_filter=asked, special_ids=special_ids(tokenizer), about=about, found=found,
        keep=keep,
    )  # fmt: skip
    with Interrupts() as interrupts, writer:
        todo = _Todo(chain([first], batches), keep, resolved(out), writer.shard_rows)
        whole = _fill(writer, model, tokenizer, todo, limit * context_tokens, interrupts)
        if not writer.rows:
            raise Interrupted(f"stopped after 0 contexts; nothing is left at {out}")
        reason = f"stream: {contexts.reading.stopped}" if contexts.reading.stopped else "text"
        ended = "complete" if writer.rows >= limit * context_tokens else reason if whole else "interrupted"
        manifest = writer.finish(ended=ended)
    _warn(contexts.reading, about_cache := about_manifest(manifest))
    if interrupts.arrived:
        raise Interrupted(_said(about_cache, out))
    return manifest


def is_collected(out: str | Path) -> bool:
    """Whether the cache at `out` has all that it was to have, or all that its text has."""
    place = resolved(out)
    return (place / MANIFEST).is_file() and read_manifest(place).get("ended") not in GOES_ON


def _plan(language: Language, widths: Mapping[str, int], settings: dict[str, Any]) -> dict[str, Any]:
    """What the bytes of a cache depend on, besides its text; JSON-able."""
    return {
        "hookpoints": dict(widths),
        "context_tokens": language.context_tokens,
        "bos": language.bos,
        "model": language.model.weights_sha256,
        "model_dtype": language.model_dtype,
        "shard_rows": shard_rows(widths, settings["dtype"]),
        **settings,
    }


def _kept_rows(found: Mapping[str, Any], plan: dict[str, Any], rows: int, tokens: int, out: str | Path) -> int:
    """How many rows of the cache a collection by this plan begins with. ValueError unless it was made by the same."""
    theirs = found.get("plan", {})
    for name, value in plan.items():
        if theirs.get(name) != value:
            raise ValueError(
                f"{str(out)!r} exists already, begun with {name} = {theirs.get(name)}, and not {value}: collect with "
                "the same settings to go on, or choose another folder"
            )
    if rows < found["rows"]:
        raise ValueError(
            f"{str(out)!r} exists already, with {found['rows']} tokens, and {tokens} are asked for: ask for more, or "
            "choose another folder"
        )
    if found["ended"] in GOES_ON and tokens == found["tokens_asked"]:
        return found["rows"]
    together = plan["batch_contexts"] * plan["context_tokens"]  # the last batch may have been shorter, and is not now
    return found["rows"] // together * together


class _Todo:
    """Batches of contexts that are not in the cache yet, with the rows of the first one that are."""

    def __init__(self, batches: Iterator[Tensor], keep: int, place: Path, size: int) -> None:
        self.batches, self.keep, self.place, self.size = batches, keep, place, size
        self.contexts = self.rows = 0
        self._shard: tuple[int, Tensor] = -1, torch.empty(0)

    def next(self) -> tuple[Tensor, int] | None:
        """The contexts, and how many of their rows there are already; None at the end of the text."""
        while (ids := next(self.batches, None)) is not None:
            first, self.rows, self.contexts = self.rows, self.rows + ids.numel(), self.contexts + len(ids)
            if (there := min(self.keep, self.rows) - first) > 0:
                self._compare(first, ids.flatten()[:there])
            if self.rows > self.keep:
                return ids, max(0, there)
        return None

    def _compare(self, first: int, tokens: Tensor) -> None:
        while len(tokens):
            number, at = divmod(first, self.size)
            if self._shard[0] != number:
                with safe_open(self.place / token_file(number), framework="pt") as opened:
                    self._shard = number, opened.get_tensor("tokens")
            part = tokens[: self.size - at]
            if not torch.equal(part.int(), self._shard[1][at : at + len(part)]):
                raise ValueError(
                    f"the text is not the one that {str(self.place)!r} was begun with: its tokens differ between "
                    f"{first} and {first + len(part)}. Give the same text to go on, or choose another folder"
                )
            first, tokens = first + len(part), tokens[len(part) :]


def _warn(reading: Reading, about: About) -> None:
    """Log what one would not expect of the cache."""
    reading.warn()
    if about.lm.text_ended_early:
        log.warning("the text ended after %d of the %d tokens asked for", about.rows, about.lm.tokens_asked)


def _said(about: About, out: str | Path) -> str:
    """What a Ctrl-C left, and what to do next."""
    kept = f"stopped: {about.rows:,} of {about.lm.tokens_asked:,} tokens are kept in {out}, a whole cache"
    return kept if about.lm.ended == "complete" else f"{kept}. To go on, collect again with the same settings"


def _fill(writer: StoreWriter, model: Any, tokenizer: Any, todo: _Todo, total: int, interrupts: Interrupts) -> bool:
    """Run the contexts through the model and write their rows; False if that was interrupted."""
    with progress_bar("collecting", total, writer.rows) as show:
        while True:
            try:
                with interrupts.let_through():
                    if (found := todo.next()) is None:
                        return True
                    ids, there = found
                    made = run_contexts(model, list(writer.stats), ids)
                    acts = {name: x.to(writer.dtype) for name, x in made.items()}
            except GivenUp:
                raise
            except KeyboardInterrupt:
                interrupts.caught()
                return False
            contexts = range(todo.contexts - len(ids), todo.contexts)
            for name, x in acts.items():
                check_finite(name, x, ids, contexts, tokenizer)
            positions = torch.arange(ids.shape[1]).repeat(len(ids))
            numbers = torch.tensor(contexts).repeat_interleave(ids.shape[1])
            rows = (ids.flatten(), positions, numbers)
            writer.add({name: x[there:] for name, x in acts.items()}, *(column[there:] for column in rows))
            show(writer.rows)

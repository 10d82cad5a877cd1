"""Collect: text -> language model -> activations in a cache on disk.

    model, tokenizer = load_model("HuggingFaceTB/SmolLM2-135M")
    collect(model, tokenizer, "model.layers.15", "corpus.txt", tokens=1_000_000, out="acts")

The model runs in inference mode on packed contexts and stops after the last hookpoint, so the upper layers and the
language-model head cost nothing. Everything that can be wrong with the request is checked before the work starts (a
two-token pass finds the widths).

Nothing is lost: each shard is there for good when it is made (rows/writer.py), and a collection that is interrupted, or
whose text comes from a stream that fails for good, has all contexts collected so far. The same call goes on with what
is missing, and several at once share the work: each takes the shards that nobody has yet. What is in a shard follows
from the numbers of its contexts alone. For that the model runs over the same contexts together whoever makes them,
always as many (the last of a text again, where there are fewer), since its rounding depends on their number; and the
text is read from its beginning and compared. A collection that fails before there is a shard leaves nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from safetensors import SafetensorError
from torch import Tensor

from apportion.about import About, Language
from apportion.interrupt import GivenUp, Interrupted, Interrupts
from apportion.language.documents import Reading
from apportion.language.fingerprint import model_fingerprint, tokenizer_fingerprint
from apportion.language.hookpoints import expand
from apportion.language.model import check_context_tokens, check_finite, run_contexts
from apportion.language.model import load_model as load_model
from apportion.language.precision import dtype_of
from apportion.language.text import Text, TextSource
from apportion.language.tokens import PackedContexts, num_contexts_for, special_ids, vocabulary_size
from apportion.locks import Lock
from apportion.progress import progress_bar
from apportion.rows.filter import TokenFilter
from apportion.rows.layout import DTYPES, FLOATS, GOES_ON, MANIFEST
from apportion.rows.manifest import about_manifest, read_manifest
from apportion.rows.numbers import row_bytes
from apportion.rows.writer import CacheWriter, cache_at, check_free_disk, check_plan, contexts_of_a_shard
from apportion.torch_state import usual
from apportion.trust import resolved

log = logging.getLogger(__name__)

LOOK_EVERY_S = 0.5
"""How often one looks whether others have made their shards."""


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
    and raises `Interrupted`, whose message says where. If `out` has a cache that is being collected, was interrupted,
    or whose process was killed, it goes on with that; `append` does so with a complete one, for more tokens of the same
    text. ValueError if it was made with other settings, of another model or text. `dtype` is float32, bfloat16, float16
    or int8 (rows/numbers.py).
    """
    found, text = cache_at(out, append), TextSource.of(text)
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not supported: use one of {', '.join(DTYPES)}")
    check_context_tokens(model, context_tokens)
    if batch_contexts < 1:
        raise ValueError(f"batch_contexts={batch_contexts} must be at least 1")
    names, limit = expand(model, hookpoints), num_contexts_for(tokens, context_tokens)
    contexts = PackedContexts(tokenizer, text, context_tokens, bos, vocabulary_size(model))
    batches = batched_contexts(contexts, batch_contexts, limit)
    first = next(batches)  # an empty or too short text fails here
    widths = {name: x.shape[1] for name, x in run_contexts(model, names, first[:2, :2], whole=True).items()}

    started, asked, ids = perf_counter(), token_filter or TokenFilter(), special_ids(tokenizer)
    language = Language(
        model=model_fingerprint(model),
        model_dtype=dtype_of(model),
        tokenizer=tokenizer_fingerprint(tokenizer),
        text=text.describe(),
        bos=bos,
        context_tokens=context_tokens,
        tokens_asked=tokens,
    )
    shard_contexts = contexts_of_a_shard(widths, dtype, context_tokens, batch_contexts)
    settings = {"dtype": dtype, "batch_contexts": batch_contexts, "filter": asked.to_dict(), "special_ids": list(ids)}
    plan = _plan(language, widths, {**settings, "shard_contexts": shard_contexts})
    if found is not None:
        check_plan(found, plan, out)
        _check_more(found, limit * context_tokens, tokens, out)
    most_contexts = min(limit, 1 + (text.most_tokens() or limit * context_tokens) // contexts.body)
    missing = most_contexts * context_tokens - (0 if found is None else found["rows"])
    check_free_disk(resolved(out), missing * (sum(row_bytes(dtype, d) for d in widths.values()) + 4 * len(names) + 12))

    def about(ended: str, num_contexts: int) -> dict[str, Any]:
        """What the manifest says of that many contexts."""
        seconds = perf_counter() - started
        early = ended not in ("complete", *GOES_ON)
        counts = {"text_skipped": dict(contexts.reading.skipped), "text_repaired": dict(contexts.reading.repaired)}
        said = replace(
            language,
            bos_prepended=contexts.bos_prepended,
            contexts=num_contexts,
            seconds=round(seconds, 1),
            tokens_per_s=round(todo.made * context_tokens / seconds, 1),
            ended=ended,
            text_ended_early=early,
            **counts,
        )
        return said.to_json()

    with Interrupts() as interrupts:
        cache = CacheWriter(
            out, widths, dtype=dtype, token_filter=asked, special_ids=ids, shard_contexts=shard_contexts, plan=plan,
            about=about,
        )  # fmt: skip
        todo = _Todo(cache, model, tokenizer, batch_contexts)
        with cache, progress_bar("collecting", limit * context_tokens, cache.contexts * context_tokens) as show:
            whole = todo.go_through(chain([first], batches), interrupts, show)
            while whole and todo.of_others:
                whole = todo.wait_for_others(interrupts)
                if whole and todo.of_others:  # which somebody has given up
                    if isinstance(text.where, Iterator):
                        raise ValueError(
                            f"another process gave up shards {sorted(todo.of_others)} of {str(cache.place)!r}, and the "
                            "text here can be read only once: collect again with the same settings"
                        )
                    contexts = PackedContexts(tokenizer, text, context_tokens, bos, vocabulary_size(model))
                    again = batched_contexts(contexts, batch_contexts, limit)
                    whole = todo.go_through(again, interrupts, show)
            if not cache.look():
                what = f"nothing is left at {out}" if cache.began else f"{out} is as it was"
                raise Interrupted(f"stopped after 0 contexts; {what}")
            if whole and todo.contexts < min(limit, cache.contexts):
                raise _other_text(cache.place, f"it ends after {todo.contexts * context_tokens} tokens")
            reason = f"stream: {contexts.reading.stopped}" if contexts.reading.stopped else "text"
            ended = "complete" if cache.readable_contexts >= limit else reason if whole else "interrupted"
            manifest = cache.finish(ended)
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
        **settings,
    }


def _check_more(found: Mapping[str, Any], rows: int, tokens: int, out: str | Path) -> None:
    """ValueError if a cache has more tokens than are asked for."""
    if rows < found["rows"]:
        raise ValueError(
            f"{str(out)!r} exists already, with {found['rows']} tokens, and {tokens} are asked for: ask for more, or "
            "choose another folder"
        )


def _other_text(place: Path, how: str) -> ValueError:
    return ValueError(
        f"the text is not the one that {str(place)!r} was begun with: {how}. Give the same text to go on, or choose "
        "another folder"
    )


class _Todo:
    """Goes through the contexts of a text, and makes the shards that are not there and that nobody else makes."""

    def __init__(self, cache: CacheWriter, model: Any, tokenizer: Any, together: int) -> None:
        self.cache, self.model, self.tokenizer, self.together = cache, model, tokenizer, together
        self.made = self.contexts = 0
        """Contexts run here, and seen in the text."""
        self.of_others: set[int] = set()
        """Shards that others were making when they came by."""

    def go_through(self, batches: Iterator[Tensor], interrupts: Interrupts, show: Callable[[int], None]) -> bool:
        """False if it was interrupted."""
        self.contexts, self.of_others, size = 0, set(), self.cache.shard_contexts
        shard, whole = None, True
        with ExitStack() as claims:
            while True:
                try:
                    with interrupts.let_through():
                        if (ids := next(batches, None)) is None:
                            break
                        if shard is None or shard.number != self.contexts // size:
                            self._end(shard, claims)
                            shard = self._begin(self.contexts // size, claims)
                        acts = self._run(shard, ids)
                except GivenUp:
                    raise
                except KeyboardInterrupt:
                    interrupts.caught()
                    whole = False
                    break
                shard.compare(self.contexts, ids)
                if acts is not None:
                    self._check(acts, ids)
                    shard.add(acts, self.contexts, ids)
                    self.made += len(ids)
                self.contexts += len(ids)
                show((self.cache.contexts + max(0, shard.new_contexts)) * ids.shape[1])
            self._end(shard, claims)
        return whole

    def _begin(self, number: int, claims: ExitStack) -> _Shard:
        there = self.cache.look().get(number, {}).get("contexts", 0)
        if there == self.cache.shard_contexts:
            return _Shard(self.cache, number, there, None)
        claimed = claims.enter_context(self.cache.claim(number))
        if claimed is None:
            self.of_others.add(number)
            return _Shard(self.cache, number, 0, None)
        there = self.cache.shards.get(number, {}).get("contexts", 0)  # somebody may just have made it
        return _Shard(self.cache, number, there, claimed if there < self.cache.shard_contexts else None)

    def _end(self, shard: _Shard | None, claims: ExitStack) -> None:
        if shard is not None:
            shard.commit()
        claims.close()

    def _run(self, shard: _Shard, ids: Tensor) -> dict[str, Tensor] | None:
        """The activations of these contexts; None if they are not to be made here."""
        if not shard.needs(self.contexts, len(ids)):
            return None
        padded = torch.cat([ids, ids[-1:].expand(self.together - len(ids), -1)])
        acts = run_contexts(self.model, list(self.cache.widths), padded)
        return {name: x[: ids.numel()].to(FLOATS.get(self.cache.dtype, x.dtype)).cpu() for name, x in acts.items()}

    def _check(self, acts: Mapping[str, Tensor], ids: Tensor) -> None:
        for name, x in acts.items():
            check_finite(name, x, ids, range(self.contexts, self.contexts + len(ids)), self.tokenizer)

    def _is_whole(self, shard: Mapping[str, Any]) -> bool:
        """Whether it has all contexts of the text that belong there."""
        size = self.cache.shard_contexts
        return shard["contexts"] >= min(size, self.contexts - shard["shard"] * size)

    def wait_for_others(self, interrupts: Interrupts) -> bool:
        """Until they have made their shards, which are then no longer `of_others`, or somebody has given one up; False
        if it was interrupted."""
        try:
            with interrupts.let_through():
                while self.of_others:
                    sleep(LOOK_EVERY_S)
                    there = self.cache.look()
                    self.of_others = {n for n in self.of_others if n not in there or not self._is_whole(there[n])}
                    if any(map(self.cache.is_free, self.of_others)):
                        return True
        except GivenUp:
            raise
        except KeyboardInterrupt:
            interrupts.caught()
            return False
        return True


class _Shard:
    """A shard that the text has come to, of which `there` contexts are on the disk; `lock` is what claims it."""

    def __init__(self, cache: CacheWriter, number: int, there: int, lock: Lock | None) -> None:
        self.cache, self.number, self.there, self.lock = cache, number, there, lock
        self.first = number * cache.shard_contexts
        self._acts: dict[str, list[Tensor]] = {name: [] for name in cache.widths}
        self._labels: list[Int[Tensor, "3 n"]] = []
        self.new_contexts = 0
        try:
            self._tokens = cache.tokens(number) if there else None
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"shard {number} of {str(cache.place)!r} is damaged ({error}): take it out with `apportion cache "
                "repair`, and collect again"
            ) from error

    def compare(self, context: int, ids: Int[Tensor, "n context_tokens"]) -> None:
        """ValueError if these contexts, of which the first has this number, are others than those on the disk."""
        if self._tokens is None:
            return
        begin = (context - self.first) * ids.shape[1]
        there = self._tokens[begin : begin + ids.numel()]
        if not torch.equal(there, ids.flatten()[: len(there)].int()):
            first = context * ids.shape[1]
            raise _other_text(self.cache.place, f"its tokens differ between {first} and {first + len(there)}")

    def needs(self, context: int, n: int) -> bool:
        """Whether one of these contexts is to be made here."""
        known = 0 if self.cache.dtype == "int8" else self.there  # 8 bits do not give the rows back
        return self.lock is not None and context + n > self.first + known

    def add(self, acts: Mapping[str, Tensor], context: int, ids: Int[Tensor, "n context_tokens"]) -> None:
        """Rows of contexts, behind those that are on the disk."""
        if self.there and not self._labels and self.cache.dtype != "int8":
            held, labels = self.cache.held(self.number, context - self.first)
            self._labels.append(labels)
            for name, x in held.items():
                self._acts[name].append(x)
        for name, x in acts.items():
            self._acts[name].append(x)
        positions = torch.arange(ids.shape[1]).repeat(len(ids))
        numbers = torch.arange(context, context + len(ids)).repeat_interleave(ids.shape[1])
        self._labels.append(torch.stack([ids.flatten(), positions, numbers]))
        self.new_contexts = context + len(ids) - self.first - self.there

    def commit(self) -> None:
        if self.new_contexts > 0:
            acts = {name: torch.cat(parts) for name, parts in self._acts.items()}
            self.cache.write(self.number, acts, torch.cat(self._labels, 1), self.lock)


def _warn(reading: Reading, about: About) -> None:
    """Log what one would not expect of the cache."""
    reading.warn()
    if about.lm.text_ended_early:
        log.warning("the text ended after %d of the %d tokens asked for", about.rows, about.lm.tokens_asked)


def _said(about: About, out: str | Path) -> str:
    """What a Ctrl-C left, and what to do next."""
    kept = f"stopped: {about.rows:,} of {about.lm.tokens_asked:,} tokens are kept in {out}, a whole cache"
    return kept if about.lm.ended == "complete" else f"{kept}. To go on, collect again with the same settings"

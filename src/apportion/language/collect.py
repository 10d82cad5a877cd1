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
from itertools import chain
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

import torch
from jaxtyping import Int
from safetensors import SafetensorError
from torch import Tensor

from apportion.about import About, Language
from apportion.interrupt import GivenUp, Interrupted, Interrupts
from apportion.language.document_layout import Layout, ids_of, labels_of, num_rows
from apportion.language.documents import Reading
from apportion.language.fingerprint import model_fingerprint, tokenizer_fingerprint
from apportion.language.hookpoints import expand
from apportion.language.model import check_context_tokens, check_finite, run_contexts
from apportion.language.model import load_model as load_model
from apportion.language.precision import dtype_of
from apportion.language.text import Text, TextSource
from apportion.language.tokens import Batches, PackedContexts, special_ids, vocabulary_size
from apportion.progress import progress_bar
from apportion.rows.filter import TokenFilter
from apportion.rows.layout import DTYPES, FLOATS, GOES_ON
from apportion.rows.manifest import about_manifest, read_manifest
from apportion.rows.numbers import row_bytes
from apportion.rows.place import place_of
from apportion.rows.retries import Unreachable
from apportion.rows.writer import CacheWriter, cache_at, check_free_disk, check_plan, contexts_of_a_shard
from apportion.torch_state import usual

log = logging.getLogger(__name__)

LOOK_EVERY_S = 0.5
"""How often one looks whether others have made their shards."""


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
    layout: Layout | None = None,
) -> dict[str, Any]:
    """Write the activations of the first `tokens` tokens of `text` (in whole contexts) to the cache `out`.

    `layout` says how documents lie in contexts, whether attention stays within them, and of conversations, whose words
    are rows; `tokens` counts rows.

    `text` is whatever a `TextSource` takes; where it is token ids, `tokenizer` may be None. Returns the manifest. A
    text that ends early is collected as far as it goes, which the manifest and the log say. Ctrl-C keeps what there is
    and raises `Interrupted`, whose message says where. If `out` has a cache that is being collected, was interrupted,
    or whose process was killed, it goes on with that; `append` does so with a complete one, for more tokens of the same
    text. ValueError if it was made with other settings, of another model or text. `dtype` is float32, bfloat16, float16
    or int8 (rows/numbers.py). `out` may be a URL (s3://bucket/acts).
    """
    found, text, layout = cache_at(out, append), TextSource.of(text), layout or Layout()
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not supported: use one of {', '.join(DTYPES)}")
    check_context_tokens(model, context_tokens)
    if batch_contexts < 1:
        raise ValueError(f"batch_contexts={batch_contexts} must be at least 1")
    names = expand(model, hookpoints)

    def read() -> Batches:
        contexts = PackedContexts(tokenizer, text, context_tokens, bos, vocabulary_size(model), layout)
        return Batches(contexts, tokens, batch_contexts)

    asked_for = read()
    batches = iter(asked_for)
    first = next(batches)  # an empty or too short text fails here
    widths = {name: x.shape[1] for name, x in run_contexts(model, names, ids_of(first)[:2, :2], whole=True).items()}
    if layout.within:
        run_contexts(model, names, first[:1], layout=layout)  # a model that cannot keep documents apart fails here

    started, asked, ids = perf_counter(), token_filter or TokenFilter(), special_ids(tokenizer)
    language = Language(
        model=model_fingerprint(model),
        model_dtype=dtype_of(model),
        tokenizer=tokenizer_fingerprint(tokenizer),
        text=text.describe(),
        bos=bos,
        context_tokens=context_tokens,
        tokens_asked=tokens,
        layout=layout.to_json(),
    )
    shard_contexts = contexts_of_a_shard(widths, dtype, context_tokens, batch_contexts)
    settings = {"dtype": dtype, "batch_contexts": batch_contexts, "filter": asked.to_dict(), "special_ids": list(ids)}
    plan = _plan(language, widths, {**settings, "shard_contexts": shard_contexts})
    if found is not None:
        check_plan(found, plan, out)
        _check_more(found, tokens, out)
    most = min(tokens, (1 + (text.most_tokens() or tokens) // asked_for.contexts.body) * context_tokens)
    missing = most - (0 if found is None else found["rows"])
    check_free_disk(out, missing * (sum(row_bytes(dtype, d) for d in widths.values()) + 4 * len(names) + 12))

    def about(ended: str, num_contexts: int) -> dict[str, Any]:
        """What the manifest says of that many contexts."""
        seconds = perf_counter() - started
        early = ended not in ("complete", *GOES_ON)
        reading = asked_for.contexts.reading
        counts = {"text_skipped": dict(reading.skipped), "text_repaired": dict(reading.repaired)}
        said = replace(
            language,
            bos_prepended=asked_for.contexts.bos_prepended,
            contexts=num_contexts,
            seconds=round(seconds, 1),
            tokens_per_s=round(todo.made / seconds, 1),
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
        todo = _Todo(cache, model, tokenizer, batch_contexts, layout)
        with cache, progress_bar("collecting", tokens, cache.rows) as show:
            whole = todo.go_through(chain([first], batches), interrupts, show)
            while whole and todo.is_given_up(interrupts):
                _check_can_be_read_again(text, todo)
                asked_for = read()
                whole = todo.go_through(iter(asked_for), interrupts, show)
            whole = whole and not todo.of_others
            if not cache.look():
                what = f"nothing is left at {out}" if cache.began else f"{out} is as it was"
                raise Interrupted(f"stopped after 0 contexts; {what}")
            if whole and not asked_for.reached and todo.contexts < cache.contexts:
                raise _other_text(cache.place, f"it ends after {todo.rows} tokens")
            reading = asked_for.contexts.reading
            reason = f"stream: {reading.stopped}" if reading.stopped else "text"
            complete = cache.readable_rows >= tokens
            manifest = cache.finish("complete" if complete else reason if whole else "interrupted")
    _warn(reading, about_cache := about_manifest(manifest))
    if interrupts.arrived:
        raise Interrupted(_said(about_cache, out))
    return manifest


def is_collected(out: str | Path) -> bool:
    """Whether the cache at `out` has all that it was to have, or all that its text has."""
    place = place_of(out)
    return place.manifest() is not None and read_manifest(place).get("ended") not in GOES_ON


def _plan(language: Language, widths: Mapping[str, int], settings: dict[str, Any]) -> dict[str, Any]:
    """What the bytes of a cache depend on, besides its text; JSON-able."""
    return {
        "hookpoints": dict(widths),
        "context_tokens": language.context_tokens,
        "bos": language.bos,
        "model": language.model.weights_sha256,
        "model_dtype": language.model_dtype,
        "layout": language.layout,
        **settings,
    }


def _check_more(found: Mapping[str, Any], tokens: int, out: str | Path) -> None:
    """ValueError if a cache has more contexts than are asked for."""
    if found["rows"] - found["context_tokens"] >= tokens:
        raise ValueError(
            f"{str(out)!r} exists already, with {found['rows']} tokens, and {tokens} are asked for: ask for more, or "
            "choose another folder"
        )


def _check_can_be_read_again(text: TextSource, todo: _Todo) -> None:
    if isinstance(text.where, Iterator):
        raise ValueError(
            f"another process gave up shards {sorted(todo.of_others)} of {str(todo.cache.place)!r}, and the text here "
            "can be read only once: collect again with the same settings"
        )


def _other_text(place: Path | str, how: str) -> ValueError:
    return ValueError(
        f"the text is not the one that {str(place)!r} was begun with: {how}. Give the same text to go on, or choose "
        "another folder"
    )


class _Todo:
    """Goes through the contexts of a text, and makes the shards that are not there and that nobody else makes."""

    def __init__(self, cache: CacheWriter, model: Any, tokenizer: Any, together: int, layout: Layout) -> None:
        self.cache, self.model, self.tokenizer, self.together, self.layout = cache, model, tokenizer, together, layout
        self.made = self.contexts = self.rows = 0
        """Rows made here; contexts, and their rows, seen in the text."""
        self.of_others: set[int] = set()
        """Shards that others were making when they came by."""

    def go_through(self, batches: Iterator[Tensor], interrupts: Interrupts, show: Callable[[int], None]) -> bool:
        """False if it was interrupted."""
        self.contexts, self.rows, self.of_others, size = 0, 0, set(), self.cache.shard_contexts
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
                    self.made += num_rows(ids)
                self.contexts, self.rows = self.contexts + len(ids), self.rows + num_rows(ids)
                show(self.cache.rows + shard.new_rows)
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
        padded = torch.cat([ids, ids[-1:].expand(self.together - len(ids), *ids.shape[1:])])
        acts, rows = run_contexts(self.model, list(self.cache.widths), padded, layout=self.layout), num_rows(ids)
        return {name: x[:rows].to(FLOATS.get(self.cache.dtype, x.dtype)).cpu() for name, x in acts.items()}

    def _check(self, acts: Mapping[str, Tensor], ids: Tensor) -> None:
        for name, x in acts.items():
            check_finite(name, x, ids, range(self.contexts, self.contexts + len(ids)), self.tokenizer)

    def _is_whole(self, shard: Mapping[str, Any]) -> bool:
        """Whether it has all contexts of the text that belong there."""
        size = self.cache.shard_contexts
        return shard["contexts"] >= min(size, self.contexts - shard["shard"] * size)

    def _look_for_others(self) -> None:
        there = self.cache.look()
        self.of_others = {n for n in self.of_others if n not in there or not self._is_whole(there[n])}

    def is_given_up(self, interrupts: Interrupts) -> bool:
        """Wait until others have made their shards, which are then no longer `of_others`; True once somebody has given
        one up, False also if the waiting is interrupted."""
        try:
            with interrupts.let_through():
                while self.of_others:
                    sleep(LOOK_EVERY_S)
                    self._look_for_others()
                    if any(map(self.cache.is_free, self.of_others)):
                        self._look_for_others()  # it may have been made just before it was left
                        if any(map(self.cache.is_free, self.of_others)):
                            return True
        except GivenUp:
            raise
        except KeyboardInterrupt:
            interrupts.caught()
        return False


class _Shard:
    """A shard that the text has come to, of which `there` contexts are on the disk; `lock` is what claims it."""

    def __init__(self, cache: CacheWriter, number: int, there: int, lock: Any) -> None:
        self.cache, self.number, self.there, self.lock = cache, number, there, lock
        self.first = number * cache.shard_contexts
        self._acts: dict[str, list[Tensor]] = {name: [] for name in cache.widths}
        self._labels: list[Int[Tensor, "3 n"]] = []
        self.new_contexts = self.new_rows = self._seen = 0
        """Made here; and rows of its contexts that have come by."""
        try:
            self._tokens = cache.tokens(number) if there else None
        except Unreachable:
            raise
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"shard {number} of {str(cache.place)!r} is damaged ({error}): take it out with `apportion cache "
                "repair`, and collect again"
            ) from error

    def compare(self, context: int, ids: Int[Tensor, "n *columns context_tokens"]) -> None:
        """ValueError if these contexts, of which the first has this number, are others than those on the disk."""
        if self._tokens is None:
            return
        tokens = labels_of(ids)[0].int()
        there = self._tokens[self._seen : self._seen + len(tokens)]
        self._seen += len(tokens)
        if not torch.equal(there, tokens[: len(there)]):
            raise _other_text(self.cache.place, f"its tokens differ in contexts {context} to {context + len(ids) - 1}")

    def needs(self, context: int, n: int) -> bool:
        """Whether one of these contexts is to be made here."""
        known = 0 if self.cache.dtype == "int8" else self.there  # 8 bits do not give the rows back
        return self.lock is not None and context + n > self.first + known

    def add(self, acts: Mapping[str, Tensor], context: int, ids: Int[Tensor, "n *columns context_tokens"]) -> None:
        """Rows of contexts, behind those that are on the disk."""
        if self.there and not self._labels and self.cache.dtype != "int8":
            held, labels = self.cache.held(self.number, context - self.first)
            self._labels.append(labels)
            for name, x in held.items():
                self._acts[name].append(x)
        for name, x in acts.items():
            self._acts[name].append(x)
        self._labels.append(labels_of(ids, context))
        self.new_contexts = context + len(ids) - self.first - self.there
        self.new_rows += int((self._labels[-1][2] >= self.first + self.there).sum())

    def commit(self) -> None:
        if self.new_contexts > 0:
            acts = {name: torch.cat(parts) for name, parts in self._acts.items()}
            contexts = self.there + self.new_contexts
            self.cache.write(self.number, acts, torch.cat(self._labels, 1), self.lock, contexts)


def _warn(reading: Reading, about: About) -> None:
    """Log what one would not expect of the cache."""
    reading.warn()
    if about.lm.text_ended_early:
        log.warning("the text ended after %d of the %d tokens asked for", about.rows, about.lm.tokens_asked)


def _said(about: About, out: str | Path) -> str:
    """What a Ctrl-C left, and what to do next."""
    kept = f"stopped: {about.rows:,} of {about.lm.tokens_asked:,} tokens are kept in {out}, a whole cache"
    return kept if about.lm.ended == "complete" else f"{kept}. To go on, collect again with the same settings"

"""Contexts in layouts other than the usual one (document_layout.py), filled with documents as they come."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Integer

from apportion.language.document_layout import PAD, Layout

AT_ONCE = 64
"""Contexts that are handed out together."""

Context = Integer[np.ndarray, "3 context_tokens"]


@dataclass
class Part:
    """A document, or a part of one."""

    ids: Integer[np.ndarray, " n"]
    spoken: Bool[np.ndarray, " n"] | None
    """Which of them are rows; None: all."""
    first: bool
    """Whether a document begins with it."""
    wants_eos: bool
    """Whether an end-of-sequence token is to come behind the document."""

    @property
    def rows(self) -> Integer[np.ndarray, " n"]:
        return np.ones(len(self.ids), dtype=np.int64) if self.spoken is None else self.spoken.astype(np.int64)


class Filling:
    """Iterate `contexts` once."""

    def __init__(
        self, layout: Layout, context_tokens: int, bos: int | None, eos: int | None, tokenizer: Any = None
    ) -> None:
        """`bos` is what contexts begin with, and documents of which nothing before is seen."""
        self.layout, self.size, self.bos, self.eos = layout, context_tokens, bos, eos
        known = (getattr(tokenizer, "pad_token_id", None), eos, 0)
        self.fill = next(token for token in known if token is not None)
        self.own = 0 if layout.roles else 1
        """Whether tokens that are put in are rows."""

    def contexts(self, parts: Iterable[Part]) -> Iterator[Integer[np.ndarray, "n 3 context_tokens"]]:
        waiting: list[Context] = []
        for context in self._one_each(parts) if self.layout.padded else self._packed(parts):
            waiting.append(context)
            if len(waiting) == AT_ONCE:
                yield np.stack(waiting).astype(np.int32)
                waiting = []
        if waiting:
            yield np.stack(waiting).astype(np.int32)

    def _packed(self, parts: Iterable[Part]) -> Iterator[Context]:
        """What fills no context at the end is dropped."""
        context, n, at = np.zeros((3, self.size), dtype=np.int64), 0, 0
        for tokens in self._end_to_end(parts):
            if self.layout.within and tokens[1, 0] == 0:
                at = 0
            while tokens.shape[1]:
                if n == 0:
                    at = 0
                    if self.bos is not None and not (self.layout.within and tokens[1, 0] == 0):
                        context[:, 0], n, at = (self.bos, 0, self.own), 1, 1
                taken = tokens[:, : self.size - n]
                length = taken.shape[1]
                context[0, n : n + length], context[2, n : n + length] = taken[0], taken[2]
                context[1, n : n + length] = np.arange(at, at + length)
                n, at, tokens = n + length, at + length, tokens[:, length:]
                if n == self.size:
                    yield context
                    context, n = np.zeros_like(context), 0

    def _end_to_end(self, parts: Iterable[Part]) -> Iterator[Integer[np.ndarray, "3 n"]]:
        """Ids, numbers that are 0 where a document begins, and rows; documents with EOS between them."""
        open_end, begun = False, False
        for part in parts:
            ids, rows, starts = part.ids, part.rows, part.first or not begun
            if part.first and begun and open_end and self.eos is not None:
                yield np.array([[self.eos], [1], [self.own]])
            if starts and self.layout.within and self.bos is not None:
                ids, rows = np.concatenate([[self.bos], ids]), np.concatenate([[self.own], rows])
            begun, open_end = True, part.wants_eos
            if len(ids):
                numbers = np.ones(len(ids), dtype=np.int64)
                numbers[0] = not starts
                yield np.stack([ids, numbers, rows])

    def _one_each(self, parts: Iterable[Part]) -> Iterator[Context]:
        ids, rows = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
        for part in parts:
            if part.first:
                yield from self._cut(ids, rows)
                ids, rows = part.ids, part.rows
            else:
                ids, rows = np.concatenate([ids, part.ids]), np.concatenate([rows, part.rows])
        yield from self._cut(ids, rows)

    def _cut(self, ids: Integer[np.ndarray, " n"], rows: Integer[np.ndarray, " n"]) -> Iterator[Context]:
        """A document in contexts of its own."""
        body = self.size - (self.bos is not None)
        for start in range(0, len(ids), body):
            own, kept = ids[start : start + body], rows[start : start + body]
            if self.bos is not None:
                own, kept = np.concatenate([[self.bos], own]), np.concatenate([[self.own], kept])
            context = np.stack([np.full(self.size, self.fill), np.full(self.size, PAD), np.zeros(self.size, np.int64)])
            begin = 0 if self.layout.padding == "right" else self.size - len(own)
            context[:, begin : begin + len(own)] = own, np.arange(len(own)), kept
            if kept.any():
                yield context


def given(
    ids: Integer[np.ndarray, "n context_tokens"], layout: Layout, eos: int | None
) -> Integer[np.ndarray, "n 3 _"]:
    """Contexts that were packed before; documents in them end with EOS."""
    if layout.roles:
        raise ValueError(
            "roles are of conversations (messages), and the text is contexts of token ids: leave roles out"
        )
    positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    if layout.attention == "documents" and not layout.padded and eos is not None:
        begins = np.zeros_like(ids, dtype=bool)
        begins[:, 1:] = ids[:, :-1] == eos
        positions = positions - np.maximum.accumulate(np.where(begins, positions, 0), axis=1)
    return np.stack([ids, positions, np.ones_like(ids)], axis=1).astype(np.int32)

"""Tokens: documents -> contexts, int32 [num_contexts, context_tokens], packed and streamed.

Documents are laid end to end with the tokenizer's end-of-sequence token between two of them (where it has one) and cut
into contexts of equal length; what is left at the end is dropped. So no context is padded, a context may hold the end
of one document and the beginning of the next, and attention crosses that border, as in most language-model training.

`bos` says whether every context begins with the beginning-of-sequence token: "auto" does what the tokenizer does to
plain text (Llama 2 and Gemma add it, SmolLM2 and GPT-2 do not), "always" and "never" overrule it. With it, a context
carries ``context_tokens - 1`` tokens of text. `bos_prepended` says what came of it.

Other layouts (document_layout.py) keep attention within documents: packed ones, which then each begin with BOS where
contexts do, or one document a context.

Documents of token ids are packed in the same way, with or without a tokenizer. Those of exactly `context_tokens` tokens
each (an array [n, context_tokens], a dataset that was packed before) are contexts already and stay as they are.

A tokenizer is that of transformers, or anything that is called with a text and returns {"input_ids": [...]}.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int, Integer
from torch import Tensor

from apportion.language.chats import check_template, spoken_by, written
from apportion.language.document_layout import Layout
from apportion.language.documents import FIRST_ROWS, Broken, Reading, as_array
from apportion.language.filling import Filling, Part, given
from apportion.language.text import Piece, Text, TextSource, given_width

BOS_POLICIES = ("auto", "always", "never")
PIECES_AT_ONCE = 16
MOST_IDS = 1 << 31


def bos_id(tokenizer: Any, policy: str) -> int | None:
    """The token each context begins with under `policy`, None for no such token."""
    if policy not in BOS_POLICIES:
        raise ValueError(f"bos={policy!r} is not a policy: use one of {', '.join(BOS_POLICIES)}")
    bos = getattr(tokenizer, "bos_token_id", None)
    if policy == "always" and bos is None:
        raise ValueError("bos='always' but there is no BOS token: use bos='never' or bos='auto'")
    if policy == "always":
        return bos
    if policy == "never" or bos is None:
        return None
    ids = tokenizer("a")["input_ids"]
    return bos if len(ids) and ids[0] == bos else None


def special_ids(tokenizer: Any) -> tuple[int, ...]:
    """The ids of special tokens, as far as a tokenizer of one's own names them; none without a tokenizer."""
    named = getattr(tokenizer, "all_special_ids", None)
    if named is None:
        named = (getattr(tokenizer, f"{kind}_token_id", None) for kind in ("bos", "eos", "pad", "unk"))
    return tuple(sorted({int(i) for i in named if i is not None}))


def begin_with_bos(tokenizer: Any, ids: Int[Tensor, "n context_tokens"]) -> bool:
    """Whether every context begins with the tokenizer's BOS token."""
    bos = getattr(tokenizer, "bos_token_id", None)
    return bos is not None and len(ids) > 0 and bool((ids[:, 0] == bos).all())


def vocabulary_size(model: Any) -> int | None:
    """How many tokens the model knows; None if it does not say."""
    embeddings = None
    with suppress(AttributeError, NotImplementedError):
        embeddings = model.get_input_embeddings()
    return getattr(embeddings, "num_embeddings", None) or getattr(model.config, "vocab_size", None)


def check_ids(ids: Any, vocab_size: int | None, where: str = "the text") -> None:
    """ValueError naming the first id that is no token of the model."""
    ids = as_array(ids)
    outside = (ids < 0) | (ids >= (vocab_size or MOST_IDS))
    if outside.any():
        raise ValueError(
            f"{where} holds the token id {ids[outside][0]}, which is outside of the model's vocabulary size of "
            f"{vocab_size or MOST_IDS}: give token ids that were made for this model"
        )


class Encoder:
    """A tokenizer's texts -> ids: many texts at once with those of transformers, else one by one."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._many = any(base.__module__.startswith("transformers.") for base in type(tokenizer).__mro__)

    def __call__(self, pieces: list[Piece], reading: Reading) -> list[Integer[np.ndarray, " n"] | None]:
        """The ids of each piece; None, and counted, for a piece that the tokenizer refuses."""
        if self._many:
            with suppress(Exception):  # which of them it refuses shows one by one
                return self._together([piece.text for piece in pieces])
        return [self._alone(piece, reading) for piece in pieces]

    def _together(self, texts: list[str]) -> list[Integer[np.ndarray, " n"] | None]:
        quiet = {"return_attention_mask": False, "verbose": False}
        encoded = self.tokenizer(texts, add_special_tokens=False, **quiet)["input_ids"]
        return [np.asarray(ids, dtype=np.int64) for ids in encoded]

    def _alone(self, piece: Piece, reading: Reading) -> Integer[np.ndarray, " n"] | None:
        try:
            return self._together([piece.text])[0] if self._many else self._one(piece.text)
        except Exception as error:  # whatever a tokenizer raises
            reason = f"{type(error).__name__}: {error}"
            reading.documents -= piece.first
            reading.skip(Broken("refused by the tokenizer", f"is refused by the tokenizer ({reason})"), piece.place)
            reading.check(FIRST_ROWS)
            return None

    def _one(self, text: str) -> Integer[np.ndarray, " n"]:
        try:
            encoded = self.tokenizer(text, add_special_tokens=False)
        except TypeError:  # it has no such argument
            encoded = self.tokenizer(text)
        return as_array(encoded["input_ids"]).astype(np.int64).reshape(-1)


class PackedContexts:
    """The contexts of a text, in blocks, as they become known. Iterate once; ValueError if there is not even one."""

    def __init__(
        self,
        tokenizer: Any,
        text: Text,
        context_tokens: int,
        bos: str = "auto",
        vocab_size: int | None = None,
        layout: Layout | None = None,
    ) -> None:
        """Token ids are checked against `vocab_size`, where it is given. In an unusual layout blocks are
        [n, 3, context_tokens]."""
        self.layout = layout or Layout()
        self.source, self.reading, self.context_tokens = TextSource.of(text), Reading(), context_tokens
        self.tokenizer, self.bos, self.vocab_size = tokenizer, bos, vocab_size
        self.first = bos_id(tokenizer, bos)
        self.body = context_tokens - (self.first is not None)
        if self.body < 1:
            raise ValueError(f"context_tokens={context_tokens} leaves no room for text: use a larger number")
        width = given_width(self.source.where)
        if width is not None and width != context_tokens:
            raise ValueError(
                f"the token ids come in contexts of {width}, not context_tokens={context_tokens}: give "
                f"context_tokens={width}, or a list of documents to be cut into contexts"
            )
        if width is not None:
            check_ids(self.source.where, vocab_size)
        self.bos_prepended = self.first is not None
        self.num_contexts, self._num_tokens = 0, 0

    def __iter__(self) -> Iterator[Integer[np.ndarray, "n *columns context_tokens"]]:
        pieces = self.source.pieces(self.reading)
        head = list(islice(pieces, PIECES_AT_ONCE))
        whole = bool(head) and all(p.ids is not None and len(p.ids) == self.context_tokens for p in head)
        pieces = chain(head, pieces)
        for block in self._as_given(pieces) if whole else self._made(pieces):
            self.num_contexts += len(block)
            yield block
        if self.num_contexts == 0:
            raise self._nothing()

    def _as_given(self, pieces: Iterable[Piece]) -> Iterator[Integer[np.ndarray, "n context_tokens"]]:
        """Documents that are contexts already."""
        self.bos_prepended = True  # so far
        pieces = iter(pieces)
        while block := list(islice(pieces, PIECES_AT_ONCE)):
            kept = [ids for piece in block if (ids := self._context(piece)) is not None]
            if not kept:
                continue
            packed = np.stack(kept).astype(np.int32)
            self.bos_prepended &= begin_with_bos(self.tokenizer, torch.from_numpy(packed))
            if self.bos == "always" and not self.bos_prepended:
                raise ValueError("bos='always', but the contexts given do not begin with BOS: put it there, or drop it")
            yield packed if self.layout.is_usual else given(packed, self.layout, self._eos)

    def _context(self, piece: Piece) -> Integer[np.ndarray, " context_tokens"] | None:
        if piece.ids is None or len(piece.ids) != self.context_tokens:
            self.reading.skip(Broken("of another length than the contexts before"), piece.place)
            return None
        return piece.ids if self._are_tokens(piece.ids, piece.place) else None

    @property
    def _eos(self) -> int | None:
        return getattr(self.tokenizer, "eos_token_id", None)

    def _made(self, pieces: Iterable[Piece]) -> Iterator[Integer[np.ndarray, "n *columns context_tokens"]]:
        if self.layout.is_usual:
            return self._packed(pieces)
        fill = Filling(self.layout, self.context_tokens, self.first, self._eos, self.tokenizer)
        return fill.contexts(self._documents(pieces))

    def _documents(self, pieces: Iterable[Piece]) -> Iterator[Part]:
        """Documents, or parts of them."""
        for block in self._with_ids(pieces):
            for piece, ids, spoken in block:
                self._num_tokens += len(ids)
                plain = piece.ids is None and piece.messages is None
                yield Part(ids, spoken, piece.first, plain or self._eos not in ids[-2:])

    def _packed(self, pieces: Iterable[Piece]) -> Iterator[Integer[np.ndarray, "n context_tokens"]]:
        rest = np.empty(0, dtype=np.int32)
        for ids in self._token_stream(pieces):
            self._num_tokens += len(ids)
            rest = np.concatenate([rest, ids])
            full = len(rest) // self.body
            if full:
                packed, rest = rest[: full * self.body].reshape(full, self.body), rest[full * self.body :]
                yield packed if self.first is None else np.insert(packed, 0, self.first, axis=1)

    def _token_stream(self, pieces: Iterable[Piece]) -> Iterator[Integer[np.ndarray, " n"]]:
        """The tokens of all pieces in order, in blocks, with EOS between documents; many pieces at a time for speed."""
        eos, begun = self._eos, False
        for block in self._with_ids(pieces):
            parts: list[np.ndarray] = []
            for piece, ids, _ in block:
                if piece.first and begun and eos is not None:
                    parts.append(np.asarray([eos]))
                parts.append(ids)
                ends = ids[-1:] if piece.messages is None else ids[-2:]  # a template may put a newline behind it
                plain = piece.ids is None and piece.messages is None
                begun = eos is None or plain or eos not in ends  # others may bring their EOS
            yield np.concatenate([np.empty(0, dtype=np.int64), *parts]).astype(np.int32)

    def _with_ids(self, pieces: Iterable[Piece]) -> Iterator[list[tuple[Piece, Integer[np.ndarray, " n"], Any]]]:
        """Pieces, some at a time, with their tokens, and which of them the roles say that are asked for."""
        pieces, encode = iter(pieces), Encoder(self.tokenizer)
        while block := list(islice(pieces, PIECES_AT_ONCE)):
            if self.layout.roles:
                found = [self._spoken(piece) for piece in block]
            else:
                found = [None if ids is None else (ids, None) for ids in self._ids_of(block, encode)]
            yield [
                (piece, one[0], one[1])
                for piece, one in zip(block, found, strict=True)
                if one is not None and self._are_tokens(one[0], piece.place)
            ]

    def _spoken(self, piece: Piece) -> tuple[Integer[np.ndarray, " n"], Bool[np.ndarray, " n"]] | None:
        """The tokens of a conversation, and which of them are said by the roles asked for."""
        if piece.messages is None:
            raise ValueError(
                f"{piece.place or 'the text'} is no conversation, and roles={','.join(self.layout.roles)} have to be "
                "somebody's: give messages, or leave roles out"
            )
        check_template(self.tokenizer)
        try:
            ids, spoken = spoken_by(self.tokenizer, piece.messages, self.layout.roles)
        except Broken as broken:
            self._left_out(broken, piece)
            return None
        self.reading.count_tokens(piece.part, len(piece.text), len(ids))
        return ids, spoken

    def _left_out(self, broken: Broken, piece: Piece) -> None:
        self.reading.documents -= 1
        self.reading.skip(broken, piece.place)
        self.reading.check(FIRST_ROWS)

    def _ids_of(self, block: list[Piece], encode: Encoder) -> list[Integer[np.ndarray, " n"] | None]:
        """The ids of each piece, given or encoded."""
        texts = [piece for piece in block if piece.ids is None]
        if texts and self.tokenizer is None:
            raise ValueError(
                f"{texts[0].place or 'the text'} is text, and there is no tokenizer: give token ids, such as an array "
                "[n, context_tokens] or a list of lists, or a tokenizer"
            )
        ready = [self._written(piece) for piece in texts]
        encoded = iter(encode([piece for piece in ready if piece is not None], self.reading) if texts else [])
        made = [None if piece is None else next(encoded) for piece in ready]
        for piece, ids in zip(texts, made, strict=True):
            self.reading.count_tokens(piece.part, len(piece.text), 0 if ids is None else len(ids))
        rest = iter(made)
        return [next(rest) if piece.ids is None else piece.ids for piece in block]

    def _written(self, piece: Piece) -> Piece | None:
        """With the text of a conversation as the chat template has it; None, and counted, if it does not take it."""
        if piece.messages is None:
            return piece
        check_template(self.tokenizer)
        try:
            return piece._replace(text=self.reading.mend(written(self.tokenizer, piece.messages), piece.place))
        except Broken as broken:
            self._left_out(broken, piece)
            return None

    def _are_tokens(self, ids: Integer[np.ndarray, " n"], place: str) -> bool:
        """Whether the model knows all of them: before the first context a ValueError, later such a document is left
        out."""
        try:
            check_ids(ids, self.vocab_size, place or "the text")
        except ValueError as error:
            if self.num_contexts == 0:
                raise
            self.reading.skip(Broken("with ids outside of the vocabulary", str(error)), place)
            return False
        return True

    def _nothing(self) -> ValueError:
        """Why there is not one context."""
        said = self.reading.left_out()
        said = f" ({said})" if said else ""
        if self.reading.stopped:
            return ValueError(f"{self.reading.stopped} before the text filled one context: try again later{said}")
        if self._num_tokens == 0:
            return ValueError(f"the text is empty: give a text with at least one context of tokens{said}")
        return ValueError(
            f"the text has only {self._num_tokens} tokens, less than one context of {self.context_tokens}: "
            f"give a longer text or a smaller context_tokens{said}"
        )


class Batches:
    """The first contexts that have `tokens` rows, a few at a time; iterate once."""

    def __init__(self, contexts: PackedContexts, tokens: int, together: int) -> None:
        num_contexts_for(tokens, contexts.context_tokens)  # numbers that are possible
        self.contexts, self.tokens, self.together = contexts, tokens, together
        self.reached = False
        """Whether there are so many."""

    def __iter__(self) -> Iterator[Int[Tensor, "n *columns context_tokens"]]:
        waiting, rows = list[np.ndarray](), 0
        for context in chain.from_iterable(self.contexts):
            waiting.append(context)
            rows += context.size if context.ndim == 1 else int(context[2].sum())
            self.reached = rows >= self.tokens
            if len(waiting) == self.together or self.reached:
                yield torch.from_numpy(np.stack(waiting))
                waiting = []
            if self.reached:
                return
        if waiting:
            yield torch.from_numpy(np.stack(waiting))


def read_contexts(
    tokenizer: Any, text: Text, *, tokens: int, context_tokens: int = 256, bos: str = "auto",
    layout: Layout | None = None,
) -> Int[Tensor, "num_contexts *columns context_tokens"]:  # fmt: skip
    """The first contexts of `text`, enough for `tokens` tokens (or all there are), in memory."""
    contexts = PackedContexts(tokenizer, text, context_tokens, bos, layout=layout)
    first = torch.cat(list(Batches(contexts, tokens, 64)))
    contexts.reading.warn()
    return first


def num_contexts_for(tokens: int, context_tokens: int) -> int:
    """How many contexts hold at least `tokens` tokens."""
    if tokens < 1 or context_tokens < 1:
        raise ValueError(f"tokens={tokens} and context_tokens={context_tokens} must be positive")
    return -(-tokens // context_tokens)

"""Tokens: documents -> contexts, int32 [num_contexts, context_tokens], packed and streamed.

Documents are laid end to end with the tokenizer's end-of-sequence token between two of them (where it has one) and cut
into contexts of equal length; what is left at the end is dropped. So no context is padded, a context may hold the end
of one document and the beginning of the next, and attention crosses that border, as in most language-model training.

`bos` says whether every context begins with the beginning-of-sequence token: "auto" does what the tokenizer does to
plain text (Llama 2 and Gemma add it, SmolLM2 and GPT-2 do not), "always" and "never" overrule it. With it, a context
carries ``context_tokens - 1`` tokens of text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from apportion.activations.text import Piece, TextSource

BOS_POLICIES = ("auto", "always", "never")
PIECES_AT_ONCE = 16


def bos_id(tokenizer: Any, policy: str) -> int | None:
    """The token each context begins with under `policy`, None for no such token."""
    if policy not in BOS_POLICIES:
        raise ValueError(f"bos={policy!r} is not a policy: use one of {', '.join(BOS_POLICIES)}")
    if policy == "never":
        return None
    bos = tokenizer.bos_token_id
    if policy == "always":
        if bos is None:
            raise ValueError("bos='always' but the tokenizer has no BOS token: use bos='never' or bos='auto'")
        return bos
    ids = tokenizer("a")["input_ids"]
    return bos if bos is not None and ids and ids[0] == bos else None


def token_stream(tokenizer: Any, pieces: Iterable[Piece]) -> Iterator[Int[np.ndarray, " n"]]:
    """The tokens of all pieces in order, in blocks, with EOS between documents; many pieces at a time for speed."""
    pieces, eos, begun = iter(pieces), tokenizer.eos_token_id, False
    while block := list(islice(pieces, PIECES_AT_ONCE)):
        texts = [piece.text for piece in block]
        encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        ids: list[int] = []
        for piece, piece_ids in zip(block, encoded, strict=True):
            if piece.first and begun and eos is not None:
                ids.append(eos)
            ids.extend(piece_ids)
            begun = True
        yield np.asarray(ids, dtype=np.int32)


def contexts(
    tokenizer: Any, text: TextSource | str | Path | Iterable[str], context_tokens: int, bos: str = "auto"
) -> Iterator[Int[np.ndarray, "n context_tokens"]]:
    """The contexts of `text` in blocks, as they become known; ValueError if there is not even one."""
    first = bos_id(tokenizer, bos)
    body = context_tokens - (first is not None)
    if body < 1:
        raise ValueError(f"context_tokens={context_tokens} leaves no room for text: use a larger number")
    rest, num_tokens, num_contexts = np.empty(0, dtype=np.int32), 0, 0
    for ids in token_stream(tokenizer, TextSource.of(text).pieces()):
        num_tokens += len(ids)
        rest = np.concatenate([rest, ids])
        full = len(rest) // body
        if full:
            packed, rest = rest[: full * body].reshape(full, body), rest[full * body :]
            num_contexts += full
            yield packed if first is None else np.insert(packed, 0, first, axis=1)
    if num_tokens == 0:
        raise ValueError("the text is empty: give a text with at least one context of tokens")
    if num_contexts == 0:
        raise ValueError(
            f"the text has only {num_tokens} tokens, less than one context of {context_tokens}: "
            "give a longer text or a smaller context_tokens"
        )


def read_contexts(
    tokenizer: Any,
    text: TextSource | str | Path | Iterable[str],
    *,
    tokens: int,
    context_tokens: int = 256,
    bos: str = "auto",
) -> Int[Tensor, "num_contexts context_tokens"]:
    """The first contexts of `text`, enough for `tokens` tokens (or all there are), in memory."""
    wanted, blocks = num_contexts_for(tokens, context_tokens), []
    for block in contexts(tokenizer, text, context_tokens, bos):
        blocks.append(block)
        if sum(map(len, blocks)) >= wanted:
            break
    return torch.from_numpy(np.concatenate(blocks)[:wanted])


def num_contexts_for(tokens: int, context_tokens: int) -> int:
    """How many contexts hold at least `tokens` tokens."""
    if tokens < 1 or context_tokens < 1:
        raise ValueError(f"tokens={tokens} and context_tokens={context_tokens} must be positive")
    return -(-tokens // context_tokens)

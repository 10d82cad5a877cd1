"""Conversations: [{"role": "user", "content": "..."}, ...], written as text by the chat template of a tokenizer.

They stand in the field `messages` of a row, or are the rows themselves. What the template makes is the text that a
model was trained to go on with, its markers of turns included; a conversation is one document.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Integer

from apportion.language.documents import Broken

Messages = Sequence[Mapping[str, Any]]


def contents(messages: Messages) -> str:
    """What was said, one message after the other, without the template."""
    return "\n".join(content for message in messages if isinstance(content := message["content"], str))


def check_template(tokenizer: Any) -> None:
    """ValueError for a tokenizer that cannot write conversations."""
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        name = getattr(tokenizer, "name_or_path", "") or "this model"
        what = "no tokenizer" if tokenizer is None else "no chat template"
        raise ValueError(
            f"the text holds conversations (messages), and {name} has {what}: use the chat version of the model, or "
            "give text that is written out"
        )


def written(tokenizer: Any, messages: Messages) -> str:
    """The conversation as text; raises `Broken` if the template does not take it (some want turns to alternate)."""
    try:
        return tokenizer.apply_chat_template([dict(message) for message in messages], tokenize=False)
    except Exception as error:  # whatever a template raises
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise Broken("refused by the chat template", f"is refused by the chat template ({reason})") from None


def spoken_by(
    tokenizer: Any, messages: Messages, roles: Sequence[str]
) -> tuple[Integer[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
    """The tokens of a conversation, and which of them are said by one of the roles: of the assistant alone what the
    template marks as generated, if it marks anything; else the words of the messages, without the marks of turns.

    Raises `Broken` if the template does not take the conversation, or changes what was said; ValueError for a tokenizer
    that does not say where in the text its tokens lie.
    """
    if [*roles] == ["assistant"] and re.search(r"\{%-?\s*generation", str(tokenizer.chat_template)):
        marked = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        found = tokenizer.apply_chat_template([dict(message) for message in messages], **marked)
        return np.asarray(found["input_ids"], dtype=np.int64), np.asarray(found["assistant_masks"], dtype=bool)
    text = written(tokenizer, messages)
    try:
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    except (NotImplementedError, TypeError):
        raise ValueError(
            f"roles: {type(tokenizer).__name__} does not say where in the text its tokens lie, so who says what is not "
            "known: use its fast version"
        ) from None
    places = np.asarray(found["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    spoken = np.zeros(len(places), dtype=bool)
    for message, (start, stop) in zip(messages, _places_of(tokenizer, messages, text), strict=True):
        if message["role"] in roles:
            spoken |= (places[:, 0] < stop) & (places[:, 1] > start)
    return np.asarray(found["input_ids"], dtype=np.int64), spoken


def _places_of(tokenizer: Any, messages: Messages, text: str) -> Iterator[tuple[int, int]]:
    """Where in the text the words of each message lie."""
    ends = _ends(tokenizer, messages, text)
    at = 0
    for number, message in enumerate(messages):
        words = message["content"].strip() if isinstance(message["content"], str) else ""
        start = text.find(words, at) if ends is None else text.rfind(words, at, ends[number])
        if start < 0:
            raise Broken("changed by the chat template", "has words that the chat template changes or leaves out")
        yield start, start + len(words)
        at = start + len(words) if ends is None else ends[number]


def _ends(tokenizer: Any, messages: Messages, text: str) -> list[int] | None:
    """Where the turn of each message ends; None if the template writes the first ones otherwise without the others."""
    ends = []
    for number in range(1, len(messages) + 1):
        try:
            part = written(tokenizer, messages[:number])
        except Broken:
            return None
        if not text.startswith(part):
            return None
        ends.append(len(part))
    return ends

"""Conversations: [{"role": "user", "content": "..."}, ...], written as text by the chat template of a tokenizer.

They stand in the field `messages` of a row, or are the rows themselves. What the template makes is the text that a
model was trained to go on with, its markers of turns included; a conversation is one document.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

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

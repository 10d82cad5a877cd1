"""Documents: what one row of a text holds, and a record of what had to be left out.

    "some text"                     a document
    {"text": "some text", ...}      the document in the field `field`
    [17, 4, 2048], a tensor, ...    a document that is tokenised already
    {"input_ids": [17, 4], ...}     the same in a field, also in one of `ID_FIELDS` where there is no text
    {"messages": [{"role": "user", "content": "..."}, ...]}         a conversation (chats.py); there, too

Large texts hold rows that are null, empty, cut off or of another kind. Such a row is left out and counted; half an
emoji and bytes that are no UTF-8 become U+FFFD. Only if nothing can be used from the beginning on is that a mistake of
the request, most likely a wrong field, and a ValueError.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Integer

TEXT_FIELD = "text"
ID_FIELDS = ("input_ids", "tokens")
MESSAGES = "messages"
FIRST_ROWS = 100
"""A file, or a stream, of which none of so many rows at the beginning can be used is given up."""

log = logging.getLogger(__name__)


class Broken(Exception):
    """A row that holds no document. `reason` is counted; `detail` says more about this row."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(detail or f"is {reason}")
        self.reason = reason


NOTHING = ("null", "empty")
"""Reasons for which no request is wrong: the next row may hold a document."""


Document = str | Integer[np.ndarray, " n"] | list[dict[str, Any]]
"""Text, token ids, or the messages of a conversation."""


def document_in(row: Any, field: str) -> Document:
    """The document of a row; raises `Broken`."""
    if isinstance(row, Broken):
        raise row
    name = chosen_field(row, field) if isinstance(row, Mapping) else None
    value = row if name is None else row[name]
    if is_null(value):
        raise Broken("null")
    if is_conversation(value):
        return [dict(message) for message in value]
    if isinstance(value, bytes):
        value = value.decode("utf-8", "surrogateescape")
    if not isinstance(value, str):
        value = _ids_of(value)
    if value is None:
        where = "" if name is None else f" in field {name!r}{_has(row)}"
        holds = type(row if name is None else row[name]).__name__
        raise Broken("neither text nor token ids", f"holds a {holds}{where}, neither text nor token ids")
    if not len(value):
        raise Broken("empty")
    return value


def chosen_field(names: Collection[Any], field: str) -> str:
    """The field to read: `field`, or one that holds token ids where the usual field of text is not there."""
    if field in names:
        return field
    for name in (*ID_FIELDS, MESSAGES) if field == TEXT_FIELD else ():
        if name in names:
            return name
    raise Broken(f"no field {field!r}", f"has no text in field {field!r}{_has(names)}: say which field holds the text")


def is_conversation(value: Any) -> bool:
    """Messages, each with who said it and what."""
    return isinstance(value, list | tuple) and bool(value) and all(map(_is_message, value))


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("role"), str) and value.get("content") is not None


def _has(names: Collection[Any]) -> str:
    return f" (it has: {', '.join(map(str, names))})"


def is_null(value: Any) -> bool:
    """None, and what pandas has in its place."""
    return value is None or type(value).__name__ == "NAType" or (isinstance(value, float) and value != value)


def _ids_of(value: Any) -> Integer[np.ndarray, " n"] | None:
    """Token ids as an array, None if these are none."""
    if isinstance(value, list | tuple):
        if not value:
            return np.empty(0, dtype=np.int64)
        if not is_id(value[0]):
            return None
    elif not hasattr(value, "__array__"):
        return None
    try:
        ids = as_array(value)
    except (ValueError, OverflowError):  # of several lengths, beyond 64 bits
        return None
    return ids if ids.ndim == 1 and ids.dtype.kind in "iu" else None


def is_id(value: Any) -> bool:
    return isinstance(value, int | np.integer)


def as_array(value: Any) -> np.ndarray:
    """Of numbers on any device."""
    return np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)


def without_surrogates(text: str) -> str:
    """Two halves of a character are joined, a half alone becomes U+FFFD."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


@dataclass
class Reading:
    """What happened while a text was read."""

    documents: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    """Rows left out, by reason."""
    repaired: Counter[str] = field(default_factory=Counter)
    """Pieces of text mended, by reason."""
    first: dict[str, str] = field(default_factory=dict)
    """For each reason the first place."""
    stopped: str | None = None
    """Why a stream ended before its end."""
    made: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Of each text of a mixture, the characters that were tokenised so far, and what they made."""
    unusable: int = 0
    """Rows left out because they are of the wrong kind, not because there is nothing in them."""
    _problem: str = ""

    def take(self, row: Any, field: str, place: str) -> Document | None:
        """The document of a row; None, and counted, if it holds none."""
        try:
            document = document_in(row, field)
        except Broken as broken:
            self.skip(broken, place)
            return None
        self.documents += 1
        return document

    def skip(self, broken: Broken, place: str) -> None:
        """Count a row that is left out."""
        self._count(self.skipped, broken.reason, place)
        if broken.reason not in NOTHING:
            self._problem = self._problem or f"{place} {broken}"
            self.unusable += 1

    def mend(self, text: str, place: str) -> str:
        """`text` as valid Unicode, counted if it was not."""
        if (mended := without_surrogates(text)) != text:
            self._count(self.repaired, "not valid Unicode", place)
        return mended

    def count_tokens(self, part: int, chars: int, tokens: int) -> None:
        before = self.made.get(part, (0, 0))
        self.made[part] = (before[0] + chars, before[1] + tokens)

    def check(self, at_least: int = 1) -> None:
        """ValueError naming the first problem if so many rows are unusable and there was no document."""
        if self.documents <= 0 and self.unusable >= at_least:
            raise ValueError(self._problem if self.unusable == 1 else f"no row can be used: {self._problem}")

    def _count(self, counts: Counter[str], reason: str, place: str) -> None:
        counts[reason] += 1
        self.first.setdefault(reason, place)

    def left_out(self) -> str:
        """In words what was skipped and repaired, empty if nothing was."""
        kinds = (("skipped", self.skipped), ("repaired", self.repaired))
        return "; ".join(f"{what} {self._listed(counts)}" for what, counts in kinds if counts)

    def _listed(self, counts: Counter[str]) -> str:
        return ", ".join(f"{n:,} {reason} (first: {self.first[reason]})" for reason, n in counts.most_common())

    def warn(self) -> None:
        """Log what was left out, and why a stream ended early."""
        if said := self.left_out():
            log.warning("of the text: %s", said)
        if self.stopped:
            log.warning("the text is read as far as it came: %s", self.stopped)

"""Mixtures: one text made of several, of which each has its share of the tokens.

    Mixture([("web.jsonl.gz", 0.7), (TextSource("owner/code", field="content"), 0.3)])

Usable wherever a text is. Documents stay whole. The next one comes from the text that has the fewest tokens for its
weight, so which text that is follows from the documents so far, and reading again gives the same sequence. The number
of tokens is what the tokenizer made of the documents so far (`Reading.made`); for the few that are read ahead of it,
and where nobody counts, it is told from their characters.

The mixture ends where the text whose turn it is has no more: beyond, its shares would not be those asked for.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from apportion.about import TextRecord
from apportion.language.documents import Reading
from apportion.language.text import Piece, Text, TextSource

CHARS_PER_TOKEN = 4.0
"""Until a text's own is known."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Mixture(TextSource):
    """`where` are texts with their weights, which need not sum to 1; `field`, `split` and `config` are those of texts
    that are no `TextSource` with their own."""

    parts: tuple[TextSource, ...] = field(init=False)
    weights: tuple[float, ...] = field(init=False)

    def __post_init__(self) -> None:
        given = [(self._part(text), float(weight)) for text, weight in self.where]
        for name, value in {"parts": [text for text, _ in given], "weights": [weight for _, weight in given]}.items():
            object.__setattr__(self, name, tuple(value))
        object.__setattr__(self, "where", tuple(given))
        if len(given) < 2:
            raise ValueError(f"a mixture is made of two texts or more, got {len(given)}: give the text itself")
        for text, weight in given:
            if not (math.isfinite(weight) and weight > 0):
                raise ValueError(
                    f"the text {_name(text)} has weight {weight:g} in the mixture: give a positive number, or leave "
                    "the text out"
                )
            if isinstance(text, Mixture):
                raise ValueError("a mixture holds a mixture: give its texts, with their weights, in its place")

    def _part(self, text: Text) -> TextSource:
        return text if isinstance(text, TextSource) else TextSource(text, self.field, self.split, self.config)

    @property
    def path(self) -> None:
        """A mixture lies nowhere."""
        return

    def check(self) -> None:
        for part in self.parts:
            part.check()

    def num_bytes(self) -> int | None:
        return _sum(part.num_bytes() for part in self.parts)

    def most_tokens(self) -> int | None:
        return _sum(part.most_tokens() for part in self.parts)

    def describe(self) -> TextRecord:
        shares = [weight / sum(self.weights) for weight in self.weights]
        parts = zip(self.parts, shares, strict=True)
        return TextRecord(parts=tuple(replace(part.describe(), share=round(share, 6)) for part, share in parts))

    def pieces(self, reading: Reading | None = None) -> Iterator[Piece]:
        reading = Reading() if reading is None else reading
        documents = [_Documents(text, number, reading) for number, text in enumerate(self.parts)]
        while True:
            behind = min(documents, key=lambda one: one.tokens() / self.weights[one.number])
            document = behind.next()
            if document is None:
                break
            reading.documents += 1
            yield from document
        log.warning("the mixture ends with the text %s, which has no more", _name(behind.text))


class _Documents:
    """The documents of one text of a mixture, each as its pieces, and how many tokens it has given."""

    def __init__(self, text: TextSource, number: int, reading: Reading) -> None:
        self.text, self.number, self.reading = text, number, reading
        self.own = Reading(skipped=reading.skipped, repaired=reading.repaired, first=reading.first)
        self._pieces = text.pieces(self.own)
        self._ahead: Piece | None = None
        self._chars = self._ids = 0

    def tokens(self) -> float:
        chars, tokens = self.reading.made.get(self.number, (0, 0))
        return self._ids + self._chars * (tokens / chars if chars and tokens else 1 / CHARS_PER_TOKEN)

    def next(self) -> Iterator[Piece] | None:
        """The next document; None if there is none. It is to be read to its end before the one behind it."""
        self._ahead = self._ahead or next(self._pieces, None)
        self.reading.stopped = self.reading.stopped or self.own.stopped
        return None if self._ahead is None else self._document(self._ahead)

    def _document(self, piece: Piece | None) -> Iterator[Piece]:
        first = True
        while piece is not None and (first or not piece.first):
            first = False
            self._chars += len(piece.text)
            self._ids += 0 if piece.ids is None else len(piece.ids)
            yield piece._replace(part=self.number)
            piece = next(self._pieces, None)
        self._ahead = piece


def _name(text: TextSource) -> str:
    return repr(text.describe().in_words())


def _sum(numbers: Iterable[int | None]) -> int | None:
    """None if one of them is not known."""
    known = list(numbers)
    return None if None in known else sum(number or 0 for number in known)

"""How to show rows: a unit is what one row stands for, and its neighbours are the rows of its group on either side.

TokenUnits      a token in its text
RowNumbers      the number of the row and its labels, where nothing better is known
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, final

from jaxtyping import Int
from torch import Tensor

from apportion.rows.batch import RowStore


class Units(ABC):
    before: ClassVar[int] = 0
    after: ClassVar[int] = 0
    """Neighbours that are shown on either side."""

    def __init__(self, store: RowStore) -> None:
        self.store = store

    @abstractmethod
    def pieces(self, rows: Int[Tensor, " n"]) -> list[str]:
        """The text of each of some consecutive rows of one group; "" where it belongs to the next one."""

    def sorts(self) -> Int[Tensor, " rows"] | None:
        """Of what sort each row is, as a number, where a latent may prefer some sort to others."""
        return None

    def name_of(self, sort: int) -> str:
        """The sort of that number in words."""
        raise NotImplementedError


@final
class TokenUnits(Units):
    before, after = 16, 6

    def __init__(self, store: RowStore, tokenizer: Any) -> None:
        super().__init__(store)
        self.tokenizer = tokenizer

    def pieces(self, rows: Int[Tensor, " n"]) -> list[str]:
        return text_pieces(self.tokenizer, self.store.labels["tokens"][rows].tolist())

    def sorts(self) -> Int[Tensor, " rows"]:
        return self.store.labels["tokens"]

    def name_of(self, sort: int) -> str:
        return self.tokenizer.decode([sort])


@final
class RowNumbers(Units):
    def pieces(self, rows: Int[Tensor, " n"]) -> list[str]:
        return [self._shown(row) for row in rows.tolist()]

    def _shown(self, row: int) -> str:
        known = ", ".join(f"{name} {column[row]}" for name, column in self.store.labels.items())
        return f"row {row}" + f" ({known})" * bool(known)


def units_of(store: RowStore, tokenizer: Any = None) -> Units:
    """The best that can be shown of these rows."""
    if tokenizer is not None and "tokens" in store.labels:
        return TokenUnits(store, tokenizer)
    return RowNumbers(store)


def text_pieces(tokenizer: Any, tokens: list[int]) -> list[str]:
    """The text of each token as it stands in the whole; a character of several tokens belongs to the last of them."""
    texts, before = [], ""
    for end in range(1, len(tokens) + 1):
        text = tokenizer.decode(tokens[:end], clean_up_tokenization_spaces=False)
        complete = not text.endswith("\ufffd") or end == len(tokens)
        texts.append(text[len(before) :] if complete else "")
        before = text if complete else before
    return texts

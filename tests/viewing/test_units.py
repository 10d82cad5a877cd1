"""How rows are shown: tokens in their text, other rows by number and labels."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import apportion as ap
from apportion.rows.arrays import ArrayStore
from apportion.viewing.examples import _Finder, find_examples
from apportion.viewing.units import RowNumbers, TokenUnits, text_pieces, units_of

X = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))


class ByteTokenizer:
    """One token per byte: characters beyond ASCII need several."""

    def decode(self, tokens: list[int], **_: Any) -> str:
        return bytes(tokens).decode("utf-8", errors="replace")


def test_pieces_add_up_to_the_text() -> None:
    text = "naïve – “quoted” 🙂 a"
    found = text_pieces(ByteTokenizer(), list(text.encode()))
    assert "".join(found) == text and len(found) == len(text.encode())
    assert not any("\ufffd" in piece for piece in found)
    cut = text_pieces(ByteTokenizer(), list("é".encode())[:1])
    assert cut == ["\ufffd"], "what cannot be completed is shown as such"


def test_an_example_about_part_of_a_character_marks_the_character() -> None:
    tokens = torch.tensor(list("a🙂b".encode()))
    store = ArrayStore(X[:6], labels={"tokens": tokens}, groups=torch.zeros(6, dtype=torch.int64))
    finder = _Finder(TokenUnits(store, ByteTokenizer()), torch.arange(6), store.groups, 6)
    shown = finder.example(2, torch.tensor([0.0, 0.5, 3.0, 1.0, 0.0, 2.0]))
    wanted = [("a", 0.0, False), ("🙂", 3.0, True), ("b", 2.0, False)]
    assert [(piece.text, piece.activation, piece.is_focus) for piece in shown] == wanted


def test_the_best_unit_that_there_is() -> None:
    plain, tokens = ArrayStore(X), ArrayStore(X, labels={"tokens": torch.zeros(300)})
    assert isinstance(units_of(plain, ByteTokenizer()), RowNumbers) and isinstance(units_of(tokens), RowNumbers)
    assert isinstance(units_of(tokens, ByteTokenizer()), TokenUnits)


def test_rows_without_text_are_shown_by_number_and_labels() -> None:
    store = ArrayStore(X, labels={"cell": [f"c{i % 3}" for i in range(300)]}, groups=torch.arange(300) // 10)
    sae = ap.create("topk", d_in=8, d_sae=16, k=2, seed=0)
    sae.fit_input(X)
    codes = sae.eval().encode(X).dense()
    (found,) = find_examples(sae, store, torch.arange(300), torch.tensor([5]), RowNumbers(store), strongest=3, random=1)
    best = codes[:, 5].view(30, 10).max(1)
    places = [10 * group + int(best.indices[group]) for group in best.values.topk(3).indices.tolist()]
    assert [[piece.text for piece in example] for example in found.strongest] == [
        [f"row {place} (cell c{place % 3})"] for place in places
    ], "one of each group, without neighbours"
    assert found.preferred == [] and found.density == pytest.approx((codes[:, 5] > 0).double().mean().item())
    (texts,) = ap.examples_of(sae, store, [5], strongest=3)
    assert texts.strongest == [f"<<row {place} (cell c{place % 3})>>" for place in places] and texts.top_tokens == []


def test_an_example_keeps_to_its_own_text() -> None:
    store = ArrayStore(X[:8], labels={"tokens": torch.tensor(list(b"abcdwxyz"))}, groups=torch.arange(8) // 4)
    finder = _Finder(TokenUnits(store, ByteTokenizer()), torch.arange(8), store.groups, 8)
    for place, wanted in ((3, "abcd"), (4, "wxyz")):
        assert "".join(piece.text for piece in finder.example(place, torch.ones(8))) == wanted

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apportion.language import tokens
from apportion.language.model import load_model
from apportion.language.text import PIECE_CHARS, TextSource, split_pieces
from apportion.language.tokens import Batches, PackedContexts, read_contexts

BOS, EOS = 1, 2


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path) -> Any:
    return load_model(tiny_model_dir)[1]


def ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def packed(tokenizer: Any, text: Any, context_tokens: int, bos: str) -> list[list[int]]:
    return np.concatenate(list(PackedContexts(tokenizer, text, context_tokens, bos))).tolist()


def test_documents_are_packed_with_eos_between_and_the_tail_is_dropped(tokenizer: Any) -> None:
    documents = ["the cat sat", "", "a dog ran", "the sea was calm"]
    stream = [*ids(tokenizer, documents[0]), EOS, *ids(tokenizer, documents[2]), EOS, *ids(tokenizer, documents[3])]
    assert len(stream) == 12
    assert packed(tokenizer, documents, 5, "never") == [stream[:5], stream[5:10]]


@pytest.mark.parametrize("bos", ["auto", "always"])
def test_with_bos_every_context_begins_with_it(tokenizer: Any, bos: str) -> None:
    stream = ids(tokenizer, "the cat sat on the mat")
    assert packed(tokenizer, ["the cat sat on the mat"], 4, bos) == [[BOS, *stream[:3]], [BOS, *stream[3:]]]


def test_auto_follows_a_tokenizer_that_adds_no_bos(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenizers import processors

    monkeypatch.setattr(tokenizer._tokenizer, "post_processor", processors.TemplateProcessing(single="$A"))
    assert packed(tokenizer, ["the cat sat on the mat"], 3, "auto") == packed(
        tokenizer, ["the cat sat on the mat"], 3, "never"
    )


def test_contexts_are_read_on_until_there_are_enough_and_no_further(tokenizer: Any) -> None:
    """From an endless text, several blocks of documents."""
    taken = 0

    def endless() -> Iterator[str]:
        nonlocal taken
        while True:
            taken += 1
            yield "the cat sat on the mat"

    found = read_contexts(tokenizer, endless(), tokens=1000, context_tokens=10)
    assert found.shape == (100, 10)
    enough = 100 * 9 / 7  # six words and EOS of each document, BOS in each context
    assert enough <= taken <= enough + 3 * tokens.PIECES_AT_ONCE
    assert found.tolist() == packed(tokenizer, ["the cat sat on the mat"] * 200, 10, "auto")[:100]


@pytest.mark.parametrize(
    ("text", "message"),
    [(["the cat sat"], "only 3 tokens.*one context of 8"), ([""], "empty"), ([], "empty")],
)
def test_too_little_text_is_refused_with_its_size(tokenizer: Any, text: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        packed(tokenizer, text, 8, "auto")


def test_unknown_bos_policies_are_refused(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="'sometimes'"):
        packed(tokenizer, ["the cat"], 2, "sometimes")


def test_read_contexts_covers_the_tokens_asked_for(tokenizer: Any) -> None:
    assert read_contexts(tokenizer, ["the cat sat " * 50], tokens=21, context_tokens=10).shape == (3, 10)
    assert read_contexts(tokenizer, ["the cat sat " * 50], tokens=10**6, context_tokens=10).shape == (150 // 9, 10)


@pytest.mark.parametrize("tokens", [1, 10, 11, 35, 1000])
def test_batches_keep_every_context_in_order(tokenizer: Any, tokens: int) -> None:
    everything = np.concatenate(list(PackedContexts(tokenizer, ["the cat sat " * 50], 10)))
    packed = Batches(PackedContexts(tokenizer, ["the cat sat " * 50], 10), tokens, 3)
    batches = list(packed)
    wanted = everything[: -(-tokens // 10)]
    assert np.concatenate([b.numpy() for b in batches]).tolist() == wanted.tolist()
    assert all(len(b) == 3 for b in batches[:-1]) and packed.reached == (tokens <= everything.size)


def test_pieces_join_to_the_document_and_end_at_newlines(tmp_path: Path) -> None:
    document = "".join(f"line {i} of a long text\n" for i in range(PIECE_CHARS // 8)) + "no newline at the end"
    file = tmp_path / "long.txt"
    file.write_text(document)
    for pieces in (list(split_pieces(document)), list(TextSource(file).pieces())):
        assert "".join(p.text for p in pieces) == document
        assert [p.first for p in pieces] == [True] + [False] * (len(pieces) - 1)
        assert len(pieces) > 2
        assert all(p.text.endswith("\n") for p in pieces[:-1])


def test_a_text_without_newlines_still_comes_in_bounded_pieces(tmp_path: Path) -> None:
    file = tmp_path / "one-line.txt"
    file.write_text("word " * PIECE_CHARS)
    assert max(len(p.text) for p in TextSource(file).pieces()) <= PIECE_CHARS


def test_a_folder_is_read_in_sorted_order(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"body": t}) for t in ["third", "fourth"]) + "\n\n")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "a2.md").write_text("second")
    (tmp_path / "ignored.bin").write_text("not text")
    (tmp_path / ".hidden.txt").write_text("not for reading")
    source = TextSource(tmp_path, field="body")
    assert [p.text for p in source.pieces()] == ["first", "second", "third", "fourth"]
    assert all(p.first for p in source.pieces())
    assert source.describe().files == 3


def test_mistakes_about_text_are_named(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"body": "t"}\n')
    with pytest.raises(ValueError, match=r"no text in field 'text' \(it has: body\)"):
        list(TextSource(tmp_path / "x.jsonl").pieces())
    with pytest.raises(ValueError, match="no text at"):
        list(TextSource(str(tmp_path / "missing.txt")).pieces())
    with pytest.raises(ValueError, match="is not a text file"):
        (tmp_path / "x.bin").write_text("")
        list(TextSource(tmp_path / "x.bin").pieces())


def test_datasets_are_streamed_by_column(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def fake(
        name: str, config: str | None, *, split: str, streaming: bool, trust_remote_code: bool
    ) -> list[dict[str, str]]:
        assert (name, config, split, streaming, trust_remote_code) == ("owner/texts", None, "test", True, False)
        return [{"story": "one"}, {"story": "two"}]

    monkeypatch.setattr(datasets, "load_dataset", fake)
    source = TextSource("owner/texts", field="story", split="test")
    assert [p.text for p in source.pieces()] == ["one", "two"]


def test_what_is_neither_path_nor_dataset_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def fail(*args: object, **kwargs: object) -> None:
        raise FileNotFoundError("nowhere\nlong traceback")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(ValueError, match=r"'owner/nothing'.*neither a file.*\(nowhere\)"):
        list(TextSource("owner/nothing").pieces())

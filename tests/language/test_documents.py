"""What counts as a document, wherever it comes from; what does not is left out and counted."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import pytest
import torch

from apportion.about import TextRecord
from apportion.language.documents import FIRST_ROWS, Reading
from apportion.language.model import load_model
from apportion.language.text import TextSource
from apportion.language.tokens import read_contexts


def read(text: Any, **settings: Any) -> tuple[list[Any], Reading]:
    """The documents of a text, token ids as lists, and what happened."""
    reading, documents = Reading(), []
    for piece in TextSource(text, **settings).pieces(reading):
        assert piece.place
        if piece.ids is not None:
            documents.append(piece.ids.tolist())
        elif piece.first:
            documents.append(piece.text)
        else:
            documents[-1] += piece.text
    return documents, reading


TABLE = {"text": ["one", "two\nlines"], "number": [1, 2]}
ROWS = [{"text": "one", "number": 1}, {"text": "two\nlines", "number": 2}]


@pytest.mark.parametrize(
    "text",
    [
        TABLE["text"],
        tuple(TABLE["text"]),
        (document for document in TABLE["text"]),
        np.array(TABLE["text"]),
        np.array(TABLE["text"], dtype=object),
        ROWS,
        (row for row in ROWS),
        datasets.Dataset.from_dict(TABLE),
        datasets.Dataset.from_dict(TABLE).to_iterable_dataset(),
        pandas.DataFrame(TABLE),
        pandas.DataFrame(TABLE)["text"],
        [b"one", "two\nlines"],
    ],
    ids=lambda text: type(text).__name__,
)
def test_documents_in_memory(text: Any) -> None:
    documents, reading = read(text)
    assert documents == TABLE["text"]
    assert reading.documents == 2 and not reading.left_out()


@pytest.mark.parametrize(
    "text",
    [
        [[5, 6, 7], [8, 9]],
        [np.array([5, 6, 7]), np.array([8, 9])],
        [torch.tensor([5, 6, 7]), torch.tensor([8, 9], dtype=torch.int32)],
        [{"input_ids": [5, 6, 7]}, {"tokens": [8, 9]}],
        datasets.Dataset.from_dict({"input_ids": [[5, 6, 7], [8, 9]], "attention_mask": [[1, 1, 1], [1, 1]]}),
        pandas.DataFrame({"tokens": [[5, 6, 7], [8, 9]]}),
    ],
    ids=["lists", "arrays", "tensors", "rows", "dataset", "frame"],
)
def test_token_ids_in_memory(text: Any) -> None:
    assert read(text)[0] == [[5, 6, 7], [8, 9]]


def test_an_array_of_ids_is_contexts_or_one_document() -> None:
    assert read(torch.tensor([[5, 6], [7, 8]]))[0] == read(np.array([[5, 6], [7, 8]]))[0] == [[5, 6], [7, 8]]
    for one in (torch.tensor([5, 6]), np.array([5, 6]), [5, 6]):
        assert read(one)[0] == [[5, 6]]


def test_text_comes_before_ids_and_only_whole_numbers_are_ids() -> None:
    documents, reading = read(
        [
            {"text": "a", "input_ids": [1]},
            {"tokens": ["b"]},
            {"tokens": [True]},
            {"tokens": [1.5]},
            {"tokens": np.ones(3)},
        ]
    )
    assert documents == ["a"]
    assert reading.skipped == {"neither text nor token ids": 4}
    assert read([{"story": "a"}, {"tokens": [1]}], field="story")[0] == ["a"]  # ids only where no field is asked for


class NAType:
    """What pandas.NA is called."""


def test_what_is_broken_is_counted_with_its_first_place(caplog: pytest.LogCaptureFixture) -> None:
    rows = [None, "good", float("nan"), NAType(), "", {"text": None}, {"story": "s"}, {"text": 3}, [[1, 2], [3]], "end"]
    documents, reading = read(rows)
    assert documents == ["good", "end"]
    assert reading.skipped == {"null": 4, "empty": 1, "no field 'text'": 1, "neither text nor token ids": 2}
    assert reading.first == {
        "null": "document 1", "empty": "document 5", "no field 'text'": "document 7",
        "neither text nor token ids": "document 8",
    }  # fmt: skip
    reading.warn()
    assert len(caplog.records) == 1 and "4 null (first: document 1)" in caplog.text


@pytest.mark.parametrize(
    ("broken", "whole"),
    [
        ("half an emoji \ud83d and on", "half an emoji � and on"),
        ("two halves \ud83d\ude00", "two halves 😀"),
        (b"caf\xe9", "caf�"),
    ],
)
def test_what_is_not_valid_unicode_is_mended_and_counted(broken: Any, whole: str) -> None:
    documents, reading = read(["fine 😀", broken])
    assert documents == ["fine 😀", whole]
    assert reading.repaired == {"not valid Unicode": 1} and reading.first == {"not valid Unicode": "document 2"}


def test_a_field_that_no_row_has_is_refused_after_the_first_rows() -> None:
    read_rows = 0

    def rows() -> Iterator[dict[str, str]]:
        nonlocal read_rows
        while read_rows < 10 * FIRST_ROWS:
            read_rows += 1
            yield {"body": "text", "id": "7"}

    with pytest.raises(ValueError, match=r"no row can be used: .* no text in field 'text' \(it has: body, id\)"):
        read(rows())
    assert read_rows == FIRST_ROWS


def test_rows_without_anything_are_no_reason_to_refuse() -> None:
    assert read([None, ""] * FIRST_ROWS + ["at last"])[0] == ["at last"]
    assert read([{"body": "x"}] * (FIRST_ROWS - 1) + ["at last"])[0] == ["at last"]
    assert read(["first", *([{"body": "x"}] * 2 * FIRST_ROWS), "last"])[0] == ["first", "last"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (datasets.DatasetDict(train=datasets.Dataset.from_dict(TABLE), test=datasets.Dataset.from_dict(TABLE)),
         r"DatasetDict of train, test: give one of them, such as text\['train'\]"),
        ({"input_ids": [[1, 2]], "attention_mask": [[1, 1]]}, r"of input_ids, attention_mask.*text\['input_ids'\]"),
        (np.zeros((2, 3)), r"array \(2, 3\) of float64: token ids are whole numbers"),
        (torch.zeros(2, 3, 4, dtype=torch.int64), r"array \(2, 3, 4\)"),
        (7, "the text is a int"),
        (b"bytes", "the text is a bytes"),
    ],
)  # fmt: skip
def test_what_is_no_text_is_refused_at_once(text: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextSource(text)


@pytest.mark.parametrize("text", ["Tom had a dog.\nIt was big.", "word " * 1000])
def test_text_given_as_a_path_gets_a_hint(text: str) -> None:
    with pytest.raises(ValueError, match=r"put it into a list: \[text\]"):
        list(TextSource(text).pieces())


@pytest.mark.parametrize("stream", [False, True])
def test_a_dataset_names_its_columns(stream: bool) -> None:
    dataset = datasets.Dataset.from_dict({"story": ["a"], "id": [1]})
    text = dataset.to_iterable_dataset() if stream else dataset
    with pytest.raises(ValueError, match=r"no text in field 'text' \(it has: story, id\)"):
        read(text)
    assert read(text, field="story")[0] == ["a"]


def test_only_the_column_that_is_needed_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(Reading, "take", lambda self, row, field, place: seen.append(row))
    read(datasets.Dataset.from_dict(TABLE))
    assert seen == [{"text": "one"}, {"text": "two\nlines"}]


def test_saved_datasets(tmp_path: Path) -> None:
    dataset = datasets.Dataset.from_dict(TABLE)
    dataset.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=dataset, test=dataset.select([1])).save_to_disk(tmp_path / "several")
    assert read(tmp_path / "one")[0] == read(str(tmp_path / "several"))[0] == TABLE["text"]
    assert read(tmp_path / "several", split="test")[0] == ["two\nlines"]
    source = TextSource(tmp_path / "several", split="validation")
    with pytest.raises(ValueError, match="no split 'validation': choose one of train, test"):
        source.check()
    assert source.describe() == TextRecord(where=str(tmp_path / "several"), split="validation", field="text")


def test_home_in_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("at home")
    assert read("~/a.txt")[0] == read(Path("~/a.txt"))[0] == ["at home"]
    assert TextSource("~/a.txt").describe().where == str(tmp_path / "a.txt")
    with pytest.raises(ValueError, match=r"~nobody-of-this-name/a\.txt.*Write the path in full"):
        TextSource("~nobody-of-this-name/a.txt").files()


def test_the_contexts_of_a_text_with_broken_rows_are_those_of_the_good_ones(
    tiny_model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = load_model(tiny_model_dir)[1]
    good = ["the cat sat on the mat", "a dog ran over the hill"]
    lines = [json.dumps({"text": good[0]}), "{cut off", '{"text": null}', json.dumps({"text": good[1]})]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with caplog.at_level(logging.WARNING):
        found = read_contexts(tokenizer, tmp_path / "a.jsonl", tokens=100, context_tokens=3)
    assert found.tolist() == read_contexts(tokenizer, good, tokens=100, context_tokens=3).tolist()
    assert f"1 not JSON (first: {tmp_path / 'a.jsonl'}:2)" in caplog.text

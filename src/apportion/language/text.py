"""Text: documents from a file, a folder, a Hugging Face dataset or memory, read in bounded pieces.

    notes.txt, notes.jsonl.gz, ...   a file (text_files.py says which kinds, and how each is read)
    folder/                          all such files below it, sorted by path
    folder/                          a dataset saved with `save_to_disk`
    owner/dataset                    a `datasets` id, streamed from the split `split`; none that is a program
    ["...", "..."]                   documents in memory: a list, a generator, an array, rows that are dicts,
                                     a `datasets.Dataset`, a data frame, or token ids (documents.py)

A document comes as one or more *pieces* of about `PIECE_CHARS` characters, cut behind a newline where there is one, so
that memory stays bounded and a tokenizer can work on many pieces at once. Cutting there costs next to nothing: nearly
every tokenizer splits at line ends anyway.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Integer

from apportion.about import TextRecord
from apportion.extras import need
from apportion.language.chats import contents
from apportion.language.documents import FIRST_ROWS, TEXT_FIELD, Broken, Reading, chosen_field, is_id
from apportion.language.text_files import PIECE_CHARS, Row, files_at, is_packed, kind_of_file, rows_of_file
from apportion.language.text_streams import steady_rows
from apportion.trust import expanded, refuse_mistyped

Text = Any
"""What a user calls text: a `TextSource`, or anything that it takes as `where`."""


class Piece(NamedTuple):
    """A part of a document; `first` is True for the part that begins it. A document of token ids is one piece."""

    text: str
    first: bool
    ids: Integer[np.ndarray, " n"] | None = None
    place: str = ""
    part: int = 0
    """Which text of a mixture (mixture.py)."""
    messages: Sequence[Mapping[str, Any]] | None = None
    """Of a conversation, which is one piece; `text` is what was said in it."""


@dataclass(frozen=True, eq=False)
class TextSource:
    """Where text comes from: `where` is a path, a `datasets` id, or what holds documents in memory."""

    where: Any
    field: str = TEXT_FIELD
    """The field of a row, or the column of a dataset, that holds the text."""
    split: str = "train"
    """The split of a dataset."""
    config: str | None = None
    """The configuration of a dataset that has several."""

    def __post_init__(self) -> None:
        if not isinstance(self.where, str | Path):
            _check_documents(self.where)

    @staticmethod
    def of(text: Text) -> TextSource:
        """Whatever a user calls text, as a TextSource."""
        return text if isinstance(text, TextSource) else TextSource(text)

    @property
    def path(self) -> Path | None:
        """Where on this disk; None for what is in memory. ValueError for what can only be text itself."""
        if not isinstance(where := self.where, str | Path):
            return None
        if (len(str(where)) > 1000 or "\n" in str(where)) and not os.path.lexists(where):
            raise ValueError(f"{str(where)[:40]!r}... is no path: to give text itself, put it into a list: [text]")
        return expanded(where)

    def files(self) -> list[Path]:
        """The files to read; empty when the text is not in files of its own. ValueError if a path cannot be read."""
        path = self.path
        if path is None or saved_dataset(path):
            return []
        if path.is_dir() or path.is_file():
            return files_at(path)
        if isinstance(self.where, Path) or kind_of_file(path) or path.is_absolute() or str(path).count("/") > 1:
            raise ValueError(f"no text at {str(path)!r}: give an existing file or folder, or a datasets id")
        refuse_mistyped(str(self.where), "a datasets id")
        return []

    def check(self) -> None:
        """ValueError if it is seen without reading it that there is no text."""
        if self.path is not None and saved_dataset(self.path):
            _load_saved(self.path, self.split)
        if self.num_bytes() == 0:
            raise ValueError(f"the text {str(self.where)!r} is empty: give a text with at least one context of tokens")

    def num_bytes(self) -> int | None:
        """How much there is to read; None where that is not known beforehand."""
        if self.path is None:
            return _bytes_in_memory(self.where)
        files = self.files()
        return sum(file.stat().st_size for file in files) if files else None

    def most_tokens(self) -> int | None:
        """More tokens than this it cannot have; None where that is not known. No token is shorter than a byte."""
        if self.path is not None and any(map(is_packed, self.files())):
            return None
        return self.num_bytes()

    def pieces(self, reading: Reading | None = None) -> Iterator[Piece]:
        """All pieces of all documents, in order. What is left out is counted in `reading`."""
        reading = Reading() if reading is None else reading
        if self.path is None:
            yield from self._documents(self._rows_in_memory(reading), reading)
        elif saved_dataset(self.path):
            rows = _column(_load_saved(self.path, self.split), self.field)
            yield from self._documents(_numbered(rows, f"dataset {str(self.path)!r}, row"), reading)
        elif files := self.files():
            for file in files:
                if kind_of_file(file) == "plain":
                    yield from _plain_pieces(file, reading)
                else:
                    yield from self._documents(rows_of_file(file, self.field), reading)
        else:
            yield from self._documents(self._streamed(reading), reading)
        reading.check()

    def _documents(self, rows: Iterable[Row], reading: Reading) -> Iterator[Piece]:
        documents, unusable = reading.documents, reading.unusable
        for place, row in rows:
            document = reading.take(row, self.field, place)
            if reading.documents == documents and reading.unusable - unusable >= FIRST_ROWS:
                reading.skip(Broken(f"given up after {FIRST_ROWS} rows without a document"), place)
                return
            if isinstance(document, str):
                for piece in split_pieces(document, place):
                    yield piece._replace(text=reading.mend(piece.text, place))
            elif isinstance(document, list):
                yield Piece(contents(document), True, place=place, messages=document)
            elif document is not None:
                yield Piece("", True, document, place)

    def _rows_in_memory(self, reading: Reading) -> Iterator[Row]:
        if _is_one_document(self.where):
            return iter([("the text", self.where)])
        if hasattr(self.where, "skip") and not hasattr(self.where, "__len__"):  # a stream of `datasets`
            rows = _column(self.where, self.field)
            return steady_rows(lambda: rows, "the dataset", reading)
        if isinstance(self.where, Iterator):
            return steady_rows(lambda: self.where, "the text", reading, again=False)
        return _numbered(_column(self.where, self.field), "document")

    def _streamed(self, reading: Reading) -> Iterator[Row]:
        need("A dataset", "datasets")
        from datasets import load_dataset  # heavy, and only needed here

        name = str(self.where)

        def opened() -> Iterable[Any]:
            return load_dataset(name, self.config, split=self.split, streaming=True, trust_remote_code=False)

        try:
            rows = opened()
        except Exception as error:  # datasets raises many kinds; the user needs one sentence
            raise ValueError(
                f"no text at {name!r}: it is neither a file, nor a folder, nor a datasets id that can be "
                f"loaded with split {self.split!r} and configuration {self.config!r} ({_one_line(error)})"
            ) from error
        first = [_column(rows, self.field)]
        return steady_rows(
            lambda: first.pop() if first else _column(opened(), self.field), f"dataset {name!r}", reading
        )

    def describe(self) -> TextRecord:
        if self.path is None:
            where, counted = self.where, hasattr(self.where, "__len__") and not isinstance(self.where, Iterator)
            return TextRecord(documents=1 if _is_one_document(where) else len(where) if counted else None)
        where = str(self.path if self.path.exists() else self.where)
        if files := self.files():
            return TextRecord(where=where, files=len(files), bytes=self.num_bytes())
        return TextRecord(where=where, split=self.split, field=self.field, config=self.config)


def split_pieces(document: str, place: str = "") -> Iterator[Piece]:
    """A document in memory, cut into pieces."""
    start, first = 0, True
    while start < len(document):
        stop = start + PIECE_CHARS
        if stop < len(document):
            newline = document.rfind("\n", start, stop)
            stop = newline + 1 if newline >= start else stop
        yield Piece(document[start:stop], first, place=place)
        start, first = stop, False


def _plain_pieces(file: Path, reading: Reading) -> Iterator[Piece]:
    first = True
    for place, text in rows_of_file(file, TEXT_FIELD):
        if isinstance(text, Broken):
            reading.skip(text, place)
            return
        reading.documents += first
        yield Piece(reading.mend(text, place), first, place=place)
        first = False


def _numbered(rows: Iterable[Any], what: str) -> Iterator[Row]:
    for number, row in enumerate(rows, 1):
        yield f"{what} {number}", row


def _check_documents(where: Any) -> None:
    """ValueError for what is no collection of documents."""
    if isinstance(where, Mapping):  # a DatasetDict, or what a tokenizer returns
        names = list(map(str, where))
        raise ValueError(f"the text is a {type(where).__name__} of {', '.join(names)}: give one of them, such as "
                         f"text[{(names or ['train'])[0]!r}]")  # fmt: skip
    if isinstance(where, bytes) or not hasattr(where, "__iter__"):
        raise ValueError(
            f"the text is a {type(where).__name__}: give a path, a datasets id, documents in a list, or token ids"
        )
    if _is_numbers(where) and not (len(where.shape) in (1, 2) and _dtype_name(where).startswith(("int", "uint"))):
        raise ValueError(
            f"the text is an array {tuple(where.shape)} of {where.dtype}: token ids are whole numbers, one document, "
            "or [contexts, context_tokens]"
        )


def _is_numbers(where: Any) -> bool:
    """A numpy array of numbers, or a tensor."""
    numbers = ("int", "uint", "float", "bfloat", "complex", "bool")
    return hasattr(where, "shape") and _dtype_name(where).startswith(numbers)


def _dtype_name(where: Any) -> str:
    return str(getattr(where, "dtype", "")).removeprefix("torch.")


def given_width(where: Any) -> int | None:
    """The length of the contexts if `where` is an array of them."""
    return int(where.shape[1]) if _is_numbers(where) and len(where.shape) == 2 else None


def _is_one_document(where: Any) -> bool:
    """Token ids of one document: a flat list or array of them."""
    if _is_numbers(where):
        return len(where.shape) == 1
    return isinstance(where, list | tuple) and bool(where) and is_id(where[0])


def _bytes_in_memory(where: Any) -> int | None:
    """Of documents in a list or array; a token id counts as one."""
    if _is_numbers(where):
        return int(np.prod(where.shape))
    if not isinstance(where, list | tuple):
        return None
    return len(where) if _is_one_document(where) else sum(map(_length, where))


def _length(document: Any) -> int:
    if isinstance(document, Mapping):
        return sum(_length(value) for value in document.values())
    if isinstance(document, str):
        return len(document.encode(errors="replace"))
    return len(document) if hasattr(document, "__len__") else 0


def _column(rows: Any, field: str) -> Iterable[Any]:
    """The rows of a table with no more than the column that is needed; other rows as they are."""
    if (names := getattr(rows, "column_names", None)) is not None:
        return rows.select_columns([_column_name(list(names), field)]) if hasattr(rows, "select_columns") else rows
    names = getattr(rows, "columns", None)
    return rows if names is None else rows[_column_name(list(names), field)]


def _column_name(names: list[str], field: str) -> str:
    try:
        return chosen_field(names, field)
    except Broken as broken:
        raise ValueError(f"the dataset {broken}") from None


def saved_dataset(path: Path) -> bool:
    """Whether a folder was written by `save_to_disk` of `datasets`."""
    return (path / "dataset_dict.json").is_file() or ((path / "state.json").is_file() and any(path.glob("*.arrow")))


def _load_saved(path: Path, split: str) -> Any:
    need("A folder made with save_to_disk", "datasets")
    from datasets import load_from_disk  # heavy, and only needed here

    try:
        loaded = load_from_disk(str(path))
    except Exception as error:  # datasets raises many kinds; the user needs one sentence
        raise ValueError(f"the dataset {str(path)!r} cannot be read ({_one_line(error)}): save it again") from error
    if not isinstance(loaded, Mapping):
        return loaded
    if split not in loaded:
        raise ValueError(
            f"the dataset {str(path)!r} has no split {split!r}: choose one of {', '.join(map(str, loaded))}"
        )
    return loaded[split]


def _one_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

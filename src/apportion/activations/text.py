"""Text: documents from a file, a folder, a list or a Hugging Face dataset, read in bounded pieces.

    notes.txt, notes.md    the whole file is one document
    notes.jsonl            one document per line, in the field `field`
    folder/                all such files below it, sorted by path
    owner/dataset          a `datasets` id, streamed from the split `split`, in the column `field`
    ["...", "..."]         documents already in memory

A document comes as one or more *pieces* of about `PIECE_CHARS` characters, cut behind a newline where there is one, so
that memory stays bounded and a tokenizer can work on many pieces at once. Cutting there costs next to nothing: nearly
every tokenizer splits at line ends anyway.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TextIO

PIECE_CHARS = 1 << 16
SUFFIXES = (".txt", ".md", ".jsonl")


class Piece(NamedTuple):
    """A part of a document; `first` is True for the part that begins it."""

    text: str
    first: bool


@dataclass(frozen=True)
class TextSource:
    """Where text comes from: `where` is a path, a `datasets` id or a sequence of documents."""

    where: str | Path | tuple[str, ...]
    field: str = "text"
    """The field of a .jsonl line, or the column of a dataset, that holds the text."""
    split: str = "train"
    """The split of a dataset."""
    config: str | None = None
    """The configuration of a dataset that has several."""

    @staticmethod
    def of(text: TextSource | str | Path | Iterable[str]) -> TextSource:
        """Whatever a user calls text, as a TextSource."""
        if isinstance(text, TextSource):
            return text
        return TextSource(text) if isinstance(text, (str, Path)) else TextSource(tuple(text))

    def files(self) -> list[Path]:
        """The files to read; empty when the text is not on this disk. ValueError if a path cannot be read."""
        if isinstance(self.where, tuple):
            return []
        path = Path(self.where)
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
            if not found:
                raise ValueError(f"folder {str(path)!r} holds no {', '.join(SUFFIXES)} file: give a folder with text")
            return found
        if path.is_file():
            if path.suffix not in SUFFIXES:
                raise ValueError(f"{str(path)!r} is not a text file: use one that ends in {', '.join(SUFFIXES)}")
            return [path]
        if isinstance(self.where, Path) or path.suffix in SUFFIXES or path.is_absolute() or str(path).count("/") > 1:
            raise ValueError(f"no text at {str(path)!r}: give an existing file or folder, or a datasets id")
        return []

    def num_bytes(self) -> int | None:
        """How much text there is, None for a streamed dataset: a text never has more tokens than bytes."""
        if isinstance(self.where, tuple):
            return sum(len(document.encode()) for document in self.where)
        files = self.files()
        return sum(file.stat().st_size for file in files) if files else None

    def pieces(self) -> Iterator[Piece]:
        """All pieces of all documents, in order; empty documents are left out."""
        if isinstance(self.where, tuple):
            for document in self.where:
                yield from split_pieces(document)
        elif files := self.files():
            for file in files:
                yield from _jsonl_pieces(file, self.field) if file.suffix == ".jsonl" else _plain_pieces(file)
        else:
            yield from _dataset_pieces(self)

    def describe(self) -> dict[str, Any]:
        if isinstance(self.where, tuple):
            return {"documents": len(self.where)}
        described: dict[str, Any] = {"where": str(self.where)}
        if files := self.files():
            return described | {"files": len(files), "bytes": self.num_bytes()}
        return described | {"split": self.split, "field": self.field, "config": self.config}


def split_pieces(document: str) -> Iterator[Piece]:
    """A document in memory, cut into pieces."""
    start, first = 0, True
    while start < len(document):
        stop = start + PIECE_CHARS
        if stop < len(document):
            newline = document.rfind("\n", start, stop)
            stop = newline + 1 if newline >= start else stop
        yield Piece(document[start:stop], first)
        start, first = stop, False


def _read_pieces(stream: TextIO) -> Iterator[str]:
    """A stream in pieces that end with a newline where the text has one, holding about one piece in memory."""
    rest = ""
    while block := stream.read(PIECE_CHARS):
        rest += block
        cut = rest.rfind("\n") + 1
        if cut == 0 and len(rest) >= PIECE_CHARS:
            cut = len(rest)
        if cut:
            yield rest[:cut]
            rest = rest[cut:]
    if rest:
        yield rest


def _plain_pieces(file: Path) -> Iterator[Piece]:
    first = True
    with file.open(encoding="utf-8-sig", errors="replace") as stream:
        for text in _read_pieces(stream):
            yield Piece(text, first)
            first = False


def _jsonl_pieces(file: Path, field: str) -> Iterator[Piece]:
    with file.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{file}:{number} is not JSON ({error.msg}): write one object per line") from None
            yield from split_pieces(_text_of(record, field, f"{file}:{number}"))


def _dataset_pieces(source: TextSource) -> Iterator[Piece]:
    from datasets import load_dataset  # heavy, and only needed here

    name = str(source.where)
    try:
        rows = load_dataset(name, source.config, split=source.split, streaming=True)
    except Exception as error:  # datasets raises many kinds; the user needs one sentence
        raise ValueError(
            f"no text at {name!r}: it is neither a file, nor a folder, nor a datasets id that can be "
            f"loaded with split {source.split!r} ({_one_line(error)})"
        ) from error
    for row in rows:
        yield from split_pieces(_text_of(row, source.field, f"dataset {name!r}"))


def _one_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _text_of(record: Any, field: str, where: str) -> str:
    if not isinstance(record, dict) or not isinstance(record.get(field), str):
        keys = ", ".join(map(str, record)) if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"{where} has no text in field {field!r} (it has: {keys}): say which field holds the text")
    return record[field]

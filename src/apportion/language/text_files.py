"""Rows of text files, each with its place, in bounded memory and whatever is broken in them.

    notes.txt, notes.md            the whole file is one document
    notes.jsonl, notes.json        one row per line, or an array of rows
    table.csv, table.tsv           one row per line below the names of the columns
    table.parquet                  a batch of rows at a time, of the one column that is needed

All but .parquet may be compressed as well: .gz, .bz2, .xz, .zst. Text is UTF-8, or UTF-16 or UTF-32 where the file
begins with the mark of these (BOM). Bytes that are no UTF-8 come as lone surrogates, which `Reading.mend` replaces. A
file that ends in the middle, as one of an interrupted download, gives what is before, and `Broken` as its last row.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import lzma
import re
import sys
import zlib
from collections.abc import Iterator
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import Any

from apportion.disk import check_may_open
from apportion.extras import need
from apportion.language.documents import Broken, chosen_field, is_conversation, is_id

PIECE_CHARS = 1 << 16
PARQUET_ROWS = 1024
KINDS = {
    **dict.fromkeys((".txt", ".md"), "plain"),
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "json"),
    **dict.fromkeys((".csv", ".tsv"), "csv"),
    ".parquet": "parquet",
}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
"""UTF-32 before UTF-16, whose mark begins like it."""

LONGEST_WORD = len(r"\ud83d\ude00")
"""JSON cannot be known to be wrong in the last few characters of a block: a word may be cut there."""
SPACE = re.compile(r"[\ufeff\s,]*")

Row = tuple[str, Any]
"""A place, such as notes.jsonl:17, and what is there."""


def kind_of_file(file: Path) -> str | None:
    """How a file is read, by the end of its name; None if it is no text."""
    *_, inner, last = ["", "", *(suffix.lower() for suffix in file.suffixes)]
    if last in COMPRESSED:
        return KINDS.get(inner) if inner != ".parquet" else None
    return KINDS.get(last)


def is_packed(file: Path) -> bool:
    """Whether it may hold more text than it has bytes."""
    return file.suffix.lower() in (*COMPRESSED, ".parquet")


def files_at(path: Path) -> list[Path]:
    """A file, or all text files below a folder, sorted by path, without hidden ones.

    Before work starts: ValueError if there is none, or what one needs is not installed, OSError if one may not be read.
    """
    if path.is_dir():
        below = (p for p in path.rglob("*") if not any(part.startswith(".") for part in p.relative_to(path).parts))
        files = sorted(p for p in below if kind_of_file(p) and p.is_file())
        if not files:
            raise ValueError(f"folder {str(path)!r} holds no {', '.join(KINDS)} file: give a folder with text")
    elif kind_of_file(path) is None:
        raise ValueError(f"{str(path)!r} is not a text file: use one that ends in {', '.join(KINDS)}")
    else:
        files = [path]
    for file in files:
        check_may_open(file)
        if file.suffix.lower() in (".zst", ".parquet"):
            need(f"reading {str(file)!r}", "pyarrow")
    return files


def _bytes_of(file: Path) -> Any:
    """A stream of the file's bytes, unpacked."""
    if (suffix := file.suffix.lower()) == ".zst":
        import pyarrow

        return pyarrow.input_stream(str(file), compression="zstd")
    if suffix == ".bz2":
        import bz2  # not every Python was built with it

        return bz2.open(file)
    return {".gz": gzip.open, ".xz": lzma.open}.get(suffix, Path.open)(file, "rb")


def open_text(file: Path, newline: str | None = None) -> io.TextIOWrapper:
    """A file as text, whatever its packing and encoding; ValueError if it looks like no text at all."""
    with closing(_bytes_of(file)) as stream:
        start = stream.read(4096)
    encoding = next((name for mark, name in MARKS.items() if start.startswith(mark)), "utf-8")
    if encoding == "utf-8" and start.count(0) > len(start) // 8:
        raise Broken("no text file", "is no UTF-8 text (it is binary, or UTF-16 without its mark): save it as UTF-8")
    errors = "surrogateescape" if encoding.startswith("utf-8") else "replace"
    return io.TextIOWrapper(_bytes_of(file), encoding=encoding, errors=errors, newline=newline)


def _plain_pieces(file: Path, field: str) -> Iterator[Row]:
    """A text file in pieces that end with a newline where the text has one, holding about one piece in memory."""
    with closing(open_text(file)) as stream:
        rest = ""
        while block := stream.read(PIECE_CHARS):
            rest += block
            cut = rest.rfind("\n") + 1
            if cut == 0 and len(rest) >= PIECE_CHARS:
                cut = len(rest)
            if cut:
                yield str(file), rest[:cut]
                rest = rest[cut:]
        if rest:
            yield str(file), rest


def rows_of_file(file: Path, field: str) -> Iterator[Row]:
    """The rows of a file, of plain text its pieces; `Broken` in place of the error with which a damaged file ends."""
    try:
        yield from READERS[kind_of_file(file) or ""](file, field)
    except Broken as broken:
        yield str(file), broken
    except (OSError, EOFError, UnicodeError, zlib.error, lzma.LZMAError, csv.Error, *_pyarrow_errors()) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        yield str(file), Broken("damaged file", f"cannot be read to its end ({reason})")


def _pyarrow_errors() -> tuple[type[Exception], ...]:
    """The errors of pyarrow, if that is what was used."""
    return (sys.modules["pyarrow"].ArrowException,) if "pyarrow" in sys.modules else ()


def _json_rows(file: Path, field: str) -> Iterator[Row]:
    with closing(open_text(file)) as stream:
        head = stream.read(PIECE_CHARS)
        begin = SPACE.match(head).end()  # pyright: ignore[reportOptionalMemberAccess]
        if head[begin : begin + 1] == "[" and not head[begin + 1 :].lstrip()[:1].isdigit():
            yield from _array_rows(file, head[begin + 1 :], stream)
        else:
            yield from _line_rows(file, head, stream, field)


def _line_rows(file: Path, head: str, stream: io.TextIOBase, field: str) -> Iterator[Row]:
    """One row per line; or, if the first line is no more than an opening brace, the whole file as one value."""
    lines = _lines(head, stream)
    first = next(lines)
    if first.strip() == "{":
        first, lines = first + "".join(lines), iter(())
    for number, line in enumerate(chain([first], lines), 1):
        if line := line.strip("\ufeff \t\r\n"):
            yield from _column_or_row(_parsed(line), field, f"{file}:{number}")


def _lines(head: str, stream: io.TextIOBase) -> Iterator[str]:
    """The lines of `head` and what follows it in the stream."""
    *whole, cut = head.split("\n")
    for line in whole:
        yield line + "\n"
    yield cut + stream.readline()
    yield from stream


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", "too deep")
        return Broken("not JSON", f"is not JSON ({reason}): write one object per line")


def _column_or_row(value: Any, field: str, place: str) -> Iterator[Row]:
    """An object may hold whole columns, as lists or, as pandas writes them, as objects."""
    column = value.get(field) if isinstance(value, dict) else None
    if isinstance(column, dict):
        column = list(column.values())
    if isinstance(column, list) and column and not is_id(column[0]) and not is_conversation(column):
        yield from ((place, row) for row in column)
    else:
        yield place, value


def _array_rows(file: Path, rest: str, stream: io.TextIOBase) -> Iterator[Row]:
    """The elements of an array one by one; what follows an element that is not JSON cannot be found again."""
    decoder, number, at, ended = json.JSONDecoder(), 1, 0, False
    while True:
        at = SPACE.match(rest, at).end()  # pyright: ignore[reportOptionalMemberAccess]
        if rest.startswith("]", at):
            return
        row, stop = _next_value(decoder, rest, at)
        if stop < len(rest) or ended:
            yield f"{file}, row {number}", row
            number, at = number + 1, stop
            if isinstance(row, Broken):
                return
        else:  # what is there may go on; twice as much each time, so that a long element is not looked at too often
            block = stream.read(max(PIECE_CHARS, len(rest) - at))
            rest, at, ended = rest[at:] + block, 0, not block


def _next_value(decoder: json.JSONDecoder, text: str, at: int) -> tuple[Any, int]:
    """The JSON value that begins at `at` and where it ends, or `Broken` and where that shows; the end of `text` if more
    of it may make it whole."""
    broken = Broken("not JSON", "is not JSON, and what follows in the file is lost")
    try:
        return decoder.raw_decode(text, at)
    except json.JSONDecodeError as error:
        cut = error.msg.startswith("Unterminated") or error.pos > len(text) - LONGEST_WORD
        return broken, len(text) if cut else error.pos
    except RecursionError:
        return broken, at


def _csv_rows(file: Path, field: str) -> Iterator[Row]:
    csv.field_size_limit(max(csv.field_size_limit(), 1 << 30))
    with closing(open_text(file, newline="")) as stream:
        tabs = ".tsv" in [suffix.lower() for suffix in file.suffixes]
        rows = csv.DictReader(stream, delimiter="\t" if tabs else ",")
        column = chosen_field(rows.fieldnames or [], field)
        while True:
            try:
                row: Any = {column: next(rows)[column]}
            except StopIteration:
                return
            except csv.Error as error:
                row = Broken("not CSV", f"is not CSV ({error})")
            yield f"{file}:{rows.line_num}", row


def _parquet_rows(file: Path, field: str) -> Iterator[Row]:
    import pyarrow.parquet as parquet

    with parquet.ParquetFile(file) as opened:
        column = chosen_field(list(opened.schema_arrow.names), field)
        batches = opened.iter_batches(batch_size=PARQUET_ROWS, columns=[column])
        values = (value for batch in batches for value in batch.column(0).to_pylist())
        for number, value in enumerate(values, 1):
            yield f"{file}, row {number}", {column: value}


READERS = {"plain": _plain_pieces, "json": _json_rows, "csv": _csv_rows, "parquet": _parquet_rows}

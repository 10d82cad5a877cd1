"""Every kind of text file, every packing, every encoding, and files that are damaged."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pandas
import pyarrow
import pytest
from test_documents import read

from apportion.language import text_files
from apportion.language.documents import FIRST_ROWS
from apportion.language.text import TextSource

DOCUMENTS = ['with "quotes", commas\nand\ttwo lines', "braces {[}] and \\ and é and 😀", "x" * 140_000, "end"]
FRAME = pandas.DataFrame({"number": range(4), "text": DOCUMENTS})
RECORDS = [{"number": i, "text": t} for i, t in enumerate(DOCUMENTS)]
LINES = "".join(json.dumps(r) + "\n" for r in RECORDS)

CONTENTS = {
    "a.jsonl": LINES,
    "a.ndjson": LINES.rstrip("\n"),
    "a.JSONL": LINES.replace("\n", "\r\n"),
    "lines.json": LINES,
    "array.json": json.dumps(RECORDS),
    "array.jsonl": json.dumps(RECORDS),
    "pretty.json": json.dumps(RECORDS, indent=2),
    "line-by-line.json": "[\n" + ",\n".join(map(json.dumps, RECORDS)) + "\n]\n",
    "raw.json": json.dumps(RECORDS, ensure_ascii=False),
    "strings.json": json.dumps(DOCUMENTS),
    "columns.json": json.dumps({"text": DOCUMENTS}),
    "pretty-columns.json": json.dumps({"text": DOCUMENTS}, indent=2),
    "pandas.json": FRAME.to_json(),
    "a.csv": FRAME.to_csv(),
    "a.tsv": FRAME.to_csv(sep="\t"),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_rows(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / name).write_text(CONTENTS[name], encoding="utf-8", newline="")
    for block in (text_files.PIECE_CHARS, 7):  # with the second every row lies across several blocks
        monkeypatch.setattr(text_files, "PIECE_CHARS", block)
        documents, reading = read(tmp_path / name)
        assert documents == DOCUMENTS and not reading.left_out()


def test_parquet_in_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FRAME.to_parquet(tmp_path / "a.PARQUET")
    pandas.DataFrame({"tokens": [[1, 2], [3]]}).to_parquet(tmp_path / "b.parquet")
    monkeypatch.setattr(text_files, "PARQUET_ROWS", 3)
    assert read(tmp_path)[0] == [*DOCUMENTS, [1, 2], [3]]
    with pytest.raises(ValueError, match=r"a\.PARQUET has no text in field 'body' \(it has: number, text\)"):
        read(tmp_path / "a.PARQUET", field="body")


def test_ids_in_lines(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("[1, 2]\n[30]\n")
    (tmp_path / "b.json").write_text("[[1, 2], [30]]")
    (tmp_path / "c.jsonl").write_text('{"input_ids": [1, 2]}\n{"input_ids": [30]}\n')
    for name in ("a.jsonl", "b.json", "c.jsonl"):
        assert read(tmp_path / name)[0] == read(tmp_path / name, field="input_ids")[0] == [[1, 2], [30]]


def zst(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


PACK = {
    ".gz": gzip.compress,
    ".bz2": partial(bz2.compress, compresslevel=1),
    ".xz": lzma.compress,
    ".zst": zst,
    ".GZ": gzip.compress,
}


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("name", ["a.jsonl", "array.json", "a.csv"])
def test_packed_files(suffix: str, name: str, tmp_path: Path) -> None:
    content = CONTENTS[name].encode()
    file = tmp_path / (name + suffix)
    file.write_bytes(PACK[suffix](content))
    assert read(file)[0] == DOCUMENTS
    if name == "a.jsonl":  # files of several parts, as parallel packers write them
        file.write_bytes(PACK[suffix](content) + PACK[suffix](content))
        assert read(file)[0] == DOCUMENTS * 2
    assert TextSource(file).num_bytes() == file.stat().st_size
    assert TextSource(file).most_tokens() is None  # it is not known how much is in there


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_packed_plain_text(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"A.TXT{suffix}"
    file.write_bytes(PACK.get(suffix, bytes)(b"plain\ntext\n"))
    assert read(file)[0] == ["plain\ntext\n"]


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_a_packed_file_that_was_cut_off_gives_what_is_there(suffix: str, tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": f"document {i * i * i} of many"}) + "\n" for i in range(20_000))
    file = tmp_path / f"a.jsonl{suffix}"
    file.write_bytes(PACK[suffix](lines.encode())[:-50])
    documents, reading = read(file)
    assert len(documents) > 1000 and documents[7] == "document 343 of many"
    assert reading.skipped["damaged file"] == 1 and reading.first["damaged file"] == str(file)


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz"])
def test_a_packed_file_that_is_damaged_gives_what_is_before(suffix: str, tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": f"document {i * i * i} of many"}) + "\n" for i in range(20_000))
    packed = bytearray(PACK[suffix](lines.encode()))
    middle = len(packed) * 2 // 3
    packed[middle : middle + 100] = b"\xff" * 100
    file = tmp_path / f"a.jsonl{suffix}"
    file.write_bytes(packed)
    documents, reading = read(file)
    assert len(documents) > 1000 and documents[7] == "document 343 of many"
    assert reading.skipped["damaged file"] == 1


def test_a_packed_file_whose_second_part_is_no_data(tmp_path: Path) -> None:
    part = gzip.compress(LINES.encode())
    (tmp_path / "a.jsonl.gz").write_bytes(part + part[:10] + b"\xff" * 100)  # behind the header nothing that unpacks
    documents, reading = read(tmp_path / "a.jsonl.gz")
    assert documents == DOCUMENTS and reading.skipped == {"damaged file": 1}


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl.gz", "a.txt.zst", "a.txt.xz"])
def test_a_file_that_is_something_else_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"this is not what the name says")
    with pytest.raises(ValueError, match=rf"{name} cannot be read to its end"):
        read(tmp_path / name)
    (tmp_path / "z.txt").write_text("good")
    documents, reading = read(tmp_path)
    assert documents == ["good"] and reading.skipped == {"damaged file": 1}


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "array.json", "a.csv"])
def test_encodings_with_a_mark(encoding: str, name: str, tmp_path: Path) -> None:
    content = CONTENTS.get(name, "plain é 😀")
    (tmp_path / name).write_text(content, encoding=encoding, newline="")
    assert read(tmp_path / name)[0] == (["plain é 😀"] if name == "a.txt" else DOCUMENTS)


def test_a_mark_between_lines_of_joined_files(tmp_path: Path) -> None:
    part = '{"text": "hello"}\n'.encode("utf-8-sig")
    (tmp_path / "a.jsonl").write_bytes(part + part)
    documents, reading = read(tmp_path / "a.jsonl")
    assert documents == ["hello", "hello"] and not reading.skipped


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_utf_16_without_a_mark_and_binary_files_are_named(name: str, tmp_path: Path) -> None:
    for content in ('{"text": "hello"}'.encode("utf-16-le"), bytes(1000)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name} is no UTF-8 text"):
            read(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", b"caf\xe9 au lait", "caf\ufffd au lait"),
        ("a.jsonl", b'{"text": "caf\xe9"}\n', "caf\ufffd"),
        ("a.csv", b"text\ncaf\xe9\n", "caf\ufffd"),
        ("a.jsonl", b'{"text": "half \\ud83d"}\n', "half \ufffd"),
    ],
)
def test_bytes_that_are_no_utf_8(name: str, content: bytes, expected: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    documents, reading = read(tmp_path / name)
    assert documents == [expected] and reading.repaired == {"not valid Unicode": 1}


def test_broken_lines_are_left_out(tmp_path: Path) -> None:
    lines = [
        '{"text": "one"}', '{"text": "cut of', "", "   ", "\0\0\0\0", "[" * 100_000, '{"story": "x"}',
        '{"text": "two"}',
    ]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    documents, reading = read(tmp_path / "a.jsonl")
    assert documents == ["one", "two"]
    assert reading.skipped == {"not JSON": 3, "no field 'text'": 1}
    assert reading.first == {"not JSON": f"{tmp_path}/a.jsonl:2", "no field 'text'": f"{tmp_path}/a.jsonl:7"}


@pytest.mark.parametrize("end", ['{"text" "three"}, {"text": "four"}]', '{"text": "thr', '{"text": "three"},', ""])
def test_an_array_that_is_broken_gives_what_is_before(end: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"text": "one"}, {"text": "two"}, ' + end)
    documents, reading = read(tmp_path / "a.json")
    assert documents[:2] == ["one", "two"] and "four" not in documents
    assert reading.skipped == {"not JSON": 1}


def test_a_broken_array_is_not_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.json").write_text('[{"text": "one"}, {"text" "two"}, ' + '{"text": "three"}, ' * 1000)
    monkeypatch.setattr(text_files, "PIECE_CHARS", 64)
    read_chars = 0

    class Counted(io.StringIO):
        def read(self, size: int | None = -1) -> str:
            nonlocal read_chars
            block = super().read(size)
            read_chars += len(block)
            return block

    monkeypatch.setattr(text_files, "open_text", lambda file: Counted(file.read_text()))
    assert read(tmp_path / "a.json")[0] == ["one"]
    assert read_chars < 500


def test_an_array_is_read_in_bounded_memory(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[" + ", ".join('{"text": "a few words"}' for _ in range(50_000)) + "]")
    longest = 0
    decode = json.JSONDecoder.raw_decode

    def watched(self: json.JSONDecoder, text: str, at: int = 0) -> Any:
        nonlocal longest
        longest = max(longest, len(text))
        return decode(self, text, at)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json.JSONDecoder, "raw_decode", watched)
        assert len(read(tmp_path / "a.json")[0]) == 50_000
    assert longest < 4 * text_files.PIECE_CHARS


def test_a_file_of_another_kind_in_a_folder_is_given_up_early(tmp_path: Path) -> None:
    (tmp_path / "a-metadata.csv").write_text("id,title\n" + "1,x\n" * 1000)
    (tmp_path / "b-other.jsonl").write_text('{"id": 1}\n' * 1000)
    (tmp_path / "c.txt").write_text("the text")
    documents, reading = read(tmp_path)
    assert documents == ["the text"]
    assert reading.skipped["no field 'text'"] == 1 + FIRST_ROWS
    assert reading.first[f"given up after {FIRST_ROWS} rows without a document"] == f"{tmp_path}/b-other.jsonl:100"


def test_line_ends_inside_a_cell_stay(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b'id,text\r\n1,"one\r\ntwo"\r\n')
    assert read(tmp_path / "a.csv")[0] == ["one\r\ntwo"]


def test_a_wide_table_may_have_rows_that_are_short_or_long(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,text\n1,one\n2\n3,three,more\n\n4,\n")
    documents, reading = read(tmp_path / "a.csv")
    assert documents == ["one", "three"]
    assert reading.skipped == {"null": 1, "empty": 1}
    assert reading.first["null"] == f"{tmp_path}/a.csv:3"


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl.zst"])
def test_what_is_not_installed_is_said_before_anything_is_read(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=rf"{name}' needs pyarrow, not installed here.*pip install pyarrow"):
        TextSource(tmp_path / name).files()


def test_how_many_tokens_a_text_can_have(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("four")
    assert TextSource(tmp_path / "a.txt").most_tokens() == 4
    assert TextSource(["four", None, {"text": "é"}, [1, 2, 3], "\ud83d"]).most_tokens() == 4 + 2 + 3 + 1
    FRAME.to_parquet(tmp_path / "b.parquet")
    assert TextSource(tmp_path).most_tokens() is None

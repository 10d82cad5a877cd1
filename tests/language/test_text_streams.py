"""Streams that fail: read on from the same row, or kept up to there."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest

from apportion.language import text_streams
from apportion.language.collect import collect
from apportion.language.documents import Reading
from apportion.language.model import load_model
from apportion.language.text import TextSource
from apportion.language.tokens import read_contexts


class Dropped(Exception):
    """What a transport raises; no OSError, no ValueError."""


class Rows:
    """Rows 0, 1, ...; at the rows `failing` it fails as often as it says there."""

    def __init__(self, failing: dict[int, int], begin: int = 0, num_rows: int = 30) -> None:
        self.failing, self.begin, self.num_rows = failing, begin, num_rows

    def skip(self, n: int) -> Rows:
        return Rows(self.failing, self.begin + n, self.num_rows)

    def __iter__(self) -> Iterator[dict[str, str]]:
        for i in range(self.begin, self.num_rows):
            if self.failing.get(i):
                self.failing[i] -= 1
                raise Dropped("connection reset")
            yield {"text": f"the cat sat on the mat and row {i} "}


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits, which take no time."""
    waited: list[float] = []
    monkeypatch.setattr(text_streams.time, "sleep", waited.append)
    return waited


ALWAYS = 1 << 30


def streamed(monkeypatch: pytest.MonkeyPatch, failing: dict[int, int]) -> TextSource:
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: Rows(failing))
    return TextSource("org/corpus")


@pytest.mark.parametrize("by_name", [True, False])
def test_a_stream_goes_on_where_it_failed(
    by_name: bool, monkeypatch: pytest.MonkeyPatch, waits: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    failing = {0: 1, 7: 2, 8: 4}
    source = streamed(monkeypatch, failing) if by_name else TextSource(Rows(failing))
    reading = Reading()
    texts = [piece.text for piece in source.pieces(reading)]
    assert texts == [row["text"] for row in Rows({})]
    assert waits == [1, 1, 5, 1, 5, 30, 120]  # it begins anew after each row that came
    assert reading.stopped is None
    assert "failed at row 8 (Dropped: connection reset); once more in 5 s" in caplog.text
    assert ("dataset 'org/corpus'" in caplog.text) == by_name


def test_rows_without_skip_are_counted_off(monkeypatch: pytest.MonkeyPatch, waits: list[float]) -> None:
    rows = Rows({5: 1})
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: (row for row in rows))
    assert [p.text for p in TextSource("org/corpus").pieces()] == [row["text"] for row in Rows({})]


def test_a_stream_that_fails_for_good_ends_there(
    monkeypatch: pytest.MonkeyPatch, waits: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    reading = Reading()
    texts = [piece.text for piece in streamed(monkeypatch, {12: ALWAYS}).pieces(reading)]
    assert texts == [row["text"] for row in Rows({}, num_rows=12)]
    assert reading.stopped == "dataset 'org/corpus' failed at row 13 (Dropped: connection reset)"
    assert len(waits) == 4


def test_a_generator_that_fails_ends_there_and_is_not_called_again(waits: list[float]) -> None:
    reading = Reading()
    texts = [piece.text for piece in TextSource(iter(Rows({3: 1}))).pieces(reading)]
    assert len(texts) == 3 and not waits
    assert reading.stopped == "the text failed at row 4 (Dropped: connection reset)"


def test_a_dataset_in_memory_is_no_stream(waits: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(Rows):
        def __len__(self) -> int:
            return 30

    with pytest.raises(Dropped):
        list(TextSource(Failing({3: 1})).pieces())
    assert not waits


def test_the_wrong_column_is_no_failure_of_the_stream(monkeypatch: pytest.MonkeyPatch, waits: list[float]) -> None:
    table = datasets.Dataset.from_dict({"story": ["a"]}).to_iterable_dataset()
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: table)
    with pytest.raises(ValueError, match=r"no text in field 'text' \(it has: story\)"):
        list(TextSource("org/corpus").pieces())
    assert not waits


def test_what_was_collected_before_a_stream_failed_is_kept(
    tiny_model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    waits: list[float],
    caplog: pytest.LogCaptureFixture,
) -> None:
    lm = load_model(tiny_model_dir)
    source = streamed(monkeypatch, {25: ALWAYS})
    manifest = collect(*lm, "model.layers.1", source, tokens=10_000, out=tmp_path / "acts", context_tokens=8)
    assert manifest["ended"] == "stream: dataset 'org/corpus' failed at row 26 (Dropped: connection reset)"
    assert manifest["text_ended_early"]
    assert json.loads((tmp_path / "acts" / "manifest.json").read_text()) == manifest
    whole = read_contexts(lm[1], [row["text"] for row in Rows({}, num_rows=25)], tokens=10_000, context_tokens=8)
    assert manifest["rows"] == whole.numel() > 100
    warned = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert any("as far as it came" in m and "org/corpus" in m for m in warned)


@pytest.mark.parametrize("row", [0, 1])
def test_before_the_first_context_it_is_one_error(
    row: int, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: list[float]
) -> None:
    source = streamed(monkeypatch, {row: ALWAYS})
    with pytest.raises(ValueError, match=rf"'org/corpus' failed at row {row + 1} \(Dropped.*try again later"):
        collect(
            *load_model(tiny_model_dir), "model.layers.1", source, tokens=99, out=tmp_path / "acts", context_tokens=32
        )
    assert not list(tmp_path.iterdir())


def test_a_dataset_that_cannot_be_opened_names_split_and_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def missing(*names: Any, **settings: Any) -> Any:
        asked.append((names, settings))
        raise RuntimeError("Config name is missing.\nPlease pick one")

    monkeypatch.setattr(datasets, "load_dataset", missing)
    with pytest.raises(ValueError, match=r"split 'test' and configuration 'v2' \(Config name is missing\.\)"):
        list(TextSource("org/corpus", split="test", config="v2").pieces())
    assert asked == [(("org/corpus", "v2"), {"split": "test", "streaming": True, "trust_remote_code": False})]

"""Several texts as one, each with its share of the tokens."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apportion.about import About, TextRecord
from apportion.cli import main
from apportion.evals.rows import same_text
from apportion.language import Mixture, TextSource, load_model, read_contexts
from apportion.language.collect import collect
from apportion.language.documents import Reading
from apportion.language.tokens import PackedContexts

SHORT = [f"the cat sat on {n}" for n in range(4000)]
LONG = ["she read a book about ships and the people who sailed them " * (1 + n % 40) for n in range(400)]


class Characters:
    """A tokenizer of which a token is `each` characters of a document of SHORT, and one of others."""

    eos_token_id = bos_token_id = None

    def __init__(self, each: int = 1) -> None:
        self.each = each

    def __call__(self, text: str, add_special_tokens: bool = False) -> dict[str, Any]:
        step = self.each if text.startswith("the cat") else 1
        return {"input_ids": [1 if step == self.each and text.startswith("the cat") else 2 for _ in text[::step]]}


def shares(mixture: Mixture, tokenizer: Any, tokens: int) -> tuple[float, PackedContexts]:
    """The share of the first text among the first tokens: its tokens are 1."""
    contexts = PackedContexts(tokenizer, mixture, 16)
    found = np.concatenate([block.flatten() for block, _ in zip(contexts, range(tokens), strict=False)])[:tokens]
    assert len(found) == tokens
    return float((found == 1).mean()), contexts


@pytest.mark.parametrize("weights", [(0.7, 0.3), (7, 3), (1, 1), (1, 9)])
@pytest.mark.parametrize("each", [1, 5])
def test_shares_are_of_tokens(weights: tuple[float, float], each: int) -> None:
    """However long documents and tokens are: those of one text have 14 or 3 tokens, those of the other 1,200."""
    mixture = Mixture(zip((SHORT, LONG), weights, strict=True))
    found, _ = shares(mixture, Characters(each), 8_000)
    expected = weights[0] / sum(weights)
    assert found == pytest.approx(expected, abs=0.12)
    assert shares(mixture, Characters(each), 8_000)[0] == found


def test_documents_are_whole_and_read_again_the_same(tiny_model_dir: Path) -> None:
    _, tokenizer = load_model(tiny_model_dir)
    mixture = Mixture([(SHORT, 2), (LONG, 1)])
    pieces = [piece.text for piece, _ in zip(mixture.pieces(), range(300), strict=False)]
    assert [text for text in pieces if text in set(SHORT)] == SHORT[: sum(text in set(SHORT) for text in pieces)]
    assert [text for text in pieces if text not in set(SHORT)] == LONG[: sum(text in LONG for text in pieces)]
    for tokens in (600, 2400):
        first = read_contexts(tokenizer, mixture, tokens=600, context_tokens=8)
        again = read_contexts(tokenizer, mixture, tokens=tokens, context_tokens=8)
        assert np.array_equal(first, again[: len(first)])


def test_documents_of_several_pieces_stay_together() -> None:
    long = ["\n".join(["x" * 999] * 200), "y" * 70_000]
    pieces = list(Mixture([(long, 1), (["a" * 100, "b" * 100_000, "c" * 100_000, "d" * 100_000], 1)]).pieces())
    begun = [piece.text[0] for piece in pieces if piece.first]
    assert begun == ["x", "a", "b", "c", "y", "d"][: len(begun)] and len(begun) >= 5
    last = ""
    for piece in pieces:
        assert piece.first or piece.text[0] in (last, "\n")
        last = piece.text[0]


def test_token_ids_count_as_they_are() -> None:
    ids = [[1] * 10] * 300
    found, _ = shares(Mixture([(ids, 1), (LONG, 3)]), Characters(), 3_000)
    assert found == pytest.approx(0.25, abs=0.1)


def test_it_ends_with_the_text_whose_turn_it_is(caplog: pytest.LogCaptureFixture) -> None:
    mixture = Mixture([(["a" * 100] * 3, 0.5), (["b" * 100] * 50, 0.5)])
    reading = Reading()
    with caplog.at_level(logging.WARNING, logger="apportion"):
        texts = [piece.text[0] for piece in mixture.pieces(reading)]
    assert texts == ["a", "b"] * 3 and reading.documents == 6
    assert "ends with the text '3 documents in memory', which has no more" in caplog.text


def test_a_stream_that_fails_ends_it_and_is_said() -> None:
    def failing() -> Iterator[str]:
        yield from ["one", "two"]
        raise OSError("connection reset")

    reading = Reading()
    list(Mixture([(failing(), 1), (SHORT, 1)]).pieces(reading))
    assert reading.stopped is not None and "connection reset" in reading.stopped


def test_what_is_left_out_is_counted_together(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\nnothing\n{"text": "two"}\n{"text": "three"}\n')
    reading = Reading()
    texts = [
        piece.text for piece in Mixture([(tmp_path / "a.jsonl", 1), (["", "x", "half \ud83d"], 1)]).pieces(reading)
    ]
    assert texts == ["one", "x", "half \ufffd", "two", "three"]
    assert reading.skipped["not JSON"] == 1 and reading.skipped["empty"] == 1 and reading.repaired
    assert reading.documents == len(texts)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ([(SHORT, 1)], "of two texts or more, got 1"),
        ([(SHORT, 1), (LONG, 0)], "has weight 0 in the mixture"),
        ([(SHORT, float("nan")), (LONG, 1)], "has weight nan"),
        ([(SHORT, 1), (Mixture([(SHORT, 1), (LONG, 1)]), 1)], "holds a mixture"),
        ([(SHORT, 1), ({"train": SHORT}, 1)], "the text is a dict"),
    ],
)
def test_mistakes(parts: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Mixture(parts)


def test_an_empty_part_is_said_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(ValueError, match=r"a\.txt' is empty"):
        Mixture([(tmp_path / "a.txt", 1), (SHORT, 1)]).check()


def test_settings_are_for_texts_without_their_own() -> None:
    rows = [{"a": "one", "b": "two"}] * 3
    mixture = Mixture([(rows, 1), (TextSource(rows, field="b"), 1)], field="a")
    assert [piece.text for piece in mixture.pieces()][:2] == ["one", "two"]


def test_sizes_are_sums(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc")
    mixture = Mixture([(tmp_path / "a.txt", 1), (["de"], 1)])
    assert (mixture.num_bytes(), mixture.most_tokens()) == (5, 5)
    assert Mixture([(iter(SHORT), 1), (["de"], 1)]).most_tokens() is None


def test_the_record_says_parts_and_shares(tiny_model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the cat sat on the mat and looked at the dog " * 60)
    model, tokenizer = load_model(tiny_model_dir)
    mixture = Mixture([(tmp_path / "a.txt", 3), (SHORT, 1)])
    out = tmp_path / "acts"
    manifest = collect(model, tokenizer, "model.layers.1", mixture, tokens=160, context_tokens=8, out=out)
    text = About.from_json(json.loads((out / "manifest.json").read_text())).lm.text
    assert manifest["text"]["parts"][0] == {"where": str(tmp_path / "a.txt"), "files": 1, "bytes": 2700, "share": 0.75}
    assert (
        text == mixture.describe() and text.in_words() == f"{tmp_path / 'a.txt'} (75%), 4,000 documents in memory (25%)"
    )
    one = TextSource(tmp_path / "a.txt").describe()
    assert same_text(one, text) and same_text(text, one) and same_text(text, text)
    assert not same_text(text, TextRecord(where="b.txt", bytes=2700, files=1))
    longer = collect(model, tokenizer, "model.layers.1", mixture, tokens=320, context_tokens=8, out=out, append=True)
    assert longer["rows"] == 320


def test_the_command_mixes(tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd = tmp_path / "a:0.7.txt"
    odd.write_text("the cat sat on the mat and looked at the dog " * 60)
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in SHORT))
    options = ["collect", str(tiny_model_dir), "--hookpoint", "model.layers.1", "--tokens", "160",
               "--context-tokens", "8", "--text", str(odd), "--text", str(tmp_path / "b.jsonl"),
               "--out", str(tmp_path / "acts")]  # fmt: skip
    assert main([*options, "--weights", "0.6"]) == 2
    assert "--weights 0.6 are not the weights of" in capsys.readouterr().err
    assert main([*options, "--weights", "0.6", "0.2"]) == 0
    text = json.loads((tmp_path / "acts" / "manifest.json").read_text())["text"]
    assert [(part["where"], part["share"]) for part in text["parts"]] == [
        (str(odd), 0.75),
        (str(tmp_path / "b.jsonl"), 0.25),
    ]

"""A collection that was interrupted, killed or is to become longer: it goes on, to the same bytes as in one piece."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from apportion.cli import main
from apportion.interrupt import Interrupted
from apportion.language import collect as collect_module
from apportion.language.collect import collect, is_collected
from apportion.language.model import load_model
from apportion.rows import writer as writer_module
from apportion.rows.filter import TokenFilter
from apportion.rows.store import ActivationStore

TEXT = ["the cat sat on the mat and looked at the dog by the sea " * 12, "she read a book about ships " * 40]
NAMES = ["model.layers.1", "model.layers.0.mlp:in"]
SHARD = 48
"""Rows of a shard, two batches of three contexts; 57 were allowed."""
LATER = " ".join("book" if number == 43 else word for number, word in enumerate(TEXT[0].split()))
"""Another word in row 50, in the second shard: every context begins with BOS."""


@pytest.fixture(scope="module")
def lm(tiny_model_dir: Path) -> tuple[Any, Any]:
    return load_model(tiny_model_dir)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "SHARD_ROWS", 57)


def tiny(lm: tuple[Any, Any], out: Path, **settings: Any) -> dict[str, Any]:
    how = {"tokens": 200, "context_tokens": 8, "batch_contexts": 3, "hookpoints": NAMES, "text": TEXT} | settings
    return collect(*lm, how.pop("hookpoints"), how.pop("text"), out=out, **how)


def content(folder: Path) -> dict[str, Any]:
    """Digests of all files; of the manifest what it says, save how long it took."""
    found: dict[str, Any] = {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
    times = dict.fromkeys(("seconds", "tokens_per_s", "manifest_sha256"))
    return found | {"manifest.json": json.loads((folder / "manifest.json").read_text()) | times}


class Stop(Exception):
    pass


def stopped(monkeypatch: pytest.MonkeyPatch, at: int, how: Any) -> None:
    """At the `at`-th batch (from 1) something comes between."""
    run, calls = collect_module.run_contexts, 0

    def wrapped(*args: Any, **settings: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at + 1:  # the first call finds the widths
            how()
        return run(*args, **settings)

    monkeypatch.setattr(collect_module, "run_contexts", wrapped)


def fail() -> None:
    raise Stop


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("how", [fail, interrupt])
@pytest.mark.parametrize("at", [2, 3, 4, 8, 9])
def test_what_was_stopped_goes_on(how: Any, at: int, lm: tuple[Any, Any], tmp_path: Path) -> None:
    """A failure keeps whole shards, a Ctrl-C all contexts."""
    tiny(lm, tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        stopped(patch, at, how)
        with pytest.raises((Stop, Interrupted)):
            tiny(lm, tmp_path / "acts")
    rows = 24 * (at - 1)
    kept = rows if how is interrupt else rows // SHARD * SHARD
    if kept:
        store = ActivationStore(tmp_path / "acts", NAMES[0])
        store.verify()
        assert store.rows == kept and store.manifest["ended"] == ("interrupted" if how is interrupt else "unfinished")
        assert not is_collected(tmp_path / "acts")
    else:
        assert not (tmp_path / "acts").exists()
    calls: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        run = collect_module.run_contexts
        patch.setattr(collect_module, "run_contexts", lambda *a, **s: (calls.append(1), run(*a, **s))[1])
        tiny(lm, tmp_path / "acts")
    assert len(calls) == 1 + 9 - kept // 24, "only what is missing is computed"
    assert content(tmp_path / "acts") == content(tmp_path / "whole")
    assert is_collected(tmp_path / "acts")


@pytest.mark.parametrize("steps", [[120], [8], [100, 101], [74, 148], [40, 80, 120, 160]])
def test_appending_gives_the_bytes_of_one_collection(steps: list[int], lm: tuple[Any, Any], tmp_path: Path) -> None:
    """Wherever the steps end: within a shard, within a batch, within a context."""
    tiny(lm, tmp_path / "whole")
    for i, tokens in enumerate(steps):
        tiny(lm, tmp_path / "acts", tokens=tokens, append=i > 0)
    tiny(lm, tmp_path / "acts", append=True)
    assert content(tmp_path / "acts") == content(tmp_path / "whole")


def test_a_text_that_has_grown_is_appended(lm: tuple[Any, Any], tmp_path: Path) -> None:
    tiny(lm, tmp_path / "whole", text=[*TEXT, TEXT[0]], tokens=10**6)
    first = tiny(lm, tmp_path / "acts", tokens=10**6)
    assert first["ended"] == "text"
    tiny(lm, tmp_path / "acts", text=[*TEXT, TEXT[0]], tokens=10**6, append=True)
    found, wanted = content(tmp_path / "acts"), content(tmp_path / "whole")
    assert found == wanted and found["manifest.json"]["rows"] > first["rows"]


def test_a_text_that_has_become_shorter_is_another(lm: tuple[Any, Any], tmp_path: Path) -> None:
    tiny(lm, tmp_path / "acts", tokens=10**6)
    before = content(tmp_path / "acts")
    with pytest.raises(ValueError, match=r"the text is not the one.*it ends after \d+ tokens"):
        tiny(lm, tmp_path / "acts", text=TEXT[:1], tokens=10**6, append=True)
    assert content(tmp_path / "acts") == before


def test_the_model_always_takes_as_many_contexts(lm: tuple[Any, Any], tmp_path: Path) -> None:
    """On their number rounding depends, which does not show in models that are small."""
    taken: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        run = collect_module.run_contexts
        noted = lambda m, n, ids, **s: (taken.append(len(ids)), run(m, n, ids, **s))[1]  # noqa: E731
        patch.setattr(collect_module, "run_contexts", noted)
        tiny(lm, tmp_path / "acts", tokens=80)
        tiny(lm, tmp_path / "acts", append=True)
    assert [n for n in taken if n != 2] == [3] * (4 + 6) and taken.count(2) == 2  # the first of each finds the widths


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "dtype": ({"dtype": "float32"}, "dtype = bfloat16, and not float32"),
    "contexts": ({"context_tokens": 16}, "context_tokens = 8, and not 16"),
    "batches": ({"batch_contexts": 4}, "batch_contexts = 3, and not 4"),
    "hookpoints": ({"hookpoints": NAMES[:1]}, "hookpoints = "),
    "bos": ({"bos": "never"}, "bos = auto, and not never"),
    "filter": ({"token_filter": TokenFilter(norm_outlier=5)}, "filter = "),
    "text": ({"text": TEXT[::-1]}, "the text is not the one that"),
    "text, later": ({"text": [LATER, TEXT[1]]}, "its tokens differ in contexts 6 to 8"),
    "fewer tokens": ({"tokens": 24}, "with 72 tokens, and 24 are asked for"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_going_on_with_something_else_is_refused(other: str, lm: tuple[Any, Any], tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stopped(patch, 4, interrupt)
        with pytest.raises(Interrupted):
            tiny(lm, tmp_path / "acts")
    before = content(tmp_path / "acts")
    settings, message = OTHERS[other]
    with pytest.raises(ValueError, match=message):
        tiny(lm, tmp_path / "acts", **settings)
    assert content(tmp_path / "acts") == before


def test_going_on_with_another_model_is_refused(lm: tuple[Any, Any], tiny_model_dir: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stopped(patch, 3, interrupt)
        with pytest.raises(Interrupted):
            tiny(lm, tmp_path / "acts")
    model, tokenizer = load_model(tiny_model_dir)
    with torch.no_grad():
        next(model.parameters()).mul_(1.5)
    with pytest.raises(ValueError, match="begun with model = "):
        tiny((model, tokenizer), tmp_path / "acts")


def test_a_complete_cache_is_not_collected_again(lm: tuple[Any, Any], tmp_path: Path) -> None:
    tiny(lm, tmp_path / "acts")
    before = content(tmp_path / "acts")
    with pytest.raises(ValueError, match=r"exists already.*append"):
        tiny(lm, tmp_path / "acts", tokens=300)
    assert tiny(lm, tmp_path / "acts", append=True)["rows"] == 200
    assert content(tmp_path / "acts") == before


def test_a_cache_without_a_shard_says_so(lm: tuple[Any, Any], tmp_path: Path) -> None:
    def look() -> None:
        with pytest.raises(ValueError, match="has no rows yet"):
            ActivationStore(tmp_path / "acts", NAMES[0])
        raise Stop

    with pytest.MonkeyPatch.context() as patch:
        stopped(patch, 1, look)
        with pytest.raises(Stop):
            tiny(lm, tmp_path / "acts")


def test_the_command_goes_on(tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("\n".join(TEXT))
    words = ["collect", str(tiny_model_dir), "--hookpoint", NAMES[0], "--text", str(tmp_path / "text.txt")]
    words += ["--context-tokens", "8", "--out", str(tmp_path / "acts"), "--tokens"]
    with pytest.MonkeyPatch.context() as patch:
        stopped(patch, 2, interrupt)
        assert main([*words, "200"]) == 130
    assert "To go on, collect again with the same settings" in capsys.readouterr().out
    assert main([*words, "200"]) == 0
    assert main([*words, "240"]) == 2
    assert main([*words, "240", "--append"]) == 0
    assert ActivationStore(tmp_path / "acts").rows == 240

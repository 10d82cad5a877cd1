"""Conversations become text through the chat template of the tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apportion.cli import main
from apportion.language import Mixture, TextSource, load_model
from apportion.language.documents import Broken, document_in
from apportion.language.tokens import PackedContexts

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{{ m.role + ' ' + m.content + ' </s>' }}\n{% endfor %}"
)
CHAT = [
    {"role": "user", "content": "the cat sat on the mat"},
    {"role": "assistant", "content": "and looked at the dog"},
]
SYSTEM = [{"role": "system", "content": "she read a book"}, *CHAT]


@pytest.fixture
def tokenizer(tiny_model_dir: Path) -> Any:
    tokenizer = load_model(tiny_model_dir)[1]
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def ids_of(tokenizer: Any, text: Any) -> tuple[list[int], PackedContexts]:
    contexts = PackedContexts(tokenizer, text, 1, bos="never")
    return np.concatenate(list(contexts)).flatten().tolist(), contexts


def expected(tokenizer: Any, *chats: Any) -> list[int]:
    text = "".join(f"{m['role']} {m['content']} </s>\n" for chat in chats for m in chat)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_the_template_writes_conversations(tokenizer: Any) -> None:
    """Its own end is the end of the document: there is no second one."""
    found, contexts = ids_of(tokenizer, [{"messages": CHAT}, {"messages": CHAT[:1]}, {"messages": CHAT}])
    assert found == expected(tokenizer, CHAT, CHAT[:1], CHAT) and contexts.reading.documents == 3
    assert found.count(tokenizer.eos_token_id) == 5


def test_an_end_is_put_between_where_the_template_has_none(tokenizer: Any) -> None:
    tokenizer.chat_template = "{% for m in messages %}{{ m.content + ' ' }}{% endfor %}"
    found, _ = ids_of(tokenizer, [CHAT, CHAT, "the cat"])
    assert found.count(tokenizer.eos_token_id) == 2
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %} </s> the"  # as others a newline
    found, _ = ids_of(tokenizer, [CHAT, CHAT, "the cat"])
    assert found.count(tokenizer.eos_token_id) == 2


@pytest.mark.parametrize("kind", ["lines", "array", "columns", "parquet", "saved", "rows", "tuples", "field"])
def test_wherever_they_stand(kind: str, tokenizer: Any, tmp_path: Path) -> None:
    rows: list[Any] = [{"id": n, "messages": CHAT} for n in range(3)]
    text: Any = tmp_path / "chats.jsonl"
    if kind == "lines":
        text.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "array":
        text.write_text(json.dumps(rows))
    elif kind == "columns":
        text = TextSource(text, field="messages")
        text.where.write_text(json.dumps({"messages": [CHAT] * 3}))
    elif kind in ("parquet", "saved"):
        datasets = pytest.importorskip("datasets")
        text = tmp_path / f"chats.{kind}"
        data = datasets.Dataset.from_list(rows)
        data.to_parquet(text) if kind == "parquet" else data.save_to_disk(text)
    elif kind == "field":
        text.write_text("".join(json.dumps({"text": "no", "talk": CHAT}) + "\n" for _ in rows))
        text = TextSource(text, field="talk")
    else:
        text = rows if kind == "rows" else [tuple(CHAT)] * 3
    assert ids_of(tokenizer, text)[0] == expected(tokenizer, CHAT, CHAT, CHAT)


def test_what_the_template_does_not_take_is_left_out(tokenizer: Any) -> None:
    found, contexts = ids_of(tokenizer, [CHAT, SYSTEM, CHAT, [{"role": "user"}], []])
    assert found == expected(tokenizer, CHAT, CHAT) and contexts.reading.documents == 2
    skipped = {"refused by the chat template": 1, "neither text nor token ids": 1, "empty": 1}
    assert dict(contexts.reading.skipped) == skipped
    with pytest.raises(ValueError, match=r"document 1 is refused by the chat template \(TemplateError: no system\)"):
        list(PackedContexts(tokenizer, [SYSTEM] * 100, 8))


def test_a_tokenizer_without_a_template(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": CHAT}) + "\n")
    words = ["collect", str(tiny_model_dir), "--hookpoint", "model.layers.1", "--text", str(tmp_path / "chats.jsonl")]
    assert main([*words, "--context-tokens", "8", "--out", str(tmp_path / "acts")]) == 2
    error = capsys.readouterr().err
    assert f"{tiny_model_dir} has no chat template: use the chat version" in error and error.count("\n") == 1
    assert not (tmp_path / "acts").exists()
    with pytest.raises(ValueError, match="there is no tokenizer"):
        list(PackedContexts(None, [CHAT], 8))


@pytest.mark.parametrize("value", [[{"role": "user"}], [{"content": "x"}], [{"role": 1, "content": "x"}], ["x"]])
def test_what_is_no_conversation(value: Any) -> None:
    with pytest.raises(Broken):
        document_in({"messages": value}, "text")


def test_in_a_mixture(tokenizer: Any) -> None:
    texts = [" ".join(["sea"] * 9)] * 200
    found, _ = ids_of(tokenizer, Mixture([([CHAT] * 50, 1), (texts, 1)]))
    sea = tokenizer("sea", add_special_tokens=False)["input_ids"][0]
    share = found[:400].count(sea) / 400
    assert 0.35 < share < 0.65

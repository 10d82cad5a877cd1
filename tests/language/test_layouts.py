"""Documents that do not see each other: what lies in contexts, that rows are those of a document alone, and caches."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import FAMILIES, make
from torch import Tensor

from apportion.architectures import create
from apportion.cli import main
from apportion.evals.language_model import CrossEntropies, evaluate_cache_in_model, evaluate_model, token_losses
from apportion.interrupt import Interrupted
from apportion.language import ContextSource, LiveSource, load_model, read_contexts
from apportion.language.chats import spoken_by
from apportion.language.collect import collect
from apportion.language.document_layout import Layout, are_rows, labels_of, num_rows
from apportion.language.documents import Broken
from apportion.language.filling import Filling, Part, given
from apportion.language.model import run_contexts
from apportion.rows import ActivationStore, TokenFilter

EVERY = TokenFilter(special_tokens=False, first_position=False, norm_outlier=None)
PLACE = "model.layers.1"
APART = [Layout(attention="documents"), Layout("documents"), Layout("documents", padding="left")]
NAMES = ["packed", "right", "left"]
DOCUMENTS = [[5, 9, 12], [7, 8], [20, 21, 22, 23, 24, 25, 26, 27, 28], [30], [31, 32, 33, 34, 35], [40, 41, 42, 43]]


def filled(documents: list[list[int]], layout: Layout, size: int, bos: int | None, eos: int | None) -> Tensor:
    parts = (Part(np.asarray(ids), None, True, True) for ids in documents)
    return torch.from_numpy(np.concatenate(list(Filling(layout, size, bos, eos).contexts(parts))))


def naively_packed(
    documents: list[list[int]], size: int, bos: int | None, eos: int | None
) -> list[list[tuple[int, int]]]:
    """Token by token: (id, position)."""
    stream: list[tuple[int, bool]] = []
    for number, ids in enumerate(documents):
        if number and eos is not None:
            stream.append((eos, False))
        stream += [] if bos is None else [(bos, True)]
        stream += [(token, bos is None and place == 0) for place, token in enumerate(ids)]
    contexts: list[list[tuple[int, int]]] = []
    now: list[tuple[int, int]] = []
    at = 0
    for token, begins in stream:
        if begins:
            at = 0
        if not now:
            at = 0
            if bos is not None and not begins:
                now, at = [(bos, 0)], 1
        now.append((token, at))
        at += 1
        if len(now) == size:
            contexts, now = [*contexts, now], []
    return contexts


@pytest.mark.parametrize("eos", [None, 1])
@pytest.mark.parametrize("bos", [None, 2])
@pytest.mark.parametrize("size", [2, 3, 5, 7, 40])
def test_packed_contexts_are_those_of_a_naive_packer(size: int, bos: int | None, eos: int | None) -> None:
    documents = DOCUMENTS * 4
    found = filled(documents, Layout(attention="documents"), size, bos, eos)
    wanted = torch.tensor(naively_packed(documents, size, bos, eos))
    assert torch.equal(found[:, :2].long(), wanted.transpose(1, 2)) and bool((found[:, 2] == 1).all())


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("bos", [None, 2])
def test_one_document_each(bos: int | None, padding: str) -> None:
    found = filled(DOCUMENTS, Layout("documents", padding=padding), 6, bos, 1)
    body, contexts = 6 - (bos is not None), []
    for ids in DOCUMENTS:
        for start in range(0, len(ids), body):
            own = ([] if bos is None else [bos]) + ids[start : start + body]
            fill = 6 - len(own)
            pads = ([1] * fill, [-1] * fill, [0] * fill)
            sides = (own, list(range(len(own))), [1] * len(own))
            contexts.append([p + s if padding == "left" else s + p for p, s in zip(pads, sides, strict=True)])
    assert found.tolist() == contexts


def test_contexts_given_begin_documents_behind_eos() -> None:
    ids = np.array([[4, 1, 5, 6, 1, 7], [4, 5, 6, 7, 8, 1]])
    assert given(ids, Layout(attention="documents"), 1)[:, 1].tolist() == [[0, 1, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5]]
    assert given(ids, Layout("documents"), 1)[:, 1].tolist() == [[0, 1, 2, 3, 4, 5]] * 2
    with pytest.raises(ValueError, match="leave roles out"):
        given(ids, Layout(roles=("user",)), 1)


def test_layouts_that_there_are_not() -> None:
    for name in ("contexts", "attention", "padding"):
        with pytest.raises(ValueError, match=f"{name}='up' is not known: use"):
            Layout(**{name: "up"})
    for layout in (Layout(), *APART, Layout(roles=("user", "assistant"))):
        assert Layout.from_json(layout.to_json()) == layout


KEPT_APART = ["llama", "gpt2", "gpt_neox", "gemma3", "qwen3", "phi", "mistral", "olmoe", "opt", "falcon"]


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("layout", APART, ids=NAMES)
@pytest.mark.parametrize("family", KEPT_APART)
def test_rows_are_those_of_documents_alone(family: str, layout: Layout, use_cache: bool) -> None:
    """Above all else what this is for; mixing shows as rows that are far from those."""
    model, block = make(family), FAMILIES[family].block
    model.config.use_cache = use_cache
    names = [block, block.replace(".1", ".2")]
    contexts = filled(DOCUMENTS, layout, 12, None, None)
    rows = run_contexts(model, names, contexts, layout=layout)
    tokens, positions, _ = labels_of(contexts)
    begins = [*(positions == 0).nonzero().flatten().tolist(), len(positions)]
    for name in names:
        assert len(rows[name]) == num_rows(contexts) == len(tokens)
        for start, stop in pairwise(begins):
            alone = run_contexts(model, [name], tokens[None, start:stop])[name]
            torch.testing.assert_close(rows[name][start:stop], alone, rtol=2e-4, atol=2e-4 * float(alone.abs().max()))
    together = run_contexts(model, names, contexts[:, 0])[names[1]]
    if layout == APART[0]:
        assert not torch.allclose(together, rows[names[1]], rtol=1e-2), "attention to all is another thing"


@pytest.mark.parametrize("family", ["bloom", "mpt"])
def test_padded_rows_of_models_with_linear_biases(family: str) -> None:
    model, block = make(family), FAMILIES[family].block
    for layout in APART[1:]:
        contexts = filled(DOCUMENTS, layout, 12, None, None)
        rows = run_contexts(model, [block], contexts, layout=layout)[block]
        tokens, positions, _ = labels_of(contexts)
        begins = [*(positions == 0).nonzero().flatten().tolist(), len(positions)]
        for start, stop in pairwise(begins):
            alone = run_contexts(model, [block], tokens[None, start:stop])[block]
            torch.testing.assert_close(rows[start:stop], alone, rtol=2e-4, atol=2e-4 * float(alone.abs().max()))


def test_a_model_that_mixes_them_is_refused() -> None:
    model = make("mamba")
    contexts = filled(DOCUMENTS, APART[0], 12, None, None)
    with pytest.raises(ValueError, match=r"MambaForCausalLM does not keep documents apart .*attention='all'"):
        run_contexts(model, [FAMILIES["mamba"].block], contexts, layout=APART[0])


@pytest.fixture(scope="module")
def lm(tiny_model_dir: Path) -> tuple[Any, Any]:
    return load_model(tiny_model_dir)


TEXT = [
    "the cat sat on the mat",
    "a dog",
    "the old house by the sea was calm and the cat looked at the dog and the mat",
    "the sea",
    "the dog looked at the cat on the old mat by the house",
] * 12


def content(folder: Path) -> dict[str, str]:
    """Digests of all files but for times."""
    files = sorted(folder.rglob("*.safetensors"))
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def collected(lm: Any, out: Path, layout: Layout, tokens: int = 10**6, **more: Any) -> dict[str, Any]:
    settings = {"context_tokens": 8, "batch_contexts": 4, "dtype": "float32", "token_filter": EVERY}
    return collect(*lm, PLACE, TEXT, out=out, tokens=tokens, layout=layout, **settings | more)


@pytest.mark.parametrize("layout", APART, ids=NAMES)
def test_a_cache_has_the_rows_of_documents_alone(layout: Layout, lm: Any, tmp_path: Path) -> None:
    manifest = collected(lm, tmp_path / "acts", layout)
    store = ActivationStore(tmp_path / "acts")
    assert store.describe().lm.layout == layout.to_json() and manifest["rows"] == store.rows
    assert bool(store.mask.all()) and int(store.positions.min()) == 0
    if layout.padded:
        alone = [[1, *lm[1](text, add_special_tokens=False)["input_ids"]] for text in TEXT]
        first = [ids for ids in alone if len(ids) <= 8]
        for ids in first[:3]:
            x = run_contexts(lm[0], [PLACE], torch.tensor([ids]))[PLACE]
            at = next(i for i in range(store.rows) if store.tokens[i : i + len(ids)].tolist() == ids)
            torch.testing.assert_close(store.gather(torch.arange(at, at + len(ids))), x, rtol=1e-4, atol=1e-5)
            assert store.positions[at : at + len(ids)].tolist() == list(range(len(ids)))
        assert len(store.contexts.unique()) == manifest["contexts"] > len(TEXT)
        assert manifest["rows"] == sum(len(ids) + (len(ids) - 2) // 7 for ids in alone)
    else:
        assert manifest["rows"] == 8 * manifest["contexts"] and int((store.positions == 0).sum()) > len(TEXT) - 3


@pytest.mark.parametrize("layout", [*APART, Layout("documents", roles=())], ids=[*NAMES, "again"])
def test_appended_and_interrupted_caches_are_those_in_one_piece(
    layout: Layout, lm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("apportion.rows.writer.SHARD_BYTES", 12 * 8 * 32 * 4)
    collected(lm, tmp_path / "whole", layout)
    assert len(content(tmp_path / "whole")) > 4
    for tokens in (61, 200, 10**6):
        collected(lm, tmp_path / "appended", layout, tokens, append=(tmp_path / "appended").exists())
    assert content(tmp_path / "appended") == content(tmp_path / "whole")
    ran, calls = run_contexts, 0

    def stopping(*args: Any, **more: Any) -> Any:
        nonlocal calls
        if (calls := calls + 1) == 9:
            os.kill(os.getpid(), signal.SIGINT)
        return ran(*args, **more)

    with monkeypatch.context() as patch:
        patch.setattr("apportion.language.collect.run_contexts", stopping)
        with pytest.raises(Interrupted):
            collected(lm, tmp_path / "stopped", layout)
    assert 0 < len(content(tmp_path / "stopped")) < len(content(tmp_path / "whole"))
    collected(lm, tmp_path / "stopped", layout)
    assert content(tmp_path / "stopped") == content(tmp_path / "whole")
    with pytest.raises(ValueError, match="layout"):
        collected(lm, tmp_path / "whole", Layout(), 10**6 + 1, append=True)


@pytest.mark.parametrize("layout", APART, ids=NAMES)
def test_live_rows_are_those_of_the_cache(layout: Layout, lm: Any, tmp_path: Path) -> None:
    collected(lm, tmp_path / "acts", layout)
    store = ActivationStore(tmp_path / "acts")
    contexts = read_contexts(lm[1], TEXT, tokens=10**6, context_tokens=8, layout=layout)
    source = LiveSource(
        *lm, PLACE, contexts, batch_contexts=4, buffer_tokens=64, token_filter=EVERY, held_out_share=0.0, layout=layout
    )
    rows, _ = source._filtered_rows(source._train)
    assert rows.tokens is not None and rows.positions is not None and source.num_rows == store.rows == len(rows)
    assert torch.equal(rows.tokens, store.tokens) and torch.equal(rows.positions, store.positions)
    torch.testing.assert_close(rows.x, store.gather(torch.arange(store.rows)), rtol=1e-4, atol=1e-5)
    assert source.describe().lm.layout == layout.to_json()
    with pytest.raises(ValueError, match="whole contexts are packed"):
        ContextSource(*lm, PLACE, contexts, layout=layout)


# Roles

CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "the cat and the dog"},
    {"role": "assistant", "content": "sat on the mat"},
    {"role": "user", "content": "user"},
    {"role": "assistant", "content": "the cat and the dog "},
]
PLAIN = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'].strip() }} </s> {% endfor %}"
MARKED = (
    "{% for m in messages %}<{{ m['role'] }}> {% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }} </s>"
    "{% endgeneration %}{% else %}{{ m['content'] }} </s>{% endif %} {% endfor %}"
)


class Letters:
    """A tokenizer of characters, with a template; fast ones say where tokens lie."""

    eos_token_id, bos_token_id, pad_token_id, name_or_path = 3, None, 0, "letters"

    def __init__(self, template: str = PLAIN, fast: bool = True) -> None:
        self.chat_template, self.fast = template, fast

    def __call__(self, text: Any, add_special_tokens: bool = True, **more: Any) -> dict[str, Any]:
        if more.get("return_offsets_mapping"):
            if not self.fast:
                raise NotImplementedError
            return {"input_ids": [ord(c) for c in text], "offset_mapping": [(i, i + 1) for i in range(len(text))]}
        return {"input_ids": [ord(c) for c in text]}

    def apply_chat_template(self, messages: Any, tokenize: bool = True, **more: Any) -> Any:
        from jinja2 import Environment

        assert not tokenize
        return Environment().from_string(self.chat_template).render(messages=messages)


def said_by(tokenizer: Any, messages: Any, *roles: str) -> str:
    ids, spoken = spoken_by(tokenizer, messages, roles)
    return "".join(chr(i) if said else "_" for i, said in zip(ids, spoken, strict=True)).replace("_", "")


def test_who_says_what() -> None:
    assert said_by(Letters(), CHAT, "assistant") == "sat on the matthe cat and the dog"
    assert said_by(Letters(), CHAT, "user") == "the cat and the doguser"
    assert said_by(Letters(), CHAT, "system", "user") == "be briefthe cat and the doguser"
    ids, spoken = spoken_by(Letters(), CHAT, ["user"])
    text = "".join(map(chr, ids))
    assert text.index("<user> user") + len("<user> ") == int(spoken.nonzero()[0][-4])
    whole_only = "{% if messages|length < 5 %}{{ 1 / 0 }}{% endif %}" + PLAIN
    assert said_by(Letters(whole_only), CHAT, "assistant") == "sat on the matthe cat and the dog"
    with pytest.raises(Broken, match="changes or leaves out"):
        spoken_by(Letters("{% for m in messages %}{{ m['content'].upper() }}{% endfor %}"), CHAT, ["user"])
    with pytest.raises(ValueError, match="fast version"):
        spoken_by(Letters(fast=False), CHAT, ["user"])


def test_what_a_template_marks_as_generated(tiny_model_dir: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.chat_template = MARKED
    ids, spoken = spoken_by(tokenizer, CHAT, ["assistant"])
    words = tokenizer.decode(ids[spoken]).replace("</s>", "").split()
    assert words == [*["sat", "on", "the", "mat"], *["the", "cat", "and", "the", "dog"]]


@pytest.mark.parametrize("layout", [Layout(), *APART], ids=["all", *NAMES])
def test_rows_of_some_roles_only(layout: Layout, lm: Any, tmp_path: Path) -> None:
    """All tokens go through the model; in the cache are those that were asked for."""
    layout = Layout(layout.contexts, layout.attention, layout.padding, ("assistant",))
    model, tokenizer = lm
    tokenizer.chat_template = "{% for m in messages %} the old {{ m['content'] }} by the sea {% endfor %}"
    chats = [{"messages": CHAT[1:3]}, {"messages": CHAT[3:]}, {"messages": CHAT[1:]}] * 6
    settings = {"context_tokens": 16, "batch_contexts": 4, "dtype": "float32", "token_filter": EVERY}
    try:
        manifest = collect(*lm, PLACE, chats, out=tmp_path / "acts", tokens=10**6, layout=layout, **settings)
        contexts = read_contexts(tokenizer, chats, tokens=10**6, context_tokens=16, layout=layout)
        with pytest.raises(ValueError, match="is no conversation"):
            read_contexts(tokenizer, ["the cat"], tokens=10, layout=layout)
    finally:
        tokenizer.chat_template = None
    store = ActivationStore(tmp_path / "acts")
    words = set(tokenizer.decode(store.tokens).split())
    assert (
        words <= {*["sat", "on", "the", "mat", "cat", "and", "dog"]}
        and {"mat", "dog"} <= words
        and manifest["rows"] > 20
    )
    kept = are_rows(contexts)
    assert torch.equal(contexts[:, 0][kept], store.tokens) and bool((~kept & (contexts[:, 1] >= 0)).any())
    whole = Layout(layout.contexts, layout.attention, layout.padding)
    every = torch.cat([contexts[:, :2], (contexts[:, 1:2] >= 0).int()], 1)
    rows = torch.cat([run_contexts(model, [PLACE], part, layout=whole)[PLACE] for part in every.split(4)])
    torch.testing.assert_close(
        store.gather(torch.arange(store.rows)), rows[kept[are_rows(every)]], rtol=1e-4, atol=1e-5
    )


# Evaluation


@pytest.mark.parametrize("layout", APART, ids=NAMES)
def test_evaluation_in_the_model_is_that_of_documents_alone(layout: Layout, lm: Any, tmp_path: Path) -> None:
    """Cross-entropies and rows; no token is predicted from another document."""
    model, tokenizer = lm
    contexts = read_contexts(tokenizer, TEXT, tokens=200, context_tokens=8, layout=layout)
    sae = create("topk", d_in=32, d_sae=48, k=4, seed=0)
    place = {"hookpoint": PLACE, "progress": False}
    (found,), entropies = _evaluated(sae, model, contexts, layout=layout, **place)
    tokens, positions, _ = labels_of(contexts)
    begins = [*(positions == 0).nonzero().flatten().tolist(), len(positions)]
    alone = CrossEntropies()
    errors = torch.zeros(())
    for start, stop in pairwise(begins):
        ids = tokens[None, start:stop]
        alone.add("clean", token_losses(model, ids)) if stop - start > 1 else None
        x = run_contexts(model, [PLACE], ids)[PLACE]
        errors += (sae(x) - x).square().sum()
    assert entropies.predictions["clean"] == alone.predictions["clean"] == len(tokens) - len(begins) + 1
    assert entropies.mean("clean") == pytest.approx(alone.mean("clean"), rel=1e-4)
    assert found.result()["tokens"] == len(tokens)
    collected(lm, tmp_path / "acts", layout)
    store = ActivationStore(tmp_path / "acts")
    rows = torch.arange(store.rows)[: int((store.contexts < len(contexts)).sum())]
    _, of_cache = evaluate_cache_in_model({"a": sae}, store, rows, model, progress=False)
    assert of_cache.predictions == entropies.predictions
    assert of_cache.mean("clean") == pytest.approx(entropies.mean("clean"), rel=1e-4)
    assert of_cache.mean("sae:a") == pytest.approx(entropies.mean("sae:a"), rel=1e-4)


def _evaluated(sae: Any, model: Any, contexts: Tensor, **more: Any) -> tuple[list[Any], CrossEntropies]:
    found, entropies = evaluate_model({"a": sae}, model, contexts, EVERY, **more)
    return [*found.values()], entropies


@pytest.mark.parametrize("layout", APART, ids=NAMES)
def test_commands_follow_the_layout_of_the_run(layout: Layout, tiny_model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXT * 4))
    text = ["--text", str(tmp_path / "text.jsonl")]
    where = ["--contexts", layout.contexts, "--attention", layout.attention, "--padding", layout.padding]
    words = ["train", str(tiny_model_dir), "--hookpoint", PLACE, *text, "--tokens", "1k", "--context-tokens", "8"]
    small = ["--sae", "topk", "--k", "4", "--d-sae", "48", "--batch-tokens", "128"]
    assert main([*words, *where, *small, "--out", str(tmp_path / "run")]) == 0
    assert main(["eval", str(tmp_path / "run"), *text, "--tokens", "500", "--json", str(tmp_path / "a.json")]) == 0
    figures = json.loads((tmp_path / "a.json").read_text())
    contexts = read_contexts(load_model(tiny_model_dir)[1], TEXT * 4, tokens=500, context_tokens=8, layout=layout)
    _, positions, _ = labels_of(contexts)
    assert figures["predictions"] == num_rows(contexts) - int((positions == 0).sum())
    (tmp_path / "other.jsonl").write_text((tmp_path / "text.jsonl").read_text() * 2)
    text[1] = str(tmp_path / "other.jsonl")
    assert main(["report", str(tmp_path / "run"), *text, "--tokens", "500", "--out", str(tmp_path / "report")]) == 0

"""Token ids as text, models without a tokenizer, and tokenizers of one's own."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch

from apportion.about import TextRecord
from apportion.language import LiveSource
from apportion.language.collect import collect
from apportion.language.documents import FIRST_ROWS
from apportion.language.fingerprint import tokenizer_fingerprint
from apportion.language.model import load_model
from apportion.language.tokens import PackedContexts, begin_with_bos, read_contexts, special_ids, vocabulary_size
from apportion.rows.store import ActivationStore

BOS, EOS = 1, 2


@pytest.fixture(scope="module")
def lm(tiny_model_dir: Path) -> tuple[Any, Any]:
    return load_model(tiny_model_dir)


IDS = np.random.default_rng(0).integers(3, 30, (40, 8))


def tiny_collect(model: Any, tokenizer: Any, text: Any, out: Path, **settings: Any) -> dict[str, Any]:
    return collect(model, tokenizer, "model.layers.1", text, out=out, **{"tokens": 64, "context_tokens": 8} | settings)


@pytest.mark.parametrize("with_tokenizer", [False, True])
@pytest.mark.parametrize(
    "text",
    [
        torch.from_numpy(IDS),
        IDS.astype(np.uint16),
        IDS.tolist(),
        [{"input_ids": row} for row in IDS.tolist()],
        datasets.Dataset.from_dict({"tokens": IDS.tolist()}),
    ],
    ids=["tensor", "array", "lists", "rows", "dataset"],
)
def test_contexts_of_ids_stay_as_they_are(lm: tuple[Any, Any], tmp_path: Path, text: Any, with_tokenizer: bool) -> None:
    """Also where the tokenizer would put BOS before plain text and EOS between documents."""
    model, tokenizer = lm
    manifest = tiny_collect(model, tokenizer if with_tokenizer else None, text, tmp_path / "acts")
    store = ActivationStore(tmp_path / "acts")
    assert torch.equal(store.tokens, torch.from_numpy(IDS[:8].astype(np.int32)).flatten())
    assert manifest["bos_prepended"] is False and manifest["ended"] == "complete"
    assert json.loads((tmp_path / "acts" / "manifest.json").read_text()) == manifest


def test_contexts_that_begin_with_bos_are_known(lm: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = lm
    ids = IDS.copy()
    ids[:, 0] = BOS
    assert tiny_collect(model, tokenizer, ids, tmp_path / "a")["bos_prepended"] is True
    assert tiny_collect(model, tokenizer, ids, tmp_path / "b", bos="always")["bos_prepended"] is True
    assert tiny_collect(model, None, ids, tmp_path / "c")["bos_prepended"] is False  # nobody says which token it is
    ids[5, 0] = 7  # one of the first
    packed = PackedContexts(tokenizer, ids, 8)
    list(packed)
    assert packed.bos_prepended is False
    with pytest.raises(ValueError, match="do not begin with BOS"):
        tiny_collect(model, tokenizer, IDS, tmp_path / "d", bos="always")


@pytest.mark.parametrize(("bos", "prepended"), [("auto", True), ("always", True), ("never", False)])
def test_the_manifest_says_what_came_of_the_policy(
    lm: tuple[Any, Any], tmp_path: Path, bos: str, prepended: bool
) -> None:
    manifest = tiny_collect(*lm, ["the cat sat on the mat " * 20], tmp_path / "acts", bos=bos)
    store = ActivationStore(tmp_path / "acts")
    assert manifest["bos"] == bos and store.describe().lm.bos_prepended is prepended
    assert bool((store.tokens[store.positions == 0] == BOS).all()) is prepended


def test_a_live_source_says_whether_its_contexts_begin_with_bos(lm: tuple[Any, Any]) -> None:
    model, tokenizer = lm
    for bos, prepended in (("auto", True), ("never", False)):
        contexts = read_contexts(tokenizer, ["the cat sat " * 300], tokens=400, context_tokens=8, bos=bos)
        about = LiveSource(model, tokenizer, "model.layers.1", contexts).describe()
        assert about.lm.bos_prepended is prepended and about.lm.text == TextRecord(contexts=len(contexts))
    contexts[:-1, 0] = BOS  # all but one
    assert LiveSource(model, tokenizer, "model.layers.1", contexts).describe().lm.bos_prepended is False
    assert not begin_with_bos(None, contexts) and not begin_with_bos(tokenizer, contexts[:0])


def test_documents_of_ids_are_packed_like_text(lm: tuple[Any, Any]) -> None:
    documents = [[5, 6, 7], [8, 9, EOS], [10, 11], [12, 13, 14]]
    packed = np.concatenate(list(PackedContexts(lm[1], documents, 5, "never"))).flatten().tolist()
    assert packed == [5, 6, 7, EOS, 8, 9, EOS, 10, 11, EOS]  # a document may bring its EOS
    with_bos = np.concatenate(list(PackedContexts(lm[1], documents, 5, "auto"))).tolist()
    assert with_bos == [[BOS, 5, 6, 7, EOS], [BOS, 8, 9, EOS, 10], [BOS, 11, EOS, 12, 13]]
    bare = np.concatenate(list(PackedContexts(None, documents, 5))).flatten().tolist()
    assert bare == [5, 6, 7, 8, 9, EOS, 10, 11, 12, 13]
    one = np.concatenate(list(PackedContexts(None, torch.arange(23), 5))).flatten().tolist()
    assert one == list(range(20))


def test_documents_of_which_one_has_the_length_of_a_context_are_packed() -> None:
    packed = PackedContexts(None, [[3] * 8, [4] * 4, [5] * 4], 8)
    assert np.concatenate(list(packed)).tolist() == [[3] * 8, [4] * 4 + [5] * 4]


def test_documents_of_text_and_ids_keep_their_order(lm: tuple[Any, Any]) -> None:
    cat = lm[1]("the cat", add_special_tokens=False)["input_ids"]
    packed = np.concatenate(list(PackedContexts(lm[1], [[5, 6], "the cat", [7]], 6, "never")))
    assert packed.tolist() == [[5, 6, EOS, *cat, EOS]]


def test_a_context_of_another_length_among_the_others_is_left_out(lm: tuple[Any, Any]) -> None:
    packed = PackedContexts(None, [*IDS.tolist(), [1, 2, 3], IDS[0].tolist()], 8)
    found = np.concatenate(list(packed))
    assert found.tolist() == [*IDS.tolist(), IDS[0].tolist()]
    assert packed.reading.skipped == {"of another length than the contexts before": 1}
    assert list(packed.reading.first.values()) == ["document 41"]


def test_the_width_of_an_array_is_the_length_of_its_contexts(lm: tuple[Any, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="contexts of 8, not context_tokens=16: give context_tokens=8"):
        tiny_collect(lm[0], None, IDS, tmp_path / "acts", context_tokens=16)


@pytest.mark.parametrize("bad", [36, -100, 1 << 40])
@pytest.mark.parametrize(
    "form", [np.asarray, torch.as_tensor, lambda ids: ids.tolist(), lambda ids: [*ids.tolist(), [3]]]
)
def test_ids_that_are_no_tokens_of_the_model_are_refused(
    lm: tuple[Any, Any], tmp_path: Path, form: Any, bad: int
) -> None:
    ids = IDS[:12].copy()
    ids[11, 3] = bad
    with pytest.raises(ValueError, match=rf"holds the token id {bad}, which is outside of .* vocabulary size of 36"):
        tiny_collect(lm[0], None, form(ids), tmp_path / "acts")
    assert not list(tmp_path.iterdir())


def test_an_array_is_checked_to_its_end_before_work_starts(lm: tuple[Any, Any], tmp_path: Path) -> None:
    ids = np.tile(IDS, (10, 1))
    ids[-1, -1] = 36
    with pytest.raises(ValueError, match="token id 36"):
        tiny_collect(lm[0], None, ids, tmp_path / "acts")
    with pytest.raises(ValueError, match=r"contexts holds the token id 36.*vocabulary size of 36"):
        LiveSource(lm[0], None, "model.layers.1", torch.as_tensor(ids))


def test_ids_that_are_no_tokens_later_on_are_left_out(
    lm: tuple[Any, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = np.tile(IDS, (10, 1)).tolist()
    rows[300][0] = 99
    with caplog.at_level(logging.WARNING):
        manifest = tiny_collect(lm[0], None, iter(rows), tmp_path / "acts", tokens=10_000, batch_contexts=2)
    assert manifest["contexts"] == 399
    assert manifest["text_skipped"] == {"with ids outside of the vocabulary": 1}
    assert "first: the text, row 301" in caplog.text


def test_text_without_a_tokenizer_says_what_to_give(lm: tuple[Any, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"document 1 is text, and there is no tokenizer: give token ids"):
        tiny_collect(lm[0], None, ["the cat sat " * 100], tmp_path / "acts")
    with pytest.raises(ValueError, match=r"bos='always' but there is no BOS token"):
        tiny_collect(lm[0], None, IDS, tmp_path / "acts", bos="always")


def test_without_a_tokenizer_rows_come_live_too(lm: tuple[Any, Any], tmp_path: Path) -> None:
    manifest = tiny_collect(lm[0], None, IDS, tmp_path / "acts", tokens=320, dtype="float32")
    assert manifest["tokenizer"] == {"name_or_path": "", "special_ids": []}
    source = LiveSource(lm[0], None, "model.layers.1", IDS, held_out_share=0.1)  # an array will do
    batch = next(source.batches(32))
    store = ActivationStore(tmp_path / "acts")
    same = (store.tokens == int(batch.tokens[0])) & (store.positions == int(batch.positions[0]))
    assert (store.gather(same.nonzero().squeeze(1)) - batch.x[0]).abs().sum(1).min() < 1e-4
    assert source.describe().lm.tokenizer == tokenizer_fingerprint(None)


def test_activations_that_are_not_finite_name_the_id(lm: tuple[Any, Any], tmp_path: Path) -> None:
    handle = lm[0].model.layers[0].register_forward_hook(lambda *a: torch.full_like(a[2], float("nan")))
    try:
        with pytest.raises(ValueError, match=rf"at token {IDS[0, 0]}, context 0, position 0"):
            tiny_collect(lm[0], None, IDS, tmp_path / "acts")
    finally:
        handle.remove()


class Letters:
    """A tokenizer of one's own, with nothing but what is needed."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        if "!" in text:
            raise KeyError("!")
        return {"input_ids": [3 + ord(c) % 30 for c in text]}

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


class Named(Letters):
    """One that names its tokens and leaves special tokens out when asked."""

    bos_token_id, eos_token_id, pad_token_id = BOS, EOS, None

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, Any]:
        ids = super().__call__(text)["input_ids"]
        return {"input_ids": torch.tensor([[BOS, *ids] if add_special_tokens else ids])[0]}

    def __len__(self) -> int:
        return 33


def test_a_tokenizer_of_ones_own(lm: tuple[Any, Any], tmp_path: Path) -> None:
    manifest = tiny_collect(lm[0], Letters(), ["abc" * 40, "xyz" * 40], tmp_path / "acts", tokens=1000)
    tokens = ActivationStore(tmp_path / "acts").tokens.tolist()
    assert tokens == Letters()("abc" * 40 + "xyz" * 40)["input_ids"]
    assert (manifest["bos_prepended"], manifest["tokenizer"]["special_ids"]) == (False, [])

    manifest = tiny_collect(lm[0], Named(), ["abcdefg", "abcdefg"], tmp_path / "named", tokens=8)
    assert ActivationStore(tmp_path / "named").tokens.tolist() == [BOS, *Letters()("abcdefg")["input_ids"]]
    assert manifest["bos_prepended"] is True
    assert manifest["tokenizer"] == {"name_or_path": "", "vocab_size": 33, "special_ids": [BOS, EOS]}
    assert special_ids(Named()) == (BOS, EOS) and special_ids(None) == ()


def test_text_that_a_tokenizer_refuses_is_left_out(lm: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    packed = PackedContexts(Letters(), ["abcd", "no!", "efgh"], 4)
    assert np.concatenate(list(packed)).shape == (2, 4)
    assert packed.reading.skipped == {"refused by the tokenizer": 1}
    with pytest.raises(ValueError, match=r"document 1 is refused by the tokenizer \(KeyError"):
        list(PackedContexts(Letters(), ["no!"] * (FIRST_ROWS + 20), 4))

    whole = type(lm[1]).__call__

    def choosy(self: Any, text: Any, **settings: Any) -> Any:
        if any("dog" in t for t in ([text] if isinstance(text, str) else text)):
            raise TypeError("TextEncodeInput must be Union[...]")
        return whole(self, text, **settings)

    documents = ["the cat", "a dog", "the sea"]
    expected = np.concatenate(list(PackedContexts(lm[1], documents[::2], 2, "never"))).tolist()
    monkeypatch.setattr(type(lm[1]), "__call__", choosy)
    packed = PackedContexts(lm[1], documents, 2, "never")
    assert np.concatenate(list(packed)).tolist() == expected
    assert packed.reading.first == {"refused by the tokenizer": "document 2"}


def test_the_vocabulary_of_models_that_say_it_otherwise(lm: tuple[Any, Any]) -> None:
    class Bare:
        config = type("Config", (), {"vocab_size": 7})

    assert vocabulary_size(lm[0]) == 36
    assert vocabulary_size(Bare()) == 7
    Bare.config = type("Config", (), {})
    assert vocabulary_size(Bare()) is None

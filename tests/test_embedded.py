"""The model and the stories inside the package, and the commands that write them."""

from __future__ import annotations

import dataclasses
import json
import lzma
import math
from itertools import islice
from pathlib import Path

import pytest
import torch
from embedded_card import WriteCard, fitting, loss_per_character
from embedded_corpus import Sampling, WriteCorpus, draw, ends, sample_batch, sample_stories, write_xz
from embedded_model import END, TrainModel, stories

from apportion import embedded
from apportion.language import load_model
from apportion.language.collect import collect

MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")

NAMES, VERBS, THINGS = ("Tim", "Lily", "Ben"), ("saw", "liked", "found"), ("a dog", "the sun", "a red ball", "her mom")


def some_stories(num: int, seed: int = 0) -> list[str]:
    """Stories of one to three sentences, so simple that a tiny model learns to end them."""
    numbers = torch.randint(12, (num, 10), generator=torch.Generator().manual_seed(seed)).tolist()
    return [
        "\n".join(f"{NAMES[a % 3]} {VERBS[b % 3]} {THINGS[c % 4]}." for a, b, c in (n[i : i + 3] for i in (0, 3, 6)))[
            : None if n[9] % 3 else 40
        ]
        for n in numbers
    ]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a toy model, as embedded_model.py writes it."""
    folder = tmp_path_factory.mktemp("toy")
    for seed, name in enumerate(("train", "valid")):
        (folder / f"{name}.txt").write_text("\n\n".join(some_stories(300, seed)))
    training(folder).run()
    return folder


def training(folder: Path) -> TrainModel:
    return TrainModel(
        text=folder / "train.txt",
        valid=folder / "valid.txt",
        out=folder / "model",
        vocab_size=300,
        hidden_size=32,
        layers=2,
        heads=2,
        intermediate_size=32,
        context_tokens=32,
        batch_contexts=8,
        tokens=32 * 8 * 60,
        lr=1e-2,
    )


def test_a_finished_training_only_writes_its_files_again(toy: Path) -> None:
    written = {name: (toy / "model" / name).read_bytes() for name in (*MODEL_FILES, "training.json")}
    state = (toy / "model" / "state.safetensors").stat().st_mtime_ns
    for name in (*MODEL_FILES[:3], "training.json"):
        (toy / "model" / name).unlink()
    training(toy).run()
    assert {name: (toy / "model" / name).read_bytes() for name in written} == written
    assert (toy / "model" / "state.safetensors").stat().st_mtime_ns == state
    told = json.loads(written["training.json"])
    assert told["train"]["tokens"] % 32 == 0 and 0 < told["tokens_seen"] <= 32 * 8 * 60
    for name in ("config.json", "tokenizer_config.json", "training.json"):
        assert str(toy) not in written[name].decode()


def test_a_text_too_short_to_train_on_is_named(toy: Path) -> None:
    (toy / "short.txt").write_text("Tim.")
    with pytest.raises(ValueError, match="valid text holds less than one context of 32"):
        dataclasses.replace(training(toy), valid=toy / "short.txt").run()


def naive_story(model, start: int, stop: set[int], uniforms: torch.Tensor, sampling: Sampling) -> list[int]:
    """One story, recomputing everything for every token."""
    ids = [start]
    for uniform in uniforms:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[:, -1]
        ids.append(int(draw(logits, uniform[None], sampling)))
        if ids[-1] in stop:
            break
    return ids[1:]


def test_sampling_in_a_shrinking_batch_is_sampling_one_by_one(toy: Path) -> None:
    model, tokenizer = load_model(toy / "model")
    uniforms = torch.rand(20, 31, generator=torch.Generator().manual_seed(3))
    for sampling in (Sampling(), Sampling(temperature=1.5, top_k=300, top_p=1.0)):
        written = sample_batch(model, tokenizer.bos_token_id, ends(tokenizer), uniforms, sampling)
        assert len({len(story) for story in written}) > 3, "stories of several lengths, so that the batch shrinks"
        for row, story in zip(uniforms, written, strict=True):
            assert story == naive_story(model, tokenizer.bos_token_id, ends(tokenizer), row, sampling)


def test_sampled_stories_do_not_depend_on_the_batch(toy: Path) -> None:
    model, tokenizer = load_model(toy / "model")

    def first(num: int, seed: int, batch_stories: int) -> list[list[int]]:
        return list(islice(sample_stories(model, tokenizer, Sampling(), seed, batch_stories), num))

    assert first(24, 0, 1) == first(24, 0, 7) == first(24, 0, 24)
    assert first(24, 0, 8) != first(24, 1, 8)


def test_draw_follows_the_probabilities() -> None:
    p = torch.tensor([0.1, 0.4, 0.2, 0.3])
    evenly = (torch.arange(1000) + 0.5) / 1000

    def shares(**sampling: float) -> list[float]:
        drawn = draw(p.log().expand(1000, 4), evenly, Sampling(**sampling))  # pyright: ignore[reportArgumentType]
        return (drawn.bincount(minlength=4) / 1000).tolist()

    near = {"abs": 2e-3}
    assert shares(top_p=1.0) == pytest.approx(p.tolist(), **near)
    assert shares(top_p=0.6) == pytest.approx([0, 4 / 7, 0, 3 / 7], **near)
    assert shares(top_p=1e-9) == [0, 1, 0, 0]
    assert shares(top_k=3, top_p=1.0) == pytest.approx([0, 4 / 9, 2 / 9, 3 / 9], **near)
    assert shares(temperature=0.5, top_p=1.0) == pytest.approx((p**2 / (p**2).sum()).tolist(), **near)
    last = draw(torch.zeros(1, 5), torch.tensor([1.0]), Sampling())
    assert 0 <= int(last) < 5, "rounding must not lead past the last token"


@pytest.mark.slow
def test_the_corpus_is_reproducible_ended_and_without_duplicates(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = WriteCorpus(model=str(toy / "model"), out=tmp_path / "a.txt.xz", tokens=2000, batch_stories=16)
    corpus.run()
    said = capsys.readouterr().out
    dataclasses.replace(corpus, out=tmp_path / "b.txt.xz", batch_stories=50).run()
    assert (tmp_path / "a.txt.xz").read_bytes() == (tmp_path / "b.txt.xz").read_bytes()
    text = lzma.decompress((tmp_path / "a.txt.xz").read_bytes()).decode()
    written = text.strip().split("\n\n")
    assert len(written) == len(set(written)) and "" not in written and END not in text
    model, tokenizer = load_model(toy / "model")
    ended = [ids for ids in islice(sample_stories(model, tokenizer, Sampling(), 0, 16), 400) if ids[-1] == 0]
    texts = dict.fromkeys(tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in ended)
    assert written == [t for t in texts if t and "\n\n" not in t and "\ufffd" not in t][: len(written)]
    lengths = [len(tokenizer(story)["input_ids"]) + 1 for story in written]
    assert sum(lengths[:-1]) < 2000 <= sum(lengths)
    assert f"{len(written):,} stories, {sum(lengths):,} tokens, {len(text):,} characters" in said
    assert "not ended" in said and "duplicate" in said


def test_an_interrupted_corpus_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: Path, data: bytes) -> int:
        self.touch()
        raise KeyboardInterrupt

    (tmp_path / "old.txt.xz").write_text("old")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "write_bytes", interrupted)
        write_xz(tmp_path / "old.txt.xz", "new")
    assert [p.name for p in tmp_path.iterdir()] == ["old.txt.xz"]
    assert (tmp_path / "old.txt.xz").read_text() == "old"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"tokens": 0}, "tokens=0"),
        ({"batch_stories": 0}, "batch_stories=0"),
        ({"out": Path("no-such-folder/a.xz")}, "no folder no-such-folder"),
        ({"sampling": {"top_p": 1.5}}, "top_p=1.5"),
        ({"sampling": {"temperature": 0.0}}, "temperature=0.0"),
        ({"sampling": {"temperature": 1e-3}}, "brought nothing new"),
    ],
)
def test_mistakes_in_a_corpus(toy: Path, tmp_path: Path, setting: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        if "sampling" in setting:
            setting = {"sampling": Sampling(**setting["sampling"])}
        WriteCorpus(**{"model": str(toy / "model"), "out": tmp_path / "a.xz"} | setting).run()


def test_the_card_says_what_was_measured(toy: Path, tiny_model_dir: Path) -> None:
    valid = toy / "valid.txt"
    card = WriteCard(
        model=toy / "model", compare=str(tiny_model_dir), valid={"held-out stories": valid}, characters=4000
    )
    card.run()
    text = (toy / "model" / "README.md").read_text()
    models = [load_model(toy / "model"), load_model(tiny_model_dir)]
    scored, total = [], 0
    for story in stories(valid):
        if total < 4000:
            scored.append(fitting(story, models))
            total += len(scored[-1])
    losses = [f"{loss_per_character(*model, scored):.4f}" for model in models]
    assert f"| held-out stories | {len(scored)} | {total:,} | {losses[0]} | {losses[1]} |" in text
    assert tiny_model_dir.name in text and str(toy) not in text and str(tiny_model_dir.parent) not in text

    training = json.loads((toy / "model" / "training.json").read_text())
    assert training["train"]["stories"] == 300
    assert f"300 simple English stories ({training['train']['characters']:,} characters" in text
    assert f"Trained on {training['tokens_seen']:,} tokens" in text
    assert "--lr 0.01" in text and "--seed" not in text, "the command names what differs from the defaults"
    model, tokenizer = models[0]
    assert f"| parameters | {sum(p.numel() for p in model.parameters()):,}, stored in float16 |" in text
    for ids in islice(sample_stories(model, tokenizer, card.sampling, card.seed, 3), 3):
        assert tokenizer.decode(ids, skip_special_tokens=True) in text
    card.run()
    assert (toy / "model" / "README.md").read_text() == text


def test_loss_per_character_of_a_model_that_knows_nothing(tiny_model_dir: Path) -> None:
    model, tokenizer = load_model(tiny_model_dir)
    model.lm_head.weight.zero_()
    texts = ["the cat sat", "a dog"]
    assert loss_per_character(model, tokenizer, texts) == pytest.approx(5 * math.log(len(tokenizer)) / 16)


def test_a_story_is_cut_where_one_context_of_the_narrower_model_ends(toy: Path, tiny_model_dir: Path) -> None:
    narrow, wide = load_model(toy / "model"), load_model(tiny_model_dir)
    for text in ("Tim saw a dog.", "Tim saw a dog. \n" * 40):
        cut = fitting(text, [narrow, wide])
        assert text.startswith(cut)
        assert len(narrow[1](cut)["input_ids"]) <= 31
    assert len(narrow[1](cut)["input_ids"]) > 20
    assert fitting("Tim saw a dog.", [narrow, wide]) == "Tim saw a dog."


def test_stories_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("One.\nTwo.\n\n\n\nThree.\n")
    assert stories(file) == ["One.\nTwo.", "Three."]
    file.write_text("One.\n\nTwo. \n \nThree.\n<|endoftext|>\nFour.\n<|endoftext|>\n")
    assert stories(file) == ["One.\nTwo. \nThree.", "Four."]
    with pytest.raises(ValueError, match="no text at"):
        stories(tmp_path / "none.txt")


def test_a_missing_model_or_corpus_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "MODEL", tmp_path / "model")
    monkeypatch.setattr(embedded, "STORIES", tmp_path / "stories.txt.xz")
    with pytest.raises(ValueError, match="model is missing: install apportion again"):
        load_model("embedded")
    with pytest.raises(ValueError, match=r"stories\.txt\.xz is missing: install apportion again"):
        embedded.stories()


def test_the_embedded_model_keeps_its_name(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "MODEL", toy / "model")
    model, tokenizer = load_model("embedded")
    assert model.config._name_or_path == "embedded"
    manifest = collect(model, tokenizer, "model.layers.1", some_stories(20), tokens=64, out=tmp_path, context_tokens=32)
    assert manifest["model"]["name_or_path"] == manifest["tokenizer"]["name_or_path"] == "embedded"
    load_model(manifest["model"]["name_or_path"])
    by_folder, _ = load_model(toy / "model")
    assert by_folder.config._name_or_path == str(toy / "model")


def test_shipped_model() -> None:
    sizes = {file.name: file.stat().st_size for file in embedded.MODEL.iterdir()}
    assert set(sizes) == {"README.md", *MODEL_FILES}
    assert sum(sizes.values()) <= 8e6
    model, tokenizer = load_model("embedded")
    assert next(model.parameters()).dtype == torch.float32
    assert tokenizer.bos_token == tokenizer.eos_token == END
    written = islice(sample_stories(model, tokenizer, Sampling(), 0, 8), 8)
    assert sum(tokenizer.decode(ids).startswith(("Once upon a time", "One day")) for ids in written) >= 4


@pytest.mark.slow
def test_shipped_stories() -> None:
    model, tokenizer = load_model("embedded")
    texts = embedded.stories()
    assert len(texts) == len(set(texts))
    lengths = [len(ids) for ids in tokenizer(texts)["input_ids"]]
    assert sum(lengths) >= 1_000_000
    assert loss_per_character(model, tokenizer, texts[:20]) < 0.6

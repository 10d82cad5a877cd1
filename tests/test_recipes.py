"""The experiment commands, on a tiny model: they run, resume without repeating work, and refuse other settings."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from apportion.activations import load_model
from apportion.activations.collect import collect
from apportion.recipes.compare import METHODS, Compare
from apportion.recipes.embedded_card import loss_per_character
from apportion.recipes.embedded_model import TrainModel

WORDS = ("the cat sat on the mat and looked at a dog old house by sea was calm sun warm stones she read book").split()  # noqa: SIM905


def some_text(seed: int, words: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (words,), generator=generator).tolist())


@pytest.fixture(scope="module")
def compare(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Compare:
    folder = tmp_path_factory.mktemp("compare")
    model, tokenizer = load_model(tiny_model_dir)
    for seed, (name, tokens) in enumerate({"train": 4000, "valid": 1500}.items()):
        (folder / f"{name}.txt").write_text(some_text(seed, tokens + 100))
        collect(
            model,
            tokenizer,
            "model.layers.1",
            folder / f"{name}.txt",
            tokens=tokens,
            out=folder / name,
            context_tokens=32,
        )
    return Compare(
        acts=folder / "train",
        eval_acts=folder / "valid",
        out=folder / "results",
        model=str(tiny_model_dir),
        text=folder / "valid.txt",
        ce_tokens=256,
        lrs=(1e-3, 3e-3),
        seeds=2,
        k=4,
        d_sae=48,
        batch_tokens=256,
        total_tokens=2048,
        window_tokens=1024,
    )


def test_every_method_is_compared_and_finished_runs_are_not_repeated(
    compare: Compare, capsys: pytest.CaptureFixture[str]
) -> None:
    compare.run()
    table = capsys.readouterr().out
    results = json.loads((compare.out / "results.json").read_text())
    assert [sum(f"| {method} |" in line for line in table.splitlines()) for method in METHODS] == [2] * len(METHODS)
    assert len(results["grid"]) == 2 * len(METHODS) and len(results["chosen"]) == 2 * len(METHODS)
    for run in results["chosen"]:
        best = min((r for r in results["grid"] if r["method"] == run["method"]), key=lambda r: r["held_out"]["fvu"])
        assert run["lr"] == best["lr"]
        assert run["delta_ce"] == pytest.approx(run["ce_spliced"] - run["ce_clean"])
        assert run["l0"] == pytest.approx(4, rel=0.1)
        assert run["tokens"] + run["filtered_share"] * 752 == pytest.approx(736, abs=16), "every other context of 47"
    assert {p.name for p in (compare.out / "plots").iterdir()} == {"density.png", "l0.png"}
    written = {p: p.stat().st_mtime_ns for p in compare.out.rglob("model.safetensors")}
    assert len(written) >= 3 * len(METHODS)
    compare.run()
    assert capsys.readouterr().out == table
    assert {p: p.stat().st_mtime_ns for p in compare.out.rglob("model.safetensors")} == written

    with pytest.raises(ValueError, match="other settings"):
        dataclasses.replace(compare, k=3).run()


def test_the_embedded_model_learns_and_loads(tmp_path: Path) -> None:
    text = "\n\n".join(some_text(seed, 60) for seed in range(40))
    (tmp_path / "stories.txt").write_text(text)
    small = TrainModel(
        text=tmp_path / "stories.txt",
        valid=tmp_path / "stories.txt",
        out=tmp_path / "model",
        vocab_size=300,
        hidden_size=16,
        layers=1,
        heads=2,
        intermediate_size=32,
        context_tokens=16,
        batch_contexts=4,
        tokens=16 * 4 * 100,
        save_every_steps=50,
    )
    small.run()
    model, tokenizer = load_model(tmp_path / "model")
    some = [some_text(seed, 4) for seed in range(100, 150)]
    trained = loss_per_character(model, tokenizer, some)
    torch.manual_seed(0)
    untrained = loss_per_character(small.model(tokenizer).eval(), tokenizer, some)
    assert trained < 0.8 * untrained
    assert tokenizer.decode(tokenizer("The cat, twice!")["input_ids"]) == "The cat, twice!"

"""The command that compares where training begins."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

import apportion as ap
from apportion.recipes.start import LEARNED, Start, Truth, nearest_row
from apportion.synthetic import GroundTruthConfig


def small(out: Path, **options: object) -> Start:
    world = GroundTruthConfig(num_features=48, d_in=16)
    truth = Truth(k=3, d_sae=48, total_tokens=2048, batch_tokens=256, eval_tokens=500, world=world)
    settings = {"saes": ("topk", "relu"), "starts": ("random", "data", "0"), "seeds": (0,)}
    return Start(out=out, truth=truth, **settings | options)  # type: ignore[arg-type]


def test_every_start_is_trained_and_has_a_line(tmp_path: Path) -> None:
    recipe = small(tmp_path / "start")
    recipe.run()
    table = (tmp_path / "start" / "truth.md").read_text()
    runs = {run["name"]: run for run in json.loads((tmp_path / "start" / "truth.json").read_text())["runs"]}
    assert list(runs) == [f"{sae} {start}" for sae in ("topk", "relu") for start in ("random", "data", "0")]
    assert all(f"| `{name}` |" in table for name in runs) and "nearest row" in table and "duplicated" in table
    assert len({round(run["fvu"], 6) for run in runs.values()}) == 6, "each is another one"
    assert all(0 < run["nearest_row"] < 1 for run in runs.values())
    saved = ap.load(tmp_path / "start" / "truth" / "topk-random-lr0.003-seed0")
    assert saved.settings()["init"] == "random"


def test_a_start_is_made_of_what_it_says(tmp_path: Path) -> None:
    (experiment,) = small(tmp_path).experiments()
    rows = experiment.part.source(experiment.arms["topk data"](0), 0).sample(1000)
    made = {}
    for name in ("topk random", "topk data", "topk 0"):
        made[name] = sae = experiment.arms[name](0)
        sae.fit_input(rows.x)
        sae.start(rows.x)
    assert torch.allclose(made["topk 0"].W_dec, made["topk random"].W_dec)
    assert not torch.allclose(made["topk 0"].W_enc, made["topk random"].W_enc), "another scale"
    assert not torch.allclose(made["topk data"].W_dec, made["topk random"].W_dec)


@pytest.mark.parametrize("start", ["date", "1.5", "-0.1", "nan"])
def test_what_is_no_start_is_refused(start: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--starts takes random, data and shares between 0 and 1; got"):
        small(tmp_path, starts=(start,)).experiments()


def test_tables_are_made_alone(tmp_path: Path) -> None:
    (experiment,) = small(tmp_path, parts=("truth",)).experiments()
    assert experiment.part.k == 3
    with pytest.raises(ValueError, match="needs two caches: give --acts and --eval-acts"):
        small(tmp_path, parts=("cache",)).experiments()
    with pytest.raises(ValueError, match="There is no table named cash"):
        small(tmp_path, parts=("cash",)).experiments()


def test_training_has_other_settings(tmp_path: Path) -> None:
    recipe = small(tmp_path)
    part = dataclasses.replace(recipe.truth, train=("decay_share=0.4", "screen=bfloat16", "dead_window_tokens=null"))
    config = part.config(1e-3, 0)
    (experiment,) = dataclasses.replace(recipe, truth=part).experiments()
    assert ", decay_share=0.4, " in experiment.setting(), "the table says so"
    assert (config.decay_share, config.screen, config.dead_window_tokens, config.lr) == (0.4, "bfloat16", None, 1e-3)
    for words, match in (
        ("decay=1", "no setting 'decay'|decay_share"),
        ("decay_share", "is not of the form NAME=VALUE"),
        ("lr=1", "takes no lr"),
    ):
        with pytest.raises((ValueError, TypeError), match=match):
            dataclasses.replace(recipe, truth=dataclasses.replace(part, train=(words,))).run()
    assert not list(tmp_path.iterdir()), "before anything is made"


def test_copies_of_rows_are_seen() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(200, 8, generator=g)
    sae = ap.create("topk", d_in=8, d_sae=16, k=2, seed=0, input_norm="none")
    with torch.no_grad():
        sae.W_dec.copy_(torch.nn.functional.normalize((x - x.mean(0))[:16], dim=1))
    assert nearest_row(sae, ap.Batch(x)) == pytest.approx(1, abs=1e-6)
    with torch.no_grad():
        sae.W_dec[8:] = 0
    assert nearest_row(sae, ap.Batch(x)) == pytest.approx(0.5, abs=1e-6)


def test_all_that_can_begin_at_the_data_do() -> None:
    assert len(LEARNED) == 13 and not {"frozen_decoder", "pca"} & set(LEARNED)


@pytest.mark.parametrize(
    ("lr_of", "said"),
    [
        ("topk=fast", "takes a number for topk"),
        ("topk", "is not of the form NAME=VALUE"),
        ("nobody=1e-3", "no SAE in --saes named nobody"),
        ("topk=-1", "lr must be positive"),
    ],
)
def test_a_rate_that_is_none_is_refused_before_anything_is_trained(lr_of: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        small(tmp_path / "out", saes=("topk",), lr_of=(lr_of,)).run()
    assert not (tmp_path / "out").exists()


def test_a_rate_is_for_all_starts_of_an_sae(tmp_path: Path) -> None:
    (one,) = small(tmp_path, saes=("topk", "mutual_choice"), lr_of=("topk=7e-3",)).experiments()
    assert one.given == {f"topk {start}": 7e-3 for start in ("random", "data", "0")}

"""Experiments: nothing is done twice, the rate is chosen on held-out rows alone, and tables show the spread."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import apportion as ap
from apportion.architectures import SAE
from apportion.evals import FIGURES
from apportion.recipes.experiment import SECONDS, Experiment, best_rate, over_seeds, run_all, table
from apportion.recipes.parts import Part
from apportion.rows import ArraySource
from apportion.training import TrainConfig, Trainer


@dataclass(frozen=True, kw_only=True)
class Rows(Part):
    """Random rows, and figures that are made up: on held-out rows and on those of the evaluation the opposite."""

    k: int = 2
    d_sae: int = 16
    total_tokens: int = 256
    batch_tokens: int = 64
    d_in: int = 4
    fvu: dict[float, float] = field(default_factory=dict)
    finishes: bool = False
    asked: list[Any] = field(default_factory=list)
    """The rate of the last configuration, and what was measured."""

    def describe(self) -> str:
        return "rows"

    def config(self, lr: float, seed: int) -> TrainConfig:
        self.asked.append(lr)
        return super().config(lr, seed)

    def source(self, sae: SAE, seed: int) -> ArraySource:
        return ArraySource(torch.randn(400, 4, generator=torch.Generator().manual_seed(0)), seed=seed)

    def held_out(self, sae: SAE) -> dict[str, Any]:
        return {"fvu": self.fvu.get(self.asked[-1], 0.5), "l0": 2.0}

    def evaluate(self, sae: SAE) -> dict[str, Any]:
        self.asked.append("evaluate")
        return {"fvu": sae.W_dec.double().sum().item(), "l0": 2.0}

    def unfinished(self, result: dict[str, Any]) -> bool:
        return self.finishes and "delta_ce" not in result

    def finish(self, saes: Mapping[str, SAE]) -> dict[str, dict[str, Any]]:
        self.asked.append(len(saes))
        return {name: {"delta_ce": sae.W_dec.double().mean().item()} for name, sae in saes.items()}


def new(name: str, part: Part, seed: int) -> SAE:
    return ap.create(name, d_in=4, d_sae=part.d_sae, k=part.k, seed=seed)


def experiment(out: Path, part: Part | None = None, **changes: Any) -> Experiment:
    part = part or Rows(fvu={1e-3: 0.3, 2e-3: 0.2, 3e-3: 0.25})
    arms = {name: partial(new, name, part) for name in ("topk", "mutual_choice")}
    return Experiment(**{"out": out, "part": part, "arms": arms, "lrs": (1e-3, 2e-3, 3e-3), "seeds": (0, 1), **changes})


def results(one: Experiment) -> list[dict[str, Any]]:
    return [{key: value for key, value in run.items() if key != "seconds"} for run in one.done]


@pytest.mark.few(2)
@pytest.mark.parametrize("where", range(8))
def test_what_was_interrupted_goes_on_and_nothing_is_trained_twice(
    where: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_all(whole := experiment(tmp_path / "whole"))
    fit, calibrate, begun, ended = Trainer.fit, Trainer._calibrate, [], []

    def counted(self, source, folder, **how):
        begun.append(folder.name)
        return fit(self, source, folder, **how)

    def interrupted(self, source):
        if len(ended) == where and len(begun) == where + 1:
            raise KeyboardInterrupt
        ended.append(begun[-1])
        return calibrate(self, source)

    monkeypatch.setattr(Trainer, "fit", counted)
    monkeypatch.setattr(Trainer, "_calibrate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_all(experiment(tmp_path / "out"))
    run_all(again := experiment(tmp_path / "out"))
    assert results(again) == results(whole) and len(results(whole)) == 4
    assert len(ended) == len(set(ended)) == 8, "three rates and a second seed, of two arms"
    assert len(begun) == 9 and begun.count(begun[where]) == 2, "one was begun twice"

    monkeypatch.setattr(Trainer, "fit", lambda *args, **kwargs: pytest.fail("nothing is trained twice"))
    run_all(third := experiment(tmp_path / "out"))
    assert third.done == again.done and third.grid == again.grid and "evaluate" not in third.part.asked


@pytest.mark.parametrize("changes", [{"k": 3}, {"d_sae": 17}, {"batch_tokens": 32}, {"total_tokens": 320}])
def test_another_setting_in_the_same_folder_is_refused(
    changes: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_all(experiment(tmp_path, seeds=(0,)))
    monkeypatch.setattr(Trainer, "fit", lambda *args, **kwargs: pytest.fail("too late"))
    with pytest.raises(ValueError, match="was started with"):
        run_all(experiment(tmp_path, Rows(**changes), lrs=(5e-3, 3e-3)))


@pytest.mark.parametrize(("changes", "said"), [({"seeds": ()}, "at least one"), ({"lrs": ()}, "at least one")])
def test_mistakes_show_before_any_experiment_is_run(
    changes: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "fit", lambda *args, **kwargs: pytest.fail("too late"))
    with pytest.raises(ValueError, match=said):
        run_all(experiment(tmp_path / "a"), experiment(tmp_path / "b", **changes))
    part = Rows(batch_tokens=1, d_sae=64)
    few = experiment(tmp_path / "c", part, arms={"feature_choice": partial(new, "feature_choice", part)})
    with pytest.raises(ValueError, match="batch"):
        run_all(experiment(tmp_path / "a"), few)


@pytest.mark.parametrize("best", [1e-3, 2e-3, 3e-3])
def test_the_rate_is_chosen_on_held_out_rows_and_only_its_runs_are_evaluated(best: float, tmp_path: Path) -> None:
    run_all(one := experiment(tmp_path, Rows(fvu={best: 0.1})))
    assert one.rates == {"topk": best, "mutual_choice": best}
    assert [(run["name"], run["lr"], run["seed"]) for run in one.done] == [
        (name, best, seed) for seed in (0, 1) for name in ("topk", "mutual_choice")
    ]
    assert {file.parent for file in tmp_path.glob("*/result.json")} == {one.folder(run) for run in one.done}
    assert len(list(tmp_path.glob("*/trained.json"))) == 8 and one.part.asked.count("evaluate") == 4
    assert all(run["held_out"]["fvu"] == 0.1 for run in one.done), "the figures of the evaluation are others"
    assert len({run["fvu"] for run in one.done}) == 4
    record = json.loads((one.folder(one.done[0]) / "trained.json").read_text())
    assert record["held_out"] == {"fvu": 0.1, "l0": 2.0} and "fvu" not in record


def test_a_rate_that_misses_the_budget_does_not_count_and_the_edge_of_a_grid_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    found = {lr: {"fvu": fvu, "l0": l0} for lr, fvu, l0 in ((1, 0.4, 4), (2, 0.3, 4.4), (3, 0.35, 4), (4, 0.1, 9))}
    with caplog.at_level(logging.WARNING):
        assert best_rate("a", found, 4.4) == 2 and not caplog.records
        assert best_rate("a", found) == 4 and "4 lies at the edge" in caplog.text
        caplog.clear()
        assert best_rate("a", {2: found[2], 4: found[4]}, 4.4) == 2 and not caplog.records, "no grid is left"
        assert best_rate("a", found, 3) == 1, "the nearest, and of those the first"
        assert best_rate("a", {4: found[4], 2: found[2]}, 3) == 2 and not caplog.records


def test_what_has_nothing_to_train_is_run_once_for_each_seed(tmp_path: Path) -> None:
    part = Rows(d_sae=8)
    run_all(one := experiment(tmp_path, part, arms={"pca": partial(new, "pca", part)}))
    assert [(run["lr"], run["seed"]) for run in one.done] == [(1e-3, 0), (1e-3, 1)] and not one.grid
    assert len(list(tmp_path.iterdir())) == 2


def test_a_run_that_fails_stops_none_of_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calibrate = Trainer._calibrate

    def failing(self, source):
        if self.sae.name == "topk" and self.config.seed == 1:
            raise ValueError("loss is nan")
        return calibrate(self, source)

    monkeypatch.setattr(Trainer, "_calibrate", failing)
    shown = []
    write = lambda one: shown.append([(run["name"], run["seed"]) for run in one.done])  # noqa: E731
    experiments = [experiment(tmp_path / name, write=write, lrs=(1e-3,)) for name in "ab"]
    with pytest.raises(ValueError, match=r"2 runs failed; the first: topk, seed 1: loss is nan"):
        run_all(*experiments)
    done = [("topk", 0), ("mutual_choice", 0), ("mutual_choice", 1)]
    assert shown == 2 * [done[:1], done[:2], done[:2], done], "after every run, failed or not"


def test_what_is_found_for_several_at_once_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apportion.recipes.experiment.GROUP", 3)
    run_all(experiment(tmp_path, lrs=(1e-3,)))
    run_all(one := experiment(tmp_path, Rows(finishes=True), lrs=(1e-3,)))
    assert [a for a in one.part.asked if isinstance(a, int)] == [3, 1] and "evaluate" not in one.part.asked
    for run in one.done:
        sae = ap.load(one.folder(run))
        assert run["delta_ce"] == sae.W_dec.double().mean().item()
        assert json.loads((one.folder(run) / "result.json").read_text()) == run
    run_all(again := experiment(tmp_path, Rows(finishes=True), lrs=(1e-3,)))
    assert again.done == one.done and not [a for a in again.part.asked if isinstance(a, int)]


def test_runs_of_older_versions_are_measured_again_and_not_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_all(before := experiment(tmp_path, lrs=(1e-3,)))
    compared, switched = (before.folder(run) for run in before.done[:2])
    for folder in (compared, switched):
        record = json.loads((folder / "trained.json").read_text())
        record["method"] = record.pop("name")
        (folder / "trained.json").write_text(json.dumps(record))
    (compared / "result.json").rename(compared / "evaluated.json")
    (switched / "trained.json").unlink()
    old = {"lr": 1e-3, "seed": 0, "seconds": 7.0, "held_out_fvu": 0.3, "fvu": 0.123, "l0": 2.0}
    (switched / "result.json").write_text(json.dumps(old))
    monkeypatch.setattr(Trainer, "_calibrate", lambda *args: pytest.fail("nothing is trained twice"))
    run_all(now := experiment(tmp_path, lrs=(1e-3,)))
    first, second = now.done[:2]
    assert first["name"] == "topk" and first["fvu"] == before.done[0]["fvu"]
    assert second == old | {"name": "mutual_choice", "held_out": {"fvu": 0.3, "l0": 2.0}}


def test_tables_show_mean_and_deviation_over_seeds() -> None:
    values = (("a", 0.2), ("b", 0.5), ("a", 0.4), ("a", 0.6))
    runs: list[dict[str, Any]] = [{"name": name, "lr": 1e-3, "fvu": fvu, "l0": None} for name, fvu in values]
    for run in runs:
        fvu = run["fvu"]
        run |= {"delta_ce": fvu - 0.3, "seconds": 100 * fvu, "as_fitted": {"fvu": 2 * fvu}}
    columns = over_seeds("fvu", "l0", "delta_ce", "mcc", SECONDS) | over_seeds("fvu", of="as fitted")
    assert table("SAE", runs, columns, "`{}`".format) == (
        f"| SAE | lr | FVU | L0 | ΔCE | {FIGURES['mcc'].title} | seconds | FVU as fitted |\n"
        "| --- | --- | --- | --- | --- | --- | --- | --- |\n"
        "| `a` | 0.001 | 0.4000 ± 0.2000 | - | 0.1000 ± 0.2000 | - | 20 | 0.8000 ± 0.4000 |\n"
        "| `b` | 0.001 | 0.5000 | - | 0.2000 | - | 50 | 1.0000 |\n"
    )


def test_the_setting_in_words(tmp_path: Path) -> None:
    assert experiment(tmp_path, lrs=(1e-3,)).setting() == (
        "256 training tokens in batches of 64, learning rate 0.001, seeds 0, 1"
    )
    assert "rate chosen from 0.001, 0.002, 0.003" in experiment(tmp_path).setting()
    other = dataclasses.replace(experiment(tmp_path), word=str.upper)
    assert other.folder({"name": "a", "lr": 3e-3, "seed": 2}) == tmp_path / "A-lr0.003-seed2"


def test_an_arm_with_a_rate_of_its_own_chooses_none(tmp_path: Path) -> None:
    run_all(one := experiment(tmp_path, given={"topk": 7e-3}))
    assert {(run["name"], run["lr"]) for run in one.done} == {("topk", 7e-3), ("mutual_choice", 2e-3)}
    assert set(one.grid) == {"mutual_choice"}
    assert "0.003 (topk 0.007), " in one.setting()
    with pytest.raises(ValueError, match="no SAE named tpok"):
        run_all(experiment(tmp_path, given={"tpok": 7e-3}))

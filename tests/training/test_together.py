"""Several runs on one stream are each what they would be alone, however they are stopped and gone on with."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from apportion.architectures import create
from apportion.interrupt import Interrupted
from apportion.rows.batch import ArraySource, Batch
from apportion.rows.shared import Shared
from apportion.training import TrainConfig, Trainer
from apportion.training.together import fit_together

D_IN, BATCH, STEPS = 16, 64, 12
KINDS = {"topk": "topk", "mutual": "mutual_choice", "zipf": "feature_choice", "jump": "jumprelu"}


class Counted(ArraySource):
    """An array whose batches are counted as they are read."""

    def __init__(self) -> None:
        super().__init__(torch.randn(1000, D_IN, generator=torch.Generator().manual_seed(0)))
        self.read = 0

    def batches(self, batch_tokens: int) -> Iterator[Batch]:
        for batch in super().batches(batch_tokens):
            self.read += 1
            yield batch


def trainers(**others: Any) -> dict[str, Trainer]:
    config = TrainConfig(batch_tokens=BATCH, total_tokens=BATCH * STEPS)
    made = {name: create(sae, d_in=D_IN, d_sae=48, k=4, seed=1) for name, sae in KINDS.items()}
    return {name: Trainer(sae, config) for name, sae in made.items()} | others


def content(folder: Path) -> dict[str, Any]:
    """All files of a run, save for times."""
    found: dict[str, Any] = {}
    for file in sorted(folder.rglob("*")):
        name = str(file.relative_to(folder))
        if file.name == "metrics.jsonl":
            found[name] = [json.loads(line) | {"seconds": 0} for line in file.read_text().splitlines()]
        elif file.name == "finished.json":
            found[name] = json.loads(file.read_text()) | {"seconds": 0}
        elif file.is_file():
            found[name] = file.read_bytes()
    return found


def alone(tmp_path: Path) -> dict[str, dict[str, Any]]:
    for name, trainer in trainers().items():
        trainer.fit(Counted(), tmp_path / "alone" / name, progress=False)
    return {name: content(tmp_path / "alone" / name) for name in KINDS}


def test_each_is_what_it_would_be_alone_and_batches_are_read_once(tmp_path: Path) -> None:
    source = Counted()
    assert fit_together(trainers(), source, tmp_path / "runs", progress=False) == {}
    assert source.read == STEPS
    assert {name: content(tmp_path / "runs" / name) for name in KINDS} == alone(tmp_path)


@pytest.mark.parametrize("at", [1, 2, 9, 30, 4 * STEPS])
def test_what_was_stopped_goes_on(at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Ctrl-C in the step number `at` of all."""
    step, calls = Trainer.step, 0

    def stopping(self: Trainer, batch: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", stopping)
        with pytest.raises(Interrupted, match=r"runs in .* are not finished, and go on with --resume"):
            fit_together(trainers(), Counted(), tmp_path / "runs", progress=False)
    fit_together(trainers(), Counted(), tmp_path / "runs", resume=True, progress=False)
    assert {name: content(tmp_path / "runs" / name) for name in KINDS} == alone(tmp_path)


def test_runs_that_are_behind_catch_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two were stopped at other steps, one is finished, one has not begun."""
    for name, steps in (("topk", 3), ("mutual", 8), ("zipf", STEPS)):
        trainer, count, step = trainers()[name], 0, Trainer.step

        def stopping(self: Trainer, batch: Any, steps: int = steps, step: Any = step) -> Any:
            if self.steps == steps - 1 < STEPS - 1:
                os.kill(os.getpid(), signal.SIGINT)
            return step(self, batch)

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "step", stopping)
            try:
                trainer.fit(Counted(), tmp_path / "runs" / name, progress=False)
            except Interrupted:
                count += 1
        assert count == (steps < STEPS)
    source = Counted()
    fit_together(trainers(), source, tmp_path / "runs", resume=True, progress=False)
    assert {name: content(tmp_path / "runs" / name) for name in KINDS} == alone(tmp_path)
    assert source.read < STEPS + 6, "each batch about once"


def test_sources_are_told_when_runs_begin_and_end(tmp_path: Path) -> None:
    said: list[str] = []

    class Told(Counted):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def join(self) -> None:
            said.append(f"{self.name} joins")

        def leave(self) -> None:
            said.append(f"{self.name} leaves")

    one, other = Told("one"), Told("other")
    sources = {name: one if name == "topk" else other for name in KINDS}
    assert fit_together(trainers(), sources, tmp_path / "runs", progress=False) == {}
    assert said == ["one joins", "other joins", "one leaves", "other leaves"]
    assert one.read == other.read == STEPS


def test_one_that_fails_stops_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Trainer.step

    def failing(self: Trainer, batch: Any) -> Any:
        if self.sae.name == "topk" and self.steps == 4:
            raise RuntimeError("out of luck")
        return step(self, batch)

    monkeypatch.setattr(Trainer, "step", failing)
    failed = fit_together(trainers(), Counted(), tmp_path / "runs", progress=False)
    assert {name: str(error) for name, error in failed.items()} == {"topk": "out of luck"}
    wanted = alone_but(tmp_path, "topk")
    assert {name: content(tmp_path / "runs" / name) for name in wanted} == wanted


def alone_but(tmp_path: Path, but: str) -> dict[str, dict[str, Any]]:
    for name, trainer in trainers().items():
        if name != but:
            trainer.fit(Counted(), tmp_path / "alone" / name, progress=False)
    return {name: content(tmp_path / "alone" / name) for name in KINDS if name != but}


def test_a_view_is_a_source_of_its_own() -> None:
    source, wanted = Counted(), [batch.x for _, batch in zip(range(20), Counted().batches(BATCH), strict=False)]
    shared = Shared(source)
    one, other = shared.view(), shared.view()
    first, second = one.batches(BATCH), other.batches(BATCH)
    for i in range(6):
        assert torch.equal(next(first).x, wanted[i]) and torch.equal(next(second).x, wanted[i])
    assert source.read == 6
    behind = other.state_dict()
    for i in range(6, 12):
        assert torch.equal(next(first).x, wanted[i])
    assert torch.equal(next(second).x, wanted[6]), "far behind"
    assert torch.equal(next(first).x, wanted[12])
    late = shared.view()
    late.load_state_dict(behind)
    assert torch.equal(next(late.batches(BATCH)).x, wanted[6]) and one.state_dict() != late.state_dict()
    assert one.held_out_share == 0.1 and one.d_in == D_IN and one.num_rows == source.num_rows
    with pytest.raises(ValueError, match="seed"):
        late.load_state_dict(behind | {"seed": 5})


def test_what_cannot_be_on_one_stream_is_refused(tmp_path: Path) -> None:
    trainer = trainers()["topk"]
    with pytest.raises(ValueError, match="given twice"):
        fit_together({"a": trainer, "b": trainer}, Counted(), tmp_path)
    sae = create("topk", d_in=D_IN, d_sae=48, k=4)
    other = Trainer(sae, TrainConfig(batch_tokens=32, total_tokens=320))
    with pytest.raises(ValueError, match=r"batch_tokens = \[32, 64\]"):
        fit_together({"a": trainer, "b": other}, Counted(), tmp_path)

"""Rows and settings with which training comes to nothing: refused before it starts, or said loudly at its end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from trials import trials

import apportion as ap
from apportion.cli import main
from apportion.rows import ArraySource
from apportion.rows.stream import StreamSource

D_IN, ROWS, BATCH = 8, 2000, 100


def rows(seed: int = 0) -> Tensor:
    return torch.randn(ROWS, D_IN, generator=torch.Generator().manual_seed(seed)) + 1


def trainer(sae: str = "topk", lr: float = 1e-3, steps: int = 18, **settings) -> ap.Trainer:
    made = ap.create(sae, **{"d_in": D_IN, "d_sae": 32, "k": 4, "seed": 0, **settings})
    return ap.Trainer(made, ap.TrainConfig(lr=lr, batch_tokens=BATCH, total_tokens=steps * BATCH))


def steps_done(t: ap.Trainer, source, out: Path | None = None) -> int:
    """How many steps had been made when the run was refused for the rows that it was given."""
    with pytest.raises(ValueError, match=r"NaN or infinity|times the median|scale"):
        t.fit(source, out, progress=False)
    return t.steps


BAD = {"nan": torch.nan, "inf": torch.inf, "1e30": 1e30, "1e15": 1e15}
HELD_OUT, TRAINED_ON = 1009, 1011
"""Rows of an ArraySource: every tenth is held out, beginning with row 9."""


@pytest.mark.fault("divergence")
@pytest.mark.parametrize("at", trials([9, HELD_OUT, 1999], 3))
@pytest.mark.parametrize("bad", trials(list(BAD), 4))
@pytest.mark.parametrize("sae", trials(["topk", "mutual_choice", "feature_choice"], 1))
def test_a_held_out_row_is_named_before_training(sae, bad, at):
    x = rows()
    x[at, 3] = BAD[bad]
    t = trainer(sae)
    with pytest.raises(ValueError, match=rf"held-out rows \(row {at} of the source\) (hold NaN|have a row whose norm)"):
        t.fit(x, progress=False)
    assert t.steps == 0


@pytest.mark.fault("divergence")
@pytest.mark.parametrize("bad", trials(list(BAD), 4))
@pytest.mark.parametrize("at", trials([0, 500, TRAINED_ON, 1998], 2))
def test_a_training_row_is_named_before_training(bad, at):
    x = rows()
    x[at, 0] = BAD[bad]
    t = trainer()
    with pytest.raises(ValueError, match=rf"training rows \(row {at} of the source\)"):
        t.fit(x, progress=False)
    assert t.steps == 0


@pytest.mark.fault("divergence")
@pytest.mark.parametrize("bad", trials(["nan", "inf"], 2))
def test_a_training_row_that_the_sample_missed_is_named_in_its_step(bad, monkeypatch):
    monkeypatch.setattr("apportion.training.trainer.FIT_INPUT_ROWS", 100)
    source = ArraySource(rows())
    at = (set(range(ROWS)) - set(source.sample(100).index.tolist()) - set(range(9, ROWS, 10))).pop()
    source.x[at, 0] = BAD[bad]
    t = trainer(steps=36)
    with pytest.raises(ValueError, match=rf"in step \d+ \(row {at} of the source\)"):
        t.fit(source, progress=False)


@pytest.mark.fault("divergence")
@pytest.mark.parametrize("bad", trials(list(BAD), 2))
def test_the_target_of_a_transcoder(bad):
    x, target = rows(), rows(1)
    target[HELD_OUT, 0] = BAD[bad]
    t = trainer("transcoder", d_out=D_IN)
    assert steps_done(t, ArraySource(x, target=target)) == 0


@pytest.mark.fault("divergence")
@pytest.mark.parametrize("bad", trials(list(BAD), 4))
def test_a_stream_is_looked_at_as_it_comes(bad, monkeypatch):
    """Its rows are read in parts, of which only the first is there before training."""
    monkeypatch.setattr("apportion.rows.stream.SAMPLE_ROWS", 200)
    x = rows()
    x[1509, 0] = BAD[bad]
    assert int(((torch.arange(ROWS + 1) * 0.1 + 1e-9).floor().diff() > 0)[1509]), "a row that is held out"
    t = trainer(steps=18)
    with pytest.raises(ValueError, match=r"held-out rows \(row 1509 of the source\)"):
        t.fit(StreamSource(iter(x.split(100))), progress=False)
    assert 10 < t.steps < 18


@pytest.mark.fault("divergence")
def test_large_rows_are_pointed_out_and_small_ones_are_not(caplog):
    x = rows()
    x[HELD_OUT] *= 1e4
    assert trainer().fit(x, progress=False).info["training"]
    assert f"row {HELD_OUT} of the source) have a row whose norm" in caplog.text and "token filter" in caplog.text
    caplog.clear()
    x[HELD_OUT] = 0
    trainer().fit(x, progress=False)
    assert "norm" not in caplog.text


@pytest.mark.fault("divergence")
@pytest.mark.parametrize("lr", trials([1000.0, 100.0, 30.0], 1))
@pytest.mark.parametrize("sae", trials(["topk", "mutual_choice", "feature_choice", "jumprelu", "relu"], 2))
def test_a_rate_that_is_too_high_is_said_and_noted_and_the_checkpoint_stays(sae, lr, tmp_path, caplog):
    t = trainer(sae, lr)
    try:
        t.fit(rows(), tmp_path / "run", progress=False)
    except ValueError as refused:
        assert "lr = " in str(refused), "seen in a step"
        return
    assert t.verdict and "FVU" in t.verdict.text and t.verdict.diverged
    assert "come to nothing" in caplog.text and t.verdict.text in caplog.text
    assert ap.load(tmp_path / "run").info["training"]["verdict"] == t.verdict.text
    assert (tmp_path / "run" / "checkpoint-18").is_dir()


@pytest.mark.fault("divergence")
def test_what_many_rows_are_is_no_outlier():
    """Most rows all but empty, as of a layer that writes to few tokens."""
    x = rows()
    x[torch.arange(len(x)) % 5 < 3] *= 1e-8
    assert trainer().fit(x, progress=False).info["calibration"]["tokens"] > 0


@pytest.mark.fault("divergence")
def test_one_that_comes_to_something_is_not_blamed(tmp_path, caplog):
    t = trainer(lr=1e-2, steps=60)
    sae = t.fit(rows(), tmp_path / "run", progress=False)
    assert t.verdict is None and "verdict" not in sae.info["training"] and "training has" not in caplog.text
    assert not list((tmp_path / "run").glob("checkpoint-*"))


@pytest.mark.fault("divergence")
def test_duplicates_that_leave_feature_choice_without_matches_are_pointed_out():
    x = rows()[:1].repeat(ROWS, 1)
    x[::2] *= -1
    t = trainer("feature_choice")
    t.fit(x, progress=False)
    assert t.verdict and "held-out L0 is 0, far from k = 4" in t.verdict.text and t.verdict.diverged


@pytest.mark.fault("divergence")
def test_one_that_was_trained_for_too_short_is_told_from_one_that_is_lost(tmp_path, caplog, capsys):
    """Its L0 is on the way to k: said loudly, the checkpoint stays, and the command has succeeded."""
    words = ["train", "embedded", "--hookpoint", "model.layers.1", "--tokens", "2k", "--context-tokens", "32"]
    words += ["--sae", "gated", "--k", "4", "--d-sae", "64", "--batch-tokens", "256", "--out", str(tmp_path / "run")]
    assert main(words) == 0
    assert "far from k = 4" in capsys.readouterr().out and "training has not come far: gated" in caplog.text
    assert list((tmp_path / "run").glob("checkpoint-*"))
    assert json.loads((tmp_path / "run" / "finished.json").read_text())["diverged"] is False
    assert main([*words, "--requeue"]) == 0
    assert "far from k = 4" in capsys.readouterr().out and list((tmp_path / "run").glob("checkpoint-*"))


@pytest.mark.fault("divergence")
@pytest.mark.parametrize("kind", trials(["zero", "constant", "one row repeated with rounding"], 3))
@pytest.mark.parametrize("sae", trials(["topk", "mutual_choice", "feature_choice", "gated", "matryoshka", "switch"], 3))
def test_batches_without_spread_change_no_weight_by_much(sae, kind, tmp_path):
    t = trainer(sae, lr=1e-3)
    t.fit(rows(), progress=False)
    for own in t.learners:
        own.activity.silent_tokens.fill_(10**9)  # the auxiliary loss is for those
    batch = {
        "zero": torch.zeros(BATCH, D_IN),
        "constant": torch.full((BATCH, D_IN), 0.1),
        "one row repeated with rounding": rows()[:1].repeat(BATCH, 1),
    }[kind]
    before = [p.detach().clone() for p in t.sae.parameters()]
    for _ in range(3):
        found = t.step(batch)
        assert all(abs(value.item()) < 1e3 for name, value in found.items() if name not in ("fvu_batch", "loss"))
        assert found["fvu_batch"].isnan() and found["loss"].isfinite()
    for old, new in zip(before, t.sae.parameters(), strict=True):
        assert new.isfinite().all() and (new - old).abs().max() < 0.1


@pytest.mark.fault("divergence")
def test_the_log_of_such_a_run_is_json(tmp_path):
    parts = [rows(i)[:100] if i % 2 else rows()[:1].repeat(100, 1) for i in range(20)]
    made = ap.create("topk", d_in=D_IN, d_sae=32, k=4, seed=0)
    config = ap.TrainConfig(batch_tokens=90, total_tokens=1800, log_every_steps=1)
    ap.Trainer(made, config).fit(StreamSource(parts), tmp_path / "run", progress=False)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["fvu_batch"] is None for line in lines] == [True, False] * 10
    for line in lines:
        json.loads(line, parse_constant=pytest.fail)


@pytest.mark.fault("divergence")
@pytest.mark.parametrize("sae", trials(["mutual_choice", "topk", "feature_choice"], 1))
def test_the_command_says_so_and_its_exit_code_too(sae, tmp_path, capsys, caplog):
    words = ["train", "embedded", "--hookpoint", "model.layers.1", "--tokens", "4k", "--context-tokens", "32"]
    words += ["--k", "4", "--d-sae", "64", "--batch-tokens", "256", "--lr", "1000", "--out", str(tmp_path / "run")]
    assert main([*words, "--sae", sae]) == 3
    said = capsys.readouterr()
    assert "the result is of no use" in said.out and "come to nothing" in caplog.text
    assert (tmp_path / "run" / "model.safetensors").exists() and list((tmp_path / "run").glob("checkpoint-*"))

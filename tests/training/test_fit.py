"""A whole run: checkpoints, resuming, Ctrl-C, folders, and that training works."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import apportion as ap
from apportion.about import About
from apportion.interrupt import TOLD, GivenUp, Interrupts
from apportion.metrics import FVU
from apportion.rows import ArraySource

D_IN, D_SAE, K, BATCH, STEPS = 8, 48, 3, 32, 20


def data(n: int = 500, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, D_IN, generator=torch.Generator().manual_seed(seed)) * 3 + 1


class Source(ArraySource):
    """Interferes when batch number `at` is asked for, or when the held-out rows are behind the last one."""

    def __init__(self, x=None, at: int = -1, act=None, held_out=None, **settings) -> None:
        super().__init__(data() if x is None else x, **settings)
        self.at, self.act, self.at_held_out, self.handed_out = at, act, held_out, 0

    def batches(self, batch_tokens):
        for batch in super().batches(batch_tokens):
            self.handed_out += 1
            if self.handed_out == self.at:
                batch = self.act(batch) or batch
            yield batch

    def held_out(self, *args, **kwargs):
        if self.at_held_out is not None and self.handed_out == STEPS:
            self.at_held_out()
        return super().held_out(*args, **kwargs)


class Crash(Exception):
    pass


def crash(*_):
    raise Crash


def press_ctrl_c(*_):
    os.kill(os.getpid(), signal.SIGINT)


CASES = {name: (name, {}) for name in ("topk", "mutual_choice", "feature_choice")}
CASES["feature_choice, switch in the middle"] = ("feature_choice", {"switch_at": 0.6, "budgets": "zipf"})
CASES["feature_choice, switched before"] = (
    "feature_choice",
    {"switch_at": 0.3, "budgets": "zipf", "zipf_alpha": None, "zipf_beta": None},
)


def trainer(case=("mutual_choice", {}), **train: object) -> ap.Trainer:
    name, settings = case
    auxiliary = {} if name in ("relu", "gated") else {"k_aux": 4}
    sae = ap.create(name, **{"d_in": D_IN, "d_sae": D_SAE, "k": K, "seed": 0, **auxiliary, **settings})
    defaults = {
        "lr": 1e-2, "batch_tokens": BATCH, "total_tokens": BATCH * STEPS, "log_every_steps": 1,
        "dead_window_tokens": 60, "density_window_tokens": 200, "checkpoint_every_tokens": 10 * BATCH,
    }  # fmt: skip
    return ap.Trainer(sae, ap.TrainConfig(**(defaults | train)))  # type: ignore[arg-type]


def metrics(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def assert_same_run(a: Path, b: Path) -> None:
    """Bit for bit: every tensor, the information, and every logged number."""
    one, two = ap.load(a), ap.load(b)
    for key, tensor in one.state_dict().items():
        assert torch.equal(tensor, two.state_dict()[key]), key
    assert one.info == two.info and one.settings() == two.settings()
    assert metrics(a) == metrics(b)
    assert len(metrics(a)) == STEPS


@pytest.fixture(params=CASES.values(), ids=list(CASES))
def case(request):
    return request.param


# A run from start to end


def test_a_run_leaves_a_finished_sae(case, tmp_path):
    t = trainer(case)
    sae = t.fit(Source(), tmp_path / "run")
    assert not sae.training and (t.steps, t.tokens) == (STEPS, STEPS * BATCH)
    assert sorted(f.name for f in (tmp_path / "run").iterdir()) == [
        "config.json", "finished.json", "metrics.jsonl", "model.safetensors", "run.json",
    ]  # fmt: skip
    loaded, x = ap.load(tmp_path / "run"), data(20, seed=3)
    assert torch.equal(loaded(x), sae(x))
    assert sae.info["calibration"]["tokens"] == 50 and sae.info["source"]["rows"] == 500
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert {"loss", "reconstruction", "fvu_batch", "l0", "dead", "grad_norm", "tokens"} <= lines[0].keys()
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["sae"]["name"] == case[0] and record["train"]["lr"] == 1e-2 and "torch" in record["versions"]


def test_logging_every_few_steps_includes_the_last(tmp_path):
    trainer(log_every_steps=7).fit(Source(), tmp_path / "run")
    assert [line["step"] for line in metrics(tmp_path / "run")] == [7, 14, 20]


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not trainer().fit(Source()).training
    assert not list(tmp_path.iterdir())


def test_fit_equals_steps(case):
    """fit is the step in a loop, and nothing else."""
    by_fit, by_step, source = trainer(case), trainer(case), Source()
    by_fit.fit(Source())
    by_step.sae.fit_input(x := source.sample(32_768).x)
    by_step.sae.start(x)
    batches = source.batches(BATCH)
    by_step._input_ready = True
    for _ in range(STEPS):
        by_step.step(next(batches))
    for p, q in zip(by_fit.sae.parameters(), by_step.sae.parameters(), strict=True):
        assert torch.equal(p, q)


# Resuming


@pytest.mark.few(2)
def test_resuming_after_a_crash_is_exact(case, tmp_path):
    """20 steps are 10 steps, a checkpoint, a crash three steps later, fresh objects, and 10 steps more."""
    trainer(case).fit(Source(), tmp_path / "whole")
    with pytest.raises(Crash):
        trainer(case).fit(Source(at=13, act=crash), tmp_path / "run")
    assert [f.name for f in tmp_path.joinpath("run").glob("checkpoint*")] == ["checkpoint-10"]
    assert len(metrics(tmp_path / "run")) == 12
    again, source = trainer(case), Source()
    again.fit(source, tmp_path / "run", resume=True)
    assert source.handed_out == 10, "it goes on from step 10"
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def spike(batch):
    return replace(batch, x=100 * batch.x)


@pytest.mark.few(4)
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("topk", {"k_anneal_share": 0.8, "k_start": 10}),
        ("mutual_choice", {"aux": "aux_zipf"}),
        ("feature_choice", {"switch_at": 0.6}),
        ("relu", {}),
        ("relu", {"p_end": 0.5}),
        ("gated", {}),
        ("jumprelu", {}),
        ("jumprelu", {"objective": "l0"}),
        ("jumprelu", {"objective": "l0_target"}),
        ("matryoshka", {}),
        ("switch", {"num_experts": 4}),
    ],
)
def test_the_step_after_resuming_is_exact_even_with_an_unusual_gradient(name, settings, tmp_path):
    """It depends on all that was there before: the L0 that steers coefficients, the gradient norms that are usual."""
    trainer((name, settings)).fit(Source(at=11, act=spike), tmp_path / "whole")
    with pytest.raises(Crash):
        trainer((name, settings)).fit(Source(at=11, act=crash), tmp_path / "run")
    trainer((name, settings)).fit(Source(at=1, act=spike), tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    usual, unusual = (metrics(tmp_path / "run")[step]["grad_norm"] for step in (9, 10))
    assert unusual > 10 * usual, "it is clipped"


@pytest.mark.few(3)
@pytest.mark.parametrize("at", [1, 7, 20])
def test_ctrl_c_finishes_the_step_and_can_be_resumed(case, at, tmp_path):
    trainer(case).fit(Source(), tmp_path / "whole")
    handler = signal.getsignal(signal.SIGINT)
    t = trainer(case, checkpoint_every_tokens=10**9)
    with pytest.raises(KeyboardInterrupt):
        t.fit(Source(at=at, act=press_ctrl_c), tmp_path / "run")
    assert t.steps == at and signal.getsignal(signal.SIGINT) is handler
    assert [f.name for f in (tmp_path / "run").glob("checkpoint*")] == [f"checkpoint-{at}"]
    trainer(case, checkpoint_every_tokens=10**9).fit(Source(), tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_ctrl_c_without_a_folder():
    t = trainer()
    with pytest.raises(KeyboardInterrupt):
        t.fit(Source(at=3, act=press_ctrl_c))
    assert t.steps == 3


@pytest.mark.parametrize("act", [crash, press_ctrl_c])
def test_a_run_that_fails_during_calibration_loses_nothing(act, tmp_path):
    """All steps are done; only the thresholds are missing."""
    trainer().fit(Source(), tmp_path / "whole")
    with pytest.raises((Crash, KeyboardInterrupt)):
        trainer(checkpoint_every_tokens=10**9).fit(Source(held_out=act), tmp_path / "run")
    source = Source()
    trainer(checkpoint_every_tokens=10**9).fit(source, tmp_path / "run", resume=True)
    assert source.handed_out == 0
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_resuming_before_the_first_checkpoint_starts_again(tmp_path):
    trainer().fit(Source(), tmp_path / "whole")
    with pytest.raises(Crash):
        trainer().fit(Source(at=5, act=crash), tmp_path / "run")
    trainer().fit(Source(), tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_resuming_where_there_is_nothing_starts(tmp_path):
    trainer().fit(Source(), tmp_path / "whole")
    trainer().fit(Source(), tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_a_half_written_checkpoint_and_line_are_ignored(tmp_path):
    trainer().fit(Source(), tmp_path / "whole")
    with pytest.raises(Crash):
        trainer().fit(Source(at=13, act=crash), tmp_path / "run")
    partial = tmp_path / "run" / "checkpoint-15.partial"
    partial.mkdir()
    (partial / "config.json").write_text("{")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "tok')
    trainer().fit(Source(), tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


class Describing(Source):
    """Says more of its rows than older versions did."""

    def __init__(self, says: dict, **settings) -> None:
        super().__init__(**settings)
        self.says = says

    def describe(self):
        return About.from_json(super().describe().to_json() | self.says)


def test_a_run_of_an_older_version_goes_on(tmp_path):
    """What its record does not say is not held against it, nor is how long its cache took; all else is."""
    trainer().fit(Describing({"seconds": 2.0, "tokens_sha256": "a"}), tmp_path / "whole")
    with pytest.raises(Crash):
        trainer().fit(Describing({"seconds": 1.0}, at=13, act=crash), tmp_path / "run")
    with pytest.raises(ValueError, match="started with source dtype"):
        trainer().fit(Describing({"dtype": "bfloat16"}), tmp_path / "run", resume=True)
    trainer().fit(Describing({"seconds": 2.0, "tokens_sha256": "a"}), tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_a_run_from_before_there_were_starts_goes_on(tmp_path):
    """Its record does not say where it began, which was at random."""
    case = ("mutual_choice", {"init": "random"})
    trainer(case).fit(Source(), tmp_path / "whole")
    with pytest.raises(Crash):
        trainer(case).fit(Source(at=13, act=crash), tmp_path / "run")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    del record["sae"]["settings"]["init"]
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="started with sae init = 'random', now it is 'data'"):
        trainer().fit(Source(), tmp_path / "run", resume=True)
    trainer(case).fit(Source(), tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize(
    ("said", "refused"),
    [
        ({"target_hookpoint": None, "tokenizer": None, "folder": "/elsewhere"}, None),
        ({"rows": "many"}, "run.json is damaged: source.rows is 'many'.* Begin anew"),
        ({"model": {"name_or_path": "a"}}, "started with source model = .*now it is None"),
        ({"stains": ["H"]}, "started with source stains"),
    ],
)
def test_what_a_record_says_of_its_source(said, refused, tmp_path):
    """null is nothing; what another version says is held against what is not so."""
    trainer().fit(Source(), tmp_path / "whole")
    with pytest.raises(Crash):
        trainer().fit(Source(at=13, act=crash), tmp_path / "run")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    record["source"] |= said
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    if refused is None:
        trainer().fit(Source(), tmp_path / "run", resume=True)
        assert_same_run(tmp_path / "whole", tmp_path / "run")
        return
    with pytest.raises(ValueError, match=refused):
        trainer().fit(Source(), tmp_path / "run", resume=True)


def test_the_last_two_checkpoints_are_kept(tmp_path):
    with pytest.raises(Crash):
        trainer(checkpoint_every_tokens=2 * BATCH).fit(Source(at=18, act=crash), tmp_path / "run")
    assert sorted(f.name for f in (tmp_path / "run").glob("checkpoint*")) == ["checkpoint-14", "checkpoint-16"]
    assert ap.load(tmp_path / "run" / "checkpoint-16").name == "mutual_choice"


def test_resuming_a_finished_run_destroys_nothing(tmp_path):
    trainer().fit(Source(), tmp_path / "run")
    before = {f.name: f.read_bytes() for f in (tmp_path / "run").iterdir()}
    source, again = Source(), trainer()
    sae = again.fit(source, tmp_path / "run", resume=True)
    assert source.handed_out == 0 and again.steps == STEPS and not sae.training
    assert torch.equal(sae.W_dec, ap.load(tmp_path / "run").W_dec)
    assert {f.name: f.read_bytes() for f in (tmp_path / "run").iterdir()} == before


def test_a_folder_that_holds_another_run_is_refused(tmp_path):
    trainer().fit(Source(), tmp_path / "run")
    before = metrics(tmp_path / "run")
    with pytest.raises(ValueError, match="already holds a run"):
        trainer().fit(Source(), tmp_path / "run")
    assert metrics(tmp_path / "run") == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="not a run"):
        trainer().fit(Source(), tmp_path / "other")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"train": {"lr": 2e-2}}, "lr"),
        ({"train": {"total_tokens": BATCH * 30}}, "total_tokens"),
        ({"train": {"dtype": "float64"}}, "dtype"),
        ({"sae": {"k": 4}}, "k"),
        ({"sae": {"aux": "aux_k"}}, "aux"),
        ({"name": "topk"}, "aux"),
        ({"source": {"seed": 1}}, "seed"),
        ({"source": {"x": data(600)}}, "rows"),
    ],
)
def test_resuming_with_other_settings_is_refused(change, named, tmp_path):
    with pytest.raises(Crash):
        trainer().fit(Source(at=13, act=crash), tmp_path / "run")
    other = trainer((change.get("name", "mutual_choice"), change.get("sae", {})), **change.get("train", {}))
    with pytest.raises(ValueError, match=rf"started with \w+ {named}\w* = .* now it is"):
        other.fit(Source(**change.get("source", {})), tmp_path / "run", resume=True)
    assert len(metrics(tmp_path / "run")) == 12


def test_settings_of_logging_may_change_on_resume(tmp_path):
    with pytest.raises(Crash):
        trainer().fit(Source(at=13, act=crash), tmp_path / "run")
    trainer(log_every_steps=5, checkpoint_every_tokens=10**9).fit(Source(), tmp_path / "run", resume=True)
    assert [line["step"] for line in metrics(tmp_path / "run")] == [*range(1, 11), 15, 20]


# Mistakes


def test_mistakes_are_found_before_work_starts(tmp_path):
    with pytest.raises(ValueError, match="total_tokens"):
        trainer(total_tokens=None).fit(Source(), tmp_path / "run")
    with pytest.raises(ValueError, match=r"d_in = 8.*width 5"):
        trainer().fit(Source(torch.ones(100, 5)), tmp_path / "run")
    with pytest.raises(ValueError, match="18 training rows"):
        trainer().fit(Source(data(20)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_source_without_held_out_rows_is_refused_before_training(tmp_path):
    source = Source(held_out_share=0.0)
    with pytest.raises(ValueError, match="held"):
        trainer().fit(source, tmp_path / "run")
    assert source.handed_out == 0


def test_nan_in_a_batch_ends_the_run_with_a_clear_error(tmp_path):
    """In the middle of a run, too: no SAE full of NaN is saved as finished, or as a checkpoint."""

    def poison(batch):
        batch.x[5, 2] = torch.nan
        return batch

    case = ("mutual_choice", {"input_norm": "none"})
    for at, steps in ((1, 1), (8, 1), (8, 50)):
        out = tmp_path / f"{at}-{steps}"
        with pytest.raises(ValueError, match=f"NaN or infinity in step {at}"):
            trainer(case, log_every_steps=steps).fit(Source(at=at, act=poison), out)
        assert not (out / "model.safetensors").exists() and not list(out.glob("checkpoint*"))


# Ctrl-C itself


def test_a_second_ctrl_c_stops_at_once():
    with Interrupts() as interrupts:
        assert not interrupts.arrived
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupts.arrived
        with pytest.raises(GivenUp):
            press_ctrl_c()


@pytest.mark.parametrize("told", TOLD)
def test_being_told_to_end_says_it_once_or_often(told):
    before = signal.getsignal(told)
    with Interrupts() as interrupts:
        os.kill(os.getpid(), told)
        os.kill(os.getpid(), told)
        assert interrupts.arrived
    assert signal.getsignal(told) is before


def test_what_is_held_is_finished_and_ends_then():
    done = False
    with Interrupts() as interrupts, pytest.raises(GivenUp):
        with interrupts.held():
            press_ctrl_c()
            press_ctrl_c()
            done = True
        done = False
    assert done


def test_one_ctrl_c_while_holding_is_remembered():
    with Interrupts() as interrupts:
        with interrupts.held():
            press_ctrl_c()
        with pytest.raises(KeyboardInterrupt), interrupts.let_through():
            pass


def test_what_ends_the_work_is_raised_once():
    with Interrupts() as interrupts:
        with pytest.raises(KeyboardInterrupt) as stopped, interrupts.let_through():
            press_ctrl_c()
        assert not isinstance(stopped.value, GivenUp)
        press_ctrl_c()
        with pytest.raises(GivenUp):
            interrupts.caught()
        press_ctrl_c()


def test_who_catches_it_goes_on():
    with Interrupts() as interrupts:
        with pytest.raises(KeyboardInterrupt), interrupts.let_through():
            press_ctrl_c()
        interrupts.caught()
        with pytest.raises(GivenUp):
            press_ctrl_c()


@pytest.mark.parametrize("ignored", [signal.SIGHUP, signal.SIGINT])
def test_what_is_ignored_stays_so(ignored, monkeypatch):
    before = signal.signal(ignored, signal.SIG_IGN)
    try:
        with Interrupts() as interrupts:
            os.kill(os.getpid(), ignored)
            assert not interrupts.arrived
    finally:
        signal.signal(ignored, before)


def test_a_handler_that_a_program_brought_stays_in_place():
    """Such as that of a launcher which starts the job again when Slurm says that its time is up."""
    came = []
    before = signal.signal(signal.SIGUSR1, lambda *_: came.append(1))
    try:
        with Interrupts() as interrupts:
            os.kill(os.getpid(), signal.SIGUSR1)
            assert came == [1] and not interrupts.arrived
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_interrupts_are_left_alone_outside_the_main_thread():
    seen = []

    def work():
        with Interrupts() as interrupts:
            seen.append(interrupts.arrived)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]


# Training works


def synthetic(n: int, seed: int) -> torch.Tensor:
    """Three of 24 random directions per token, with positive coefficients."""
    directions = torch.randn(24, D_IN, generator=torch.Generator().manual_seed(99))
    g = torch.Generator().manual_seed(seed)
    active = torch.zeros(n, 24).scatter_(1, torch.rand(n, 24, generator=g).topk(2, dim=1).indices, 1.0)
    return (active * (0.5 + torch.rand(n, 24, generator=g))) @ directions


def fvu(sae: ap.SAE, x: torch.Tensor) -> float:
    measure = FVU()
    measure.add(x, sae(x).detach())
    return measure.value()


@pytest.mark.few(1)
@pytest.mark.few(2)
def test_training_lowers_fvu(case):
    x, test = synthetic(8000, 0), synthetic(2000, 1)
    settings = {"lr": 1e-2, "batch_tokens": 128, "total_tokens": 128 * 300, "dead_window_tokens": 2000}
    case = (case[0], {"k": 2, **case[1]})
    untrained = trainer(case, **settings).sae
    untrained.fit_input(x)
    untrained.calibrate(x)
    before = fvu(untrained.eval(), test)
    t = trainer(case, **settings)
    sae = t.fit(ArraySource(x))
    after = fvu(sae, test)
    assert after < 0.5 * before and after < 0.45, (before, after)
    l0 = sae.encode(test).l0().double().mean().item()
    assert l0 == pytest.approx(2, rel=0.1)


FULL_DISK = """
import resource, signal, sys, torch, apportion as ap
from apportion.training import Objective, local_reconstruction
sae = ap.create("topk", d_in=16, d_sae=1024, k=4, seed=0)
x = torch.randn(4000, 16, generator=torch.Generator().manual_seed(0))
config = ap.TrainConfig(lr=1e-2, batch_tokens=200, total_tokens=2000, checkpoint_every_tokens=600)
class Limited(Objective):
    def __call__(self, saes, batch, context):
        return local_reconstruction(saes, batch, context)
    def after_step(self, trainer):
        if trainer.steps == 5:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
ap.Trainer(sae, config, Limited()).fit(x, sys.argv[1], progress=False)
"""


def test_a_disk_that_fills_up_leaves_the_last_checkpoint(tmp_path):
    """The third checkpoint finds no room: one error that names the file, the second checkpoint whole, nothing else."""
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path / "run")], capture_output=True, text=True)
    assert done.returncode == 1 and "cannot be written" in done.stderr and "CannotWrite" in done.stderr
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["checkpoint-3", "run.json"]
    config = ap.TrainConfig(lr=1e-2, batch_tokens=200, total_tokens=2000, checkpoint_every_tokens=600)
    x = torch.randn(4000, 16, generator=torch.Generator().manual_seed(0))
    sae = ap.create("topk", d_in=16, d_sae=1024, k=4, seed=0)
    resumed = ap.Trainer(sae, config).fit(x, tmp_path / "run", resume=True, progress=False)
    whole = ap.Trainer(ap.create("topk", d_in=16, d_sae=1024, k=4, seed=0), config).fit(x, progress=False)
    assert torch.equal(resumed.W_dec, whole.W_dec)

"""The screen of a run: chosen once, kept, measured, widened, given up."""

from __future__ import annotations

import logging
import signal
from itertools import pairwise

import pytest
import torch

import apportion as ap
from apportion.allocation import Selection, StepContext
from apportion.kernels import select
from apportion.training import screen as module
from apportion.training.screen import Screening


def rows(n: int = 256, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 16, generator=torch.Generator().manual_seed(seed))


def new(name: str = "mutual_choice", **settings: object) -> ap.SAE:
    return ap.create(name, d_in=16, d_sae=128, k=4, seed=0, **settings)


def trainer(name: str = "mutual_choice", **settings: object) -> ap.Trainer:
    usual = {"batch_tokens": 256, "total_tokens": 256 * 60, "lr": 3e-3}
    return ap.Trainer(new(name), ap.TrainConfig(**usual | settings))


def measured(best: str | None, monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    asked: list[tuple] = []
    times = {None: 2.0, "bfloat16": 1.0, "int8": 3.0}
    monkeypatch.setattr(module, "LEAST_WORK", 0)
    monkeypatch.setattr(module, "fastest", lambda *args: asked.append(args) or (best, times))
    return asked


@pytest.mark.parametrize("best", [None, "bfloat16", "int8"])
def test_the_fastest_is_kept(best, monkeypatch, caplog):
    asked = measured(best, monkeypatch)
    t = trainer()
    with caplog.at_level(logging.INFO, "apportion"):
        for i in range(3):
            t.step(rows(seed=i))
    assert t.learners[0].screening.screen == best and len(asked) == 1
    assert f"screen: {best} (finding the matches of a step: float32 2000.0 ms, bfloat16 1000.0 ms" in caplog.text


@pytest.mark.parametrize("name", ["relu", "gated", "pca"])
def test_without_a_budget_there_is_no_cut_to_look_above(name, monkeypatch):
    asked = measured("bfloat16", monkeypatch)
    sae = ap.create(name, d_in=16, k=4, seed=0, **({} if name == "pca" else {"d_sae": 128}))
    t = ap.Trainer(sae, ap.TrainConfig(batch_tokens=256, total_tokens=1024))
    if name == "pca":
        t.fit(rows(2000))
    else:
        t.step(rows())
    assert not asked and t.learners[0].screening.screen is None


@pytest.mark.parametrize("name", ["mutual_choice", "switch"])
def test_nothing_is_measured_where_the_product_is_small(name, monkeypatch):
    """Of which experts make a part."""
    asked = measured("bfloat16", monkeypatch)
    t = trainer(name)
    share = 1 / t.sae.num_experts if name == "switch" else 1
    monkeypatch.setattr(module, "LEAST_WORK", 2 * 256 * 16 * 128 * share + 1)
    t.step(rows())
    assert not asked and t.learners[0].screening.screen is None
    t = trainer(name)
    monkeypatch.setattr(module, "LEAST_WORK", 2 * 256 * 16 * 128 * share)
    t.step(rows())
    assert len(asked) == 1
    ap.Trainer(new(name), ap.TrainConfig(batch_tokens=256, total_tokens=1024, dtype="float64")).step(rows().double())
    assert len(asked) == 1, "a screen is for float32"


@pytest.mark.parametrize(
    "name", ["mutual_choice", "topk", "feature_choice", "matryoshka", "switch", "multi_topk", "jumprelu"]
)
def test_what_is_measured_is_the_search_of_a_step(name, monkeypatch):
    """With every screen, each going on from the bounds that it left."""
    monkeypatch.setattr(module, "LEAST_WORK", 0)
    asked = []
    monkeypatch.setattr(
        module, "fastest", lambda search, device: ([search(s) for s in 2 * [None, "int8"]], (None, {}))[1]
    )
    t = trainer(name)
    forward = type(t.sae).forward_scaled

    def seen(sae, x, context):
        if context.selection is not None:
            asked.append((context.selection.screen, context.selection.warm))
        return forward(sae, x, context)

    monkeypatch.setattr(type(t.sae), "forward_scaled", seen)
    t._accept(rows())
    asked.clear()
    t.learners[0].screening.settle(t.sae, ap.Batch(rows()))
    assert [screen for screen, _ in asked] == [None, "int8", None, "int8"]
    if name in ("mutual_choice", "feature_choice", "matryoshka"):
        assert [warm is None for _, warm in asked] == [True, True, False, False]
    assert all(p.grad is None for p in t.sae.parameters())


def test_it_is_chosen_again_when_latents_get_budgets_of_their_own(monkeypatch):
    asked = measured("bfloat16", monkeypatch)
    sae = new("feature_choice", switch_at=0.5)
    t = ap.Trainer(sae, ap.TrainConfig(batch_tokens=256, total_tokens=256 * 10))
    for i in range(5):
        t.step(rows(seed=i))
    assert len(asked) == 1
    measured("int8", monkeypatch)
    for i in range(5):
        t.step(rows(seed=i))
    assert t.learners[0].screening.screen == "int8" and t.learners[0].screening.settled == "each latent"


def test_a_screen_that_is_slow_is_taken_and_said_once(monkeypatch, caplog):
    measured(None, monkeypatch)
    t = trainer(screen="int8")
    for i in range(3):
        t.step(rows(seed=i))
    assert t.learners[0].screening.screen == "int8"
    assert caplog.text.count('screen = "int8" is slower here than none') == 1
    caplog.clear()
    trainer(screen="bfloat16").step(rows())
    assert not caplog.text, "this one is not"


@pytest.mark.parametrize("name", ["mutual_choice", "jumprelu"])
@pytest.mark.parametrize("screen", ["bfloat16", "int8"])
def test_codes_are_exact_and_training_is_the_same_but_for_rounding(screen, name):
    exact, screened = trainer(name, screen=None), trainer(name, screen=screen)
    for i in range(30):
        figures = [t.step(rows(seed=i)) for t in (exact, screened)]
        assert figures[1]["loss"] == pytest.approx(figures[0]["loss"].item(), rel=1e-3)


def test_a_resumed_run_keeps_its_screen_and_what_it_has_counted(tmp_path, monkeypatch):
    asked = measured("int8", monkeypatch)
    monkeypatch.setattr(module, "CHECK_STEPS", 2)
    source = rows(4000)
    whole = trainer().fit(source, tmp_path / "whole", progress=False)
    t = trainer()
    step, done = t.step, []

    def interrupted(batch):
        if len(done) == 9:
            signal.raise_signal(signal.SIGINT)
        return done.append(1) or step(batch)

    monkeypatch.setattr(t, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        t.fit(source, tmp_path / "parts", progress=False)
    again = trainer()
    measured("bfloat16", monkeypatch)  # another machine, say
    resumed = again.fit(source, tmp_path / "parts", resume=True, progress=False)
    assert len(asked) == 2 and again.learners[0].screening.screen == "int8"
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), resumed.parameters(), strict=True))
    other = Screening(whole, "bfloat16")
    other.load_state(again.learners[0].screening.state())
    assert other.screen == "bfloat16", "what is asked for counts more"


def far_from_the_mean(size: float) -> tuple[ap.Trainer, list[torch.Tensor]]:
    """Rows with a large part in common, which b_enc takes away: few digits are left for what tells them apart."""
    sae = new(input_norm="none", init="random")
    with torch.no_grad():
        sae.b_enc.copy_(-size * sae.W_enc.sum(1))
    return ap.Trainer(sae, trainer().config), [size + rows(seed=i) for i in range(40)]


def test_the_margin_follows_how_far_the_screen_moves_affinities(monkeypatch, caplog):
    measured("bfloat16", monkeypatch)
    monkeypatch.setattr(module, "CHECK_STEPS", 1)
    t = trainer()
    t.step(rows())
    margins = []
    for i in range(6):
        t.step(rows(seed=i))
        margins.append(t.learners[0].screening.margin)
    assert module.NARROWEST <= margins[-1] < module.MARGINS["bfloat16"]
    assert all(b >= 0.9 * a * (1 - 1e-9) for a, b in pairwise(margins)), "slowly"
    margins = []
    for size in (3.0, 12.0):
        t, batches = far_from_the_mean(size)
        t.step(batches[0])
        margins.append(t.learners[0].screening.margin)
    assert 0.01 < margins[0] < margins[1] / 2
    t, batches = far_from_the_mean(300.0)
    t.step(batches[0])
    assert t.learners[0].screening.screen is None and "is given up" in caplog.text


def test_a_margin_that_still_misses_too_many_gets_wider(monkeypatch):
    measured("bfloat16", monkeypatch)
    monkeypatch.setattr(module, "CHECK_STEPS", 1)
    monkeypatch.setattr(module, "ENOUGH", 500)
    monkeypatch.setattr(module, "SIGMAS", 0.01)
    monkeypatch.setattr(module, "NARROWEST", 0.0)
    monkeypatch.setattr(module, "FALL", 0.0)
    t, batches = far_from_the_mean(1.0)
    shares = []
    for batch in batches:
        figures = t.step(batch)
        shares.append(figures.get("missed", torch.tensor(0.0)).item())
    assert max(shares) > module.MISSED and t.learners[0].screening.factor > 3


@pytest.mark.parametrize("name", ["mutual_choice", "topk", "feature_choice", "jumprelu", "multi_topk"])
def test_how_far_affinities_move_is_their_distance_from_the_exact_ones(name, monkeypatch):
    """As a share of the lowest candidate of all, of the latent or of the token."""
    sae = new(name).train()
    x = rows(300)
    sae.fit_input(x)
    sae.start(x)
    x = sae.input.apply_to(x)
    found = []
    exact = select._Scan.exact
    monkeypatch.setattr(
        select._Scan,
        "exact",
        lambda scan, rough, bounds: found.append((scan, rough, bounds)) or exact(scan, rough, bounds),
    )
    warm = None
    for _ in range(2):  # Feature Choice has no bounds at first, and looks up every latent by itself
        found.clear()
        selection = Selection(sae.allocation, warm, screen="int8", check=10)
        sae.forward_scaled(x, StepContext(selection=selection))
        assert (selection.moved is None) == (name == "feature_choice" and warm is None)
        warm = selection.next_warm if selection.next_warm is not None else torch.zeros(())
    (_, rough, bounds), *_ = found
    values = ((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc).detach()[rough.rows, rough.latents]
    lowest = torch.empty_like(values)
    for i in range(len(values)):
        same = torch.ones_like(rough.rows, dtype=torch.bool)
        if name in ("topk", "multi_topk"):
            same = rough.rows == rough.rows[i]
        elif bounds.ndim:
            same = rough.latents == rough.latents[i]
        lowest[i] = rough.affinity[same].min()
    assert selection.moved == pytest.approx(
        float(((rough.affinity - values) / lowest).square().mean().sqrt()), rel=1e-3
    )
    assert 1e-4 < selection.moved < 0.1 and selection.checked


def test_the_margin_is_measured_with_the_time(monkeypatch):
    monkeypatch.setattr(module, "LEAST_WORK", 0)
    monkeypatch.setattr(
        module, "fastest", lambda search, device: ([search(s) for s in 2 * [None, "int8"]], ("int8", {}))[1]
    )
    t = trainer()
    t._accept(rows())
    screening = t.learners[0].screening
    screening.settle(t.sae, ap.Batch(rows()))
    assert screening.screen == "int8" and screening.margin != module.MARGINS["int8"] and 0.002 < screening.margin < 0.2
    monkeypatch.setattr(module, "WIDEST", 1e-3)
    other = Screening(t.sae, "auto")
    other.settle(t.sae, ap.Batch(rows()))
    assert other.screen is None


@pytest.mark.parametrize("name", ["topk", "mutual_choice", "feature_choice", "matryoshka", "crosscoder", "switch"])
def test_missed_matches_are_those_that_are_missing(name, monkeypatch):
    """Without a screen none is; and one that is taken away is found."""
    sites = {"num_sites": 2} if name == "crosscoder" else {}
    sae = new(name, **sites).train()
    x = torch.randn(300, *sae.row_shape, generator=torch.Generator().manual_seed(0))
    sae.fit_input(x)
    selection = Selection(sae.allocation, check=300)
    sae.encode_scaled(sae.input.apply_to(x), selection)
    assert selection.checked > 300 and selection.missed == 0
    settle = select._Scan.settle

    def forgetful(scan, found):
        settled = settle(scan, found)
        settled.keep[settled.keep.nonzero()[5:8, 0]] = False
        return settled

    monkeypatch.setattr(select._Scan, "settle", forgetful)
    selection = Selection(sae.allocation, check=300)
    sae.encode_scaled(sae.input.apply_to(x), selection)
    assert selection.missed >= 1, "the last of a token or a latent may equal the cut"
    if sae.allocation.row_limit is None:
        assert selection.missed <= 3


def test_what_a_jumprelu_misses_is_counted(monkeypatch):
    """Of all above the window's lower end."""
    measured("int8", monkeypatch)
    monkeypatch.setattr(module, "CHECK_STEPS", 1)
    monkeypatch.setattr(module, "ENOUGH", 1)
    t = trainer("jumprelu")
    assert t.step(rows()).get("missed", torch.tensor(1.0)) <= 0.01
    find = select._Scan.reach
    monkeypatch.setattr(select._Scan, "reach", lambda scan, bounds: (find(scan, bounds)[0][torch.arange(500)], bounds))
    assert t.step(rows(seed=1))["missed"] > 0.05


@pytest.mark.parametrize(
    "damage",
    [{"screen": "int4"}, {"margin": "wide"}, {"steps": None}, {"settled": None}, {"more": 1}, {"share": "none"}, None],
    ids=str,
)
def test_a_checkpoint_that_says_nonsense_of_its_screen_is_refused(damage, monkeypatch):
    measured("int8", monkeypatch)
    t = trainer()
    t.step(rows())
    tensors, values = t.state()
    t.check_state(tensors, values)
    t.check_state(tensors, {name: value for name, value in values.items() if name != "screens"})
    t.check_state(tensors, values | {"screens": [{}]})
    (state,) = values["screens"]
    with pytest.raises(ValueError, match="screen"):
        t.check_state(tensors, values | {"screens": [state | damage] if damage else [state, state]})


def test_tokens_with_less_than_they_may_have_say_nothing_of_the_margin():
    """Their cut is zero, and the lowest of their affinities is anything: an expert may have few latents that fit."""
    sae = new("topk", init="random")
    with torch.no_grad():
        sae.b_enc.fill_(-1e4)
        sae.b_enc[:3] = 0.0  # of k = 4
    selection = Selection(sae.allocation, screen="int8", check=8)
    made = sae.forward_scaled(sae.input.apply_to(rows()), StepContext(selection=selection))
    assert made.latents.nnz > 100 and selection.moved is None

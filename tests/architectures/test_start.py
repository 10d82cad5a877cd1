"""Where training begins: at weights that reconstruct the first rows already."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor

import apportion as ap
from apportion.allocation import StepContext
from apportion.architectures import SAES
from apportion.architectures.jumprelu import INITIAL_L0
from apportion.architectures.start import drawn, least_squares, mixed, standardised
from apportion.synthetic import GroundTruthConfig, GroundTruthSource

D_IN, D_SAE, K = 16, 64, 4
LAYOUTS = {"one": "row", "layers": "row", "pair": "target", "sites": "sites"}
LEARNED = [name for name, entry in SAES.items() if entry.settings().get("init") == "data"]


def batch(name: str, n: int = 2000, seed: int = 0) -> ap.Batch:
    layout = LAYOUTS[SAES[name].architecture.row_kind]
    world = GroundTruthConfig(num_features=64, d_in=D_IN, layout=layout)  # type: ignore[arg-type]
    return GroundTruthSource(world, seed).sample(n)


def begun(name: str, rows: ap.Batch, init: str = "data", **settings: object) -> ap.SAE:
    sae = ap.create(name, d_in=D_IN, **{"d_sae": D_SAE, "k": K, "seed": 0, "init": init} | settings)  # type: ignore[arg-type]
    sae.fit_input(rows.x, rows.target)
    sae.start(rows.x, rows.target)
    return sae


def error(sae: ap.SAE, rows: ap.Batch) -> float:
    """Of the reconstruction of a training step, by that of the mean row."""
    x, y = sae.prepare(rows.x, rows.target)
    with torch.no_grad():
        y_hat = sae.train().forward_scaled(x, StepContext()).y_hat
    return float((y - y_hat).square().sum() / (y - y.mean(0)).square().sum())


@pytest.mark.parametrize("name", LEARNED)
def test_it_beats_the_mean(name: str) -> None:
    rows = batch(name)
    assert error(begun(name, rows), rows) < 0.98
    assert error(begun(name, rows), batch(name, seed=1)) < 1, "on other rows, too"


@pytest.mark.parametrize("name", LEARNED)
def test_no_other_scale_reconstructs_better(name: str) -> None:
    """In double precision, and by trying: the reconstruction about b_dec, at a little more and a little less."""
    rows = batch(name, n=1000)  # all of which the scale is fitted to
    sae = begun(name, rows).double()
    x, y = sae.prepare(rows.x, rows.target)
    with torch.no_grad():
        made = sae.train().forward_scaled(x, StepContext()).y_hat
    y, made = y - sae.b_dec.detach(), made - sae.b_dec.detach()
    if name != "skip_transcoder":
        assert float((y * made).sum() / made.square().sum()) == pytest.approx(1, abs=1e-3)


def test_the_scale_is_that_of_least_squares() -> None:
    g = torch.Generator().manual_seed(0)
    y, v = torch.randn(50, 8, generator=g), torch.randn(50, 8, generator=g).abs()
    v = v + y
    solved = torch.linalg.lstsq(v.double().reshape(-1, 1), y.double().reshape(-1, 1)).solution.item()
    assert least_squares(y, v) == pytest.approx(solved, rel=1e-12)
    assert least_squares(y, -v) == 1 and least_squares(y, torch.zeros_like(v)) == 1


@pytest.mark.parametrize("name", LEARNED)
def test_the_same_seed_is_the_same_start(name: str) -> None:
    """However the rows come, and whatever torch's own generator does."""
    rows = batch(name)
    torch.manual_seed(7)
    one = begun(name, rows)
    torch.manual_seed(8)
    pieces = ap.Batch(torch.cat(rows.x.split(500)), None if rows.target is None else torch.cat(rows.target.split(500)))
    for key, value in begun(name, pieces).named_parameters():
        assert torch.equal(value, dict(one.named_parameters())[key]), key
    assert not torch.equal(begun(name, rows, seed=1).W_dec, one.W_dec)


def test_without_a_seed_it_follows_from_the_weights_that_were_drawn() -> None:
    rows, made = batch("topk"), []
    for later in (7, 8):
        torch.manual_seed(3)
        sae = ap.create("topk", d_in=D_IN, d_sae=D_SAE, k=K)
        torch.manual_seed(later)
        sae.fit_input(rows.x)
        sae.start(rows.x)
        made.append(sae)
    assert torch.equal(made[0].W_enc, made[1].W_enc)


@pytest.mark.parametrize("name", LEARNED)
def test_random_is_as_it_was(name: str) -> None:
    rows = batch(name)
    sae = begun(name, rows, init="random")
    fresh = ap.create(name, d_in=D_IN, d_sae=D_SAE, k=K, seed=0, init="random")
    assert all(torch.equal(p, dict(fresh.named_parameters())[n]) for n, p in sae.named_parameters())


def rows_of(kind: str) -> Tensor:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(400, D_IN, generator=g)
    return {
        "few": x[:5],
        "two": x[:2],
        "duplicated": x[:4].repeat(100, 1),
        "sparse": x * (torch.rand(400, D_IN, generator=g) < 0.05),
        "non-negative": x.abs() + 3,
        "mostly equal": torch.cat([x[:3], x[3:4].expand(397, D_IN)]),
        "large": x * 1e6,
    }[kind]


@pytest.mark.parametrize("kind", ["few", "two", "duplicated", "sparse", "non-negative", "mostly equal", "large"])
@pytest.mark.parametrize("name", ["topk", "mutual_choice", "feature_choice", "relu", "gated", "jumprelu", "switch"])
@pytest.mark.parametrize("input_norm", ["dataset", "none"])
def test_strange_rows(name: str, kind: str, input_norm: str) -> None:
    rows = ap.Batch(rows_of(kind))
    sae = begun(name, rows, input_norm=input_norm)
    assert all(bool(p.isfinite().all()) for p in sae.parameters())
    assert error(sae, rows) <= 1.001
    norms = sae.W_dec.norm(dim=1)
    assert not sae.unit_rows() or torch.allclose(norms, torch.ones_like(norms), atol=1e-5)


def test_the_trainer_begins_there_once() -> None:
    rows = batch("mutual_choice")
    sae = ap.create("mutual_choice", d_in=D_IN, d_sae=D_SAE, k=K, seed=0, init="data")
    trainer = ap.Trainer(sae, ap.TrainConfig(lr=1e-12, batch_tokens=500, total_tokens=2000))
    trainer.step(rows.x)
    wanted = begun("mutual_choice", rows)
    assert torch.allclose(sae.W_enc, wanted.W_enc, atol=1e-6)
    trainer.step(batch("mutual_choice", seed=3).x)
    assert torch.allclose(sae.W_enc, wanted.W_enc, atol=1e-6) and not sae.needs_start


def test_what_was_trained_or_loaded_stays(tmp_path) -> None:
    rows = batch("topk")
    sae = begun("topk", rows)
    sae.save(tmp_path / "sae")
    loaded = ap.load(tmp_path / "sae")
    assert loaded.settings()["init"] == "data" and not loaded.needs_start
    other = ap.create("topk", d_in=D_IN, d_sae=D_SAE, k=K, init="data")
    other.load_state_dict(sae.state_dict())
    for one in (loaded, other):
        ap.Trainer(one, ap.TrainConfig(lr=1e-12, batch_tokens=500, total_tokens=2000)).step(batch("topk", seed=5).x)
        assert torch.allclose(one.W_enc, sae.W_enc, atol=1e-6)


@pytest.mark.parametrize("change", ["by hand", "on the data", "a bias"])
def test_what_is_no_longer_as_it_was_drawn_stays(change: str) -> None:
    """Such as a dictionary that somebody put in, or weights of a loop that called nothing of this."""
    rows = batch("topk")
    sae = ap.create("topk", d_in=D_IN, d_sae=D_SAE, k=K, seed=0)
    assert sae.needs_start
    trainer = ap.Trainer(sae, ap.TrainConfig(lr=1e-12, batch_tokens=500, total_tokens=2000))
    with torch.no_grad():
        {"by hand": sae.W_dec, "on the data": sae.W_dec.data, "a bias": sae.b_enc}[change][3] += 1e-3
    wanted = sae.W_enc.detach().clone()
    assert not sae.needs_start
    trainer.step(rows.x)
    assert torch.allclose(sae.W_enc, wanted, atol=1e-6)


@pytest.mark.parametrize("move", [lambda sae: sae.double(), copy.deepcopy, lambda sae: pickle.loads(pickle.dumps(sae))])
def test_what_is_as_it_was_drawn_begins_wherever_it_is(move) -> None:
    moved = move(ap.create("topk", d_in=D_IN, d_sae=D_SAE, k=K, seed=0))
    assert moved.needs_start


def test_rows_are_drawn_evenly() -> None:
    g = torch.Generator().manual_seed(0)
    assert sorted(drawn(10, 4, g).bincount().tolist()) == [2, 2, 3, 3]
    assert len(set(drawn(64, 500, g).tolist())) == 64


@pytest.mark.parametrize("rows", [torch.zeros(5, 4), torch.full((5, 4), 1e30), torch.eye(4) * 1e-30], ids=str)
def test_standardised_rows_are_finite(rows: Tensor) -> None:
    assert bool(standardised(rows, rows).isfinite().all())


def test_directions_of_rows_are_those_about_the_mean_in_units_of_the_spread() -> None:
    """With nothing random in them, and a mean far from zero."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(500, D_IN, generator=g) * torch.logspace(0, 1, D_IN) + 20
    sae = ap.create("mutual_choice", d_in=D_IN, d_sae=D_SAE, k=K, seed=0, input_norm="none")
    sae.data_share = 1.0  # type: ignore[misc]
    sae.start(x)
    u = torch.nn.functional.normalize((x - x.mean(0)) / x.std(0), dim=1)
    assert torch.allclose((sae.W_dec @ u.T).amax(1), torch.ones(D_SAE), atol=1e-5)
    assert torch.allclose(sae.b_dec, x.mean(0), atol=1e-4)
    other = ap.create("mutual_choice", d_in=D_IN, d_sae=D_SAE, k=K, seed=1, input_norm="none")
    other.data_share = 1.0  # type: ignore[misc]
    other.start(x)
    assert len(set((sae.W_dec @ u.T).argmax(1).tolist()) & set((other.W_dec @ u.T).argmax(1).tolist())) < 30


def test_latents_of_an_expert_are_made_of_rows_that_it_gets() -> None:
    rows = batch("switch")
    sae = ap.create("switch", d_in=D_IN, d_sae=D_SAE, k=K, seed=0, num_experts=4)
    sae.data_share = 1.0  # type: ignore[misc]
    sae.fit_input(rows.x)
    sae.start(rows.x)
    x, _ = sae.prepare(rows.x)
    u = torch.nn.functional.normalize((x - sae.b_dec) / x.std(0), dim=1)
    fresh = ap.create("switch", d_in=D_IN, d_sae=D_SAE, k=K, seed=0, num_experts=4)
    with torch.no_grad():
        fresh.b_dec.copy_(sae.b_dec)
        expert = fresh.route(x).expert[(sae.W_dec @ u.T).argmax(1)]
    assert len(expert.unique()) > 1 and torch.equal(expert, torch.arange(4).repeat_interleave(D_SAE // 4))


def test_a_latent_without_a_match_keeps_its_decoder() -> None:
    rows = batch("transcoder", n=20)
    sae = begun("transcoder", rows)
    with torch.no_grad():
        matched = sae.train().forward_scaled(sae.prepare(rows.x, rows.target)[0], StepContext()).latents.counts() > 0
    assert not bool(matched.all()) and bool((sae.W_dec.norm(dim=1) > 0).all())


def test_what_is_linear_is_for_the_skip_connection() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1000, D_IN, generator=g)
    rows = ap.Batch(x, target=x @ torch.randn(D_IN, D_IN, generator=g))
    assert error(begun("skip_transcoder", rows), rows) < 1e-4


@pytest.mark.parametrize("name", ["relu", "gated"])
@pytest.mark.parametrize("input_norm", ["dataset", "none"])
def test_biases_begin_where_three_times_k_are_open(name: str, input_norm: str) -> None:
    rows = batch(name)
    sae = begun(name, rows, d_sae=512, input_norm=input_norm)
    with torch.no_grad():
        made = sae.train().forward_scaled(sae.prepare(rows.x)[0], StepContext())
    gates = getattr(made, "gates", made.latents)
    assert gates.nnz / len(rows) == pytest.approx(3 * K, rel=0.05)


def test_thresholds_begin_where_as_many_match_as_they_are_made_for() -> None:
    rows = batch("jumprelu")
    sae = begun("jumprelu", rows, d_sae=512, k=60, objective="l0_target")
    with torch.no_grad():
        made = sae.train().forward_scaled(sae.prepare(rows.x)[0], StepContext())
    assert made.latents.nnz / len(rows) == pytest.approx(INITIAL_L0 * 60, rel=0.05)


@pytest.mark.parametrize("name", LEARNED)
def test_where_tokens_share_a_budget_or_experts_divide_them_directions_are_nearer_to_rows(name: str) -> None:
    in_common = name in ("mutual_choice", "feature_choice", "matryoshka", "switch")
    assert ap.create(name, d_in=D_IN, d_sae=D_SAE, k=K).data_share == (0.7 if in_common else 0.4)  # type: ignore[attr-defined]


def test_directions_lie_between_random_ones_and_rows() -> None:
    r, u = torch.eye(4)[:2], torch.eye(4)[2:]
    assert torch.allclose(mixed(r, 5 * u, 0.5), (r + u) / 2**0.5)
    assert all(torch.equal(mixed(r, torch.zeros(2, 4), share), r) for share in (0.5, 1.0))

"""The synthetic source: what fires how often and together, what rows are made of, and that positions are exact."""

from __future__ import annotations

import dataclasses
import itertools
import json

import pytest
import torch

import apportion as ap
from apportion.rows import Source
from apportion.synthetic import LIKE_SYNTH_SAE_BENCH, GroundTruthConfig, GroundTruthSource
from apportion.synthetic.world import World, repelled, unit

SMALL = GroundTruthConfig(d_in=12, num_features=40, active=3.0, num_roots=3, branching=2, depth=2, magnitude_sd=0.0)


def world(**changes: object) -> GroundTruthConfig:
    return dataclasses.replace(SMALL, **changes)  # type: ignore[arg-type]


def deviations(seen: torch.Tensor, expected: torch.Tensor, n: int) -> torch.Tensor:
    """How far shares of n tokens are from probabilities, in standard deviations."""
    return (seen - expected).abs() / (expected * (1 - expected) / n).sqrt()


@pytest.mark.parametrize("rank", [0, 6])
def test_every_feature_fires_as_often_as_it_should(rank: int) -> None:
    source = GroundTruthSource(world(correlation_rank=rank, correlation_scale=0.3), seed=1)
    _, codes = source.truth(60_000)
    p = source.world.probability
    assert p.sum().item() == pytest.approx(3.0) and p[0] == p.max()
    assert deviations(codes.counts().double() / codes.tokens, p, codes.tokens).max() < 4.5


def test_probabilities_are_zipf_shaped_and_capped() -> None:
    flat = World(world(num_roots=0, zipf_alpha=1.0, zipf_beta=2.0, max_probability=0.25)).probability
    capped = (flat == 0.25).sum()
    ranks = torch.arange(40).double() + 1
    assert 0 < capped < 10
    torch.testing.assert_close(flat[capped:] * (ranks[capped:] + 2), flat[-1:].mul(42).expand(40 - int(capped)))


def test_children_fire_with_their_parent_and_exclude_their_siblings() -> None:
    source = GroundTruthSource(SMALL)
    fires = source.truth(20_000)[1].dense() > 0
    assert [len(parents) for parents, _ in source.world.generations] == [3, 6]
    for parents, children in source.world.generations:
        for parent, siblings in zip(parents, children.view(-1, 2), strict=True):
            both = fires[:, siblings]
            assert not (both.any(1) & ~fires[:, parent]).any()
            assert not both.all(1).any()
            share = both.any(1).sum() / fires[:, parent].sum()
            assert share.item() == pytest.approx(SMALL.child_share, abs=0.05)


def test_the_spread_of_the_number_of_active_features() -> None:
    """Var L0 = E sum_j p_j u (1 - p_j u) + Var(u) (sum p)^2 for independent features."""
    for levels, variance in (((1.0,), 0.0), ((1, 7), 0.5625)):
        config = world(num_roots=0, correlation_rank=0, difficulty=levels)
        source = GroundTruthSource(config)
        p, u = source.world.probability, torch.tensor(config.levels).double()[:, None]
        expected = (p * u * (1 - p * u)).sum(1).mean() + variance * 9
        assert source.truth(60_000)[1].l0().double().var().item() == pytest.approx(expected.item(), rel=0.03)


def test_shared_directions_make_features_fire_together() -> None:
    def largest_correlation(rank: int) -> float:
        config = world(num_roots=0, difficulty=(1.0,), correlation_rank=rank, correlation_scale=0.5)
        fires = (GroundTruthSource(config).truth(20_000)[1].dense() > 0).double()
        return (torch.corrcoef(fires.T) - torch.eye(40)).abs().max().item()

    assert largest_correlation(0) < 0.05 < 0.2 < largest_correlation(4)


def test_rows_are_sums_of_directions() -> None:
    source = GroundTruthSource(world(magnitude_sd=1.0))
    batch, codes = source.truth(500)
    assert batch.x.shape == (500, 12) and batch.target is None and (codes.values > 0).all()
    torch.testing.assert_close(source.directions.norm(dim=1), torch.ones(40))
    torch.testing.assert_close(batch.x, codes.dense() @ source.directions, atol=1e-4, rtol=1e-5)


def test_shift_and_noise() -> None:
    clean, codes = GroundTruthSource(SMALL).truth(4000)
    noisy, same_codes = GroundTruthSource(world(shift=7.0, noise=0.5)).truth(4000)
    assert torch.equal(codes.dense(), same_codes.dense())
    added = noisy.x - clean.x
    assert added.mean(0).norm().item() == pytest.approx(7, rel=0.02)
    assert added.std(0).mean().item() == pytest.approx(0.5, rel=0.03)


def test_magnitudes_fall_with_rank() -> None:
    source = GroundTruthSource(world(magnitudes=(6.0, 2.0)))
    codes = source.truth(20_000)[1]
    by_frequency = source.world.probability.argsort(descending=True, stable=True)
    means = codes.dense().sum(0) / codes.counts()
    torch.testing.assert_close(means[by_frequency], torch.linspace(6, 2, 40), atol=1e-4, rtol=1e-4)


def test_repulsion_lowers_the_largest_overlap() -> None:
    torch.manual_seed(0)
    drawn = unit(torch.randn(60, 24))
    pushed = repelled(drawn, 60)

    def overlap(d: torch.Tensor) -> torch.Tensor:
        return (d @ d.T - torch.eye(60)).abs()

    assert overlap(pushed).max() < 0.7 * overlap(drawn).max()
    assert overlap(pushed).pow(4).sum() < 0.3 * overlap(drawn).pow(4).sum()
    torch.testing.assert_close(pushed.norm(dim=1), torch.ones(60))


def test_layouts_share_codes_and_the_first_site() -> None:
    plain, codes = GroundTruthSource(SMALL).truth(50)
    sites = GroundTruthSource(world(layout="sites"))
    target = GroundTruthSource(world(layout="target"))
    x = sites.truth(50)[0].x
    assert x.shape == (50, 2, 12) and sites.directions.shape == (40, 2, 12)
    torch.testing.assert_close(x[:, 0], plain.x)
    batch, same_codes = target.truth(50)
    assert batch.target is not None and torch.equal(batch.x, x[:, 0]) and torch.equal(batch.target, x[:, 1])
    assert torch.equal(codes.dense(), same_codes.dense())
    torch.testing.assert_close(batch.target, codes.dense() @ target.directions, atol=1e-4, rtol=1e-5)


def test_it_is_a_source_whose_position_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apportion.synthetic.ground_truth.BLOCK_ENTRIES", 40 * 50)
    source = GroundTruthSource(SMALL, seed=3)
    assert isinstance(source, Source) and source.block_rows == 50
    batches = source.batches(32)
    first = [next(batches).x for _ in range(4)]
    state = json.loads(json.dumps(source.state_dict()))
    later = [next(batches).x for _ in range(3)]
    again = GroundTruthSource(SMALL, seed=3)
    again.load_state_dict(state)
    assert all(torch.equal(a.x, b) for a, b in zip(again.batches(32), later, strict=False))
    whole = next(GroundTruthSource(SMALL, seed=3).batches(224)).x
    assert torch.equal(whole, torch.cat(first + later)), "batches larger than a block, and any batch size"
    with pytest.raises(ValueError, match="seed"):
        GroundTruthSource(SMALL, seed=4).load_state_dict(state)
    with pytest.raises(ValueError, match="world"):
        GroundTruthSource(world(active=2.0), seed=3).load_state_dict(state)


def test_streams_and_seeds_have_no_row_in_common() -> None:
    source, other = GroundTruthSource(world(noise=0.1), seed=0), GroundTruthSource(world(noise=0.1), seed=1)
    held_out = list(source.held_out(250, chunk=100))
    assert [len(batch.x) for batch in held_out] == [100, 100, 50]
    parts = [
        next(source.batches(100)).x,
        next(other.batches(100)).x,
        source.sample(100).x,
        source.truth(100)[0].x,
        torch.cat([batch.x for batch in held_out]),
    ]
    for a, b in itertools.combinations(parts, 2):
        assert torch.cdist(a, b).min() > 0.01
    assert torch.equal(source.sample(100).x, parts[2]) and torch.equal(source.truth(100)[0].x, parts[3])
    assert sum(len(b.x) for b in GroundTruthSource(SMALL, held_out_rows=70).held_out(10_000)) == 70
    assert not list(source.held_out(0))


def test_it_trains_and_resumes(tmp_path) -> None:
    def trainer() -> ap.Trainer:
        sae = ap.create("mutual_choice", d_in=12, d_sae=40, k=3, seed=0)
        return ap.Trainer(sae, ap.TrainConfig(batch_tokens=64, total_tokens=640))

    whole = trainer().fit(GroundTruthSource(SMALL, held_out_rows=2000), progress=False)
    stopped, source = trainer(), GroundTruthSource(SMALL, held_out_rows=2000)
    original = stopped.step

    def step(batch):
        if stopped.steps == 4:
            raise KeyboardInterrupt
        return original(batch)

    stopped.step = step
    stopped.config = dataclasses.replace(stopped.config, checkpoint_every_tokens=64)
    with pytest.raises(KeyboardInterrupt):
        stopped.fit(source, tmp_path / "run", progress=False)
    resumed = trainer()
    resumed.fit(GroundTruthSource(SMALL, held_out_rows=2000), tmp_path / "run", resume=True, progress=False)
    assert resumed.steps == 10
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.sae.parameters(), strict=True))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"active": 30.0}, "cannot be reached"),
        ({"num_roots": 10}, "do not fit"),
        ({"difficulty": (0.1, 4.9), "max_probability": 0.6}, "hardest tokens"),
        ({"difficulty": ()}, "difficulty"),
        ({"child_share": 0.0}, "child_share"),
        ({"noise": -1.0}, "noise"),
        ({"d_in": 0}, "d_in"),
        ({"layout": "column"}, "layout"),
    ],
)
def test_worlds_that_cannot_be_are_refused(changes: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        World(world(**changes))
    with pytest.raises(ValueError, match="held_out_rows"):
        GroundTruthSource(SMALL, held_out_rows=0)
    with pytest.raises(ValueError, match="at least one row"):
        GroundTruthSource(SMALL).truth(0)


def test_the_large_preset_is_possible() -> None:
    config = dataclasses.replace(LIKE_SYNTH_SAE_BENCH, d_in=8)
    p = World(config).probability
    assert p.sum().item() == pytest.approx(34) and len(p) == 16_384 and p.max() <= 0.4

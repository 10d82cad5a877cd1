"""Thresholds depend on the rows, not on their order, their chunks, or how much fits into memory."""

from __future__ import annotations

import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import apportion as ap
from apportion.architectures import calibrate, counting

D_IN, D_SAE, K = 8, 24, 3
COUPLED = ("mutual_choice", "feature_choice")


def rows(n: int = 12_000) -> Tensor:
    """In order: twenty topics, from quiet to loud, each with latents of its own."""
    g = torch.Generator().manual_seed(0)
    topic = torch.arange(n) * 20 // n
    centres = 2 * torch.randn(20, D_IN, generator=g)
    return (torch.randn(n, D_IN, generator=g) + centres[topic]) * (0.2 + topic[:, None] / 8)


def new(name: str, **settings: Any) -> ap.SAE:
    sae = ap.create(name, d_in=D_IN, d_sae=D_SAE, seed=0, **({"k": K} | settings)).double()
    sae.fit_input(rows())
    return sae


def by_hand(sae: ap.SAE, xs: Tensor) -> Tensor:
    """The thresholds, from the dense matrix of affinities."""
    z = torch.relu((sae.input.apply_to(xs.double()) - sae.b_dec) @ sae.W_enc.T + sae.b_enc)
    if sae.name == "mutual_choice":
        best = z.flatten().sort(descending=True).values
        return (best[K * len(xs) - 1] + best[K * len(xs)]) / 2
    wanted = sae.allocation.wanted(len(xs))
    best = z.sort(0, descending=True).values
    return torch.stack([(best[m - 1, j] + best[m, j]) / 2 for j, m in enumerate(wanted.tolist())])


def ways(xs: Tensor) -> dict[str, Any]:
    shuffled = xs[torch.randperm(len(xs), generator=torch.Generator().manual_seed(1))]
    return {
        "tensor": xs,
        "shuffled": shuffled,
        "reversed": xs.flip(0),
        "leading dimensions": xs.reshape(40, -1, D_IN),
        "list": list(xs.split(1000)),
        "generator": (x for x in xs.split(4100)),
        "short last chunk": iter(xs.split(len(xs) - 7)),
        "many rows one by one": chain(xs[:500, None], [xs[500:-500]], xs[-500:, None]),
        "an empty part": [xs[:500], xs[:0], xs[500:]],
        "batches": (ap.Batch(x) for x in xs.split(777)),
    }


SPACE = {"all fits": (1 << 26, 1 << 26), "little fits": (0, 1 << 26), "counted": (0, 0), "counted late": (0, 1 << 15)}
"""Matches that may be held, and for the sake of the wanted ones, of which there are 36,000."""


@pytest.fixture(params=SPACE)
def space(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    held, most = SPACE[request.param]
    monkeypatch.setattr(calibrate, "HELD", held)
    monkeypatch.setattr(calibrate, "MOST", most)
    monkeypatch.setattr(calibrate, "AT_ONCE", 300 * D_SAE)
    monkeypatch.setattr(calibrate, "IN_MEMORY", 10_000)
    monkeypatch.setattr(counting, "CELLS", 64 * D_SAE)
    return request.param


@pytest.mark.few(15)
@pytest.mark.parametrize("name", COUPLED)
@pytest.mark.parametrize("way", [*ways(torch.zeros(40, D_IN))])
def test_thresholds_do_not_depend_on_order_or_chunks(name: str, way: str, space: str) -> None:
    xs = rows()
    wanted = by_hand(new(name), xs)
    sae, given = new(name), ways(xs)[way]
    reported = sae.calibrate(given)
    assert torch.allclose(sae.allocation.threshold, wanted, rtol=1e-9)
    assert reported == K and sae.info["calibration"] == {"tokens": len(xs), "l0": K}
    assert sae.eval().encode(xs).nnz == K * len(xs)


@pytest.mark.parametrize("name", COUPLED)
def test_rows_that_come_once_and_get_quieter(name: str, space: str) -> None:
    """Many loud rows, then a few hundred times as many quiet ones: what the loud ones let go is wanted in the end."""
    g = torch.Generator().manual_seed(3)
    xs = torch.cat([5 * torch.randn(3000, D_IN, generator=g), 1e-3 * torch.randn(60_000, D_IN, generator=g)])
    sae = new(name, k=0.25)
    found = []
    for given in (xs, list(xs.split(500)), iter(xs.split(500))):
        sae.calibrate(given)
        found.append(sae.allocation.threshold.clone())
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert sae.eval().encode(xs).nnz == 0.25 * len(xs)


def test_a_rare_latent_that_is_loud_at_first(space: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a text that begins with what it is about: of so few rows nothing was wanted of it, and much of all of them."""
    g = torch.Generator().manual_seed(0)
    sae = ap.create("feature_choice", d_in=4, d_sae=4, k=1, seed=0, input_norm="none", subtract_b_dec=False)
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(4))
        sae.allocation.density.copy_(torch.tensor([0.0005, 0.33, 0.33, 0.3395]))
    xs = torch.rand(100_000, 4, generator=g) + 0.1
    xs[:40, 0] += 10
    reads, read = 0, calibrate.read

    def counted(*args: object) -> int:
        nonlocal reads
        reads += 1
        assert reads < 12, "read again and again"
        return read(*args)

    monkeypatch.setattr(calibrate, "read", counted)
    assert sae.calibrate(list(xs.split(100))) == 1
    assert sae.eval().encode(xs).counts().tolist() == [50, 33_000, 33_000, 33_950]


def test_what_silent_latents_leave_goes_to_the_others(space: str) -> None:
    sae, xs = new("feature_choice", k=1), rows()
    with torch.no_grad():
        sae.b_enc[:20] = -1e4
    assert sae.calibrate(xs) == pytest.approx(1, abs=1e-4)
    counts = sae.eval().encode(xs).counts()
    assert not counts[:20].any() and (counts[20:] - len(xs) / 4).abs().max() <= 1


@pytest.mark.parametrize("name", COUPLED)
def test_ties_at_the_cut_are_not_cut_by_order(name: str, space: str) -> None:
    """Equal affinities fire together or not at all, so that L0 stays at k or below, whichever came first."""
    sae = ap.create(name, d_in=D_IN, d_sae=D_SAE, k=K, seed=0, input_norm="none")
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        sae.W_enc.copy_(torch.randint(-1, 2, sae.W_enc.shape, generator=g))
    xs = torch.randint(-2, 3, (5000, D_IN), generator=g).float()
    found = []
    for given in (xs, xs.flip(0), list(xs.split(999))):
        reported = sae.calibrate(given)
        found.append(sae.allocation.threshold.clone())
        assert 0 < reported <= K and sae.eval().encode(xs).nnz == round(reported * len(xs))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", COUPLED)
def test_what_is_counted_is_what_would_be_held(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same thresholds bit for bit, also with latents that have few matches, or none, and ties in bfloat16."""
    found = []
    for most in (1 << 26, 0):
        monkeypatch.setattr(calibrate, "MOST", most)
        sae = new(name, k=1.5).to(dtype)
        with torch.no_grad():
            sae.b_enc[:3] = torch.tensor([-1e4, -3.0, -2.5])
        found.append((sae.calibrate(rows().to(dtype)), sae.allocation.threshold.clone(), dict(sae.info["calibration"])))
    assert torch.equal(found[0][1], found[1][1]) and found[0][::2] == found[1][::2]


@pytest.mark.slow
@pytest.mark.parametrize("name", COUPLED)
def test_memory_does_not_grow_with_rows_and_k(name: str, tmp_path: Path) -> None:
    """A million matches for every thousand rows: 81 bytes for each would be 8 GB."""
    code = f"""
import resource, torch, apportion as ap
from apportion.architectures import calibrate, counting
sae = ap.create({name!r}, d_in=4, d_sae=16384, k=1024, seed=0)
x = torch.randn(100_000, 4, generator=torch.Generator().manual_seed(0))
sae.fit_input(x)
sae.calibrate(x[:20])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert abs(sae.calibrate(x) - 1024) < 0.1
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 500


@pytest.mark.parametrize("reserve", [1.0, 1.5])
def test_a_raised_floor_keeps_so_many_and_no_more(reserve: float) -> None:
    """`reserve` times 16 more than the wanted matches: in all, or of each latent. Ties with the last stay."""
    g = torch.Generator().manual_seed(0)
    latents, affinity = torch.randint(0, 3, (400,), generator=g), torch.rand(400, generator=g) + 1
    latents[:380] = latents[:380].clamp_max(1)  # latent 2 is rare
    floor = calibrate.raised(torch.zeros(()), latents, affinity, 100, reserve)
    kept = affinity > floor
    assert int(kept.sum()) == int(116 * reserve) and affinity[kept].min() == torch.nextafter(floor, torch.tensor(9.0))
    wanted = torch.tensor([40, 60, 60])
    floors = calibrate.raised(torch.zeros(3), latents, affinity, wanted, reserve)
    counts = torch.bincount(latents[affinity > floors[latents]], minlength=3)
    assert counts[:2].tolist() == [int(56 * reserve), int(76 * reserve)]
    assert floors[2] == 0 and counts[2] == (latents == 2).sum()
    assert calibrate.raised(torch.tensor(1.9), latents, affinity, 100, reserve) == torch.tensor(1.9), "never lower"
    affinity[:] = 1.5
    assert bool((affinity > calibrate.raised(torch.zeros(()), latents, affinity, 100, reserve)).all())


@pytest.mark.parametrize("name", COUPLED)
def test_a_pool_does_not_grow_with_what_nobody_wants(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It shrinks at twice what is needed, so that it holds no more than that and the matches of one part."""
    monkeypatch.setattr(calibrate, "HELD", 0)
    sae, xs = new(name, k=1), ways(rows())["shuffled"]
    with torch.no_grad():
        pool = calibrate.pooled(sae, lambda: sae.input.apply_to(xs.double()).split(500), None, reserve=2.0)
    assert pool is not None
    needed = 2 * (len(xs) + 16 * pool.floor.numel())
    assert len(xs) < len(pool.affinity) <= 2 * needed + 500 * D_SAE
    assert bool((pool.affinity > (pool.floor if pool.floor.ndim == 0 else pool.floor[pool.latents.long()])).all())


def test_a_mutual_phase_of_feature_choice_has_one_threshold(space: str) -> None:
    sae = new("feature_choice", switch_at=0.5)
    assert sae.calibrate(rows()) == K
    plain = new("mutual_choice")
    plain.calibrate(rows())
    assert torch.equal(sae.allocation.threshold, plain.allocation.threshold.expand(D_SAE))


def test_exactly_as_many_matches_as_are_wanted(space: str) -> None:
    """All matches there are: nothing positive is left out."""
    sae = new("mutual_choice", k=D_SAE)
    sae.calibrate(rows())
    assert sae.allocation.threshold == 0
    with torch.no_grad():
        sae.b_enc += 1e3
    assert sae.calibrate(rows()) == D_SAE and sae.allocation.threshold == 0

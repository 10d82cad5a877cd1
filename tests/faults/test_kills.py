"""SIGKILL before every change that a command makes to the file system, and at random moments.

After each of them the same command is given again: it must end as if nothing had happened, bit for bit, and leave
nothing behind that nobody would remove.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from children import changes_of, end_of, killed, orphans, start
from small_run import allowed, cache, collect_small, contents, train
from trials import trials

import apportion as ap
from apportion.language.model import load_model
from apportion.rows.manifest import read_manifest


def _sae(seed: int) -> ap.SAE:
    sae = ap.create("topk", d_in=8, d_sae=16, k=2 + seed, seed=seed)
    sae.info["of"] = seed
    return sae.eval()


def _export(root: Path) -> None:
    with allowed("not empty"):
        ap.export(ap.create("topk", d_in=8, d_sae=16, k=2, seed=0).eval(), root / "deep" / "sae", "sae_lens")


def _export_in_place(root: Path) -> None:
    (root / "sae").mkdir(exist_ok=True)
    with allowed("not empty"):
        ap.export(ap.create("topk", d_in=8, d_sae=16, k=2, seed=0).eval(), root / "sae", "sae_lens")


def _save_over(root: Path) -> None:
    """Whatever moment it dies at, what is loaded then is one of the two SAEs, with its own settings."""
    _sae(1).save(root / "sae")


def _one_of_two(root: Path) -> None:
    found = ap.load(root / "sae")
    wanted = _sae(found.info["of"])
    assert found.settings() == wanted.settings()
    assert torch.equal(found.W_enc, wanted.W_enc)  # type: ignore[attr-defined]


def _nothing(root: Path) -> None:
    pass


def _begun(root: Path) -> None:
    """A run that was killed at step 8, after the checkpoint of step 6."""

    def die(number: int) -> None:
        if number == 9:
            os.kill(os.getpid(), signal.SIGKILL)

    from small_run import Watched

    assert end_of(start(lambda: train(root / "run", Watched(die)))) == -signal.SIGKILL


WORK: dict[str, tuple[Callable[..., None], Callable[..., None], Callable[..., Any]]] = {
    "train": (_nothing, lambda root: train(root / "run"), lambda root: contents(root / "run")),
    "resume": (_begun, lambda root: train(root / "run"), lambda root: contents(root / "run")),
    "convert": (_nothing, _export, lambda root: contents(root / "deep")),
    "convert in place": (_nothing, _export_in_place, lambda root: contents(root / "sae")),
    "save over another": (lambda root: _sae(0).save(root / "sae"), _save_over, lambda root: contents(root / "sae")),
}
"""What comes before, the command, and what it makes."""


def check_every_kill(
    prepare: Callable[[Path], None], work: Callable[[Path], Any], result: Callable[[Path], Any], folder: Path,
    chosen: Callable[[int], list[int]], between: Callable[[Path], None] = _nothing,
) -> int:  # fmt: skip
    """Returns how many kills there were."""
    template = folder / "template"
    template.mkdir()
    prepare(template)

    def fresh(name: str) -> Path:
        return Path(shutil.copytree(template, folder / name))

    whole = fresh("whole")
    count = changes_of(lambda: work(whole), whole, folder / "count")
    wanted, points = result(whole), chosen(count)
    assert count > 5 and not orphans(whole)
    for at in points:
        root = fresh(f"killed-{at}")
        assert killed(lambda root=root: work(root), root, at), f"change {at} of {count} did not come"
        between(root)
        assert end_of(start(lambda root=root: work(root))) == 0, f"after a kill at {at} it cannot be done"
        assert result(root) == wanted, f"after a kill at {at} the result differs"
        assert not orphans(root), f"a kill at {at} leaves {orphans(root)}"
        shutil.rmtree(root)
    return len(points)


def a_few(count: int) -> list[int]:
    """Evenly spaced, with the last."""
    return sorted({round(i * (count - 1) / 8) for i in range(9)})


def the_others(count: int) -> list[int]:
    return sorted({*range(count)} - {*a_few(count)})


some = pytest.mark.parametrize("chosen", [a_few, pytest.param(the_others, marks=pytest.mark.slow)])


@pytest.mark.few(1)
@pytest.mark.fault("SIGKILL before every change of the file system")
@some
@pytest.mark.parametrize("name", WORK)
def test_killed_before_any_change(
    name: str, tmp_path: Path, chosen: Callable[[int], list[int]], record_property: Callable[[str, Any], None]
) -> None:
    between = _one_of_two if name == "save over another" else _nothing
    record_property("trials", check_every_kill(*WORK[name], tmp_path, chosen, between))


@pytest.mark.fault("SIGKILL before every change of the file system")
@some
def test_killed_before_any_change_of_a_collection(
    tiny_model_dir: Path, tmp_path: Path, chosen: Callable[[int], list[int]],
    record_property: Callable[[str, Any], None],
) -> None:  # fmt: skip
    lm = load_model(tiny_model_dir)
    count = check_every_kill(_nothing, lambda root: collect_small(root, lm), cache, tmp_path, chosen)
    record_property("trials", count)


@pytest.fixture(scope="module")
def whole_cache(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, Any], float]:
    folder, lm = tmp_path_factory.mktemp("whole_cache"), load_model(tiny_model_dir)
    begun = time.perf_counter()
    assert end_of(start(lambda: collect_small(folder, lm))) == 0
    return lm, cache(folder), time.perf_counter() - begun


@pytest.mark.few(3)
@pytest.mark.fault("SIGKILL at random moments")
@pytest.mark.parametrize("seed", trials(range(50), short=6))
def test_a_collection_killed_at_any_moment(
    seed: int, tmp_path: Path, whole_cache: tuple[Any, dict[str, Any], float]
) -> None:
    lm, wanted, seconds = whole_cache
    chance, rows = random.Random(seed), 0
    for _ in range(3):
        pid = start(lambda: collect_small(tmp_path, lm))
        time.sleep(chance.uniform(0, seconds))
        os.kill(pid, signal.SIGKILL)
        end_of(pid)
        if (tmp_path / "acts" / "manifest.json").exists():
            now = read_manifest(tmp_path / "acts")["rows"]
            assert now >= rows, "what was there is gone"
            rows = now
    assert end_of(start(lambda: collect_small(tmp_path, lm))) == 0
    assert cache(tmp_path) == wanted
    assert not orphans(tmp_path)


@pytest.mark.few(2)
@pytest.mark.fault("SIGKILL at random moments")
@pytest.mark.parametrize("seed", trials(range(50), short=4))
def test_four_collections_at_once_killed_at_any_moment(
    seed: int, tmp_path: Path, whole_cache: tuple[Any, dict[str, Any], float]
) -> None:
    """Of four processes that make one cache three are killed, one after the other, and others come."""
    lm, wanted, seconds = whole_cache
    chance = random.Random(seed)
    running = [start(lambda: collect_small(tmp_path, lm)) for _ in range(4)]
    for _ in range(3):
        time.sleep(chance.uniform(0, seconds))
        pid = running.pop(chance.randrange(len(running)))
        os.kill(pid, signal.SIGKILL)
        end_of(pid)
        running.append(start(lambda: collect_small(tmp_path, lm)))
    for pid in running:
        end_of(pid)
    assert end_of(start(lambda: collect_small(tmp_path, lm))) == 0
    assert cache(tmp_path) == wanted
    assert not orphans(tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], float]:
    folder = tmp_path_factory.mktemp("whole") / "run"
    begun = time.perf_counter()
    assert end_of(start(lambda: train(folder))) == 0
    return contents(folder), time.perf_counter() - begun


@pytest.mark.few(3)
@pytest.mark.fault("SIGKILL at random moments")
@pytest.mark.parametrize("seed", trials(range(50), short=6))
def test_killed_at_any_moment(seed: int, tmp_path: Path, whole: tuple[dict[str, Any], float]) -> None:
    """Again and again, until it comes through."""
    wanted, seconds = whole
    chance = random.Random(seed)
    for _ in range(3):
        pid = start(lambda: train(tmp_path / "run"))
        time.sleep(chance.uniform(0, seconds))
        os.kill(pid, signal.SIGKILL)
        end_of(pid)
    assert end_of(start(lambda: train(tmp_path / "run"))) == 0
    assert contents(tmp_path / "run") == wanted
    assert not orphans(tmp_path)

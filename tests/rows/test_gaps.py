"""Caches with a gap: what was told to stop, repaired or merged stays readable and can be gone on with."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_store import OUT, files, said, tiny

from apportion.interrupt import Interrupted
from apportion.language import collect as collect_module
from apportion.language.model import load_model
from apportion.rows import writer as writer_module
from apportion.rows.filter import TokenFilter
from apportion.rows.layout import sealed
from apportion.rows.manifest import read_manifest
from apportion.rows.mend import merge, repair
from apportion.rows.norms import check_histograms
from apportion.rows.out import folder_lock
from apportion.rows.store import ActivationStore
from apportion.rows.writer import StoreWriter


@pytest.fixture(scope="module")
def lm(tiny_model_dir: Path) -> tuple[Any, Any]:
    return load_model(tiny_model_dir)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "SHARD_ROWS", 40)


def interrupted(lm: tuple[Any, Any], out: Path, at: int, **settings: Any) -> str:
    """A collection that gets a Ctrl-C at its batch number `at`; what it says."""
    run, calls = collect_module.run_contexts, 0

    def stopping(*args: Any, **how: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at + 1:  # the first finds the widths
            os.kill(os.getpid(), signal.SIGINT)
        return run(*args, **how)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted) as stopped:
        patch.setattr(collect_module, "run_contexts", stopping)
        tiny(lm, out, **settings)
    return str(stopped.value)


@pytest.mark.parametrize("at", [1, 2])
def test_a_stop_while_the_first_shard_is_missing(at: int, lm: tuple[Any, Any], tmp_path: Path) -> None:
    tiny(lm, tmp_path / "one")
    tiny(lm, tmp_path / "acts")
    (tmp_path / "acts" / OUT / "00000.safetensors").unlink()
    repair(tmp_path / "acts")
    interrupted(lm, tmp_path / "acts", at)
    assert read_manifest(tmp_path / "acts")["rows"] in (0, 16)
    assert repair(tmp_path / "acts") == []
    tiny(lm, tmp_path / "acts")
    assert files(tmp_path / "acts") == files(tmp_path / "one") and said(tmp_path / "acts") == said(tmp_path / "one")


def test_a_stop_of_one_while_another_makes_the_first_shard(lm: tuple[Any, Any], tmp_path: Path) -> None:
    tiny(lm, tmp_path / "one")
    run, calls = collect_module.run_contexts, 0

    def waiting(*args: Any, **how: Any) -> Any:
        nonlocal calls
        calls += 1
        while calls == 2 and not (tmp_path / "go").exists():
            time.sleep(0.01)
        return run(*args, **how)

    def slow() -> None:
        collect_module.run_contexts = waiting
        tiny(lm, tmp_path / "acts")

    process = multiprocessing.get_context("fork").Process(target=slow)
    process.start()
    deadline = time.monotonic() + 30
    while not (tmp_path / "acts" / "00000.apportion.lock").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    message = interrupted(lm, tmp_path / "acts", 4)
    assert "0 of 400 tokens" in message and "collect again" in message
    (tmp_path / "go").touch()
    process.join(60)
    assert process.exitcode == 0
    assert files(tmp_path / "acts") == files(tmp_path / "one") and said(tmp_path / "acts") == said(tmp_path / "one")


def test_behind_a_gap_nothing_is_complete(lm: tuple[Any, Any], tmp_path: Path) -> None:
    tiny(lm, tmp_path / "acts", tokens=160)
    (tmp_path / "acts" / OUT / "00002.safetensors").unlink()
    repair(tmp_path / "acts")
    assert "To go on" in interrupted(lm, tmp_path / "acts", 1, tokens=160)
    assert json.loads((tmp_path / "acts" / "manifest.json").read_text())["ended"] == "interrupted"


def test_a_merged_cache_is_not_repaired_and_stays_as_it_is(lm: tuple[Any, Any], tmp_path: Path) -> None:
    tiny(lm, tmp_path / "a", tokens=40)
    tiny(lm, tmp_path / "b", tokens=40)
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "ab")
    (tmp_path / "ab" / "tokens-00003.safetensors").write_bytes(b"no")
    before = files(tmp_path / "ab"), said(tmp_path / "ab")
    with pytest.raises(ValueError, match=r"tokens-00003.*merge or write it again"):
        repair(tmp_path / "ab")
    assert (files(tmp_path / "ab"), said(tmp_path / "ab")) == before


def test_a_repair_holds_no_lock_while_it_reads(
    lm: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny(lm, tmp_path / "acts")

    def reading(file: Path) -> str:
        with folder_lock(tmp_path / "acts", 0):
            return "another"

    monkeypatch.setattr("apportion.rows.mend.sha256_of", reading)
    assert repair(tmp_path / "acts")


@pytest.mark.parametrize("how", ["missing", "garbage"])
def test_going_on_over_damaged_labels_says_what_to_do(how: str, lm: tuple[Any, Any], tmp_path: Path) -> None:
    interrupted(lm, tmp_path / "acts", 8)
    file = tmp_path / "acts" / "tokens-00001.safetensors"
    file.unlink() if how == "missing" else file.write_bytes(b"garbage")
    with pytest.raises(ValueError, match=r"shard 1 of .* is damaged.*cache repair"):
        tiny(lm, tmp_path / "acts")
    repair(tmp_path / "acts")
    tiny(lm, tmp_path / "acts")
    ActivationStore(tmp_path / "acts").verify()


def test_a_reader_while_the_journal_moves_into_the_manifest(
    lm: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny(lm, tmp_path / "acts")
    whole = (tmp_path / "acts" / "manifest.json").read_text()
    manifest = json.loads(whole)
    begun = sealed(manifest | {"shards": [], "rows": 0, "contexts": 0, "ended": "unfinished"})
    (tmp_path / "acts" / "manifest.json").write_text(json.dumps(begun))
    from apportion.rows import manifest as manifest_module

    known = manifest_module.known_shards

    def moved(*args: Any) -> Any:
        (tmp_path / "acts" / "manifest.json").write_text(whole)
        return known(*args)

    monkeypatch.setattr(manifest_module, "known_shards", moved)
    assert read_manifest(tmp_path / "acts")["rows"] == 400


HOSTILE: dict[str, Any] = {
    "no filter": lambda m: m.update(plan={}),
    "a filter of another kind": lambda m: m["plan"].update(filter=5),
    "a filter with other fields": lambda m: m["plan"]["filter"].update(norm_outlier="much"),
}


@pytest.mark.parametrize("how", HOSTILE)
def test_plans_that_were_edited_are_one_error(how: str, lm: tuple[Any, Any], tmp_path: Path) -> None:
    interrupted(lm, tmp_path / "acts", 8)
    manifest = json.loads((tmp_path / "acts" / "manifest.json").read_text())
    HOSTILE[how](manifest)
    (tmp_path / "acts" / "manifest.json").write_text(json.dumps(sealed(manifest)))
    with pytest.raises(ValueError, match=r"manifest\.json: .*as it was written"):
        read_manifest(tmp_path / "acts")


def test_statistics_that_cannot_be_are_one_error(lm: tuple[Any, Any], tmp_path: Path) -> None:
    for bad in ([[4095, 1, 1.0]], [[1, 10**400, 1.0]], [[1, 1, None]], [[-1, 1, 1.0]], [[1, 0, 1.0]], [1], {}):
        with pytest.raises(ValueError, match="no histograms"):
            check_histograms({"ordinary": bad, "first_position": [], "special": []}, "x")
    interrupted(lm, tmp_path / "acts", 8, dtype="int8")
    file = tmp_path / "acts" / OUT / "00000.safetensors"
    (tmp_path / "acts" / "manifest.json").write_text(
        json.dumps(sealed(json.loads((tmp_path / "acts" / "manifest.json").read_text()) | {"shards": [], "rows": 0}))
    )
    norms = {"ordinary": [[2000, 1, 1.0]], "first_position": [], "special": []}
    stats = json.dumps({"norms": norms, "lost": 5})
    save_file(load_file(file), file, {"stats": stats})
    from apportion.rows.refit import stats_of

    with pytest.raises(ValueError, match="no sums of squares"):
        stats_of(file)


def test_what_a_writer_of_rows_refuses(tmp_path: Path) -> None:
    def writer() -> StoreWriter:
        return StoreWriter(tmp_path / "acts", {"a": 4}, dtype="int8", token_filter=TokenFilter(), special_ids=())

    rows = torch.arange(8)
    with writer() as out, pytest.raises(ValueError, match="no rows"):
        out.finish({})
    x = torch.ones(8, 4)
    x[3] = float("nan")
    with pytest.raises(ValueError, match="8 bits cannot hold"), writer() as out:
        out.add({"a": x}, rows, rows, rows)
        out.finish({})
    with pytest.raises(ZeroDivisionError), writer() as out:
        out.shard_rows = 4
        out.add({"a": torch.ones(8, 4)}, rows, rows, rows)
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())

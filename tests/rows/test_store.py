"""The cache, format version 2: shards that depend on nothing but the numbers of their contexts, the journal, 8 bits."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from apportion.language.collect import collect
from apportion.language.model import load_model
from apportion.rows import writer as writer_module
from apportion.rows.filter import TokenFilter, row_norms
from apportion.rows.journal import JOURNAL, Follower, add_line, lines
from apportion.rows.manifest import read_manifest
from apportion.rows.norms import counted, counted_exactly, fitted, histograms
from apportion.rows.numbers import lost, restored, stored
from apportion.rows.store import ActivationStore

TEXT = ["the cat sat on the mat and looked at the dog by the sea " * 40, "she read a book about ships " * 40]
OUT = "model.layers.1"


@pytest.fixture(scope="module")
def lm(tiny_model_dir: Path) -> tuple[Any, Any]:
    return load_model(tiny_model_dir)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "SHARD_ROWS", 40)  # two batches of two contexts


def tiny(lm: tuple[Any, Any], out: Path, **settings: Any) -> dict[str, Any]:
    how = {"tokens": 400, "context_tokens": 8, "batch_contexts": 2, "text": TEXT} | settings
    return collect(*lm, OUT, how.pop("text"), out=out, **how)


def files(folder: Path) -> dict[str, str]:
    """Digests of all files but the manifest."""
    found = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != "manifest.json"]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in found}


def said(folder: Path) -> dict[str, Any]:
    manifest = json.loads((folder / "manifest.json").read_text())
    return manifest | dict.fromkeys(("seconds", "tokens_per_s", "manifest_sha256"))


def in_a_process(lm: tuple[Any, Any], out: Path, **settings: Any) -> Any:
    process = multiprocessing.get_context("fork").Process(target=tiny, args=(lm, out), kwargs=settings)
    process.start()
    return process


def slowly() -> Iterator[str]:
    for text in TEXT:
        for word in text.split(". "):
            time.sleep(0.01)
            yield word


@pytest.mark.parametrize("num", [2, 4])
def test_several_processes_make_the_bytes_of_one(num: int, lm: tuple[Any, Any], tmp_path: Path) -> None:
    tiny(lm, tmp_path / "one")
    processes = [in_a_process(lm, tmp_path / "acts") for _ in range(num)]
    for process in processes:
        process.join(60)
    assert files(tmp_path / "acts") == files(tmp_path / "one") and said(tmp_path / "acts") == said(tmp_path / "one")
    ActivationStore(tmp_path / "acts").verify()
    # who came when all was there is told so
    assert {process.exitcode for process in processes} <= {0, 1} and processes[0].exitcode is not None


def test_a_journal_is_followed(tmp_path: Path) -> None:
    """What comes is read once, also behind a line that somebody is writing, and in another file of that name."""
    follower, file = Follower(tmp_path), tmp_path / JOURNAL
    assert list(follower.lines()) == [] and not follower.is_new()
    for shard in range(3):
        add_line(tmp_path, {"shard": shard})
        assert [line["shard"] for line in follower.lines()] == [shard]
    add_line(tmp_path, {"shard": 3})
    whole = file.read_bytes()
    with file.open("r+b") as stream:
        stream.truncate(len(whole) - 9)
    assert list(follower.lines()) == []
    with file.open("ab") as stream:
        stream.write(whole[-9:])
    assert [line["shard"] for line in follower.lines()] == [3] and list(follower.lines()) == []
    file.rename(tmp_path / "old")
    assert follower.is_new()
    for shard in range(6):
        add_line(tmp_path, {"shard": shard})
    assert follower.is_new()
    follower.rewind()
    assert [line["shard"] for line in follower.lines()] == [*range(6)]


@pytest.mark.parametrize("seed", range(2))
def test_what_a_killed_process_had_begun_is_made_by_another(seed: int, lm: tuple[Any, Any], tmp_path: Path) -> None:
    tiny(lm, tmp_path / "one")
    first = in_a_process(lm, tmp_path / "acts")
    second = in_a_process(lm, tmp_path / "acts")
    time.sleep(0.05 + 0.1 * seed)
    os.kill(first.pid, signal.SIGKILL)
    first.join(60)
    second.join(60)
    if said(tmp_path / "acts")["ended"] != "complete":  # the first was alone at that moment
        tiny(lm, tmp_path / "acts")
    assert files(tmp_path / "acts") == files(tmp_path / "one") and said(tmp_path / "acts") == said(tmp_path / "one")


def test_shards_that_somebody_makes_are_waited_for(lm: tuple[Any, Any], tmp_path: Path) -> None:
    """Of two processes, the one that is through with its own waits, and takes over what the other gives up."""
    tiny(lm, tmp_path / "one")
    from apportion.language import collect as collect_module

    run, shards = collect_module.run_contexts, []

    def hanging(*args: Any, **settings: Any) -> Any:
        shards.append(1)
        if len(shards) == 4:  # the first call finds the widths; in the second shard
            os.kill(os.getpid(), signal.SIGSTOP)
        return run(*args, **settings)

    def slow(out: Path) -> None:
        collect_module.run_contexts = hanging
        tiny(lm, out)

    process = multiprocessing.get_context("fork").Process(target=slow, args=(tmp_path / "acts",))
    process.start()
    deadline = time.monotonic() + 30
    while not (tmp_path / "acts" / "00001.apportion.lock").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    other = in_a_process(lm, tmp_path / "acts")
    while len(list(lines(tmp_path / "acts"))) < 12 and time.monotonic() < deadline:
        time.sleep(0.01)
    other.join(1)
    assert other.is_alive(), "it does not wait"
    manifest = read_manifest(tmp_path / "acts")
    assert manifest["rows"] == 32 and manifest["ended"] == "unfinished", "there is a gap behind the first shard"
    assert ActivationStore(tmp_path / "acts").rows == 32
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    other.join(30)
    assert other.exitcode == 0
    assert files(tmp_path / "acts") == files(tmp_path / "one") and said(tmp_path / "acts") == said(tmp_path / "one")


def test_appending_changes_no_byte_of_what_is_there(lm: tuple[Any, Any], tmp_path: Path) -> None:
    """Nor do the rows of the last shard, which becomes longer."""
    tiny(lm, tmp_path / "acts", tokens=200)
    before, x = files(tmp_path / "acts"), ActivationStore(tmp_path / "acts").gather(torch.arange(200))
    tiny(lm, tmp_path / "acts", append=True)
    after = files(tmp_path / "acts")
    last = {name for name in before if name.endswith("00006.safetensors")}
    assert len(last) == 2 and all(after[name] == before[name] for name in before.keys() - last)
    assert torch.equal(ActivationStore(tmp_path / "acts").gather(torch.arange(200)), x)


def test_the_filter_is_that_of_all_rows(lm: tuple[Any, Any], tmp_path: Path) -> None:
    """In whatever order they come, to within a bin of the exact median; counts are exact."""
    for out, text in (("a", TEXT), ("b", TEXT[::-1])):
        tiny(lm, tmp_path / out, text=text, tokens=10**6, token_filter=TokenFilter(norm_outlier=1.05))
        store = ActivationStore(tmp_path / out)
        norms = row_norms(store.gather(torch.arange(store.rows)))
        exact = TokenFilter(norm_outlier=1.05).fit(norms, store.tokens, store.positions, store.filter.special_ids)
        assert store.filter.median_norm == pytest.approx(exact.median_norm, rel=0.02)
        assert torch.equal(store.mask, store.filter.mask_of(norms, store.tokens, store.positions))
        assert store.site.filtered["norm_outlier"] > 0 and sum(store.site.filtered.values()) == int((~store.mask).sum())
        assert store.site.mean_norm == pytest.approx(float(norms[store.mask].double().mean()))


@pytest.mark.parametrize("limit", [None, 1.5, 3.0, 1e9])
def test_counts_of_a_histogram_are_those_of_the_norms(limit: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    norms = torch.randn(5000, generator=generator).exp()
    columns = {"norms": norms, "tokens": torch.arange(5000) % 7, "positions": torch.arange(5000) % 11}
    shards = [{n: c[part] for n, c in columns.items()} for part in (slice(0, 1000), slice(1000, 5000))]
    stats = [histograms(s["norms"], s["tokens"], s["positions"], (3,)) for s in shards]
    fit = fitted(TokenFilter(norm_outlier=limit), json.loads(json.dumps(stats)), (3,))
    ordinary = norms[(columns["tokens"] != 3) & (columns["positions"] != 0)]
    assert fit.median_norm == pytest.approx(float(ordinary.median()), rel=2e-3)
    for one, shard in zip(stats, shards, strict=True):
        exact = counted_exactly(fit, shard)
        found = counted(fit, one)
        assert found is None or (found["kept"] == exact["kept"] and found["left_out"] == exact["left_out"])
        assert found is None or found["norm_sum"] == pytest.approx(exact["norm_sum"])
        assert (found is None) == (limit in (1.5, 3.0)), "within a bin only the norms themselves tell"


def test_a_line_that_was_cut_off_is_passed_over(tmp_path: Path) -> None:
    for shard in range(3):
        add_line(tmp_path, {"shard": shard})
    whole = (tmp_path / JOURNAL).read_bytes()
    for cut in range(1, len(whole)):
        (tmp_path / JOURNAL).write_bytes(whole[:cut])
        found = [line["shard"] for line in lines(tmp_path)]
        assert found == list(range(len(found))) and len(found) == (whole[:cut] + b"\n").count(b"}\n")
        add_line(tmp_path, {"shard": 7})
        assert [line["shard"] for line in lines(tmp_path)] == [*found, 7]
    (tmp_path / JOURNAL).write_bytes(whole.replace(b'"shard": 1', b'"shard": 8'))
    assert [line["shard"] for line in lines(tmp_path)] == [0, 2], "a line that was edited"


def test_eight_bits_and_what_they_cost(lm: tuple[Any, Any], tmp_path: Path) -> None:
    tiny(lm, tmp_path / "full", dtype="float32")
    manifest = tiny(lm, tmp_path / "acts", dtype="int8")
    full, store = ActivationStore(tmp_path / "full"), ActivationStore(tmp_path / "acts")
    exact, x = full.gather(torch.arange(400)), store.gather(torch.arange(400))
    assert (x - exact).abs().max() <= exact.abs().amax(1).max() / 254 * 1.001
    each = [(x[rows], exact[rows]) for rows in store.mask.nonzero().squeeze(1).split(parts_of(store))]
    error = sum(float((a - b).square().sum()) for a, b in each)
    fvu = error / sum(float((b - b.mean(0)).square().sum()) for _, b in each)
    assert manifest["dtype"] == "int8" and store.site.precision_fvu == pytest.approx(fvu, rel=0.01) and 0 < fvu < 1e-3
    assert sum(f.stat().st_size for f in (tmp_path / "acts" / OUT).iterdir()) < 0.6 * sum(
        f.stat().st_size for f in (tmp_path / "full" / OUT).iterdir()
    )
    tiny(lm, tmp_path / "steps", dtype="int8", tokens=144)  # the last shard has one batch of two
    tiny(lm, tmp_path / "steps", dtype="int8", append=True)
    assert files(tmp_path / "steps") == files(tmp_path / "acts")


def parts_of(store: ActivationStore) -> list[int]:
    """How many rows of each shard take part."""
    return [int(part.sum()) for part in store.mask.split([shard["rows"] for shard in store.manifest["shards"]])]


def test_zeros_in_eight_bits() -> None:
    x = torch.tensor([[0.0, 0.0], [1.0, -3.0], [1e-38, 0.0], [3e38, -3e38]])
    held = stored(x, "int8")
    assert torch.allclose(restored(held), x, rtol=0.01, atol=1e-38)
    assert lost(x[:2], {name: column[:2] for name, column in held.items()})[0] == pytest.approx(0, abs=1e-3)


def test_ten_lines_of_numpy(lm: tuple[Any, Any], tmp_path: Path) -> None:
    """As docs/store.md has them."""
    tiny(lm, tmp_path / "acts", dtype="float32")
    docs = (Path(__file__).parents[2] / "docs" / "store.md").read_text()
    code = docs.split("```python\n")[1].split("```")[0]
    scope: dict[str, Any] = {}
    exec(code.replace('Path("acts")', f"Path({str(tmp_path / 'acts')!r})"), scope)
    store = ActivationStore(tmp_path / "acts")
    assert np.array_equal(scope["x"], store.gather(torch.arange(store.rows))[store.mask].numpy())


def test_shards_hold_what_they_say(lm: tuple[Any, Any], tmp_path: Path) -> None:
    manifest = tiny(lm, tmp_path / "acts")
    assert [(s["shard"], s["contexts"], s["rows"]) for s in manifest["shards"]] == [
        *((n, 4, 32) for n in range(12)),
        (12, 2, 16),
    ]
    assert manifest["shard_contexts"] == 4 and not (tmp_path / "acts" / JOURNAL).exists()
    for number in range(13):
        labels = load_file(tmp_path / "acts" / f"tokens-{number:05d}.safetensors")
        assert labels["contexts"].unique().tolist() == list(range(number * 4, min(50, number * 4 + 4)))

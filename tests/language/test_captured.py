"""Sources that share the passes of a model hand out what each would alone, and the model runs once."""

from __future__ import annotations

import weakref
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from apportion.language import LiveSource, load_model, read_contexts
from apportion.language.captured import Captured, Kept
from apportion.language.collect import collect
from apportion.language.fingerprint import _probe, model_fingerprint
from apportion.language.model import run_contexts
from apportion.rows import ActivationStore, Batch, PairStore, TokenFilter

TEXT = ["the cat sat on the mat and looked at the dog by the old house and the sea was calm " * 40]
PLACES = ("model.layers.0", "model.layers.0.mlp", "model.layers.1")
CONTEXT, BLOCK = 8, 96


@pytest.fixture(scope="module")
def lm(tiny_model_dir: Path) -> tuple[Any, Any]:
    return load_model(tiny_model_dir)


@pytest.fixture(scope="module")
def contexts(lm: tuple[Any, Any]) -> Tensor:
    return read_contexts(lm[1], TEXT, tokens=600, context_tokens=CONTEXT)


def live(
    lm: tuple[Any, Any], contexts: Tensor, place: str, captured: Captured | None = None, **more: Any
) -> LiveSource:
    settings = {"buffer_tokens": BLOCK, "batch_contexts": 4, "token_filter": TokenFilter(norm_outlier=1.5), "seed": 3}
    return LiveSource(*lm, place, contexts, captured=captured, **settings | more)


def in_step(sources: list[LiveSource], batches: int) -> list[list[Batch]]:
    """What each hands out, one batch after the other."""
    for source in sources:
        source.join()
    streams = [source.batches(32) for source in sources]
    found = [[next(stream) for stream in streams] for _ in range(batches)]
    return [list(column) for column in zip(*found, strict=True)]


def equal(one: list[Batch], other: list[Batch]) -> bool:
    return all(
        torch.equal(a.x, b.x) and (a.target is None or torch.equal(a.target, b.target))  # type: ignore[arg-type]
        for a, b in zip(one, other, strict=True)
    )


def test_each_hands_out_what_it_would_alone_and_the_model_runs_once(lm: tuple[Any, Any], contexts: Tensor) -> None:
    captured = Captured(*lm, contexts)
    sources = [live(lm, contexts, place, captured) for place in PLACES]
    found = in_step(sources, 40)  # two epochs and more
    for place, own in zip(PLACES, found, strict=True):
        assert equal(own, list(islice(live(lm, contexts, place).batches(32), 40)))
    alone = Captured(*lm, contexts)
    in_step([live(lm, contexts, PLACES[0], alone)], 40)
    assert captured.passes <= alone.passes + 3 * BLOCK // CONTEXT, "a source may be a block ahead of another"
    for source in sources:
        source.leave()
    assert captured._held_bytes == 0


@pytest.mark.parametrize("most_held", [0.0, 5000.0, 60_000.0])
def test_little_memory_costs_passes_and_changes_nothing(
    lm: tuple[Any, Any], contexts: Tensor, most_held: float
) -> None:
    captured = Captured(*lm, contexts, most_held)
    found = in_step([live(lm, contexts, place, captured) for place in PLACES], 30)
    assert captured._held_bytes <= most_held
    for place, own in zip(PLACES, found, strict=True):
        assert equal(own, list(islice(live(lm, contexts, place).batches(32), 30)))


def test_who_is_held_for(lm: tuple[Any, Any], contexts: Tensor) -> None:
    """As many as there is room for, and nobody who has had it."""
    chosen = torch.arange(4)
    captured = Captured(*lm, contexts, most_held=4 * CONTEXT * 32 * 4)
    first, second, third = (captured.reader([place]) for place in PLACES)
    for reader in (first, second, third):
        reader.join()
    first.rows(chosen)
    assert [len(reader.held) for reader in (first, second, third)] == [0, 1, 0]
    captured.most_held = 10**9
    third.rows(chosen)
    assert [len(reader.held) for reader in (first, second, third)] == [0, 1, 0]
    second.rows(chosen)
    assert captured.passes == 8 and captured._held_bytes == 0


def test_one_that_is_elsewhere_finds_its_own_and_nothing_piles_up(lm: tuple[Any, Any], contexts: Tensor) -> None:
    """One resumes further on, one has left: what was held for them does not stay."""
    captured = Captured(*lm, contexts)
    first, second, gone = (live(lm, contexts, place, captured) for place in PLACES)
    first.join(), second.join(), gone.join()
    ahead = live(lm, contexts, PLACES[1])
    stream = ahead.batches(32)
    for _ in range(9):
        next(stream)
    second.load_state_dict(ahead.state_dict())
    own, other = first.batches(32), second.batches(32)
    for _ in range(9):
        next(own)
    gone.leave()
    for batch in islice(stream, 12):
        assert torch.equal(next(other).x, batch.x)
        next(own)
    width = sum(source.d_in for source in (first, second))
    assert captured._held_bytes <= 3 * BLOCK * width * 4


def test_what_is_read_again_is_kept_and_only_as_far_as_there_is_room(lm: tuple[Any, Any], contexts: Tensor) -> None:
    captured = Captured(*lm, contexts)
    sources = [live(lm, contexts, place, captured) for place in PLACES]
    for source in sources:
        source.join()
    first = [torch.cat([batch.x for batch in source.held_out(200)]) for source in sources]
    passes = captured.passes
    again = [torch.cat([batch.x for batch in source.held_out(200)]) for source in sources]
    assert captured.passes == passes, "the model did not run again"
    for place, one, two in zip(PLACES, first, again, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, torch.cat([batch.x for batch in live(lm, contexts, place).held_out(200)]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kept_rows_are_the_same(dtype: torch.dtype) -> None:
    kept, x, y = Kept(), torch.randn(7, 5).to(dtype), torch.randn(7, 3).to(dtype)
    kept.add((1, 2), {"a": x})
    kept.add((3,), {"a": x + 1, "b": y})
    assert kept.find((1, 2), ["a", "b"]) is None and kept.find((9,), ["a"]) is None
    found = kept.find((3,), ["b", "a"])
    assert found is not None and torch.equal(found["a"], x + 1) and torch.equal(found["b"], y)
    gone = weakref.ref(x.untyped_storage())
    del x
    assert gone() is None, "what is in the file does not stay in memory"
    kept._most = 0.0
    kept.add((4,), {"a": y})
    assert kept.find((4,), ["a"]) is None


def test_looking_ahead_changes_no_row_and_no_count(lm: tuple[Any, Any], contexts: Tensor) -> None:
    found = []
    for look_ahead in (False, True):
        source = live(lm, contexts, PLACES[2], look_ahead=look_ahead)
        batches = source.batches(32)
        taken = [next(batches).x for _ in range(25)]
        found.append((taken, source.state_dict(), source.describe().to_json()))
        batches.close()
        again = live(lm, contexts, PLACES[2], look_ahead=look_ahead)
        again.load_state_dict(found[-1][1])
        assert torch.equal(next(again.batches(32)).x, next(source.batches(32)).x)
    assert all(torch.equal(one, other) for one, other in zip(found[0][0], found[1][0], strict=True))
    assert found[0][1:] == found[1][1:]


def test_a_failing_pass_shows_when_its_block_is_due(
    lm: tuple[Any, Any], contexts: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = live(lm, contexts, PLACES[2], look_ahead=True)
    source.sample(8)
    batches = source.batches(32)
    next(batches)
    monkeypatch.setattr(
        "apportion.language.captured.run_contexts", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("no memory"))
    )
    with pytest.raises(RuntimeError, match="no memory"):
        for _ in range(20):
            next(batches)


@pytest.mark.parametrize("pair", [("model.layers.0", "model.layers.1"), ("model.layers.1", "model.layers.0")])
def test_pairs_are_those_of_a_cache(
    pair: tuple[str, str], lm: tuple[Any, Any], contexts: Tensor, tmp_path: Path
) -> None:
    """x and target of one token, where the filters of both places keep it."""
    norms = torch.cat(
        [rows.x.norm(dim=-1) for place in pair for rows in live(lm, contexts, place)._run(torch.arange(9))]
    )
    kept = TokenFilter(norm_outlier=1.2, median_norm=float(norms.median()))
    settings = {"context_tokens": CONTEXT, "dtype": "float32", "token_filter": kept}
    collect(*lm, list(pair), TEXT, tokens=contexts.numel(), out=tmp_path / "acts", batch_contexts=4, **settings)
    store = PairStore(*(ActivationStore(tmp_path / "acts", place) for place in pair))
    wanted = store.batch(store.mask.nonzero().squeeze(1))
    source = live(lm, contexts, pair[0], target_hookpoint=pair[1], token_filter=kept, held_out_share=0.0)
    found, seen = source._filtered_rows(source._train)
    assert wanted.target is not None and found.target is not None and 0 < len(found.x) < contexts.numel()
    torch.testing.assert_close(found.x, wanted.x)  # the last contexts run with fewer others here
    torch.testing.assert_close(found.target, wanted.target)
    about, theirs = source.describe(), store.describe()
    assert (about.target_hookpoint, about.hookpoint) == (pair[1], pair[0]) == (theirs.target_hookpoint, pair[0])
    assert [site.filter for site in about.sites] == [site.filter for site in theirs.sites]
    assert seen.kept == len(found.x) and source.d_out == store.d_out
    with pytest.raises(ValueError, match="both as its rows and as their target"):
        live(lm, contexts, pair[0], target_hookpoint=pair[0])


def test_threads_do_not_run_into_each_others_hooks(lm: tuple[Any, Any], contexts: Tensor) -> None:
    """A fingerprint is made, and other places are read, while a thread makes a block."""
    wanted = model_fingerprint(lm[0]).probe
    assert wanted is not None
    with ThreadPoolExecutor(3) as pool:
        reads = [pool.submit(run_contexts, lm[0], [place], contexts[:16]) for _ in range(20) for place in PLACES]
        probes = [pool.submit(_probe, lm[0]) for _ in range(20)]
        assert all(probe.result() == wanted for probe in probes)
        for read in reads:
            ((name, x),) = read.result().items()
            assert torch.equal(x, run_contexts(lm[0], [name], contexts[:16])[name])

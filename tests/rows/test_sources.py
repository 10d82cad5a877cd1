from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from apportion.about import About
from apportion.evals import held_out_rows
from apportion.language import LiveSource, load_model, read_contexts
from apportion.language.collect import collect
from apportion.rows import ActivationStore, ArraySource, Batch, CacheSource, Source, TokenFilter
from apportion.rows.order import held_out_groups

TEXT = ["the cat sat on the mat and looked at the dog by the old house and the sea was calm " * 40]
CONTEXT = 8


@pytest.fixture(scope="module")
def lm(tiny_model_dir: Path) -> tuple[Any, Any]:
    return load_model(tiny_model_dir)


@pytest.fixture(scope="module")
def folder(lm: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cache") / "acts"
    settings = {"tokens": 480, "context_tokens": CONTEXT, "dtype": "float32", "token_filter": filtering()}
    collect(*lm, "model.layers.1", TEXT, out=out, **settings)
    return out


def filtering() -> TokenFilter:
    return TokenFilter(norm_outlier=1.2)


def array_source() -> ArraySource:
    return ArraySource(torch.arange(500.0)[:, None] * torch.ones(1, 3), seed=3)


Make = Callable[[], Source]


@pytest.fixture(params=["array", "cache", "live"])
def make(request: pytest.FixtureRequest, lm: tuple[Any, Any], folder: Path) -> Make:
    contexts = read_contexts(lm[1], TEXT, tokens=480, context_tokens=CONTEXT)

    def live() -> LiveSource:
        return LiveSource(
            *lm, "model.layers.1", contexts, buffer_tokens=100, batch_contexts=4, token_filter=filtering(), seed=3
        )

    return {"array": array_source, "cache": lambda: CacheSource(ActivationStore(folder), seed=3), "live": live}[
        request.param
    ]


def take(source: Source, batch_tokens: int, num_batches: int) -> list[Tensor]:
    batches = source.batches(batch_tokens)
    taken = [batch.x for batch in islice(batches, num_batches)]
    batches.close()
    return taken


def test_sources_follow_the_protocol(make: Make) -> None:
    source = make()
    assert isinstance(source, Source)
    batch = next(source.batches(7))
    assert batch.x.shape == (7, source.d_in)
    assert batch.x.dtype == torch.float32
    assert batch.mask is None
    about = source.describe()
    assert About.from_json(json.loads(json.dumps(about.to_json()))) == about


@pytest.mark.few(1)
@pytest.mark.parametrize("stop", [1, 9, 40])
def test_resuming_continues_bit_for_bit(make: Make, stop: int) -> None:
    batch_tokens = 23
    whole = take(make(), batch_tokens, stop + 30)  # runs over the end of an epoch
    first = make()
    assert all(map(torch.equal, take(first, batch_tokens, stop), whole))
    state = json.loads(json.dumps(first.state_dict()))
    second = make()
    second.load_state_dict(state)
    assert second.state_dict() == state
    assert all(map(torch.equal, take(second, batch_tokens, 30), whole[stop:]))


def test_reopening_the_iterator_continues(make: Make) -> None:
    source = make()
    parts = take(source, 11, 4) + take(source, 11, 3)
    assert all(map(torch.equal, parts, take(make(), 11, 7)))


def test_seeds_and_epochs_give_other_orders(make: Make) -> None:
    source = make()
    first = next(source.batches(20)).x
    state = source.state_dict()
    source.load_state_dict(state | {"epoch": 1, "row": 0})
    assert not torch.equal(next(source.batches(20)).x, first)


def test_another_seed_cannot_be_resumed(make: Make) -> None:
    source = make()
    with pytest.raises(ValueError, match="seed=8"):
        source.load_state_dict(source.state_dict() | {"seed": 8})


@pytest.mark.parametrize("batch_tokens", [0, 10**6])
def test_batches_that_do_not_fit_are_refused(make: Make, batch_tokens: int) -> None:
    with pytest.raises(ValueError, match=f"batch_tokens={batch_tokens} does not fit"):
        next(make().batches(batch_tokens))


def test_samples_and_held_out_rows_do_not_depend_on_the_position(make: Make) -> None:
    source = make()
    sample, held_out = source.sample(50).x, torch.cat([b.x for b in source.held_out(20, chunk=7)])
    take(source, 13, 5)
    assert torch.equal(source.sample(50).x, sample)
    assert torch.equal(torch.cat([b.x for b in source.held_out(20, chunk=7)]), held_out)
    assert len(sample) == 50
    assert len(held_out) == 20
    assert all(len(part.x) <= 7 for part in source.held_out(20, chunk=7))
    rows = {tuple(row) for row in held_out.tolist()}
    assert not rows & {tuple(row) for row in sample.tolist()}


def epoch_of(source: CacheSource) -> tuple[list[int], list[int]]:
    """Row numbers of two epochs, found again through the store's own values."""
    order = source._order
    stream = order.upcoming(order.num_rows)
    return next(stream)[0].tolist(), next(stream)[0].tolist()


def test_an_epoch_visits_each_training_row_once_and_no_other(folder: Path) -> None:
    store = ActivationStore(folder)
    source = CacheSource(store, seed=1)
    assert store.describe().filtered["norm_outlier"] > 0
    training = (store.mask & (store.contexts % 10 != 9)).nonzero().squeeze(1)
    seen: list[tuple[float, ...]] = []
    labels: list[tuple[int, int]] = []
    batches = source.batches(1)
    for batch in islice(batches, len(training)):
        seen += map(tuple, batch.x.tolist())
        labels += zip(batch.tokens.tolist(), batch.positions.tolist(), strict=True)
    batches.close()
    assert source.num_rows == len(training)
    assert sorted(seen) == sorted(map(tuple, store.gather(training).tolist()))
    tokens, positions = store.gather_labels(training)
    assert sorted(labels) == sorted(zip(tokens.tolist(), positions.tolist(), strict=True))
    one, two = epoch_of(source)
    assert sorted(one) == sorted(two) == training.tolist()
    assert one != two


def test_held_out_contexts_are_every_tenth_half_of_them_to_calibrate(folder: Path) -> None:
    store = ActivationStore(folder)
    held_out = torch.cat([b.x for b in CacheSource(store).held_out(10**6)])
    expected = store.gather((store.mask & (store.contexts % 20 == 9)).nonzero().squeeze(1))
    assert sorted(held_out.tolist()) == sorted(expected.tolist())
    evaluate = held_out_rows(store, 0.1)
    assert evaluate.tolist() == (store.contexts % 20 == 19).nonzero().squeeze(1).tolist(), "filtered rows included"
    none = CacheSource(store, held_out_share=0)
    assert none.num_rows == int(store.mask.sum())
    assert list(none.held_out(10)) == []


def test_the_tail_of_an_epoch_is_dropped() -> None:
    source = ArraySource(torch.arange(10.0)[:, None], held_out_share=0)
    rows = torch.cat(take(source, 4, 4)).squeeze(1)
    assert len(rows[:8].unique()) == len(rows[8:].unique()) == 8
    assert source.state_dict()["epoch"] == 1


def test_a_script_may_end_in_the_middle_of_a_cache(folder: Path) -> None:
    script = (
        "from apportion.activations import ActivationStore, CacheSource\n"
        f"batches = CacheSource(ActivationStore({str(folder)!r})).batches(4)\n"
        "print(len(next(batches).x))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.stdout, done.stderr, done.returncode) == ("4\n", "", 0)


def test_threads_that_read_ahead_end_with_the_iterator(folder: Path) -> None:
    def readers() -> list[threading.Thread]:
        return [t for t in threading.enumerate() if t.name.startswith("apportion-read-ahead")]

    batches = CacheSource(ActivationStore(folder)).batches(8)
    next(batches)
    assert readers()
    batches.close()
    assert not readers()


def test_a_live_source_has_the_rows_of_the_cache(lm: tuple[Any, Any], folder: Path) -> None:
    store = ActivationStore(folder)
    contexts = read_contexts(lm[1], TEXT, tokens=480, context_tokens=CONTEXT)
    live = LiveSource(
        *lm,
        "model.layers.1",
        contexts,
        buffer_tokens=100,
        token_filter=TokenFilter(norm_outlier=1.2, median_norm=store.filter.median_norm),
    )
    cached = CacheSource(store)
    batches = live.batches(1)
    rows = [next(batches) for _ in range(cached.num_rows)]
    assert live.state_dict()["epoch"] == 0
    next(batches)
    assert live.state_dict()["epoch"] == 1  # exactly one epoch was as long as the cache's
    got = torch.cat([row.x for row in rows]).sort(dim=0).values
    expected = torch.cat([b.x for b in islice(cached.batches(1), cached.num_rows)]).sort(dim=0).values
    assert torch.allclose(got, expected, atol=1e-5)
    held_out = [torch.cat([b.x for b in source.held_out(10**6)]) for source in (live, cached)]
    assert held_out[0].shape == held_out[1].shape
    assert cached.num_rows <= live.num_rows < cached.num_rows + store.describe().filtered["norm_outlier"] + 1


def live(lm: tuple[Any, Any], contexts: Tensor, **settings: Any) -> LiveSource:
    return LiveSource(*lm, "model.layers.1", contexts, **{"held_out_share": 0.0, **settings})


def epochs(source: LiveSource, num_rows: int, count: int) -> list[list[int]]:
    """The positions in the context of the rows of so many epochs (or blocks), in order."""
    batches = source.batches(num_rows)
    return [next(batches).positions.tolist() for _ in range(count)]


def test_a_live_source_shuffles_every_block_anew(lm: tuple[Any, Any]) -> None:
    """Blocks of one context each, so that only the order within the block can differ."""
    contexts = read_contexts(lm[1], TEXT, tokens=96, context_tokens=32)
    alone, seeds = (live(lm, contexts[:1], buffer_tokens=32, seed=seed) for seed in (3, 4)), []
    for source in alone:
        seeds += epochs(source, source.num_rows, 2)
    blocks = epochs(live(lm, contexts, buffer_tokens=32, seed=3), 31, 3)
    orders = {tuple(order) for order in seeds + blocks[1:]}
    assert len(orders) == 6, "other in each epoch, block and run"
    assert all(sorted(order) == list(range(1, 32)) for order in orders)


def test_a_resumed_live_source_hands_out_no_special_token_either(lm: tuple[Any, Any]) -> None:
    """Special tokens in the middle of contexts, where leaving out position 0 does not help."""
    tokenizer = lm[1]
    contexts = read_contexts(tokenizer, TEXT, tokens=480, context_tokens=CONTEXT).clone()
    contexts[:, 3], contexts[::2, 5] = tokenizer.eos_token_id, tokenizer.bos_token_id

    def tokens_of(source: LiveSource, num_batches: int) -> Tensor:
        return torch.cat([batch.tokens for batch in islice(source.batches(10), num_batches)])

    first, second = live(lm, contexts, seed=3), live(lm, contexts, seed=3)
    begun = tokens_of(first, 4)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    resumed = tokens_of(second, 20)
    assert torch.equal(resumed, tokens_of(first, 20)) and len(resumed) == 200
    special = torch.tensor([tokenizer.eos_token_id, tokenizer.bos_token_id])
    assert bool(torch.isin(contexts[:, 1:], special).any())
    assert not torch.isin(torch.cat([begun, resumed]), special).any()


def assert_mixed(places: Tensor, of: int) -> None:
    """Places in a list of so many, each at most once, neither ascending nor descending, from all over it."""
    assert len(places) >= 12 and len(places.unique()) == len(places)
    assert 0.2 < (places.diff() < 0).double().mean() < 0.8
    assert int(places.min()) < 0.3 * of and int(places.max()) >= 0.7 * of


def test_held_out_rows_come_in_random_order_from_all_over(folder: Path) -> None:
    """Thresholds are calibrated on the first so many of them."""
    array, cache = array_source(), CacheSource(ActivationStore(folder), seed=3)
    for max_rows in (50, 25):
        numbers = torch.cat([batch.x for batch in array.held_out(max_rows, chunk=7)])[:, 0]
        assert bool((numbers % 10 == 9).all()) and len(numbers) == min(max_rows, len(array._held_out))
        assert_mixed(numbers, 500)
    chosen: list[Tensor] = []
    cache.store.batch = lambda indices: chosen.append(indices) or Batch(torch.zeros(len(indices), 1))  # type: ignore
    list(cache.held_out(15, chunk=4))
    assert_mixed(torch.cat(chosen), len(cache.store.mask))


def test_held_out_rows_of_a_live_source_come_in_random_order_from_all_over(lm: tuple[Any, Any]) -> None:
    contexts = torch.randint(3, len(lm[1]), (40, CONTEXT), generator=torch.Generator().manual_seed(0))
    source = live(lm, contexts, held_out_share=0.5, buffer_tokens=4 * CONTEXT, seed=3)
    in_order = source._filtered_rows(source._held_out)[0].x.float()
    for max_rows in (10**6, 30):
        drawn = torch.cat([batch.x for batch in source.held_out(max_rows)])
        distances = torch.cdist(drawn.double(), in_order.double())
        assert bool((distances.min(1).values < 1e-4).all()) and len(drawn) == min(max_rows, len(in_order))
        assert_mixed(distances.argmin(1), len(in_order))
    sample = torch.cdist(source.sample(30).x.double(), source._filtered_rows(source._train)[0].x.double()).argmin(1)
    assert_mixed(sample, 20 * (CONTEXT - 1))


@pytest.mark.parametrize("percent", range(1, 100))
def test_so_many_percent_of_a_hundred_groups_are_held_out(percent: int) -> None:
    """Shares such as 0.29 are no binary fractions, and 100 of them a little less than 29."""
    held_out = held_out_groups(100, percent / 100)
    assert int(held_out.sum()) == percent and bool(held_out[-1])
    gaps = held_out.nonzero().squeeze(1).diff()
    assert not len(gaps) or int(gaps.max() - gaps.min()) <= 1, "evenly spaced"


def test_rows_of_a_batch_apply_the_mask_to_every_column() -> None:
    batch = Batch(
        torch.arange(6.0).reshape(3, 2),
        target=torch.arange(3.0)[:, None],
        tokens=torch.tensor([5, 6, 7]),
        mask=torch.tensor([True, False, True]),
    ).rows()
    assert batch.x.tolist() == [[0, 1], [4, 5]]
    assert batch.tokens is not None
    assert batch.tokens.tolist() == [5, 7]
    assert batch.target is not None
    assert batch.target.tolist() == [[0], [2]]
    assert batch.mask is None
    assert batch.positions is None
    assert batch.rows() is batch

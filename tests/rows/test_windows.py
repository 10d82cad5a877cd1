"""Orders in windows: each row once an epoch, from few parts at a time, and resumed to the row."""

from __future__ import annotations

import threading
from itertools import islice
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest
import torch
from torch import Tensor

from apportion.about import About
from apportion.architectures import create
from apportion.language import load_model
from apportion.language.collect import collect
from apportion.rows import ActivationStore, ArrayStore, Batch, CacheSource, LayersStore, PairStore
from apportion.rows.batch import as_stored
from apportion.rows.permuting import RowSet
from apportion.rows.windows import WindowOrder, choose_window, probe
from apportion.training import TrainConfig, Trainer

TEXT = ["the cat sat on the mat and looked at the dog by the old house and the sea was calm " * 60]
PLACES = ("model.layers.0", "model.layers.1")


class Parts:
    """Rows in memory, in parts; it notes which it was asked to hold."""

    folder, hookpoint, most_parts = Path("memory"), None, None

    def __init__(self, sizes: list[int], context: int = 5, d_in: int = 3) -> None:
        self.part_rows, self.rows, self.d_in, self.row_bytes = sizes, sum(sizes), d_in, 4 * d_in
        self.x = torch.arange(float(self.rows))[:, None].repeat(1, d_in)
        self.mask = torch.arange(self.rows) % 7 != 3
        self.groups = torch.arange(self.rows) // context
        self.labels: dict[str, Any] = {}
        self.holds: list[int] | None = None
        self.asked: list[list[int]] = []
        self.live = 0

    def held(self, parts: list[int]) -> Parts:
        self.asked.append(list(parts))
        found = Parts(self.part_rows)
        found.holds = list(parts)
        return found

    def batch(self, indices: Tensor) -> Batch:
        if self.holds is not None:
            ends = torch.tensor(self.part_rows).cumsum(0)
            assert set(torch.bucketize(indices, ends, right=True).tolist()) <= set(self.holds), "read at random"
        return Batch(self.x[indices])

    def describe(self) -> About:
        return About(kind="array", rows=self.rows, d_in=self.d_in)


def epoch_of(source: CacheSource, size: int) -> list[int]:
    wanted = source.num_rows // size
    return [int(x) for batch in islice(source.batches(size), wanted) for x in batch.x[:, 0]]


@pytest.mark.parametrize("window", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("sizes", [[40] * 7, [5, 90, 1, 33, 60, 2, 29], [100]])
def test_each_row_once_an_epoch_and_few_parts_at_a_time(window: int, sizes: list[int]) -> None:
    store = Parts(sizes)
    source = CacheSource(store, seed=1, window=window)
    exact = CacheSource(Parts(sizes), seed=1, window=None)
    assert source.window == min(window, len(sizes)) and source.num_rows == exact.num_rows
    first = epoch_of(source, 1)
    assert sorted(first) == sorted(epoch_of(exact, 1)) == exact._train[torch.arange(exact.num_rows)].tolist()
    assert first != sorted(first) and all(len(parts) <= window for parts in store.asked)
    ends = torch.tensor(sizes).cumsum(0)
    parts = torch.bucketize(torch.tensor(first), ends, right=True)
    order: list[int] = torch.unique_consecutive(parts).tolist()
    if window == 1:
        assert len(order) == len(set(order)), "one part after the other"
    source.load_state_dict({**source.state_dict(), "epoch": 1, "row": 0})
    second = epoch_of(source, 1)
    assert sorted(second) == sorted(first) and second != first


def test_a_run_goes_on_from_every_row_with_the_window_that_it_had() -> None:
    sizes = [20, 31, 12, 40, 25]
    whole = CacheSource(Parts(sizes), seed=4, window=2)
    batches, taken, states = whole.batches(9), [], [whole.state_dict()]
    for _ in range(30):
        taken.append(next(batches).x)
        states.append(whole.state_dict())
    assert states[-1]["epoch"] >= 2 and states[-1]["window"] == 2
    for at in range(0, 28, 3):
        again = CacheSource(Parts(sizes), seed=4, window=None)
        again.load_state_dict(states[at])
        assert again.window == 2
        for want, batch in zip(taken[at : at + 3], again.batches(9), strict=False):
            assert torch.equal(want, batch.x)
    old = {name: value for name, value in CacheSource(Parts(sizes), seed=4).state_dict().items() if name != "window"}
    source = CacheSource(Parts(sizes), seed=4, window=2)
    source.load_state_dict(old)
    assert source.window is None


@pytest.mark.parametrize("window", [1, 3])
def test_batches_have_the_rows_of_the_order_listed_or_looked_up(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [20, 31, 12, 40, 25]
    for _ in range(2):
        source = CacheSource(Parts(sizes), seed=4, window=window)
        wanted = [rows for rows, _ in islice(source._order.upcoming(9), 30)]
        for batch, rows in zip(source.batches(9), wanted, strict=False):
            assert batch.index is not None and torch.equal(batch.index, rows)
        monkeypatch.setattr("apportion.rows.windows.DRAWN", 1)


def test_how_well_rows_are_mixed_is_what_is_said() -> None:
    sizes, context = [600] * 20, 30
    for window in (1, 4, 20):
        store = Parts(sizes, context)
        source = CacheSource(store, 0.0, seed=2, window=window)
        order = source._order
        assert isinstance(order, WindowOrder)
        said, exact = order.others_of_its_context(256, order.num_rows / (store.rows / context))
        met = []
        for batch in islice(source.batches(256), source.num_rows // 256):
            assert batch.index is not None
            counts = torch.bincount(store.groups[batch.index])
            met.append(float((counts * (counts - 1)).sum()) / len(batch))
        measured = sum(met) / len(met)
        assert abs(measured - said) < 0.15 * said + 0.02, (window, measured, said)
        assert said == pytest.approx(exact, rel=1e-3) if window == 20 else said > 2 * exact


def test_rows_within_a_window_come_evenly_from_all_of_it() -> None:
    source = CacheSource(Parts([500] * 4), 0.0, seed=5, window=2)
    rows = torch.tensor(epoch_of(source, 50))
    assert all(batch.tolist() != sorted(batch.tolist()) for batch in rows.split(50))
    halves = rows[: len(rows) // 2]
    parts = torch.bucketize(halves, torch.tensor([500, 1000, 1500]), right=True)
    assert len(parts.unique()) == 2
    for tenth in halves.chunk(10):
        share = (torch.bucketize(tenth, torch.tensor([500, 1000, 1500]), right=True) == parts[0]).double().mean()
        assert 0.3 < share < 0.7


def test_the_next_window_is_read_while_one_is_handed_out_also_of_the_next_epoch() -> None:
    store = Parts([40] * 6)
    source = CacheSource(store, seed=1, window=2)
    order = source._order
    assert isinstance(order, WindowOrder)
    batches, size = source.batches(10), source.num_rows // 10
    for taken in range(size):
        next(batches)
        wanted = [parts.tolist() for parts in order.visiting(0).windows[:2]]
        wanted = wanted if taken == 0 else [order.visiting(1).windows[0].tolist()] if taken == size - 4 else []
        deadline = monotonic() + 10  # a thread reads them
        while wanted and store.asked[-len(wanted) :] != wanted:
            assert monotonic() < deadline, (taken, store.asked, wanted)
            sleep(0.01)
    batches.close()


def test_threads_end_with_the_iterator() -> None:
    batches = CacheSource(Parts([50] * 6), window=2).batches(8)
    next(batches)
    batches.close()
    assert not [t for t in threading.enumerate() if t.name.startswith(("apportion-windows", "apportion-read"))]


def test_held_out_and_sampled_rows_are_the_same_ones() -> None:
    store = Parts([60] * 5)
    one, other = CacheSource(store, seed=3, window=2), CacheSource(store, seed=3, window=None)
    rows = [torch.cat([batch.x for batch in source.held_out(1000, chunk=5)]) for source in (one, other)]
    assert torch.equal(rows[0], rows[1].sort(0).values) and len(rows[0]) > 12
    window = one._order.parts_of(0)[:2].tolist()  # type: ignore[attr-defined]
    few = torch.cat([batch.x for batch in one.held_out(3, chunk=2)])[:, 0].long()
    assert len(few) == 3 and set(few.tolist()) < set(rows[0][:, 0].tolist()) and set((few // 60).tolist()) <= {*window}
    sampled = one.sample(50).index
    assert sampled is not None and torch.equal(sampled, sampled.unique()) and len(sampled) == 50
    assert set((sampled // 60).tolist()) == {*window}, "rows of the parts that are read first"
    training = {*one._train.all().tolist()}
    assert {*sampled.tolist()} < training == {*one.sample(10_000).x[:, 0].long().tolist()}
    assert torch.equal(one.sample(50).x, one.sample(50).x)


def test_a_first_window_with_few_rows_is_not_all_that_is_sampled() -> None:
    for seed in range(12):
        store = Parts([2, 2, 40, 2, 2, 2, 2], context=2)
        source = CacheSource(store, held_out_share=0.5, seed=seed, window=1)
        assert len(source.sample(15)) == 15 and len(source.sample(10_000)) == source.num_rows


@pytest.mark.parametrize("window", [0, -1])
def test_windows_that_cannot_be(window: int) -> None:
    with pytest.raises(ValueError, match="from 1 on"):
        CacheSource(Parts([5, 5]), window=window)
    with pytest.raises(ValueError, match="is no cache"):
        CacheSource(ArrayStore(torch.randn(20, 3)), window=1)


def test_what_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    store, speeds = Parts([1000] * 10), [1.0, 100.0]
    monkeypatch.setattr("apportion.rows.windows.probe", lambda _: tuple(speeds))
    size = store.rows * store.row_bytes
    for free, wanted in ((10 * size, None), (size, 2), (0.4 * size, 1), (0.0, 1)):
        monkeypatch.setattr("apportion.rows.windows.free_bytes", lambda free=free: free)
        assert choose_window(store) == wanted, free
    speeds[0] = 90.0
    assert choose_window(store) is None, "a disk that reads well at random"
    assert choose_window(ArrayStore(torch.randn(30, 3))) is None


@pytest.mark.parametrize(
    ("parts", "most", "free", "wanted"),
    [
        (40, 40, 1e12, 8),  # so many that rows are mixed
        (4000, 4000, 1e12, 1049),  # of which each has a thousand
        (3000, 3000, 1e12, 375),  # an eighth of them
        (40, 6, 1e12, 3),  # two of them fit the folder of copies
        (40, 1, 1e12, 1),
        (40, 40, 4 * 5 * 200_000 * 12, 5),  # two of them fit half of the memory
        (3, 40, 1e12, 3),
    ],
)
def test_what_is_chosen_of_a_store_that_is_fetched(
    parts: int, most: int, free: float, wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    store: Any = Parts([200_000 if parts < 4000 else 1000] * parts, d_in=1)
    store.row_bytes = 12
    store.most_parts = most
    monkeypatch.setattr("apportion.rows.windows.free_bytes", lambda: free)
    monkeypatch.setattr("apportion.rows.windows.probe", lambda _: pytest.fail("rows are never read at random"))
    assert choose_window(store) == wanted


def test_both_ways_of_reading_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apportion.rows.windows.PROBE_S", 0.05)
    at_random, on = probe(Parts([4000] * 10))
    assert on > at_random > 0


@pytest.mark.parametrize("rows", [1, 511, 512, 513, 5000])
def test_rows_below_are_counted(rows: int) -> None:
    mask = torch.rand(rows, generator=torch.Generator().manual_seed(0)) < 0.4
    ends = torch.arange(rows + 1)
    found = RowSet([mask])
    for start, stop in ((0, rows), (rows // 3, rows // 2), (rows // 2, rows), (rows, rows)):
        assert found.between(start, stop).tolist() == [row for row in range(start, stop) if mask[row]]
    assert torch.equal(found.count_below(ends), torch.cat([torch.zeros(1).long(), mask.cumsum(0)]))


@pytest.fixture(scope="module")
def folder(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cache") / "acts"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("apportion.rows.writer.SHARD_BYTES", 16 * 8 * 32 * 4)
        collect(*load_model(tiny_model_dir), PLACES, TEXT, out=out, tokens=1000, context_tokens=8, dtype="bfloat16")
    return out


@pytest.mark.parametrize("kind", ["one", "pair", "layers"])
def test_real_caches(kind: str, folder: Path) -> None:
    def store() -> Any:
        stores = [ActivationStore(folder, place) for place in PLACES]
        return {"one": lambda: stores[0], "pair": lambda: PairStore(*stores), "layers": lambda: LayersStore(stores)}[
            kind
        ]()

    assert len(store().part_rows) > 3 and sum(store().part_rows) == store().rows
    source, exact = (CacheSource(store(), seed=1, window=window) for window in (2, None))
    found, wanted = ([*islice(one.batches(10), one.num_rows // 10)] for one in (source, exact))
    rows = [torch.cat([batch.index for batch in batches if batch.index is not None]) for batches in (found, wanted)]
    assert len(set(rows[0].tolist())) == len(rows[0]) and not torch.equal(*rows)
    for batch in found:
        assert batch.index is not None
        alone = store().batch(batch.index)
        for name in ("x", "target", "tokens", "positions", "site"):
            one, other = getattr(batch, name), getattr(alone, name)
            assert (one is None and other is None) or torch.equal(one, other), name


def test_held_parts_are_in_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for size, read in ((1 << 20, 3), (70, 3), (70, 999)):  # 999: as on systems that do not know it
        monkeypatch.setattr("apportion.rows.shards.WILL_NEED", read)
        monkeypatch.setattr("apportion.rows.store.PART_BYTES", size)
        store = ActivationStore(folder, PLACES[0])
        assert sum(store.part_rows) == store.rows and max(store.part_rows) * store.row_bytes <= max(size, 64)
        assert (len(store.part_rows) == store.num_shards) == (size > 70)
        parts = torch.randperm(len(store.part_rows))[: len(store.part_rows) // 2 + 1].tolist()
        ends = torch.tensor([0, *store.part_rows]).cumsum(0).tolist()
        rows = torch.cat([torch.arange(ends[part], ends[part + 1]) for part in parts])
        rows = rows[torch.randperm(len(rows))]
        held = store.held(parts)
        assert torch.equal(held.gather(rows), store.gather(rows))
        for one, other in zip(held.gather_labels(rows), store.gather_labels(rows), strict=True):
            assert torch.equal(one, other)
        batch = held.batch(rows, stored=True)
        assert torch.equal(batch.x, store.batch(rows, stored=True).x) and batch.x.dtype == torch.bfloat16
        assert held._rows["acts"].rows.nbytes == len(rows) * store.row_bytes, "no other rows are held"


def test_rows_of_all_of_a_cache_are_mixed_in_a_window(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apportion.rows.store.PART_BYTES", 160)  # of which a row has 16
    store = ActivationStore(folder, PLACES[0])
    source = CacheSource(store, seed=2, window=len(store.part_rows) // 3)
    batches = [*islice(source.batches(10), source.num_rows // 40)]
    found = torch.cat([batch.index for batch in batches if batch.index is not None])
    shards = torch.bucketize(found, torch.tensor(store.shard_rows).cumsum(0), right=True)
    assert len(shards.unique()) == store.num_shards > 5


def test_windows_of_other_parts_are_not_gone_on_with() -> None:
    state = CacheSource(Parts([50] * 6), window=2).state_dict()
    with pytest.raises(ValueError, match="parts=6"):
        CacheSource(Parts([100] * 3), window=2).load_state_dict(state)
    del state["parts"]
    with pytest.raises(ValueError, match="parts=None"):
        CacheSource(Parts([50] * 6), window=2).load_state_dict(state)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "int8"])
@pytest.mark.parametrize("window", [None, 2])
def test_batches_as_they_lie_there_are_the_same_numbers(
    dtype: str, window: int | None, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Trainers take them so."""
    settings = {"tokens": 400, "context_tokens": 8, "dtype": dtype}
    collect(*load_model(tiny_model_dir), PLACES[0], TEXT, out=tmp_path / "acts", **settings)
    one, other = (CacheSource(ActivationStore(tmp_path / "acts"), window=window) for _ in range(2))
    for batch, stored in zip(islice(one.batches(32), 12), one.stored_batches(32), strict=False):
        assert batch.x.dtype == torch.float32
        assert stored.x.dtype == (torch.float32 if dtype == "int8" else getattr(torch, dtype))
    runs = []
    for source in (one, other):
        source.load_state_dict({**source.state_dict(), "epoch": 0, "row": 0})
        trainer = Trainer(
            create("topk", d_in=32, d_sae=48, k=4, seed=0), TrainConfig(batch_tokens=32, total_tokens=320)
        )
        if source is other:
            for batch in islice(source.batches(32), 10):
                trainer.step(batch)
        else:
            for batch in islice(as_stored(source)(32), 10):
                trainer.step(batch)
        runs.append({name: value.clone() for name, value in trainer.sae.state_dict().items()})
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_batches_of_ones_own_are_the_ones_that_train() -> None:
    class Own(CacheSource):
        def batches(self, batch_tokens: int) -> Any:
            yield Batch(torch.full((batch_tokens, 3), 7.0))

    class Below(Own):
        def stored_batches(self, batch_tokens: int) -> Any:
            yield Batch(torch.full((batch_tokens, 3), 8.0))

    found = [float(next(iter(as_stored(kind(Parts([30]), window=None))(2))).x[0, 0]) for kind in (Own, Below)]
    assert found == [7.0, 8.0]

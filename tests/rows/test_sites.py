"""Rows made of several hookpoints: aligned, filtered together, in the same order whenever they are asked for."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import apportion as ap
from apportion.about import About, ModelRecord
from apportion.evals import evaluate_rows, held_out_rows
from apportion.language import load_model
from apportion.language.collect import collect
from apportion.rows import ActivationStore, Batch, CacheSource, Source, TokenFilter
from apportion.rows.filter import trained_filter
from apportion.rows.hookpoint import choose_from
from apportion.rows.opening import joined, open_rows, rows_for, settings_of
from apportion.rows.sites import LayersStore, PairStore, SitesStore, open_stores

TEXT = ["the cat sat on the mat and looked at the dog by the old house and the sea was calm " * 40]
CONTEXT = 8
LAYERS = ["model.layers.0", "model.layers.1", "model.layers.2"]
PAIR = ["model.layers.1.mlp:in", "model.layers.1.mlp"]


@pytest.fixture(scope="module")
def lm(tiny_model_dir: Path) -> tuple[Any, Any]:
    return load_model(tiny_model_dir)


@pytest.fixture(scope="module")
def folder(lm: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers and one MLP of the same tokens; the filters of the hookpoints keep different ones."""
    out = tmp_path_factory.mktemp("cache") / "acts"
    filtering = TokenFilter(norm_outlier=1.15)
    collect(
        *lm, LAYERS + PAIR, TEXT, tokens=480, out=out, context_tokens=CONTEXT, dtype="float32", token_filter=filtering
    )
    return out


def stores(folder: Path, names: list[str]) -> list[ActivationStore]:
    return [ActivationStore(folder, name) for name in names]


def make(kind: str, folder: Path) -> Any:
    return {
        "pair": lambda: PairStore(*stores(folder, PAIR)),
        "sites": lambda: SitesStore(stores(folder, LAYERS)),
        "layers": lambda: LayersStore(stores(folder, LAYERS)),
    }[kind]()


KINDS = pytest.mark.parametrize("kind", ["pair", "sites", "layers"])


def columns(batch: Batch) -> dict[str, Tensor]:
    return {name: column for name, column in vars(batch).items() if column is not None}


def take(source: CacheSource, batch_tokens: int, num_batches: int) -> list[dict[str, Tensor]]:
    batches = source.batches(batch_tokens)
    taken = [columns(batch) for batch in islice(batches, num_batches)]
    batches.close()
    return taken


def same(one: list[dict[str, Tensor]], other: list[dict[str, Tensor]]) -> bool:
    return len(one) == len(other) and all(
        a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) for a, b in zip(one, other, strict=True)
    )


def test_a_token_takes_part_only_if_every_hookpoint_keeps_it(folder: Path) -> None:
    masks = torch.stack([store.mask for store in stores(folder, LAYERS)])
    together = masks.all(0)
    assert all(int(mask.sum()) > int(together.sum()) for mask in masks), "each filter leaves out others"
    assert torch.equal(make("sites", folder).mask, together)
    assert torch.equal(make("layers", folder).mask, together.repeat_interleave(3))
    assert torch.equal(make("pair", folder).mask, torch.stack([s.mask for s in stores(folder, PAIR)]).all(0))


def test_rows_of_each_kind(folder: Path) -> None:
    rows = torch.tensor([17, 3, 200, 17])
    layers, pair = stores(folder, LAYERS), stores(folder, PAIR)
    tokens, positions = layers[0].gather_labels(rows)
    sites = make("sites", folder).batch(rows)
    assert sites.x.shape == (4, 3, 32) and sites.target is None and sites.site is None
    assert all(torch.equal(sites.x[:, i], store.gather(rows)) for i, store in enumerate(layers))
    two = make("pair", folder).batch(rows)
    assert torch.equal(two.x, pair[0].gather(rows)) and torch.equal(two.target, pair[1].gather(rows))
    for batch in (sites, two):
        assert torch.equal(batch.tokens, tokens) and torch.equal(batch.positions, positions)
    single = make("layers", folder).batch(rows * 3 + torch.tensor([0, 1, 2, 2]))
    assert single.site.tolist() == [0, 1, 2, 2]
    for i, (row, layer) in enumerate(zip(rows.tolist(), [0, 1, 2, 2], strict=True)):
        assert torch.equal(single.x[i], layers[layer].gather(torch.tensor([row]))[0])
    assert torch.equal(single.tokens, tokens) and torch.equal(single.positions, positions)


@KINDS
def test_sources_follow_the_protocol(kind: str, folder: Path) -> None:
    source = CacheSource(make(kind, folder), seed=3)
    assert isinstance(source, Source)
    assert source.sample(5).x.shape == (5, *((3, 32) if kind == "sites" else (32,)))
    about = source.describe()
    assert About.from_json(json.loads(json.dumps(about.to_json()))) == about
    assert about.d_in == source.d_in == 32 and about.rows_calibrate
    held_out = torch.cat([b.x for b in source.held_out(10**6, chunk=7)])
    assert len(held_out) == about.rows_calibrate
    rows = {tuple(row) for row in held_out.flatten(1).tolist()}
    trained = {tuple(row) for b in take(source, 1, source.num_rows) for row in b["x"].flatten(1).tolist()}
    assert not rows & trained


@KINDS
@pytest.mark.parametrize("stop", [1, 9, 40])
def test_resuming_continues_bit_for_bit(kind: str, stop: int, folder: Path) -> None:
    whole = take(CacheSource(make(kind, folder), seed=3), 23, stop + 30)  # runs over the end of an epoch
    first = CacheSource(make(kind, folder), seed=3)
    assert same(take(first, 23, stop), whole[:stop])
    state = json.loads(json.dumps(first.state_dict()))
    second = CacheSource(make(kind, folder), seed=3)
    second.load_state_dict(state)
    assert same(take(second, 23, 30), whole[stop:])


def test_an_epoch_visits_every_layer_of_every_token_once_and_mixes_them(folder: Path) -> None:
    store = make("layers", folder)
    source = CacheSource(store, seed=1)
    training = store.stores[0].mask & store.stores[1].mask & store.stores[2].mask & (store.stores[0].contexts % 10 != 9)
    assert source.num_rows == 3 * int(training.sum())
    batches = take(source, 1, source.num_rows)
    seen = sorted((int(b["site"]), *b["x"][0].tolist()) for b in batches)
    rows = training.nonzero().squeeze(1)
    wanted = sorted((i, *x) for i, one in enumerate(store.stores) for x in one.gather(rows).tolist())
    assert seen == wanted
    order = torch.cat([b["site"] for b in batches]).double()
    halves = order[: len(order) // 2], order[len(order) // 2 :]
    assert all(abs(half.mean().item() - 1) < 0.2 for half in halves), "layers come in no order"


def test_held_out_contexts_are_held_out_at_every_layer(folder: Path) -> None:
    store, one = make("layers", folder), ActivationStore(folder, LAYERS[0])
    evaluate = held_out_rows(store, 0.1)
    assert sorted(set((evaluate // 3).tolist())) == held_out_rows(one, 0.1).tolist()
    assert len(evaluate) == 3 * len(held_out_rows(one, 0.1))


@KINDS
def test_descriptions_keep_the_filter_of_every_hookpoint(kind: str, folder: Path) -> None:
    store = make(kind, folder)
    about = store.describe()
    names = PAIR if kind == "pair" else LAYERS
    assert [site.hookpoint for site in about.sites] == names
    assert about.hookpoint == (PAIR[0] if kind == "pair" else ",".join(LAYERS))
    assert about.target_hookpoint == (PAIR[1] if kind == "pair" else None)
    for name in names:
        assert trained_filter(about, name) == ActivationStore(folder, name).filter
    assert trained_filter(about, "elsewhere") is None
    assert about.filtered_share == pytest.approx(1 - store.mask.double().mean().item())
    assert about.rows == store.rows == len(store.mask) == len(store.groups)
    assert about.lm.model == ActivationStore(folder, names[0]).describe().lm.model != ModelRecord()


def test_hookpoints_of_a_cache_by_name_and_glob(folder: Path) -> None:
    assert [s.hookpoint for s in open_stores(folder)] == LAYERS + PAIR
    assert [s.hookpoint for s in open_stores(folder, "model.layers.*")] == LAYERS
    assert [s.hookpoint for s in open_stores(folder, f"{LAYERS[2]}, model.layers.*,{PAIR[0]}")] == [
        LAYERS[2], LAYERS[0], LAYERS[1], PAIR[0],
    ]  # fmt: skip
    assert choose_from(["a.0", "a.0:in", "b"], "*.0:in") == ["a.0:in"]
    assert choose_from(["a.0", "b"], "b:out") == ["b"]
    elements = ["a.0:out[1]", "a.0", "a.1:out[1]", "a.1:in[1]"]
    assert choose_from(elements, "a.*:out[1]") == ["a.0:out[1]", "a.1:out[1]"]
    assert choose_from(elements, "a.[01]:out[0],a.1:in[1]") == ["a.0", "a.1:in[1]"]
    for wrong in ("model.layers.7", "model.*.mlp:in", f"{LAYERS[0]},x"):
        with pytest.raises(ValueError, match=r"choose among model.layers.0"):
            open_stores(folder, wrong)


def test_one_hookpoint_is_not_several(folder: Path) -> None:
    for kind in (SitesStore, LayersStore):
        with pytest.raises(ValueError, match=r"two hookpoints or more, got model\.layers\.0"):
            kind(stores(folder, LAYERS[:1]))


@pytest.fixture(scope="module")
def others(lm: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same tokens under another model, and other tokens."""
    import copy

    tuned = copy.deepcopy(lm[0])
    with torch.no_grad():
        tuned.model.layers[0].mlp.down_proj.weight.mul_(1.5)
    root = tmp_path_factory.mktemp("others")
    settings = {"tokens": 480, "context_tokens": CONTEXT, "dtype": "float32"}
    collect(tuned, lm[1], LAYERS[1], TEXT, out=root / "tuned", **settings)
    collect(*lm, LAYERS[1], [TEXT[0].replace("cat", "dog")], out=root / "text", **settings)
    return {"tuned": root / "tuned", "text": root / "text"}


def test_two_models_are_joined_token_by_token(folder: Path, others: dict[str, Path]) -> None:
    base, tuned = ActivationStore(folder, LAYERS[1]), ActivationStore(others["tuned"])
    store = SitesStore([base, tuned])
    rows = torch.arange(40)
    assert torch.equal(store.batch(rows).x, torch.stack([base.gather(rows), tuned.gather(rows)], dim=1))
    about = store.describe()
    assert about.folders == (str(folder.resolve()), str(others["tuned"].resolve()))
    assert len(about.sites) == 2 and about.sites[0].lm.model != about.sites[1].lm.model
    assert about.lm.model == ModelRecord() and about.lm.tokens_sha256 and about.lm.context_tokens


def sae_for(kind: str, **settings: Any) -> ap.SAE:
    name = {"one": "topk", "pair": "transcoder", "sites": "crosscoder", "layers": "mlsae"}[kind]
    return ap.create(name, **{"d_in": 32, "d_sae": 16, "k": 2} | settings)


@pytest.mark.parametrize("kind", ["one", "pair", "sites", "layers"])
def test_the_rows_that_an_sae_takes(kind: str, folder: Path) -> None:
    """Of the cache it was trained on, or of another one, at its own hookpoints."""
    store = ActivationStore(folder, LAYERS[1]) if kind == "one" else make(kind, folder)
    sae = sae_for(kind)
    with pytest.raises(ValueError, match="does not say which cache"):
        rows_for(sae)
    sae.source = CacheSource(store).describe()
    for found in (rows_for(sae), rows_for(sae, folder)):
        assert type(found) is type(store) and found.describe() == store.describe()
    settings = settings_of(CacheSource(store))
    assert sae_for(kind, **settings).settings().items() >= settings.items()


@pytest.mark.parametrize("kind", ["pair", "sites", "layers"])
def test_the_rows_of_two_caches(kind: str, folder: Path, others: dict[str, Path]) -> None:
    two = [ActivationStore(folder, LAYERS[2]), ActivationStore(others["tuned"])]
    sae = sae_for(kind)
    sae.source = CacheSource(joined(kind, two)).describe()
    found = rows_for(sae)
    assert [store.folder for store in found.stores] == [folder.resolve(), others["tuned"].resolve()]
    assert type(found) is type(joined(kind, two)) and found.describe() == joined(kind, two).describe()
    assert {store.folder for store in rows_for(sae, folder).stores} == {folder}, "unless another is named"


@pytest.mark.parametrize(
    ("kind", "places", "said"),
    [
        ("one", [None, None], "has several hookpoints"),
        ("pair", [PAIR[0], None], "my-sae needs --hookpoint .* and --target-hookpoint"),
        ("pair", [None, PAIR[1]], "my-sae needs --hookpoint .* and --target-hookpoint"),
        ("pair", [PAIR[0], PAIR[0]], "my-sae cannot read and predict the same"),
        ("sites", [LAYERS[0], None], "my-sae takes two hookpoints or more"),
        ("layers", [LAYERS[0], None], "my-sae takes two hookpoints or more"),
    ],
)
def test_rows_that_a_cache_does_not_have(kind: Any, places: list[str | None], said: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=said) as refused:
        open_rows(folder, kind, *places, name="my-sae")
    assert LAYERS[2] in str(refused.value), "what there is to choose from"


def test_other_tokens_cannot_be_joined(folder: Path, others: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="hold different tokens"):
        SitesStore([ActivationStore(folder, LAYERS[1]), ActivationStore(others["text"])])


# From a cache to figures


def test_transcoders_and_crosscoders_are_trained_and_measured_on_a_cache(folder: Path) -> None:
    for name, kind, more in (("transcoder", "pair", {}), ("crosscoder", "sites", {"num_sites": 3})):
        store = make(kind, folder)
        sae = ap.create(name, d_in=32, d_sae=64, k=4, seed=0, hookpoint=store.hookpoint, **more)
        source = CacheSource(store)
        ap.Trainer(sae, ap.TrainConfig(lr=3e-3, batch_tokens=64, total_tokens=6400)).fit(source, progress=False)
        rows = held_out_rows(store, 0.1)
        result = evaluate_rows({"sae": sae}, store, rows, progress=False)["sae"].result()
        kept = rows[store.mask[rows]]
        batch = store.batch(kept)
        y = batch.x if batch.target is None else batch.target
        with torch.no_grad():
            error = (sae(batch.x) - y).square()
        spread = (y - y.mean(0)).square()
        assert result["fvu"] == pytest.approx((error.sum() / spread.sum()).item(), rel=1e-4)
        assert result["l0"] == 4 and result["tokens"] == len(kept) < len(rows)
        if kind == "sites":
            each = (error.sum((0, 2)) / spread.sum((0, 2))).tolist()
            assert result["fvu_sites"] == pytest.approx(each, rel=1e-4)
        with pytest.raises(ValueError, match="target" if kind == "pair" else "num_sites|Expected"):
            evaluate_rows({"sae": sae}, ActivationStore(folder, LAYERS[0]), rows, progress=False)

"""Rows as people have them: numpy arrays, lists, DataLoaders, generators; and rows that spoil a step."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import apportion as ap
from apportion.cli import main
from apportion.rows import Source
from apportion.rows.stream import StreamSource
from apportion.training import local_reconstruction
from apportion.training.given import source_of

D_IN, D_SAE, K, BATCH = 16, 48, 4, 200
X = 3 * torch.randn(4000, D_IN, generator=torch.Generator().manual_seed(0)) + 1


def new(name: str = "topk", **settings: Any) -> ap.SAE:
    return ap.create(name, **{"d_in": D_IN, "d_sae": D_SAE, "k": K, "seed": 0} | settings)


def trainer(sae: ap.SAE | None = None, total: int = 10 * BATCH) -> ap.Trainer:
    return ap.Trainer(sae or new(), ap.TrainConfig(lr=1e-2, batch_tokens=BATCH, total_tokens=total))


def weights(sae: ap.SAE) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in sae.named_parameters()}


ARRAYS: dict[str, Any] = {
    "numpy": lambda x: x.numpy(),
    "float64 numpy": lambda x: x.double().numpy(),
    "nested lists": lambda x: x.tolist(),
    "not contiguous": lambda x: np.asfortranarray(x.numpy()),
    "half": lambda x: x.half().numpy(),
    "backwards": lambda x: x.flip(0).numpy()[::-1],
    "of another machine": lambda x: x.numpy().astype(">f4"),
    "of objects": lambda x: x.double().numpy().astype(object),
    "lists of numpy's numbers": lambda x: [list(row) for row in x.numpy()],
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_arrays_are_tensors_everywhere(kind: str) -> None:
    loose = 1e-2 if kind == "half" else 1e-5
    sae, other = new("mutual_choice"), new("mutual_choice")
    x, given = X[:1000], ARRAYS[kind](X[:1000])
    sae.fit_input(x), other.fit_input(given)
    assert torch.allclose(sae.mean, other.mean, atol=loose)
    assert other.calibrate(given) == pytest.approx(sae.calibrate(x), abs=1e-3)
    sae.eval(), other.eval()
    assert torch.allclose(sae(x), other.decode(other.encode(given), given), atol=100 * loose)
    one, two = trainer(new()), trainer(new())
    assert torch.allclose(one.step(x)["loss"], two.step(given)["loss"], rtol=100 * loose)


@pytest.mark.parametrize(
    "kind",
    ["numpy", "nested lists", "list of tensors", "list of arrays", "list of batches", "contexts", "a batch", "graph"],
)
def test_fit_takes_what_lies_in_memory_like_a_tensor(kind: str) -> None:
    given = {
        "numpy": X.numpy(),
        "nested lists": X.tolist(),
        "list of tensors": list(X.split(300)),
        "list of arrays": [part.numpy() for part in X.split(300)],
        "list of batches": [ap.Batch(part) for part in X.split(300)],
        "contexts": X.reshape(-1, 20, D_IN),
        "a batch": ap.Batch(X),
        "graph": X.clone().requires_grad_() * 1,
    }[kind]
    assert not source_of(given, seed=0).sample(5).x.requires_grad
    wanted, found = (trainer().fit(source, progress=False) for source in (X, given))
    for name, p in weights(wanted).items():
        assert torch.allclose(p, weights(found)[name], atol=1e-6), name
    assert found.info["source"]["rows"] == len(X)


@pytest.mark.parametrize("kind", ["tensor", "numpy", "nested lists", "list of tensors", "tuple of batches"])
def test_the_seed_orders_what_lies_in_memory(kind: str) -> None:
    given: dict[str, Any] = {
        "tensor": X,
        "numpy": X.numpy(),
        "nested lists": X.tolist(),
        "list of tensors": list(X.split(300)),
        "tuple of batches": tuple(ap.Batch(part) for part in X.split(300)),
    }
    wanted = next(ap.rows.ArraySource(X, seed=3).batches(BATCH)).x
    rows = [next(source_of(given[kind], seed=seed).batches(BATCH)).x for seed in (3, 4)]
    assert torch.equal(rows[0], wanted) and not torch.equal(rows[1], wanted)


class Again:
    """Can be read again and again, as a DataLoader."""

    def __init__(self, parts: list[Any]) -> None:
        self.parts = parts

    def __iter__(self) -> Iterator[Any]:
        return iter(self.parts)


STREAMS: dict[str, Any] = {
    "generator": lambda: (part for part in X.split(130)),
    "rows one by one": lambda: iter(X),
    "dicts": lambda: ({"x": part, "y": 0} for part in X.split(130)),
    "tuples": lambda: ((part, torch.zeros(len(part))) for part in X.split(130)),
    "arrays": lambda: (part.numpy() for part in X.split(130)),
    "batches with masks": lambda: (
        ap.Batch(part.repeat(2, 1), mask=torch.arange(2 * len(part)) < len(part)) for part in X.split(130)
    ),
    "loader": lambda: torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X), batch_size=130),
    "three dimensions": lambda: (part.reshape(-1, 10, D_IN) for part in X.split(130)),
}


@pytest.mark.parametrize("kind", STREAMS)
def test_fit_takes_what_yields_rows_in_their_order(kind: str) -> None:
    source = source_of(STREAMS[kind](), seed=0)
    assert isinstance(source, StreamSource) and isinstance(source, Source) and source.d_in == D_IN
    batches = source.batches(BATCH)
    rows = torch.cat([next(batches).x for _ in range(15)])
    training = torch.ones(len(X), dtype=torch.bool)
    training[9::10] = False
    assert torch.equal(rows, X[training][:3000])
    held_out = torch.cat([b.x for b in source.held_out(1000)])
    assert torch.equal(held_out, X[~training][: len(held_out)]) and len(held_out) >= 333
    sae = trainer().fit(STREAMS[kind](), progress=False)
    assert sae.info["training"]["tokens"] == 2000 and sae.info["calibration"]["tokens"] >= 200


def test_what_can_be_read_again_has_epochs_and_resumes(tmp_path: Path) -> None:
    items = Again([(part,) for part in X[:500].split(64)])
    whole = trainer().fit(items, progress=False)

    class Stops(StreamSource):
        def batches(self, batch_tokens: int) -> Iterator[ap.Batch]:
            for number, batch in enumerate(super().batches(batch_tokens)):
                if number == 6:
                    raise ZeroDivisionError
                yield batch

    config = ap.TrainConfig(lr=1e-2, batch_tokens=BATCH, total_tokens=10 * BATCH, checkpoint_every_tokens=2 * BATCH)
    with pytest.raises(ZeroDivisionError):
        ap.Trainer(new(), config).fit(Stops(items), tmp_path / "run", progress=False)
    resumed = ap.Trainer(new(), config).fit(items, tmp_path / "run", resume=True, progress=False)
    for name, p in weights(whole).items():
        assert torch.equal(p, weights(resumed)[name]), name


@pytest.mark.parametrize("size", [1, 64, 2222])
def test_a_generator_of_exactly_enough_rows_is_enough(size: int) -> None:
    """2222 rows, of which 222 are held out, are ten batches of 200."""
    assert trainer().fit((part for part in X[:2222].split(size)), progress=False).info["training"]["tokens"] == 2000
    with pytest.raises(ValueError, match=r"ended after 1,999"):
        trainer().fit((part for part in X[:2221].split(size)), progress=False)


@pytest.mark.parametrize("again", [True, False], ids=["read again", "once"])
def test_rows_that_are_held_out_are_so_in_every_epoch(again: bool) -> None:
    """503 rows: if counting went on, other places would be held out in the second epoch."""
    parts = list(X[:503].split(64))
    source = source_of(Again(parts) if again else iter(parts * 4), seed=0)
    batches = source.batches(450)
    trained = torch.cat([next(batches).x for _ in range(4)])
    held_out = torch.cat([b.x for b in source.held_out(10_000)])
    assert torch.equal(held_out, X[:503][9::10]) is again
    assert bool(torch.isin(held_out[:, 0], trained[:, 0]).any()) is not again


PAIRS: dict[str, Any] = {
    "list of batches": lambda y: [ap.Batch(x, target=t) for x, t in zip(X.split(130), y.split(130), strict=True)],
    "a batch with a mask": lambda y: ap.Batch(X.repeat(2, 1), target=y.repeat(2, 1), mask=torch.arange(8000) < 4000),
    "generator of batches": lambda y: (ap.Batch(x, target=t) for x, t in zip(X.split(130), y.split(130), strict=True)),
    "list of pairs": lambda y: list(zip(X.split(130), y.split(130), strict=True)),
    "loader of pairs": lambda y: torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, y), batch_size=130),
    "dicts": lambda y: ({"target": t, "x": x} for x, t in zip(X.split(130), y.split(130), strict=True)),
}


@pytest.mark.parametrize("kind", PAIRS)
def test_transcoders_take_rows_with_targets(kind: str) -> None:
    weight = torch.randn(8, 8, generator=torch.Generator().manual_seed(1))
    y = X[:, :8] @ weight
    source = source_of(PAIRS[kind](y), seed=0, pairs=True)
    seen = [next(source.batches(BATCH)), source.sample(100), *source.held_out(100)]
    for batch in seen:
        assert batch.target is not None and torch.allclose(batch.target, batch.x[:, :8] @ weight, atol=1e-4)
    sae = trainer(new("transcoder", d_out=8)).fit(PAIRS[kind](y), progress=False)
    assert sae.info["training"]["tokens"] == 2000


def test_of_several_columns_the_rows_are_those_that_are_no_labels() -> None:
    labelled = [{"index": i, "acts": row} for i, row in enumerate(X)]
    source = source_of(torch.utils.data.DataLoader(labelled, batch_size=100), seed=0)
    assert torch.equal(source.sample(50).x, X[:50])
    with pytest.raises(ValueError, match="which of a, b are the activations"):
        trainer().fit(({"a": part, "b": part} for part in X.split(100)), progress=False)


def test_a_step_does_not_learn_what_its_rows_were_made_of() -> None:
    made = torch.ones(D_IN, requires_grad=True)
    one, two = trainer(new()), trainer(new())
    losses = [one.step(X[:100] * made)["loss"], two.step(ap.Batch(X[:100] * made))["loss"]]
    assert made.grad is None and losses[0] == losses[1]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([X, X[:, :8]], "rows differ"),
        (iter([X, X[:, :8], X]), "rows differ"),
        ([ap.Batch(X, target=X), ap.Batch(X)], "rows differ"),
        (X.numpy().astype(complex), "real numbers"),
        ("acts", "CacheSource"),
        (Path("acts"), "CacheSource"),
        ({"layer": X}, "got dict"),
    ],
    ids=["list", "generator", "targets", "complex", "name", "path", "dict"],
)
def test_rows_that_cannot_be_meant_are_refused_in_words(given: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        trainer().fit(given, progress=False)


def test_a_generator_that_ends_or_is_resumed_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ended after 450 to train on.*generator"):
        trainer().fit((part for part in X[:500].split(64)), progress=False)
    with pytest.raises(ValueError, match="come only once"):
        source = source_of(iter(X), seed=0)
        source.load_state_dict({"rows_out": 200})
    with pytest.raises(ValueError, match="is empty"):
        trainer().fit(iter(()), progress=False)


@pytest.mark.parametrize("given", [3, None, object()], ids=["a number", "none", "an object"])
def test_what_is_no_source_is_refused_in_words(given: Any) -> None:
    with pytest.raises(ValueError, match="a tensor or array of rows"):
        trainer().fit(given, progress=False)


@pytest.mark.parametrize("given", ["text", object(), [object()]], ids=["a text", "an object", "a list of objects"])
def test_what_is_no_array_is_refused_in_words(given: Any) -> None:
    for call in (new().encode, trainer().step, new().fit_input):
        with pytest.raises(ValueError, match=r"expected activations as a tensor or array|Expected activations"):
            call(given)


# Rows that spoil a step


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["topk", "mutual_choice", "feature_choice", "relu", "jumprelu", "gated", "switch"])
def test_a_batch_with_nan_changes_nothing(name: str, bad: float) -> None:
    """The next step is the one that would have been made without it."""
    (one, two), spoilt = (trainer(new(name)) for _ in range(2)), X[:BATCH].clone()
    spoilt[3, 5] = bad
    for t in (one, two):
        t.step(X[:BATCH]), t.step(X[BATCH : 2 * BATCH])
    before = weights(two.sae)
    with pytest.raises(ValueError, match="NaN or infinity"):
        two.step(spoilt)
    assert all(torch.equal(p, before[n]) for n, p in weights(two.sae).items())
    assert all(p.grad is None for p in two.sae.parameters())
    assert (two.steps, two.tokens) == (2, 2 * BATCH)
    one.step(X[2 * BATCH : 3 * BATCH]), two.step(X[2 * BATCH : 3 * BATCH])
    for n, p in weights(one.sae).items():
        assert torch.equal(p, weights(two.sae)[n]), n


def test_gradients_that_are_not_finite_have_no_effect_where_nobody_looks() -> None:
    """On a GPU looking means waiting: the factor of clipping is 0 there, and what is 0 times NaN counts as 0."""
    from apportion.training.clipping import RelativeClipping

    clipping = RelativeClipping(2.0)
    clipping.scale(torch.tensor(1.0))
    for norm in (math.nan, math.inf):
        assert clipping.scale(torch.tensor(norm)) == 0
    assert clipping.scale(torch.tensor(1.0)) == 1


# An input description that was never fitted


def test_rows_far_off_centre_are_pointed_out_once(caplog: pytest.LogCaptureFixture) -> None:
    sae = new()
    with caplog.at_level(logging.WARNING, logger="apportion"):
        for _ in range(3):
            sae.encode(X[:100] + 50)
    said = [r.getMessage() for r in caplog.records]
    assert len(said) == 1 and "sae.fit_input(x)" in said[0]


@pytest.mark.parametrize("state", ["fitted", "eval mode", "no description", "on centre", "few rows"])
def test_nothing_is_said_where_nothing_is_wrong(state: str, caplog: pytest.LogCaptureFixture) -> None:
    sae, x = new(input_norm="none" if state == "no description" else "dataset"), X[:100] + 50
    if state == "fitted":
        sae.fit_input(x)
    if state == "eval mode":
        sae.eval()
    x = torch.randn(100, D_IN) if state == "on centre" else x[:5] if state == "few rows" else x
    with caplog.at_level(logging.WARNING, logger="apportion"):
        sae.encode(x)
    assert not caplog.records


# Several processes


def test_several_processes_in_one_folder_are_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"2 processes were started together \(WORLD_SIZE\)"):
        trainer().fit(X, tmp_path / "run", progress=False)
    assert main(["train", "nothing", "--out", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err.startswith("apportion: 2 processes") and not (tmp_path / "run").exists()
    trainer().fit(X, progress=False)
    monkeypatch.setenv("WORLD_SIZE", "1")
    trainer().fit(X, tmp_path / "run", progress=False)


def test_what_is_logged_need_not_be_converted(tmp_path: Path) -> None:
    def objective(saes: Any, batch: ap.Batch, context: Any) -> dict[str, Tensor]:
        figures = {"a": np.float32(0.5), "b": 2, "c": np.nan, "d": torch.tensor(3.0)}
        context.figures.update(figures)
        return local_reconstruction(saes, batch, context)

    config = ap.TrainConfig(lr=1e-2, batch_tokens=BATCH, total_tokens=2 * BATCH, log_every_steps=1)
    ap.Trainer(new(), config, objective).fit(X, tmp_path / "run", progress=False)
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0], parse_constant=pytest.fail)
    assert (line["a"], line["b"], line["c"], line["d"]) == (0.5, 2, None, 3.0)


def test_home_is_where_the_tilde_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    trainer().fit(X, "~/run", progress=False)
    new().save("~/sae")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "sae"]
    assert ap.load("~/run").name == ap.load("~/sae").name == "topk"
    np.save(tmp_path / "x.npy", X.numpy())
    assert main(["info", "~/run"]) == 0 and main(["convert", "~/run", "~/lens", "--to", "sae_lens"]) == 0
    assert (tmp_path / "lens" / "cfg.json").exists() and not (tmp_path / "~").exists()

"""Caches that were damaged, and manifests that were edited: said in one line when they are opened or verified."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from trials import trials

from apportion.architectures import create
from apportion.cli import main
from apportion.rows import ActivationStore, CacheSource, LayersStore, PairStore, SitesStore, open_stores
from apportion.rows.batch import Batch
from apportion.rows.filter import TokenFilter
from apportion.rows.layout import sealed
from apportion.rows.shards import BLOCK_BYTES, sha256_of
from apportion.rows.writer import StoreWriter
from apportion.training import TrainConfig, Trainer

A, B = "model.layers.0", "model.layers.1:in"
FOLDER_A, FOLDER_B = A, "model.layers.1--in"
D_IN, LENGTH, CONTEXTS, SHARD_ROWS = 96, 8, 30, 100


def write_cache(folder: Path, seed: int = 0, contexts: int = CONTEXTS) -> Path:
    rows = torch.arange(contexts * LENGTH)
    x = torch.randn(2, len(rows), D_IN, generator=torch.Generator().manual_seed(seed))
    with StoreWriter(
        folder, {A: D_IN, B: D_IN}, dtype="float32", token_filter=TokenFilter(), special_ids=(1,)
    ) as writer:
        writer.shard_rows = SHARD_ROWS
        writer.add({A: x[0], B: x[1]}, rows % 50, rows % LENGTH, rows // LENGTH)
        writer.finish({
            "model": {"name_or_path": "embedded", "class": "Llama", "probe": [0.5, 0.5]},
            "model_dtype": "float32",
            "tokenizer": {"name_or_path": "embedded", "vocab_size": 50, "special_ids": [1]},
            "text": {"where": "somewhere", "files": 1, "bytes": 10},
            "text_skipped": {},
            "bos": "auto",
            "bos_prepended": False,
            "context_tokens": LENGTH,
            "contexts": contexts,
            "tokens_asked": len(rows),
            "seconds": 1.5 + seed,
            "ended": "complete",
            "text_ended_early": False,
        })  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cache(tmp_path_factory.mktemp("caches") / "acts")


@pytest.fixture
def acts(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "acts"))


def edit_manifest(folder: Path, edit: Callable[[dict[str, Any]], Any], seal: bool = True) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    edit(manifest)
    (folder / "manifest.json").write_text(json.dumps(sealed(manifest) if seal else manifest))


def make_old(folder: Path) -> None:
    """As caches of version 1 were, with masks in place of norms; the first had no digests of blocks and manifest."""
    for hookpoint in (A, B):
        mask = ActivationStore(folder, hookpoint).mask.split(SHARD_ROWS)
        for number, part in enumerate(mask):
            file = folder / hookpoint.replace(":", "--") / f"{number:05d}.safetensors"
            save_file({"acts": load_file(file)["acts"], "mask": part.clone()}, file)

    def forget(manifest: dict[str, Any]) -> None:
        del manifest["manifest_sha256"], manifest["shard_contexts"]
        manifest |= {"format_version": 1, "shard_rows": SHARD_ROWS}
        for shard in manifest["shards"]:
            del shard["sample_sha256"], shard["contexts"], shard["shard"]
            shard["sha256"] = {file: sha256_of(folder / file) for file in shard["sha256"]}

    edit_manifest(folder, forget, seal=False)


# Damage. Files of activations are larger than the blocks that are sampled of them, so that there is something between.


def shard(folder: Path, number: int = 1) -> Path:
    return folder / FOLDER_A / f"{number:05d}.safetensors"


def labels(folder: Path) -> Path:
    return folder / "tokens-00001.safetensors"


def exchange(one: Path, other: Path) -> None:
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


def overwrite(file: Path, at: int, content: bytes) -> None:
    with file.open("r+b") as stream:
        stream.seek(at)
        stream.write(content)


def zeroed(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def rewrite(file: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)


def changed(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({name: make(tensors[name])})


def moved_out(folder: Path) -> None:
    shutil.move(folder / FOLDER_A, folder.parent / "elsewhere")
    (folder / FOLDER_A).symlink_to(folder.parent / "elsewhere")


def replaced(file: Path, make: Callable[[Path], Any]) -> None:
    file.unlink()
    make(file)


ON_OPENING: list[tuple[str, Callable[[Path], Any]]] = [
    ("shards exchanged", lambda f: exchange(shard(f, 0), shard(f, 1))),
    ("hookpoints exchanged", lambda f: exchange(shard(f), f / FOLDER_B / "00001.safetensors")),
    ("shard missing", lambda f: shard(f).unlink()),
    ("last shard missing", lambda f: shard(f, 2).unlink()),
    ("labels missing", lambda f: labels(f).unlink()),
    ("folder missing", lambda f: shutil.rmtree(f / FOLDER_A)),
    ("folder outside", moved_out),
    ("cut by a byte", lambda f: os.truncate(shard(f), shard(f).stat().st_size - 1)),
    ("cut in half", lambda f: os.truncate(shard(f), shard(f).stat().st_size // 2)),
    ("empty", lambda f: os.truncate(shard(f), 0)),
    ("longer", lambda f: shard(f).write_bytes(shard(f).read_bytes() + b"more")),
    ("zeroed", lambda f: zeroed(shard(f))),
    ("labels zeroed", lambda f: zeroed(labels(f))),
    ("zeroed behind its header", lambda f: overwrite(shard(f), 200, bytes(shard(f).stat().st_size - 200))),
    ("last block zeroed", lambda f: overwrite(shard(f), shard(f).stat().st_size - BLOCK_BYTES, bytes(BLOCK_BYTES))),
    ("other numbers", lambda f: rewrite(shard(f), changed("acts", lambda x: 2 * x))),
    ("another dtype", lambda f: rewrite(shard(f), changed("acts", lambda x: x.half()))),
    ("a row less", lambda f: rewrite(shard(f), changed("acts", lambda x: x[1:]))),
    ("another width", lambda f: rewrite(shard(f), changed("acts", lambda x: x[:, 1:]))),
    ("no norms", lambda f: rewrite(shard(f), lambda t: t.pop("norms" if "norms" in t else "mask"))),
    ("a tensor more", lambda f: rewrite(shard(f), lambda t: t.update(more=torch.ones(1)))),
    ("labels of 64 bits", lambda f: rewrite(labels(f), changed("tokens", lambda x: x.long()))),
    ("one huge context", lambda f: rewrite(labels(f), changed("contexts", lambda x: x.fill_(2**31 - 1)))),
    ("a folder for a shard", lambda f: replaced(shard(f), Path.mkdir)),
    ("a pipe for a shard", lambda f: replaced(shard(f), os.mkfifo)),
    ("/dev/zero for a shard", lambda f: replaced(shard(f), lambda file: file.symlink_to("/dev/zero"))),
    ("of another cache", lambda f: write_cache(f.parent / "b", seed=1) and exchange(shard(f), shard(f.parent / "b"))),
]  # fmt: skip
ON_VERIFYING: list[tuple[str, Callable[[Path], Any]]] = [
    ("one row edited", lambda f: overwrite(shard(f), 2 * BLOCK_BYTES, bytes(64))),
    ("one bit of a row", lambda f: overwrite(shard(f), 2 * BLOCK_BYTES + 1, b"\x7f")),
    ("another hookpoint's shard missing", lambda f: (f / FOLDER_B / "00002.safetensors").unlink()),
    ("another hookpoint's row edited", lambda f: overwrite(f / FOLDER_B / "00000.safetensors", 9000, b"1234")),
]


@pytest.mark.fault("damaged caches")
@pytest.mark.parametrize("damage", trials(ON_OPENING))
def test_opening_notices(damage: tuple[str, Callable[[Path], Any]], acts: Path) -> None:
    damage[1](acts)
    with pytest.raises(ValueError, match=r"damaged|leads out") as raised:
        ActivationStore(acts, A)
    assert "\n" not in str(raised.value) and str(acts) in str(raised.value)


@pytest.mark.fault("damaged caches")
@pytest.mark.parametrize("damage", trials(ON_VERIFYING))
def test_verifying_notices_every_byte(
    damage: tuple[str, Callable[[Path], Any]], acts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage[1](acts)
    ActivationStore(acts, A)
    assert main(["cache", "verify", str(acts)]) == 2
    said = capsys.readouterr().err
    assert "damaged" in said and said.count("\n") == 1


SEEN_WITHOUT_DIGESTS = [
    *("shard missing", "labels missing", "folder outside", "cut by a byte", "empty", "zeroed", "another dtype"),
    *("a row less", "another width", "no norms", "a tensor more", "labels of 64 bits", "a pipe for a shard"),
]


@pytest.mark.fault("damaged caches")
@pytest.mark.parametrize("name", trials(SEEN_WITHOUT_DIGESTS))
def test_opening_an_older_cache_notices(name: str, acts: Path) -> None:
    make_old(acts)
    dict(ON_OPENING)[name](acts)
    with pytest.raises(ValueError, match=r"damaged|leads out"):
        ActivationStore(acts, A)


@pytest.mark.fault("damaged caches")
@pytest.mark.parametrize(
    "column",
    trials(
        [
            *((f"contexts {n}", "contexts", n) for n in (2**31 - 1, -1, CONTEXTS)),
            ("positions", "positions", LENGTH),
            *((f"tokens {n}", "tokens", n) for n in (2**31 - 1, -5)),
        ]
    ),
)
def test_numbers_that_cannot_be_are_refused_before_anything_is_made_of_them(
    column: tuple[str, str, int], acts: Path
) -> None:
    make_old(acts)
    _, name, value = column
    rewrite(labels(acts), lambda t: t[name][3:4].fill_(value))
    with pytest.raises(ValueError, match=rf"damaged \({name} between"):
        getattr(ActivationStore(acts, A), name)
    if name == "contexts":
        with pytest.raises(ValueError, match=r"contexts between"):
            CacheSource(ActivationStore(acts, A))


def test_caches_with_and_without_digests_are_read_and_verified(acts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new = ActivationStore(acts, B)
    assert main(["cache", "verify", str(acts)]) == 0
    assert main(["cache", "info", str(acts)]) == 0
    assert "240 tokens" in capsys.readouterr().out
    make_old(acts)
    old = ActivationStore(acts, B)
    old.verify()
    assert torch.equal(old.gather(torch.arange(240)), new.gather(torch.arange(240)))
    assert torch.equal(old.mask, new.mask) and torch.equal(old.tokens, new.tokens)
    known = {"content_sha256", "format_version"}  # the files are others
    assert (
        old.describe().to_json() | dict.fromkeys(known) == new.describe().to_json() | dict.fromkeys(known)
        and "manifest_sha256" not in new.describe().to_json()
    )
    assert all(shard["sample_sha256"].keys() == shard["sha256"].keys() for shard in new.manifest["shards"])


def test_opening_reads_a_few_blocks_of_a_file(acts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sizes(*_: Any) -> None:
        raise AssertionError("all of a file was read")

    monkeypatch.setattr("apportion.rows.place.sha256_of", sizes)
    store = ActivationStore(acts, A)
    with pytest.raises(AssertionError):
        store.verify()


# Manifests

EDITS: list[tuple[str, Any]] = [
    *((name, ...) for name in ("dtype", "rows", "shard_contexts", "context_tokens")),
    *((name, ...) for name in ("model", "text", "hookpoints", "shards")),
    *((f"hookpoints.{A}.{name}", ...) for name in ("folder", "d_in", "filter")),
    *((f"shards.1.{name}", ...) for name in ("rows", "sha256", "sample_sha256", "shard", "contexts")),
    *(("rows", value) for value in ("240", 240.0, 239, 10**18, -240, None, True)),
    *(("shard_contexts", value) for value in (0, 10**30, [100], "13")),
    *(("shards.1.shard", value) for value in (0, 2, -1, "1", None)),
    *(("shards.1.contexts", value) for value in (0, -1, 10**12, "13", None)),
    *(("context_tokens", value) for value in (0, "8", 10**15, None)),
    *(("contexts", value) for value in (0, -1, 10**15, "30")),
    *(("dtype", value) for value in ("float64", "bfloat16", 32, None)),
    *((f"hookpoints.{A}.d_in", value) for value in (0, -96, 95, 10**15, "96", 96.5, None)),
    *((f"hookpoints.{A}.folder", value) for value in ("../acts", "/etc", "", ".", FOLDER_B, 5, None)),
    *((f"hookpoints.{A}.filter", value) for value in ([], "none", None)),
    *((f"hookpoints.{A}.filter.special_ids", value) for value in ([2**40], [-1], "1", [1.5])),
    *((f"hookpoints.{A}.filter.{name}", "no") for name in ("special_tokens", "first_position", "norm_outlier")),
    *((f"hookpoints.{A}.filtered", value) for value in ([], {"special": "many"})),
    *((f"hookpoints.{A}.filtered_share", value) for value in ("half", [])),
    *(("hookpoints", value) for value in ({}, [], {A: 1}, "all")),
    *(("shards", value) for value in ([], {}, [1, 2], None)),
    *(("shards.0.rows", value) for value in (99, 101, -1, "100", 10**18)),
    *(("shards.0.sha256", value) for value in ({}, [], {"x": "y"}, None)),
    *(("shards.0.sample_sha256", value) for value in ({}, [], {"x": "y"})),
    *(("model", value) for value in ("embedded", [], None)),
    *(("model.name_or_path", value) for value in (5, {"a": 1})),
    *(("model.probe", value) for value in ("probe", [None], [[1.0]])),
    *(("text", value) for value in ("somewhere", None)),
    *(("seconds", value) for value in ("long",)),
    *(("text_skipped", value) for value in ([1], {"a": "b"})),
    *(("tokenizer", value) for value in (5, "embedded")),
]  # fmt: skip
"""Where, and what is put there; ... takes the field away."""


def put(manifest: dict[str, Any], where: str, value: Any) -> None:
    at: Any = manifest
    *way, last = where.replace(A, "A").split(".")
    for part in way:
        at = at[int(part) if part.isdigit() else A if part == "A" else part]
    if value is ...:
        del at[last]
    else:
        at[last] = value


@pytest.mark.fault("edited manifests")
@pytest.mark.parametrize("edit", trials([(f"{where} = {value!r}", where, value) for where, value in EDITS], short=40))
def test_a_field_that_cannot_be_is_named(edit: tuple[str, str, Any], acts: Path) -> None:
    """Even where the digest of the manifest was made to fit."""
    _, where, value = edit
    edit_manifest(acts, lambda manifest: put(manifest, where, value))
    with pytest.raises(ValueError, match=r"as it was written|damaged") as raised:
        ActivationStore(acts, A)
    said = str(raised.value)
    assert "\n" not in said and str(acts) in said
    if "damaged" not in said:
        assert where.split(".")[-1] in said


FITTING: list[tuple[str, Any]] = [
    (f"hookpoints.{A}.filter.median_norm", 3.0),
    (f"hookpoints.{A}.filter.first_position", False),
    ("model.name_or_path", "another/model"),
    ("text.where", "elsewhere"),
    ("bos", "always"),
    ("more", 1),
    ("manifest_sha256", "0" * 64),
    ("manifest_sha256", ...),
    ("ended", ...),
]


@pytest.mark.fault("edited manifests")
@pytest.mark.parametrize("edit", trials([(f"{where} = {value!r}", where, value) for where, value in FITTING]))
def test_a_manifest_that_was_changed_is_refused_even_if_it_could_be_so(edit: tuple[str, str, Any], acts: Path) -> None:
    edit_manifest(acts, lambda manifest: put(manifest, *edit[1:]), seal=False)
    with pytest.raises(ValueError, match="changed since it was written"):
        ActivationStore(acts, A)


@pytest.mark.fault("edited manifests")
@pytest.mark.parametrize(
    "content", trials([b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"format_version": 1}', b'{"rows": NaN}'])
)
def test_what_is_no_manifest_is_refused(content: bytes, acts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (acts / "manifest.json").write_bytes(content)
    for command in (["cache", "verify"], ["cache", "info"], ["info"]):
        assert main([*command, str(acts)]) == 2
        assert capsys.readouterr().err.count("\n") == 1


# Runs and processes


class Stopping(CacheSource):
    """Interrupted after a few batches, as by Ctrl-C."""

    def batches(self, batch_tokens: int) -> Iterator[Batch]:
        for batch, _ in zip(super().batches(batch_tokens), range(4), strict=False):
            yield batch
        raise KeyboardInterrupt


@pytest.mark.fault("damaged caches")
@pytest.mark.parametrize("sae", trials(["topk", "crosscoder"]))
def test_a_run_goes_on_with_equal_content_and_not_with_another(sae: str, acts: Path, tmp_path: Path) -> None:
    again, other = write_cache(tmp_path / "again"), write_cache(tmp_path / "other", seed=1)
    edit_manifest(again, lambda manifest: manifest.update(seconds=99.0, tokens_per_s=1.0))

    def fit(source_type: type[CacheSource], folder: Path, resume: bool) -> None:
        settings = {"num_sites": 2} if sae == "crosscoder" else {}
        store = SitesStore(open_stores(folder)) if settings else ActivationStore(folder, A)
        made = create(sae, d_in=D_IN, d_sae=128, k=4, seed=0, **settings)
        trainer = Trainer(made, TrainConfig(total_tokens=160, batch_tokens=16))
        trainer.fit(source_type(store), tmp_path / "run", resume=resume)

    with pytest.raises(KeyboardInterrupt):
        fit(Stopping, acts, resume=False)
    with pytest.raises(ValueError, match="content_sha256"):
        fit(CacheSource, other, resume=True)
    fit(CacheSource, again, resume=True)


def test_content_is_compared_only_where_a_run_recorded_it(acts: Path) -> None:
    """Older runs have no digest of content; in lists of sites it would differ from theirs."""
    about = SitesStore(open_stores(acts)).describe()
    assert about.content_sha256 and not any("content_sha256" in site.to_json() for site in about.sites)


@pytest.mark.parametrize("kind", ["one", "pair", "sites", "layers", "source"])
def test_pickling_carries_the_path(kind: str, acts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stores = open_stores(acts)
    made: Any = {
        "one": lambda: stores[0],
        "pair": lambda: PairStore(*stores),
        "sites": lambda: SitesStore(stores),
        "layers": lambda: LayersStore(stores),
        "source": lambda: CacheSource(LayersStore(stores), seed=3),
    }[kind]()
    rows, content = torch.tensor([3, 150, 7]), pickle.dumps(made)
    assert len(content) < 1000, "the cache itself has some 200,000 bytes"
    if kind == "source":
        next(made.batches(16))
        content = pickle.dumps(made)
    else:
        assert len(made.mask) and len(made.groups) and pickle.dumps(made) == content
    monkeypatch.chdir(acts)
    read = pickle.loads(content)
    if kind == "source":
        assert read.state_dict() == made.state_dict()
        assert torch.equal(next(read.batches(16)).x, next(made.batches(16)).x)
    else:
        assert torch.equal(read.batch(rows).x, made.batch(rows).x) and torch.equal(read.mask, made.mask)


def total(store: Any, rows: torch.Tensor) -> float:
    return float(store.batch(rows).x.double().sum())


def test_a_spawned_process_reads_the_cache(acts: Path) -> None:
    store = SitesStore(open_stores(acts))
    rows = torch.tensor([3, 150, 7])
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(total, (store, rows)) == total(store, rows)

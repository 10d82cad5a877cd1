"""Rows of an array: in memory, and in a file that is mapped; trained on, evaluated, reported."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

import apportion as ap
from apportion.cli import main
from apportion.rows import ActivationStore, ArrayStore, CacheSource
from apportion.rows.arrays import open_array
from apportion.rows.batch import RowStore
from apportion.rows.opening import open_rows, rows_for


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    g = torch.Generator().manual_seed(0)
    codes = torch.rand(3000, 40, generator=g) * (torch.rand(3000, 40, generator=g) < 0.1)
    x = codes @ torch.randn(40, 16, generator=g) + 0.01 * torch.randn(3000, 16, generator=g)
    path = tmp_path_factory.mktemp("rows") / "x.npy"
    np.save(path, x.half().numpy())
    return path


def test_a_file_is_mapped_and_gives_its_rows(file: Path) -> None:
    store = open_array(file)
    assert isinstance(store.x, np.memmap) and isinstance(store, RowStore)
    x = torch.from_numpy(np.load(file)).float()
    some = torch.tensor([5, 0, 2999, 5])
    assert torch.equal(store.batch(some).x, x[some]) and store.batch(some).x.dtype == torch.float32
    assert (store.rows, store.d_in, store.mask.all().item()) == (3000, 16, True)
    again = pickle.loads(pickle.dumps(store))
    assert isinstance(again.x, np.memmap) and torch.equal(again.gather(some), x[some])
    assert len(pickle.dumps(store)) < 1000, "the path, not the rows"


def test_a_file_is_known_again_by_its_content(file: Path, tmp_path: Path) -> None:
    there = open_array(file).describe()
    x = np.load(file)
    np.save(tmp_path / "same.npy", x)
    np.save(tmp_path / "wide.npy", x.astype("float32"))
    x[-1] = 7
    np.save(tmp_path / "other.npy", x)
    found = {name: open_array(tmp_path / f"{name}.npy").describe().content_sha256 for name in ("same", "wide", "other")}
    assert found["same"] == there.content_sha256 and there.language is None and there.folder == str(file)
    assert len({there.content_sha256, found["wide"], found["other"]}) == 3


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"no numpy", "is no .npy file of numbers"),
        (np.zeros(5), r"has shape \(5,\)"),
        (np.zeros((0, 4)), r"has shape \(0, 4\)"),
        (np.array([["a", "b"]]), "holds <U1"),
        (np.zeros((3, 2), dtype=complex), "holds complex128"),
        (np.array([[None, 1]], dtype=object), "is no .npy file of numbers"),
    ],
)
def test_what_is_no_file_of_rows_is_refused(content: object, said: str, tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, content, allow_pickle=True)
    with pytest.raises(ValueError, match=said):
        open_array(path)


def test_columns_have_a_row_for_each_row() -> None:
    x = torch.zeros(4, 3)
    for column in ({"groups": [1, 2]}, {"labels": {"cell": ["a"]}}, {"target": torch.zeros(3, 2)}):
        with pytest.raises(ValueError, match="x has 4 rows"):
            ArrayStore(x, **column)


def test_groups_are_held_out_together() -> None:
    store = ArrayStore(torch.arange(200.0)[:, None].expand(200, 3), groups=torch.arange(200) // 10)
    source = CacheSource(store, held_out_share=0.2)
    trained = torch.cat([next(source.batches(40)).x[:, 0] for _ in range(4)])
    held_out = torch.cat([batch.x[:, 0] for batch in source.held_out(1000)])
    assert not set((trained // 10).tolist()) & set((held_out // 10).tolist()) and len(held_out) == 20
    about = source.describe()
    assert (about.kind, about.rows_train, about.rows_calibrate, about.held_out_share) == ("array", 160, 20, 0.2)


def test_a_store_needs_what_an_sae_of_its_kind_takes(file: Path, tmp_path: Path) -> None:
    assert open_rows(file, "one", None).rows == 3000 and open_rows(file, "layers", None).rows == 3000
    for kind, said in (("sites", r"takes rows \[n, num_sites, d_in\]"), ("pair", "predicts a target")):
        with pytest.raises(ValueError, match=said):
            open_rows(file, kind, None)
    np.save(tmp_path / "sites.npy", np.zeros((7, 2, 4), dtype="float32"))
    assert open_rows(tmp_path / "sites.npy", "sites", None).num_sites == 2
    with pytest.raises(ValueError, match=r"takes rows \[n, d_in\]"):
        open_rows(tmp_path / "sites.npy", "one", None)


def test_evaluate_takes_an_array_or_a_store(file: Path) -> None:
    sae = ap.create("topk", d_in=16, d_sae=64, k=4, seed=0)
    x = torch.from_numpy(np.load(file)).float()
    sae.fit_input(x)
    of_array, of_file = ap.evaluate(sae, x), ap.evaluate(sae, open_array(file))
    assert of_array == of_file and of_array["tokens"] == 3000 and of_array["l0"] <= 4
    assert of_array["fvu"] == pytest.approx(
        ((x - sae.eval()(x)).square().sum() / (x - x.mean(0)).square().sum()).item(), rel=1e-5
    )
    assert ap.evaluate(sae, x.numpy(), torch.arange(50))["tokens"] == 50
    with pytest.raises(ValueError, match=r"an array, or a store such as ActivationStore\(folder\)"):
        ap.evaluate(sae, "acts")  # type: ignore[arg-type]


def test_train_eval_and_report_on_a_file(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = str(tmp_path / "run"), tmp_path / "out.json"
    train = ["train", str(file), "--out", run, "--k", "4", "--d-sae", "64", "--batch-tokens", "256"]
    assert main(train) == 0
    assert main(["eval", run, "--json", str(out)]) == 0
    held_out = json.loads(out.read_text())
    assert held_out["tokens"] == 150, "half of the held-out tenth; the other half calibrated"
    assert held_out["rows"] == f"held-out rows of its training rows {file}" and abs(held_out["l0"] - 4) < 1
    assert main(["eval", run, "--acts", str(file), "--json", str(out)]) == 0
    assert json.loads(out.read_text())["fvu"] == held_out["fvu"]
    np.save(tmp_path / "new.npy", np.load(file)[::-1])
    assert main(["eval", run, "--acts", str(tmp_path / "new.npy"), "--json", str(out)]) == 0
    assert json.loads(out.read_text())["tokens"] == 3000, "other rows: all of them"
    assert main(["report", run, "--out", str(tmp_path / "report")]) == 0
    page, figures = ((tmp_path / "report" / f"report.{kind}").read_text() for kind in ("html", "json"))
    (found,) = json.loads(figures)["latents"].values()
    assert found and all(text.startswith("<<row ") for one in found for text in one["strongest"])
    assert "examples are their numbers" in page and "<b>" in page and json.loads(figures)["text"] is None
    assert main([*train, "--resume"]) == 2 and main([*train, "--requeue"]) == 0
    changed = np.load(file)
    changed[0] += 1
    np.save(tmp_path / "changed.npy", changed)
    assert main(["train", str(tmp_path / "changed.npy"), *train[2:], "--requeue"]) == 2
    capsys.readouterr()
    assert main(["train", str(file), "--out", str(tmp_path / "none"), "--hookpoint", "model.layers.1"]) == 2
    assert "holds rows of no hookpoint" in capsys.readouterr().err
    assert main(["train", str(tmp_path / "nothing.npy"), "--out", str(tmp_path / "none")]) == 2
    assert "nothing.npy" in capsys.readouterr().err
    sae = ap.load(run)
    assert sae.hookpoint is None and sae.source.kind == "array" and isinstance(rows_for(sae), ArrayStore)
    assert not isinstance(rows_for(sae), ActivationStore)


def test_a_mask_is_true_or_false_and_groups_have_any_names() -> None:
    x = torch.randn(400, 3, generator=torch.Generator().manual_seed(0))
    kept = np.arange(400) % 2 == 1
    assert ArrayStore(x, mask=kept).mask.sum() == 200
    with pytest.raises(ValueError, match=r"True or False; got torch\.int64"):
        ArrayStore(x, mask=torch.arange(400) % 2)
    for names in (
        np.arange(400) // 10 * 10**12,
        [f"patient {i // 10}" for i in range(400)],
        np.arange(400) // 10 - 7.5,
    ):
        source = CacheSource(ArrayStore(x, groups=names))
        assert source.num_rows == 360 and sum(len(batch.x) for batch in source.held_out(1000)) == 20
    with pytest.raises(ValueError, match="has no rows to train on"):
        CacheSource(ArrayStore(x[:0]))


def test_rows_are_places_or_marks() -> None:
    x = torch.randn(9000, 4, generator=torch.Generator().manual_seed(0))
    sae = ap.create("topk", d_in=4, d_sae=16, k=2, seed=0)
    wanted = ap.evaluate(sae, x, torch.arange(0, 9000, 3))
    for rows in (np.arange(9000) % 3 == 0, list(range(0, 9000, 3)), np.arange(0, 9000, 3)):
        assert ap.evaluate(sae, x, rows) == wanted


def test_an_sae_of_all_layers_takes_rows_of_a_file(file: Path, tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    sizes = ["--k", "4", "--d-sae", "64", "--batch-tokens", "256"]
    assert main(["train", str(file), "--sae", "mlsae", *sizes, "--out", run]) == 0
    assert main(["eval", run]) == 0 and main(["report", run, "--out", str(tmp_path / "report")]) == 0


def test_what_an_evaluator_lacks_shows_before_rows_are_encoded(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sae = ap.create("topk", d_in=16, d_sae=64, k=4, seed=0)
    sae.save(tmp_path / "sae")
    monkeypatch.setattr(ap.SAE, "encode", lambda *_: pytest.fail("too late"))
    assert main(["eval", str(tmp_path / "sae"), "--acts", str(file), "--on", "recovery"]) == 2
    assert "needs labels" in capsys.readouterr().err


def test_every_site_has_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x = torch.randn(500, 2, 4, generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "sites.npy", x.numpy())
    ap.create("crosscoder", d_in=4, d_sae=16, k=2, seed=0).save(tmp_path / "sae")
    assert main(["eval", str(tmp_path / "sae"), "--acts", str(tmp_path / "sites.npy")]) == 0
    shown = capsys.readouterr().out
    assert "site 0 " in shown and "site 1 " in shown

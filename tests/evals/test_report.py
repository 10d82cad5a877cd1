"""The report and what it is made of: PCA, sweeps, examples, the pieces of a text, the page."""

from __future__ import annotations

import json
import re
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import apportion as ap
from apportion.cli import main
from apportion.evals import Measurement, evaluate_rows, held_out_rows
from apportion.evals.baselines import pca_curve
from apportion.evals.language_model import contexts_of
from apportion.evals.plots import fvu_chart
from apportion.evals.report import (
    NUM_LATENTS,
    Report,
    make_report,
    passage,
    spread_latents,
)
from apportion.evals.sweep import sweep
from apportion.language import load_model
from apportion.language.collect import collect
from apportion.rows import ActivationStore, CacheSource
from apportion.viewing.examples import activations_on, find_examples
from apportion.viewing.units import TokenUnits

SENTENCES = ["the cat sat on the old mat", "a dog ran over the hill by the sea", "she read a book about the sun"]
CONTEXT = 32
METHODS = ("topk", "mutual_choice")


def some_text(seed: int, sentences: int) -> str:
    order = torch.randint(len(SENTENCES), (sentences,), generator=torch.Generator().manual_seed(seed))
    return " ".join(SENTENCES[i] for i in order.tolist())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """A cache at model.layers.1 and a trained run of each method."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "text.txt").write_text(some_text(0, 2000))
    model, tokenizer = load_model(tiny_model_dir)
    collect(
        model,
        tokenizer,
        "model.layers.1",
        folder / "text.txt",
        tokens=10_000,
        out=folder / "acts",
        context_tokens=CONTEXT,
    )
    for name in METHODS:
        source = CacheSource(ActivationStore(folder / "acts"), held_out_share=0.4)
        sae = ap.create(name, d_in=32, d_sae=64, k=4, seed=0)
        config = ap.TrainConfig(lr=3e-3, batch_tokens=256, total_tokens=256 * 20)
        ap.Trainer(sae, config).fit(source, folder / name)
    return folder


@pytest.fixture(scope="module")
def store(folder: Path) -> ActivationStore:
    return ActivationStore(folder / "acts")


@pytest.fixture(scope="module")
def rows(store: ActivationStore) -> torch.Tensor:
    return held_out_rows(store, 0.4)


@pytest.fixture(scope="module")
def saes(folder: Path) -> dict[str, ap.SAE]:
    return {name: ap.load(folder / name) for name in METHODS}


@pytest.fixture(scope="module")
def report(saes: dict[str, ap.SAE], store: ActivationStore, rows: torch.Tensor, tiny_model_dir: Path) -> Report:
    return make_report(saes, store, rows, *load_model(tiny_model_dir), ce_tokens=320, progress=False)


def test_pca_leaves_what_the_best_subspace_leaves(store: ActivationStore, rows: torch.Tensor) -> None:
    curve = pca_curve(store, rows)
    x = store.gather(rows[store.mask[rows]]).double()
    centred = x - x.mean(0)
    U, S, V = torch.linalg.svd(centred, full_matrices=False)
    for components in (0, 1, 5, 32):
        x_hat = U[:, :components] * S[:components] @ V[:components]
        fvu = ((centred - x_hat).square().sum() / centred.square().sum()).item()
        assert curve[components].item() == pytest.approx(fvu, abs=1e-9)
    assert len(curve) == 33 and (curve.diff() <= 1e-12).all()


def test_a_sweep_goes_through_the_trained_sae(
    saes: dict[str, ap.SAE], store: ActivationStore, rows: torch.Tensor
) -> None:
    x = store.gather(rows[store.mask[rows]])
    for sae in saes.values():
        measurement = Measurement(sae)
        measurement.add(x, torch.ones(len(x), dtype=torch.bool))
        result = measurement.result()
        points = sweep(sae.train(), x)
        assert sae.training, "the mode is left as it was"
        l0s = [l0 for l0, _ in points]
        assert l0s == sorted(l0s) and min(l0s) < 3 and max(l0s) > 6 and min(l0s) >= 1 and max(l0s) <= 16
        ((_, fvu),) = [point for point in points if point[0] == pytest.approx(result["l0"], abs=1e-9)]
        assert fvu == pytest.approx(result["fvu"], rel=1e-6)
        sae.eval()
    topk = [l0 for l0, _ in sweep(saes["topk"], x)]
    assert all(l0 == int(l0) for l0 in topk), "another k, exactly"


def test_examples_are_the_strongest_one_per_context(
    saes: dict[str, ap.SAE], store: ActivationStore, rows: torch.Tensor
) -> None:
    sae = saes["mutual_choice"]
    counts = evaluate_rows({"sae": sae}, store, rows, progress=False)["sae"].activations.counts
    latents = counts.argsort(descending=True)[[3, 20]]
    dense = sae.encode(store.gather(rows)).dense() * store.mask[rows][:, None]
    assert torch.equal(activations_on(sae, store, rows, latents), dense[:, latents])
    units, tokenizer = TokenUnits(store, load_tokenizer(store)), load_tokenizer(store)
    words = {name: index for index, name in enumerate(tokenizer.decode([i]) for i in range(len(tokenizer)))}
    for found in find_examples(sae, store, rows, latents, units, strongest=4, random=3):
        column = dense[:, found.latent]
        assert found.density == pytest.approx((column > 0).sum().item() / store.mask[rows].sum().item())
        best_of_contexts = torch.stack(
            [column[store.contexts[rows] == context].max() for context in store.contexts[rows].unique()]
        )
        wanted = best_of_contexts.sort(descending=True).values[:4].tolist()
        strengths = [piece.activation for example in found.strongest for piece in example if piece.is_focus]
        assert strengths == pytest.approx(wanted, abs=1e-4) and found.largest == pytest.approx(wanted[0])
        whole = tokenizer.decode(store.tokens[rows].tolist())
        for example in found.strongest + found.random:
            (focus,) = [place for place, piece in enumerate(example) if piece.is_focus]
            assert example[focus].activation > 0
            assert focus <= units.before and len(example) <= units.before + 1 + units.after
            assert "".join(piece.text for piece in example).strip() in whole, "stands so in the text"
        mass = {t: column[store.tokens[rows] == words[t]].sum().item() for t, _ in found.preferred}
        assert found.preferred[0][1] == pytest.approx(max(mass.values()) / column.sum().item())
    silent = torch.tensor([int((counts == counts.min()).nonzero()[0])])
    if counts[silent] == 0:
        with pytest.raises(ValueError, match="does not fire"):
            find_examples(sae, store, rows, silent, units)


def test_latents_shown_are_spread_over_the_ranks() -> None:
    sae = ap.create("topk", d_in=4, d_sae=1000, k=4, seed=0)
    measurement = Measurement(sae)
    measurement.activations.counts = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    shown = measurement.activations.counts[spread_latents(measurement)].tolist()
    assert len(shown) == NUM_LATENTS and shown == sorted(shown, reverse=True)
    assert 940 < shown[0] < 1000 and 20 <= shown[-1] < 80
    assert {round(a - b, -1) for a, b in pairwise(shown)} == {80}
    measurement.activations.counts = torch.tensor([0, 50, 19, 21, 0])
    assert spread_latents(measurement).sort().values.tolist() == [1, 3]
    measurement.activations.counts = torch.zeros(5, dtype=torch.int64)
    assert spread_latents(measurement).tolist() == []


def test_contexts_are_taken_whole(store: ActivationStore, rows: torch.Tensor) -> None:
    contexts = contexts_of(store, rows[5:])
    assert contexts.shape == (len(rows) // CONTEXT - 1, CONTEXT)
    assert torch.equal(contexts.flatten(), store.tokens[rows[CONTEXT:]])


def test_the_passage_says_what_each_token_took(saes: dict[str, ap.SAE], store: ActivationStore, rows: Any) -> None:
    found = passage(saes, store, rows, TokenUnits(store, load_tokenizer(store)))
    first = rows[:CONTEXT]
    assert len(found) == CONTEXT and [t.takes_part for t in found] == store.mask[first].tolist()
    for column, sae in enumerate(saes.values()):
        assert [t.l0[column] for t in found] == sae.encode(store.gather(first)).l0().tolist()
    assert len({t.l0[1] for t in found}) > 1 and {t.l0[0] for t in found} == {4}
    assert "".join(t.text for t in found) == load_tokenizer(store).decode(store.tokens[first].tolist())


def load_tokenizer(store: ActivationStore) -> Any:
    return load_model(store.manifest["model"]["name_or_path"])[1]


def test_charts_hold_what_was_measured(report: Report) -> None:
    """Each SAE is a point at its (L0, FVU) of the chart of error against sparsity."""
    from matplotlib import pyplot as plt

    figures = report.figures
    points = {name: (m["l0"], m["fvu"]) for name, m in figures["methods"].items()}
    _, axes = plt.subplots()
    fvu_chart(points, figures["sweeps"], figures["baselines"]["pca"]["fvu_by_components"])(axes)
    drawn = [tuple(float(v[0]) for v in line.get_data()) for line in axes.lines if line.get_marker() == "o"]
    assert drawn == list(points.values())
    pca = axes.lines[-1].get_data()
    assert [float(v) for v in pca[1]] == [figures["baselines"]["pca"]["fvu_by_components"][int(n)] for n in pca[0]]
    plt.close()


def test_strange_saes_still_get_a_report(store: ActivationStore, rows: torch.Tensor, tiny_model_dir: Path) -> None:
    """k above the width, thresholds far off, a name like a formula."""
    wide = ap.create("topk", d_in=32, d_sae=64, k=40, seed=0).eval()
    far_off = ap.create("mutual_choice", d_in=32, d_sae=64, k=40, seed=0)
    far_off.calibrate(0.01 * torch.randn(2000, 32, generator=torch.Generator().manual_seed(0)))
    report = make_report(
        {"runs/$a$": wide, "far": far_off.eval()},
        store,
        rows[:CONTEXT],
        *load_model(tiny_model_dir),
        ce_tokens=0,
        progress=False,
    )
    assert report.figures["baselines"]["pca"]["components"] == 32
    assert len(report.figures["sweeps"]["far"]) >= 1
    with pytest.raises(ValueError, match="at most 6 SAEs"):
        make_report({str(i): wide for i in range(7)}, store, rows, None, None)


def test_figures_of_the_report(report: Report, saes: dict[str, ap.SAE], store: ActivationStore, rows: Any) -> None:
    figures = json.loads(json.dumps(report.figures, allow_nan=False))
    assert figures["k"] == 4 and list(figures["methods"]) == list(METHODS)
    plain = evaluate_rows(saes, store, rows, progress=False)
    for name, method in figures["methods"].items():
        assert {"fvu", "l0", "dead", "delta_ce"} <= method.keys()
        assert method["fvu"] == plain[name].result()["fvu"] and method["l0"] == plain[name].result()["l0"]
        assert method["delta_ce"] == pytest.approx(method["ce_spliced"] - method["ce_clean"])
        assert method["predictions"] == 10 * (CONTEXT - 1)
        assert method["training"]["tokens"] == 256 * 20
    assert figures["baselines"]["pca"]["components"] == 4
    assert figures["baselines"]["pca"]["fvu"] == pytest.approx(pca_curve(store, rows)[4].item())
    mean = figures["baselines"]["mean_ablation"]["delta_ce"]
    assert mean == pytest.approx(method["ce_mean_ablation"] - method["ce_clean"])
    for found in figures["latents"].values():
        assert len(found) == NUM_LATENTS and all("<<" in text for one in found for text in one["strongest"])
        assert all(0 < share <= 1 for one in found for _, share in one["top_tokens"])


def test_the_page_stands_on_its_own(report: Report) -> None:
    page = report.page
    assert not re.findall(r'(?:src|href|url)\s*[=(]\s*["\']?(?:https?:)?//', page), "nothing is fetched"
    assert "<script" not in page and page.count("<svg ") == 4 and page.count("</svg>") == 4
    for name in METHODS:
        assert page.count(f"</span>{name}</h3>") == 1, "a passage each"
    assert page.count('class="card latent"') == 2 * NUM_LATENTS
    svg_colours = re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", page)
    assert not svg_colours, "every colour comes from the page, for dark mode"
    assert f"{report.figures['methods']['topk']['fvu']:.4f}" in page


def test_text_cannot_break_out_of_the_page(
    saes: dict[str, ap.SAE], store: ActivationStore, rows: torch.Tensor, tiny_model_dir: Path
) -> None:
    class Hostile:
        def decode(self, tokens: Any, **_: Any) -> str:
            return "<script>alert('&')</script>" * len(tokens)

    model, _ = load_model(tiny_model_dir)
    page = make_report(saes, store, rows, model, Hostile(), ce_tokens=0, progress=False).page
    assert "<script" not in page and "&lt;script&gt;" in page
    assert page.count("<svg ") == 3, "without the model no chart of difficulty"


def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(folder / name) for name in METHODS]
    assert main(["report", *runs, "--out", str(tmp_path / "both"), "--ce-tokens", "64", "--tokens", "2k"]) == 0
    figures = json.loads((tmp_path / "both" / "report.json").read_text())
    assert set(figures["methods"]) == set(METHODS) and str(tmp_path / "both" / "report.html") in capsys.readouterr().out
    assert figures["methods"]["topk"]["tokens"] == pytest.approx(2000 * 31 / 32, abs=40)

    text = folder / "other.txt"
    text.write_text(some_text(9, 150))
    assert main(["report", runs[0], "--text", str(text), "--tokens", "1k", "--ce-tokens", "0"]) == 0
    figures = json.loads((folder / "topk" / "report.json").read_text())
    assert figures["text"]["where"] == str(text) and "delta_ce" not in figures["methods"]["topk"]
    for name in ("report.html", "report.json"):
        (folder / "topk" / name).unlink()


def test_only_text_that_no_sae_was_trained_on_counts(folder: Path, tmp_path: Path, tiny_model_dir: Path) -> None:
    """Runs with different splits of one cache; a cache that has moved; another cache of the same text."""
    source = CacheSource(ActivationStore(folder / "acts"), held_out_share=0.1)
    config = ap.TrainConfig(lr=3e-3, batch_tokens=256, total_tokens=256 * 4)
    ap.Trainer(ap.create("mutual_choice", d_in=32, d_sae=64, k=4, seed=0), config).fit(source, tmp_path / "other")
    both = [str(folder / "topk"), str(tmp_path / "other")]
    store = ActivationStore(folder / "acts")
    shared = set(held_out_rows(store, 0.4).tolist()) & set(held_out_rows(store, 0.1).tolist())
    assert main(["report", *both, "--out", str(tmp_path / "out"), "--ce-tokens", "0"]) == 0
    figures = json.loads((tmp_path / "out" / "report.json").read_text())
    tokens = {method["tokens"] for method in figures["methods"].values()}
    assert tokens == {int(store.mask[sorted(shared)].sum())} and len(shared) < 0.11 * store.rows

    moved = tmp_path / "moved"
    shutil.copytree(folder / "acts", moved)
    assert main(["report", both[0], "--acts", str(moved), "--out", str(tmp_path / "m"), "--ce-tokens", "0"]) == 0
    figures = json.loads((tmp_path / "m" / "report.json").read_text())
    assert figures["methods"]["topk"]["tokens"] == int(store.mask[held_out_rows(store, 0.4)].sum())

    model, tokenizer = load_model(tiny_model_dir)
    collect(
        model, tokenizer, "model.layers.1", folder / "text.txt", tokens=2000, out=tmp_path / "acts2", context_tokens=32
    )
    assert main(["report", both[0], "--acts", str(tmp_path / "acts2"), "--out", str(tmp_path / "n")]) == 2
    assert not (tmp_path / "n").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "at least one run"),
        (["{topk}", "{topk}"], "named twice"),
        (["{topk}", "--acts", "nowhere"], "nowhere"),
        (["{topk}", "--acts", "nowhere", "--text", "{text}"], "not both"),
        (["{topk}", "--text", "missing.txt"], "missing.txt"),
        (["nothing-here"], "'nothing-here' is no path"),
    ],
)
def test_mistakes_get_one_line(
    arguments: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filled = [a.format(topk=folder / "topk", text=folder / "text.txt") for a in arguments]
    try:
        code = main(["report", *filled])
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2 and message in error
    assert not (folder / "topk" / "report.html").exists()

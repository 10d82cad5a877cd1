"""A report on one or several SAEs of one hookpoint: figures as JSON, and a single HTML page that shows them.

Measured on rows of an activation cache or an array, and for a part of a cache's contexts inside the language model;
always in eval mode. Texts are shown where there are tokens, of one hookpoint.
The page stands on its own: no scripts or fonts are fetched, charts are inline SVG, colours follow light or dark mode.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from apportion.about import About
from apportion.architectures import SAE, SAES
from apportion.disk import replacing, write_json, write_text
from apportion.evals.baselines import pca_curve
from apportion.evals.figures import columns_of
from apportion.evals.language_model import evaluate_cache_in_model
from apportion.evals.measure import Measurement
from apportion.evals.plots import chart_svg, check_plots, density_chart, difficulty_chart, fvu_chart, l0_chart
from apportion.evals.rows import as_store, evaluate_rows
from apportion.evals.sweep import sweep
from apportion.extras import need
from apportion.progress import progress_bar
from apportion.rows.batch import RowStore
from apportion.rows.sites import LayersStore, PairStore
from apportion.rows.store import ActivationStore
from apportion.torch_state import usual
from apportion.viewing.examples import LatentExamples, find_examples
from apportion.viewing.units import TokenUnits, Units, units_of

NUM_LATENTS = 12
"""Latents shown of each SAE."""
MIN_FIRINGS = 20
"""Latents that fired less often on the evaluation tokens are not shown."""
PASSAGE_TOKENS = 120
SWEEP_ROWS = 16_384
MOST_SAES = 6
"""As many as there are colours."""
MEAN, ZERO = "mean_ablation", "zero_ablation"


@dataclass(frozen=True)
class Report:
    """`figures` is what report.json holds; `page` is the HTML."""

    figures: dict[str, Any]
    page: str

    def write(self, html: Path, json: Path) -> None:
        """Both, or neither."""
        with replacing(json) as figures, replacing(html) as page:
            write_json(figures, self.figures)
            write_text(page, self.page)


def check_report() -> None:
    """ValueError if a report cannot be made, before the work starts."""
    need("A report", "matplotlib", "jinja2")
    check_plots()


@usual()
def make_report(
    saes: Mapping[str, SAE],
    store: Any,
    rows: Int[Tensor, " n"] | None = None,
    model: Any = None,
    tokenizer: Any = None,
    *,
    ce_tokens: int = 16_384,
    progress: bool = True,
) -> Report:
    """Measure SAEs of one kind on `rows` (whole contexts, in order; all by default) and draw up the report.

    `store` is whatever `evaluate_rows` accepts. `model` is the one the cache was made with; over the first `ce_tokens`
    of the rows it is run with each SAE spliced in, for the loss that this adds. Without it, with `ce_tokens = 0`, and
    for SAEs of several sites that is left out. Without tokens or a tokenizer examples are the numbers of rows.
    """
    check_report()
    if len(saes) > MOST_SAES:
        raise ValueError(f"A report shows at most {MOST_SAES} SAEs, got {len(saes)}. Make several reports.")
    store = as_store(store)
    rows = torch.arange(store.rows) if rows is None else rows
    kind = next(iter(saes.values())).row_kind
    measurements = evaluate_rows(saes, store, rows, progress=progress)
    methods = {name: m.result() for name, m in measurements.items()}
    if any(figures["fvu"] is None for figures in methods.values()):
        raise ValueError(f"All of the {len(rows)} rows are equal, and leave nothing to explain. Give more rows.")
    pca = pca_curve(store, rows).tolist() if kind == "one" else []
    baselines: dict[str, Any] = {"pca": _pca(pca, {m["k"] for m in methods.values()})}
    in_model = None
    if ce_tokens and model is not None and isinstance(store, ActivationStore | PairStore):
        in_model, entropies = evaluate_cache_in_model(saes, store, rows, model, ce_tokens, progress=progress)
        for name, figures in methods.items():
            figures |= entropies.of(name)
            figures["l0_difficulty_correlation"] = in_model[name].result()["l0_difficulty_correlation"]
        if "clean" in entropies.sums:
            clean, mean, zero = (entropies.mean(v) for v in ("clean", "mean", "zero"))
            baselines |= {MEAN: {"delta_ce": mean - clean}, ZERO: {"delta_ce": zero - clean}}
        else:
            in_model = None
    for name, sae in saes.items():
        methods[name] |= {"settings": sae.settings(), "training": sae.info.get("training", {})}
    units, latents = units_of(store, tokenizer), dict[str, list[LatentExamples]]()
    if not isinstance(store, LayersStore):  # rows of several layers are no text
        with progress_bar("finding examples", len(rows) * len(saes), show=progress) as show:
            for number, (name, sae) in enumerate(saes.items(), 1):
                latents[name] = find_examples(sae, store, rows, spread_latents(measurements[name]), units)
                show(number * len(rows))
    shown = passage(saes, store, rows, units) if latents and isinstance(units, TokenUnits) else []
    ks, about = {figures["k"] for figures in methods.values()}, store.describe()
    figures = {
        "k": ks.pop() if len(ks) == 1 else None,
        "model": about.lm.model.to_json() or None,
        "hookpoint": store.hookpoint,
        "text": about.lm.text.to_json() or None,
        "tokens": next(iter(methods.values()))["tokens"],
        "methods": methods,
        "baselines": baselines,
        "sweeps": _sweeps(saes, store, rows, progress),
        "latents": {name: [_latent_json(one) for one in found] for name, found in latents.items()},
    }
    page = render(figures, about, measurements, in_model, pca, shown, latents)
    return Report(figures, page)


def spread_latents(measurement: Measurement) -> Int[Tensor, " n"]:
    """A dozen latents, evenly spread over the ranks by density of all that fired often enough: not hand-picked."""
    counts = measurement.activations.counts
    ranked = counts.argsort(descending=True, stable=True)[: int((counts >= MIN_FIRINGS).sum())]
    places = torch.linspace(0, len(ranked), 2 * NUM_LATENTS + 1)[1::2].long()
    return ranked[places.clamp_max(len(ranked) - 1).unique()] if len(ranked) else ranked


def _sweeps(
    saes: Mapping[str, SAE], store: RowStore, rows: Tensor, progress: bool
) -> dict[str, list[tuple[float, float]]]:
    kept = rows[store.mask[rows]]
    chosen = kept[torch.randperm(len(kept), generator=torch.Generator().manual_seed(0))[:SWEEP_ROWS].sort().values]
    batch, found = store.batch(chosen), {}
    with progress_bar("trying other budgets", len(chosen) * len(saes), show=progress) as show:
        for number, (name, sae) in enumerate(saes.items(), 1):
            device = sae.device
            found[name] = sweep(sae, batch.x.to(device), None if batch.target is None else batch.target.to(device))
            show(number * len(chosen))
    return found


def _pca(curve: list[float], ks: set[float | None]) -> dict[str, Any]:
    """The PCA with k components, where all SAEs have one k; and its whole curve."""
    if not curve:
        return {}
    if len(ks) > 1 or None in ks:
        return {"fvu_by_components": curve}
    components = min(round(next(k for k in ks if k is not None)), len(curve) - 1)
    return {"components": components, "fvu": curve[components], "fvu_by_components": curve}


@dataclass(frozen=True)
class PassageToken:
    text: str
    l0: tuple[int, ...]
    """Active latents, for each SAE."""
    takes_part: bool


@torch.inference_mode()
def passage(saes: Mapping[str, SAE], store: RowStore, rows: Tensor, units: Units) -> list[PassageToken]:
    """The beginning of the first context of `rows`, with what each token took of the budget."""
    first = rows[store.groups[rows] == store.groups[rows[0]]][:PASSAGE_TOKENS]
    x = store.batch(first).x
    l0 = torch.stack([_l0(sae, x) for sae in saes.values()], dim=1).tolist()
    shown = zip(units.pieces(first), map(tuple, l0), store.mask[first].tolist(), strict=True)
    return [PassageToken(*token) for token in shown]


def _l0(sae: SAE, x: Tensor) -> Tensor:
    with sae.in_eval_mode():
        return sae.encode(x.to(sae.device)).l0().cpu()


def _latent_json(found: LatentExamples) -> dict[str, Any]:
    shown = found.as_texts()
    return {
        "latent": shown.latent,
        "density": shown.density,
        "top_tokens": [list(pair) for pair in shown.top_tokens],
        "strongest": shown.strongest,
        "random": shown.random,
    }


@dataclass(frozen=True)
class Line:
    """One line of the page's table."""

    name: str
    figures: Mapping[str, Any]
    colour: int | None = None
    """Number of its colour in the charts."""
    tokens: int | None = None
    is_baseline: bool = False


def _lines_of(methods: Mapping[str, Any]) -> list[Line]:
    return [
        Line(name, figures, number, figures["training"].get("tokens"))
        for number, (name, figures) in enumerate(methods.items(), 1)
    ]


def _lines_of_baselines(baselines: Mapping[str, Any]) -> list[Line]:
    lines, pca = [], baselines["pca"]
    if "fvu" in pca:
        found = {"fvu": pca["fvu"], "l0": pca["components"]}
        lines.append(Line(f"PCA, {pca['components']} components", found, MOST_SAES + 1, is_baseline=True))
    if MEAN in baselines:
        found = baselines[MEAN] | {"fvu": 1.0, "l0": 0, "recovered_mean": 0.0}
        lines.append(Line("mean ablation", found, is_baseline=True))
    return lines


def render(
    figures: dict[str, Any],
    about: About,
    measurements: Mapping[str, Measurement],
    in_model: Mapping[str, Measurement] | None,
    pca: list[float],
    tokens: list[PassageToken],
    latents: Mapping[str, list[LatentExamples]],
) -> str:
    """The page."""
    from jinja2 import Environment, StrictUndefined

    methods = figures["methods"]
    points = {name: (f["l0"], f["fvu"]) for name, f in methods.items()}
    charts = [
        chart_svg(fvu_chart(points, figures["sweeps"], pca), "Reconstruction error against sparsity"),
        chart_svg(density_chart(measurements), "Firing density against rank"),
        chart_svg(l0_chart(measurements), "Distribution of active latents over tokens"),
    ]
    if in_model is not None:
        charts.append(chart_svg(difficulty_chart(in_model), "Active latents against difficulty"))
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files("apportion.evals").joinpath("report.html").read_text(encoding="utf-8"))
    baselines = figures["baselines"]
    return template.render(
        figures=figures,
        columns=[figure for figure in columns_of(methods.values()) if figure.key != "k"],
        lines=[*_lines_of(methods), *_lines_of_baselines(baselines)],
        place=" at ".join(filter(None, [about.lm.model.name_or_path or "rows of numbers", about.hookpoint])),
        text=about.lm.text.in_words(),
        methods=methods,
        pca=baselines["pca"],
        mean_ce=baselines.get(MEAN, {}).get("delta_ce"),
        summaries={name: SAES[f["sae"]].summary for name, f in methods.items()},
        charts=charts,
        passage=tokens,
        passage_top=max((max(t.l0) for t in tokens if t.takes_part), default=1) or 1,
        latents=latents,
        min_firings=MIN_FIRINGS,
        shown_first=min(methods, key=lambda name: methods[name].get("delta_ce", methods[name]["fvu"])),
    )

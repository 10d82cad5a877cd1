"""A report on one or several SAEs of one hookpoint: figures as JSON, and a single HTML page that shows them.

Measured on rows of an activation cache, and for a part of its contexts inside the language model; always in eval mode.
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

from apportion.activations.store import ActivationStore
from apportion.architectures import SAE, SAES
from apportion.disk import write_json, write_text
from apportion.evals.baselines import pca_curve
from apportion.evals.examples import Example, LatentExamples, examples_of
from apportion.evals.language_model import evaluate_model
from apportion.evals.measure import Measurement
from apportion.evals.plots import chart_svg, check_plots, density_chart, difficulty_chart, fvu_chart, l0_chart
from apportion.evals.rows import evaluate_rows
from apportion.evals.sweep import sweep

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
        write_json(json, self.figures)
        write_text(html, self.page)


def check_report() -> None:
    """ValueError if a report cannot be made, before the work starts."""
    check_plots()
    try:
        import jinja2  # noqa: F401
    except ImportError:
        raise ValueError("A report needs jinja2: pip install 'apportion[plots]'.") from None


def make_report(
    saes: Mapping[str, SAE],
    store: ActivationStore,
    rows: Int[Tensor, " n"],
    model: Any,
    tokenizer: Any,
    *,
    ce_tokens: int = 16_384,
    progress: bool = True,
) -> Report:
    """Measure SAEs of the cache's hookpoint on `rows` (whole contexts, in order) and draw up the report.

    `model` is the one the cache was made with; over the first `ce_tokens` of the rows it is run with each SAE spliced
    in, for the loss that this adds. `ce_tokens = 0` leaves that out.
    """
    check_report()
    if len(saes) > MOST_SAES:
        raise ValueError(f"A report shows at most {MOST_SAES} SAEs, got {len(saes)}. Make several reports.")
    measurements = evaluate_rows(saes, store, rows, progress=progress)
    methods = {name: m.result() for name, m in measurements.items()}
    pca = pca_curve(store, rows).tolist()
    baselines: dict[str, Any] = {"pca": _pca(pca, {m["k"] for m in methods.values()})}
    in_model = None
    if ce_tokens:
        contexts = contexts_of(store, rows)[: max(1, ce_tokens // store.manifest["context_tokens"])]
        in_model, entropies = evaluate_model(
            saes, model, contexts, store.filter, hookpoint=store.hookpoint, progress=progress
        )
        for name, figures in methods.items():
            figures |= entropies.of(name)
            figures["l0_difficulty_correlation"] = in_model[name].result()["l0_difficulty_correlation"]
        clean, mean, zero = (entropies.mean(v) for v in ("clean", "mean", "zero"))
        baselines |= {MEAN: {"delta_ce": mean - clean}, ZERO: {"delta_ce": zero - clean}}
    for name, sae in saes.items():
        methods[name] |= {"settings": sae.settings(), "training": sae.info.get("training", {})}
    latents = {name: examples_of(sae, store, rows, spread_latents(measurements[name])) for name, sae in saes.items()}
    ks = {figures["k"] for figures in methods.values()}
    figures = {
        "k": ks.pop() if len(ks) == 1 else None,
        "model": store.manifest["model"],
        "hookpoint": store.hookpoint,
        "text": store.manifest["text"],
        "tokens": next(iter(methods.values()))["tokens"],
        "methods": methods,
        "baselines": baselines,
        "sweeps": _sweeps(saes, store, rows),
        "latents": {name: [_latent_json(tokenizer, one) for one in found] for name, found in latents.items()},
    }
    page = render(figures, measurements, in_model, pca, passage(saes, store, rows, tokenizer), latents, tokenizer)
    return Report(figures, page)


def contexts_of(store: ActivationStore, rows: Int[Tensor, " n"]) -> Int[Tensor, "num_contexts context_tokens"]:
    """The whole contexts among `rows`, as token ids."""
    length = store.manifest["context_tokens"]
    whole = torch.bincount(store.contexts[rows])[store.contexts[rows]] == length
    return store.tokens[rows[whole]].reshape(-1, length)


def spread_latents(measurement: Measurement) -> Int[Tensor, " n"]:
    """A dozen latents, evenly spread over the ranks by density of all that fired often enough: not hand-picked."""
    counts = measurement.activations.counts
    ranked = counts.argsort(descending=True, stable=True)[: int((counts >= MIN_FIRINGS).sum())]
    places = torch.linspace(0, len(ranked), 2 * NUM_LATENTS + 1)[1::2].long()
    return ranked[places.clamp_max(len(ranked) - 1).unique()] if len(ranked) else ranked


def _sweeps(saes: Mapping[str, SAE], store: ActivationStore, rows: Tensor) -> dict[str, list[tuple[float, float]]]:
    kept = rows[store.mask[rows]]
    chosen = kept[torch.randperm(len(kept), generator=torch.Generator().manual_seed(0))[:SWEEP_ROWS].sort().values]
    x = store.gather(chosen)
    return {name: sweep(sae, x.to(sae.mean.device)) for name, sae in saes.items()}


def _pca(curve: list[float], ks: set[float | None]) -> dict[str, Any]:
    """The PCA with k components, where all SAEs have one k; and its whole curve."""
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
def passage(saes: Mapping[str, SAE], store: ActivationStore, rows: Tensor, tokenizer: Any) -> list[PassageToken]:
    """The beginning of the first context of `rows`, with what each token took of the budget."""
    first = rows[store.contexts[rows] == store.contexts[rows[0]]][:PASSAGE_TOKENS]
    x = store.gather(first)
    l0 = torch.stack([_l0(sae, x) for sae in saes.values()], dim=1).tolist()
    texts = pieces(tokenizer, store.tokens[first].tolist())
    return [PassageToken(*t) for t in zip(texts, map(tuple, l0), store.mask[first].tolist(), strict=True)]


def _l0(sae: SAE, x: Tensor) -> Tensor:
    with sae.in_eval_mode():
        return sae.encode(x.to(sae.mean.device)).l0().cpu()


def pieces(tokenizer: Any, tokens: list[int]) -> list[str]:
    """The text of each token as it stands in the whole; a character of several tokens belongs to the last of them."""
    texts, before = [], ""
    for end in range(1, len(tokens) + 1):
        text = tokenizer.decode(tokens[:end], clean_up_tokenization_spaces=False)
        complete = not text.endswith("\ufffd") or end == len(tokens)
        texts.append(text[len(before) :] if complete else "")
        before = text if complete else before
    return texts


@dataclass(frozen=True)
class ExamplePiece:
    text: str
    activation: float
    is_focus: bool


def example_pieces(tokenizer: Any, example: Example) -> list[ExamplePiece]:
    """The text of an example, piece by piece; tokens that share a character are one piece."""
    found: list[ExamplePiece] = []
    activation, is_focus = 0.0, False
    for place, text in enumerate(pieces(tokenizer, example.tokens)):
        activation, is_focus = max(activation, example.activations[place]), is_focus or place == example.focus
        if text:
            found.append(ExamplePiece(text, activation, is_focus))
            activation, is_focus = 0.0, False
    return found


def _latent_json(tokenizer: Any, found: LatentExamples) -> dict[str, Any]:
    def marked(example: Example) -> str:
        shown = example_pieces(tokenizer, example)
        return "".join(f"<<{piece.text}>>" if piece.is_focus else piece.text for piece in shown)

    return {
        "latent": found.latent,
        "density": found.density,
        "top_tokens": [[tokenizer.decode([token]), share] for token, share in found.tokens],
        "strongest": [marked(e) for e in found.strongest],
        "random": [marked(e) for e in found.random],
    }


def render(
    figures: dict[str, Any],
    measurements: Mapping[str, Measurement],
    in_model: Mapping[str, Measurement] | None,
    pca: list[float],
    tokens: list[PassageToken],
    latents: Mapping[str, list[LatentExamples]],
    tokenizer: Any,
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
    environment.filters["pieces"] = lambda example: example_pieces(tokenizer, example)
    environment.filters["token"] = lambda token: tokenizer.decode([token])
    template = environment.from_string(files("apportion.evals").joinpath("report.html").read_text(encoding="utf-8"))
    return template.render(
        figures=figures,
        methods=methods,
        pca=figures["baselines"]["pca"],
        mean_ce=figures["baselines"].get(MEAN, {}).get("delta_ce"),
        summaries={name: SAES[f["sae"]].summary for name, f in methods.items()},
        charts=charts,
        passage=tokens,
        passage_top=max((max(t.l0) for t in tokens if t.takes_part), default=1) or 1,
        latents=latents,
        min_firings=MIN_FIRINGS,
        shown_first=min(methods, key=lambda name: methods[name].get("delta_ce", methods[name]["fvu"])),
    )

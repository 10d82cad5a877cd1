"""Charts of an evaluation: as PNG files, or as SVG that takes its colours from the page it stands in.

Needs matplotlib (the `plots` extra). A chart is a function that draws onto matplotlib axes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import StringIO
from math import log10
from pathlib import Path
from typing import Any

import torch

from apportion.allocation.zipf import ZipfFit
from apportion.disk import replacing
from apportion.evals.measure import Measurement
from apportion.evals.measures import Difficulty
from apportion.extras import need
from apportion.trust import shown

COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#777777")
"""Paul Tol's bright palette: distinct for colour-blind readers too."""
INK, LINE = "#0a0b0c", "#d0d1d2"
"""Text and axes; grid. Like COLOURS these become CSS variables in an SVG: --ink, --line, --series-1 ..."""

Chart = Callable[[Any], None]


def save_plots(measurements: Mapping[str, Measurement], folder: Path) -> list[Path]:
    """density.png, l0.png and, where the model's losses are known, difficulty.png."""
    check_plots()
    folder.mkdir(parents=True, exist_ok=True)
    charts: dict[str, Chart] = {"density": density_chart(measurements), "l0": l0_chart(measurements)}
    if all(m.of(Difficulty).values() is not None for m in measurements.values()):
        charts["difficulty"] = difficulty_chart(measurements)
    drawn = []
    for name, chart in charts.items():
        save_chart(chart, folder / f"{name}.png")
        drawn.append(folder / f"{name}.png")
    return drawn


def save_chart(chart: Chart, file: Path) -> None:
    """As a PNG file."""
    check_plots()
    with _figure(chart, (6.4, 4.2)) as figure, replacing(file) as partial:
        figure.savefig(partial, dpi=150, format="png")


def chart_svg(chart: Chart, label: str) -> str:
    """The chart as an <svg> element to put into a page; `label` is read out to those who do not see it."""
    check_plots()
    with _figure(chart, (5.4, 3.6)) as figure:
        buffer = StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg \1 role="img" aria-label="{label}">', svg, count=1)
    colours = {INK: "--ink", LINE: "--line"} | {c: f"--series-{i}" for i, c in enumerate(COLOURS, start=1)}
    for colour, variable in colours.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg


def check_plots() -> None:
    """ValueError if plots cannot be drawn."""
    need("Drawing plots", "matplotlib")
    import matplotlib

    matplotlib.use("Agg")


def can_plot() -> bool:
    try:
        check_plots()
    except (ImportError, ValueError):
        return False
    return True


@contextmanager
def _figure(chart: Chart, inches: tuple[float, float]) -> Iterator[Any]:
    from matplotlib import pyplot as plt

    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    style: dict[Any, Any] = dict.fromkeys(inked, INK)
    style |= {"grid.color": LINE, "axes.linewidth": 0.8, "svg.fonttype": "none", "svg.hashsalt": "apportion"}
    with plt.rc_context(style):
        figure, axes = plt.subplots(figsize=inches, layout="constrained")
        chart(axes)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(linewidth=0.6)
        axes.set_axisbelow(True)
        axes.legend(frameon=False, fontsize=9)
        try:
            yield figure
        finally:
            plt.close(figure)


def layers_chart(lines: Mapping[str, Mapping[int, float]]) -> Chart:
    """FVU by layer, a line for each site."""

    def draw(axes: Any) -> None:
        from matplotlib.ticker import MaxNLocator

        for number, (name, line) in enumerate(lines.items()):
            layers = sorted(line)
            style = {"color": COLOURS[number % len(COLOURS)], "marker": "osD^v"[number // len(COLOURS) % 5]}
            values = [line[layer] for layer in layers]
            axes.plot(layers, values, linewidth=1.6, markersize=4, label=_plain(name), **style)
        axes.set(xlabel="layer", ylabel="FVU on held-out rows")
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    return draw


def density_chart(measurements: Mapping[str, Measurement]) -> Chart:
    """Firing density against rank, with the fitted Zipf curve."""

    def draw(axes: Any) -> None:
        for colour, (name, m) in zip(COLOURS, measurements.items(), strict=False):
            density = m.activations.density().sort(descending=True).values
            alive = density[density > 0]
            axes.plot(range(1, len(alive) + 1), alive, color=colour, linewidth=1.8, label=_plain(name))
            fit = m.result()["zipf"]
            if fit is not None:
                ranks = torch.logspace(0, log10(fit["ranks"]), 200)
                label = f"  Zipf: α {fit['alpha']:.2f}, β {fit['beta']:.0f}"
                curve = ZipfFit(**fit).curve(ranks)
                axes.plot(ranks, curve, color=colour, linewidth=1, linestyle=(0, (4, 3)), label=label)
        tokens = next(iter(measurements.values())).activations.tokens
        axes.set(
            xscale="log", yscale="log", xlabel="rank of the latent", ylabel="density (share of tokens it fires on)"
        )
        axes.set_title(f"Firing density against rank, {tokens:,} tokens", loc="left", fontsize=10)

    return draw


def l0_chart(measurements: Mapping[str, Measurement]) -> Chart:
    """How many latents a token takes."""

    def draw(axes: Any) -> None:
        top = max(int(torch.quantile(m.l0_of_tokens().double()[:1_000_000], 0.995)) for m in measurements.values()) + 1
        for colour, (name, m) in zip(COLOURS, measurements.items(), strict=False):
            l0 = m.l0_of_tokens()
            counts = torch.bincount(l0.clamp_max(top), minlength=top + 1).double() / len(l0)
            label = f"{_plain(name)} (mean {m.activations.mean_l0():.1f})"
            if counts.max() > 0.9:  # a fixed k: as a curve it would flatten all others
                axes.axvline(int(counts.argmax()), color=colour, linewidth=1.8, label=label)
            else:
                axes.step(range(top), counts[:top], where="mid", color=colour, linewidth=1.6, label=label)
        axes.set(xlabel="active latents of a token", ylabel="share of tokens", ylim=(0, None))
        axes.set_title("How the budget is spread over tokens", loc="left", fontsize=10)

    return draw


def difficulty_chart(measurements: Mapping[str, Measurement]) -> Chart:
    """Mean L0 of tokens, by how surprised the model is by what follows."""

    def draw(axes: Any) -> None:
        for colour, (name, m) in zip(COLOURS, measurements.items(), strict=False):
            difficulty, l0 = m.of(Difficulty).values(), m.l0_of_tokens().double()
            assert difficulty is not None
            known = ~difficulty.isnan()
            difficulty, l0 = difficulty[known].double(), l0[known]
            groups = difficulty.argsort().chunk(20)
            at = [difficulty[g].mean().item() for g in groups]
            r = m.result()["l0_difficulty_correlation"]
            label = _plain(name) if r is None else f"{_plain(name)} (r = {r:.2f})"
            axes.plot(at, [l0[g].mean().item() for g in groups], "o-", color=colour, markersize=3.5, label=label)
        axes.set(xlabel="cross-entropy of the prediction made at the token (nats)", ylabel="mean active latents")
        axes.set_title("Where the budget goes: L0 against difficulty, groups of equal size", loc="left", fontsize=10)

    return draw


def fvu_chart(
    points: Mapping[str, tuple[float, float]], sweeps: Mapping[str, Sequence[tuple[float, float]]], pca: Sequence[float]
) -> Chart:
    """FVU against L0: the trained SAEs as points, their sweeps as lines, and the PCA with as many components."""

    def draw(axes: Any) -> None:
        low = min(l0 for curve in sweeps.values() for l0, _ in curve)
        high = max(l0 for curve in sweeps.values() for l0, _ in curve)
        for colour, (name, (l0, fvu)) in zip(COLOURS, points.items(), strict=False):
            axes.plot(*zip(*sweeps[name], strict=True), color=colour, linewidth=1.4)
            axes.plot([l0], [fvu], "o", color=colour, markersize=6, label=_plain(name))
        components = [n for n in range(1, len(pca)) if low <= n <= high]
        style = {"color": COLOURS[-1], "linestyle": (0, (4, 3)), "linewidth": 1.4}
        if components:
            axes.plot(components, [pca[n] for n in components], label="PCA, as many components", **style)
        axes.set(xlabel="L0 (active latents per token)", ylabel="FVU", ylim=(0, None), xscale="log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
        axes.set_xticks([t for t in (2**i for i in range(16)) if low <= t <= high])
        axes.set_title("Error against sparsity; lines: the same SAEs at other budgets", loc="left", fontsize=10)

    return draw


def _plain(name: str) -> str:
    """A name in which matplotlib sees no formula, and no character without a picture."""
    return shown(name, keep="").replace("$", r"\$")

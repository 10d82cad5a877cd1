"""Charts of a benchmark's JSON file.

    python -m benchmarks.plot result.json --out docs/images

peers.png      one bar per subject: a training step in units of the encoder's product (cases main and bf16)
d_sae.png      the same ratio against the number of latents; likewise batch.png and k.png
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.conf import Positional

from apportion.evals.plots import COLOURS, INK, LINE, check_plots

GROWTH = {"d_sae": "number of latents", "batch": "tokens per step", "k": "active latents per token"}
UNIT_LABEL = "step / encoder product in float32"


def bars(axes: Any, results: list[dict[str, Any]]) -> None:
    """Subjects of the cases without auxiliary loss, the fastest on top; whiskers are quartiles over rounds."""
    subjects = [s for r in results for s in r["subjects"] if s["name"] != "torch/product"]
    subjects.sort(key=lambda s: s["ratio"], reverse=True)
    places, ratios = range(len(subjects)), [s["ratio"] for s in subjects]
    low = [min(s["ratio"], s["ratio_quartiles"][0]) for s in subjects]
    high = [max(s["ratio"], s["ratio_quartiles"][1]) for s in subjects]
    whiskers = [
        [r - end for r, end in zip(ratios, low, strict=True)],
        [end - r for r, end in zip(ratios, high, strict=True)],
    ]
    colours = [COLOURS[0] if s["library"] == "apportion" else LINE for s in subjects]
    axes.barh(places, ratios, xerr=whiskers, color=colours, error_kw={"ecolor": INK, "elinewidth": 0.8})
    axes.set_yticks(places, [s["label"] for s in subjects])
    for place, ratio, end in zip(places, ratios, high, strict=True):
        axes.text(end, place, f" {ratio:.2f}", va="center", fontsize=8)
    axes.axvline(1, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set(xlabel=UNIT_LABEL, xlim=(0, 1.12 * max(high)))
    axes.grid(visible=False, axis="y")


def growth(axes: Any, results: list[dict[str, Any]], key: str) -> None:
    """One line per subject over the shapes of a case."""
    names = {s["name"]: s["label"] for r in results for s in r["subjects"] if s["name"] != "torch/product"}
    for colour, (name, label) in zip(COLOURS, names.items(), strict=False):
        points = sorted((r[key], s["ratio"]) for r in results for s in r["subjects"] if s["name"] == name)
        axes.plot(*zip(*points, strict=True), "o-", color=colour, markersize=4, label=label)
    axes.axhline(1, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set(xscale="log", xlabel=GROWTH[key], ylabel=UNIT_LABEL, ylim=(0, None))
    values = sorted({r[key] for r in results})
    axes.set_xticks(values, [str(value) for value in values])
    axes.minorticks_off()
    axes.legend(frameon=False, fontsize=9)


def save(file: Path, inches: tuple[float, float], draw: Callable[[Any], None], title: str, footnote: str) -> None:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=inches, layout="constrained")
    draw(axes)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=LINE, linewidth=0.6, axis="x" if file.stem == "peers" else "both")
    axes.set_axisbelow(True)
    axes.set_title(title, loc="left", fontsize=10)
    figure.supxlabel(footnote, fontsize=7, color="#777777", x=0.01, ha="left")
    figure.savefig(file, dpi=150)
    plt.close(figure)


def shape_of(result: dict[str, Any], keys: Iterable[str] = ("d_in", "d_sae", "k", "batch")) -> str:
    return ", ".join(f"{key} {result[key]}" for key in keys)


def draw_all(record: dict[str, Any], folder: Path) -> list[Path]:
    """The charts that the cases of this file suffice for."""
    threads = record["results"][0]["subjects"][0]["about"]["threads"]
    about = f"{record['hardware']}, threads: {threads}, torch {record['versions']['torch']}, {record['date'][:10]}"
    drawn = []
    main = [r for r in record["results"] if r["case"] in ("main", "bf16")]
    if main:
        drawn.append(folder / "peers.png")
        height = 1.2 + 0.27 * sum(len(r["subjects"]) for r in main)
        title = f"A training step, {shape_of(main[0])}"
        save(drawn[-1], (7.2, height), lambda axes: bars(axes, main), title, about)
    for key in GROWTH:
        results = [r for r in record["results"] if r["case"] == key]
        if results:
            drawn.append(folder / f"{key}.png")
            title = f"A training step, {shape_of(results[0], [n for n in ('d_in', 'd_sae', 'k', 'batch') if n != key])}"
            save(drawn[-1], (6.4, 4.0), lambda axes, r=results, n=key: growth(axes, r, n), title, about)
    return drawn


def plot(result: Annotated[Positional[Path], tyro.conf.arg(metavar="FILE.json")], out: Path) -> None:
    """Draw the charts of a benchmark's JSON file into a folder."""
    check_plots()
    out.mkdir(parents=True, exist_ok=True)
    for file in draw_all(json.loads(result.read_text(encoding="utf-8")), out):
        print(file)


def main(argv: list[str] | None = None) -> int:
    try:
        tyro.cli(plot, args=argv, prog="python -m benchmarks.plot")
    except (ValueError, OSError) as error:
        sys.stderr.write(f"benchmarks: {' '.join(str(error).split())}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

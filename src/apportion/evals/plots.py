"""Plots of an evaluation as PNG files. Needs matplotlib (the `plots` extra)."""

from __future__ import annotations

from collections.abc import Mapping
from math import log10
from pathlib import Path
from typing import Any

import torch

from apportion.allocation.zipf import ZipfFit
from apportion.evals.measure import Measurement

COLOURS = ("#4477AA", "#EE6677", "#228833", "#CCBB44", "#66CCEE", "#AA3377", "#777777")
"""Paul Tol's bright palette: distinct for colour-blind readers too."""


def save_plots(measurements: Mapping[str, Measurement], folder: Path) -> list[Path]:
    """density.png, l0.png and, where the model's losses are known, difficulty.png."""
    check_plots()
    folder.mkdir(parents=True, exist_ok=True)
    drawn = [_draw(folder / "density.png", _density, measurements), _draw(folder / "l0.png", _l0, measurements)]
    if all(m.difficulty() is not None for m in measurements.values()):
        drawn.append(_draw(folder / "difficulty.png", _difficulty, measurements))
    return drawn


def check_plots() -> None:
    """ValueError if plots cannot be drawn."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("Plots need matplotlib: pip install 'apportion[plots]', or leave --plots out.") from None
    matplotlib.use("Agg")


def _draw(file: Path, draw: Any, measurements: Mapping[str, Measurement]) -> Path:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    draw(axes, measurements)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(file, dpi=150)
    plt.close(figure)
    return file


def _density(axes: Any, measurements: Mapping[str, Measurement]) -> None:
    """Firing density against rank, with the fitted Zipf curve."""
    for colour, (name, m) in zip(COLOURS, measurements.items(), strict=False):
        density = m.activations.density().sort(descending=True).values
        alive = density[density > 0]
        axes.plot(range(1, len(alive) + 1), alive, color=colour, linewidth=1.8, label=name)
        fit = m.result()["zipf"]
        if fit is not None:
            ranks = torch.logspace(0, log10(fit["ranks"]), 200)
            label = f"  Zipf: α {fit['alpha']:.2f}, β {fit['beta']:.0f}"
            axes.plot(ranks, ZipfFit(**fit).curve(ranks), color=colour, linewidth=1, linestyle=(0, (4, 3)), label=label)
    tokens = next(iter(measurements.values())).activations.tokens
    axes.set(xscale="log", yscale="log", xlabel="rank of the latent", ylabel="density (share of tokens it fires on)")
    axes.set_title(f"Firing density against rank, {tokens:,} tokens", loc="left", fontsize=10)


def _l0(axes: Any, measurements: Mapping[str, Measurement]) -> None:
    """How many latents a token takes."""
    top = max(int(torch.quantile(m.l0_of_tokens().double()[:1_000_000], 0.995)) for m in measurements.values()) + 1
    for colour, (name, m) in zip(COLOURS, measurements.items(), strict=False):
        l0 = m.l0_of_tokens()
        counts = torch.bincount(l0.clamp_max(top), minlength=top + 1).double() / len(l0)
        label = f"{name} (mean {m.activations.mean_l0():.1f})"
        if (l0 == l0[0]).all():
            axes.axvline(int(l0[0]), color=colour, linewidth=1.8, label=label)
        else:
            axes.step(range(top), counts[:top], where="mid", color=colour, linewidth=1.6, label=label)
    axes.set(xlabel="active latents of a token", ylabel="share of tokens", ylim=(0, None))
    axes.set_title("How the budget is spread over tokens", loc="left", fontsize=10)


def _difficulty(axes: Any, measurements: Mapping[str, Measurement]) -> None:
    """Mean L0 of tokens, by how surprised the model is by what follows."""
    for colour, (name, m) in zip(COLOURS, measurements.items(), strict=False):
        difficulty, l0 = m.difficulty(), m.l0_of_tokens().double()
        assert difficulty is not None
        known = ~difficulty.isnan()
        difficulty, l0 = difficulty[known].double(), l0[known]
        groups = difficulty.argsort().chunk(20)
        at = [difficulty[g].mean().item() for g in groups]
        r = m.result()["l0_difficulty_correlation"]
        label = name if r is None else f"{name} (r = {r:.2f})"
        axes.plot(at, [l0[g].mean().item() for g in groups], "o-", color=colour, markersize=3.5, label=label)
    axes.set(xlabel="cross-entropy of the prediction made at the token (nats)", ylabel="mean active latents")
    axes.set_title("Where the budget goes: L0 against difficulty, 20 equal groups", loc="left", fontsize=10)

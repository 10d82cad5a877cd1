"""Compare methods at one budget on one cache of activations: the main experiment of the docs.

    python -m apportion.recipes.compare --acts acts/train --eval-acts acts/valid --out results/smollm2 --model MODEL

For every method: the same grid of learning rates with one seed, the best chosen on rows of the training cache that were
neither trained nor calibrated on; then further seeds at that rate (experiment.py). The table is over every other
context of the evaluation cache, all in eval mode: once as fitted (thresholds calibrated on held-out rows of the
training cache), and once, with delta-CE, with thresholds calibrated on the contexts in between (parts.py).

Each finished run is written to disk at once and skipped when the command is started again. SmolLM2-135M, layer 15, 900k
tokens, d_sae 4608, k 32: about a minute and a half for a run on one CPU core.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from apportion.architectures import SAE, create, load
from apportion.disk import write_json, write_text
from apportion.evals import FIGURES, evaluate_rows
from apportion.evals.plots import save_plots
from apportion.evals.rows import recalibrate
from apportion.recipes.command import main
from apportion.recipes.experiment import (
    SECONDS,
    Experiment,
    markdown,
    over_seeds,
    run_all,
    settings_of,
    spread,
    table,
)
from apportion.recipes.parts import CachePart
from apportion.training import TrainConfig

METHODS: dict[str, dict[str, Any]] = {
    "topk": {"sae": "topk"},
    "mutual_choice aux_k": {"sae": "mutual_choice", "aux": "aux_k"},
    "mutual_choice aux_zipf": {"sae": "mutual_choice", "aux": "aux_zipf"},
    "feature_choice uniform": {"sae": "feature_choice"},
    "feature_choice zipf(1, 7)": {"sae": "feature_choice", "budgets": "zipf", "switch_at": 0.3},
    "feature_choice zipf fitted": {
        "sae": "feature_choice",
        "budgets": "zipf",
        "switch_at": 0.3,
        "zipf_alpha": None,
        "zipf_beta": None,
    },
}


@dataclass(frozen=True, kw_only=True)
class Compare(CachePart):
    """Compare methods at one budget on one cache."""

    out: Path
    """Where results go."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Which methods."""
    lrs: tuple[float, ...] = (1e-3, 2e-3, 3e-3, 5e-3)
    """The grid of learning rates."""
    seeds: int = 3
    """Seeds at each method's best learning rate."""
    window_tokens: int = 100_000
    """Window of the dead counter and of the density averages."""

    def run(self) -> None:
        experiment = self.experiment()
        run_all(experiment)
        self.draw({run["name"]: load(experiment.folder(run)) for run in experiment.done if run["seed"] == 0})
        sys.stdout.write((self.out / "table.md").read_text(encoding="utf-8"))

    def experiment(self) -> Experiment:
        self.check_rows()
        return Experiment(
            out=self.out / "runs",
            part=self,
            arms={method: partial(self.new, method) for method in self.methods},
            lrs=self.lrs,
            seeds=range(self.seeds),
            write=self.write,
            word=lambda method: "".join(c if c.isalnum() else "_" for c in method),
        )

    def new(self, method: str, seed: int) -> SAE:
        settings = dict(METHODS[method])
        return create(settings.pop("sae"), d_in=self.d_in, d_sae=self.d_sae, k=self.k, seed=seed, **settings)

    def config(self, lr: float, seed: int) -> TrainConfig:
        windows = {"dead_window_tokens": self.window_tokens, "density_window_tokens": self.window_tokens}
        return replace(super().config(lr, seed), **windows)

    def draw(self, saes: Mapping[str, SAE]) -> None:
        """Densities and L0 on the evaluation half."""
        store, calibrate, rows = self.halves()
        for sae in saes.values():
            recalibrate(sae, store, calibrate)
        save_plots(evaluate_rows(saes, store, rows, progress=False), self.out / "plots")

    def write(self, experiment: Experiment) -> None:
        grid, chosen = [run for runs in experiment.grid.values() for run in runs], experiment.done
        write_json(self.out / "results.json", {"settings": settings_of(self), "grid": grid, "chosen": chosen})
        write_text(self.out / "table.md", self.table(experiment))

    def table(self, experiment: Experiment) -> str:
        """Two markdown tables: FVU and dead latents over the grid, and every figure at the chosen rate over seeds."""
        fvu, dead, l0 = (FIGURES[key] for key in ("fvu", "dead", "l0"))
        lines = [
            [name, *(f"{fvu.written(r['held_out']['fvu'])} ({dead.written(r['held_out']['dead'])})" for r in runs)]
            for name, runs in experiment.grid.items()
        ]
        fitted = {
            f"{figure.title} as fitted": lambda runs, f=figure: spread([run["as_fitted"] for run in runs], f)
            for figure in (fvu, l0)
        }
        columns = over_seeds("fvu", "l0", "dead", "delta_ce", SECONDS) | fitted
        over_grid = markdown(["method", *(f"lr {lr:g}" for lr in self.lrs)], lines)
        return over_grid + "\n" + table("method", experiment.done, columns)


if __name__ == "__main__":
    sys.exit(main(Compare, "compare", __doc__))

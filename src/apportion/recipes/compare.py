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
from apportion.evals import FIGURES, evaluate_rows
from apportion.evals.plots import save_plots
from apportion.evals.rows import recalibrate
from apportion.recipes.command import main
from apportion.recipes.experiment import SECONDS, Experiment, Record, check_known, over_seeds, publish, run_all, table
from apportion.recipes.parts import CachePart
from apportion.training import TrainConfig

ZIPF = {"budgets": "zipf", "switch_at": 0.3}
METHODS: dict[str, dict[str, Any]] = {
    "topk": {},
    "mutual_choice aux_k": {"aux": "aux_k"},
    "mutual_choice aux_zipf": {"aux": "aux_zipf"},
    "feature_choice uniform": {},
    "feature_choice zipf(1, 7)": ZIPF,
    "feature_choice zipf fitted": {**ZIPF, "zipf_alpha": None, "zipf_beta": None},
}
"""Each begins with the name of the SAE; settings that are not the defaults."""


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
        grid, chosen = [run for runs in experiment.grid.values() for run in runs], experiment.done
        self.draw({run["name"]: load(experiment.folder(run)) for run in chosen if run["seed"] == 0})
        text = self.table(experiment)
        publish(self, text, {"grid": grid, "chosen": chosen})
        sys.stdout.write(text)

    def experiment(self) -> Experiment:
        check_known(self.methods, METHODS, "method")
        self.check_rows()
        return Experiment(
            out=self.out / "runs",
            part=self,
            arms={method: partial(self.new, method) for method in self.methods},
            lrs=self.lrs,
            seeds=range(self.seeds),
            word=lambda method: "".join(c if c.isalnum() else "_" for c in method),
        )

    def new(self, method: str, seed: int) -> SAE:
        sizes = {"d_in": self.d_in, "d_sae": self.d_sae, "k": self.k}
        return create(method.split()[0], **sizes, seed=seed, **METHODS[method])

    def config(self, lr: float, seed: int) -> TrainConfig:
        windows = {"dead_window_tokens": self.window_tokens, "density_window_tokens": self.window_tokens}
        return replace(super().config(lr, seed), **windows)

    def draw(self, saes: Mapping[str, SAE]) -> None:
        """Densities and L0 on the evaluation half."""
        store, calibrate, rows = self.halves()
        for sae in saes.values():
            recalibrate(sae, store, calibrate)
        save_plots(evaluate_rows(saes, store, rows, progress=False), self.out / "plots")

    def table(self, experiment: Experiment) -> str:
        """Two markdown tables: FVU and dead latents over the grid, and every figure at the chosen rate over seeds."""
        grid = [run["held_out"] | run for runs in experiment.grid.values() for run in runs]
        at_rate = {f"lr {lr:g}": lambda runs, i=i: fvu_and_dead(runs[i]) for i, lr in enumerate(self.lrs)}
        columns = over_seeds("fvu", "l0", "dead", "delta_ce", SECONDS) | over_seeds("fvu", "l0", of="as fitted")
        return table("method", grid, at_rate) + "\n" + table("method", experiment.done, columns)


def fvu_and_dead(run: Record) -> str:
    return f"{FIGURES['fvu'].written(run['fvu'])} ({FIGURES['dead'].written(run['dead'])})"


if __name__ == "__main__":
    sys.exit(main(Compare, "compare", __doc__))

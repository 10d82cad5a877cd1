"""Compare methods at one budget on one cache of activations: the main experiment of the docs.

    python -m apportion.recipes.compare --acts acts/train --eval-acts acts/valid --out results/smollm2 \\
        --model MODEL --text valid.txt

For every method: the same grid of learning rates with one seed, the best chosen by FVU on rows of the training cache
that were neither trained nor calibrated on; then further seeds at that rate. The table is over every other context of
the evaluation cache and, for delta-CE, over its text, all in eval mode: once as fitted (thresholds calibrated on
held-out rows of the training cache), and once with thresholds calibrated on the contexts in between, because other
text has another difficulty and methods are compared at equal L0.

Each finished run is written to disk at once and skipped when the command is started again. SmolLM2-135M, layer 15, 900k
tokens, d_sae 4608, k 32: about a minute and a half for a run on one CPU core.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apportion.architectures import create, load
from apportion.disk import read_json, write_json, write_text
from apportion.evals import evaluate_rows, held_out_rows
from apportion.evals.plots import save_plots
from apportion.recipes.command import main
from apportion.recipes.runs import (
    at_equal_l0,
    best_rate,
    check_same_place,
    fitted,
    halves,
    in_language_model,
    markdown,
    recalibrate,
    spread,
)
from apportion.rows import ActivationStore, CacheSource
from apportion.training import TrainConfig

logger = logging.getLogger("apportion.compare")

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
class Compare:
    """Compare methods at one budget on one cache."""

    acts: Path
    """The training cache."""
    eval_acts: Path
    """The evaluation cache: other text of the same kind."""
    out: Path
    """Where results go."""
    model: str | None = None
    """The language model, for delta-CE."""
    text: Path | None = None
    """The text of the evaluation cache, for delta-CE."""
    ce_tokens: int = 16_384
    """Tokens over which delta-CE is measured."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Which methods."""
    lrs: tuple[float, ...] = (1e-3, 2e-3, 3e-3, 5e-3)
    """The grid of learning rates."""
    seeds: int = 3
    """Seeds at each method's best learning rate."""
    k: int = 32
    d_sae: int = 4608
    batch_tokens: int = 1024
    total_tokens: int = 900_000
    window_tokens: int = 100_000
    """Window of the dead counter and of the density averages."""

    def run(self) -> None:
        check_same_place(ActivationStore(self.acts), ActivationStore(self.eval_acts))
        grid = [self.trained(method, lr, seed=0) for method in self.methods for lr in self.lrs]
        chosen = []
        for method in self.methods:
            lr = best_rate(method, {r["lr"]: r["held_out"]["fvu"] for r in grid if r["method"] == method})
            chosen += [self.evaluated(self.trained(method, lr, seed)) for seed in range(self.seeds)]
        self.add_delta_ce(chosen)
        self.draw([run for run in chosen if run["seed"] == 0])
        table = self.table(grid, chosen)
        write_text(self.out / "table.md", table)
        write_json(self.out / "results.json", {"settings": to_json(self), "grid": grid, "chosen": chosen})
        sys.stdout.write(table)

    def folder(self, run: dict[str, Any]) -> Path:
        name = "".join(c if c.isalnum() else "_" for c in run["method"])
        return self.out / "runs" / f"{name}-lr{run['lr']:g}-seed{run['seed']}"

    def trained(self, method: str, lr: float, seed: int) -> dict[str, Any]:
        """Train one run and measure it on held-out rows of its own cache, or read it if it is there."""
        run: dict[str, Any] = {"method": method, "lr": lr, "seed": seed}
        folder = self.folder(run)
        record = folder / "trained.json"
        settings = dict(METHODS[method])
        store = ActivationStore(self.acts)
        source = CacheSource(store, seed=seed)
        sae = create(settings.pop("sae"), d_in=source.d_in, d_sae=self.d_sae, k=self.k, seed=seed, **settings)
        config = TrainConfig(
            lr=lr,
            batch_tokens=self.batch_tokens,
            total_tokens=min(self.total_tokens, source.num_rows),
            dead_window_tokens=self.window_tokens,
            density_window_tokens=self.window_tokens,
            seed=seed,
        )
        done = record.exists()
        sae, run["seconds"] = fitted(folder, sae, config, source)
        if done:
            return read_json(record)
        rows = held_out_rows(store, source.held_out_share)
        run["held_out"] = evaluate_rows({method: sae}, store, rows, progress=False)[method].result()
        write_json(record, run)
        shown = {name: f"{run['held_out'][name]:.4f}" for name in ("fvu", "l0", "dead")}
        logger.info("%s lr %g seed %d, held-out rows: %s, %.0f s", method, lr, seed, shown, run["seconds"])
        return run

    def evaluated(self, run: dict[str, Any]) -> dict[str, Any]:
        """Measure one run on half of the evaluation cache: as fitted, and calibrated on the other half."""
        folder = self.folder(run)
        record = folder / "evaluated.json"
        if record.exists():
            return read_json(record)
        run = {**run, **at_equal_l0(load(folder), ActivationStore(self.eval_acts))}
        write_json(record, run)
        return run

    def draw(self, runs: list[dict[str, Any]]) -> None:
        """Densities and L0 of one run of each method, on the evaluation half."""
        store = ActivationStore(self.eval_acts)
        calibrate, evaluate = halves(store)
        saes = {run["method"]: load(self.folder(run)) for run in runs}
        for sae in saes.values():
            recalibrate(sae, store, calibrate)
        save_plots(evaluate_rows(saes, store, evaluate, progress=False), self.out / "plots")

    def add_delta_ce(self, chosen: list[dict[str, Any]]) -> None:
        """delta-CE of the chosen runs on contexts of the evaluation half; clean and ablated passes are shared."""
        missing = {str(self.folder(run)): run for run in chosen if "delta_ce" not in run}
        if not missing or self.model is None or self.text is None:
            return
        saes = {folder: load(folder) for folder in missing}
        store = ActivationStore(self.eval_acts)
        found = in_language_model(saes, store, self.model, self.text, self.ce_tokens)
        for folder, run in missing.items():
            run |= found[folder]
            write_json(Path(folder) / "evaluated.json", run)

    def table(self, grid: list[dict[str, Any]], chosen: list[dict[str, Any]]) -> str:
        """Two markdown tables: FVU and dead latents over the grid, and every figure at the chosen rate over seeds."""
        lines = []
        for method in self.methods:
            found = {run["lr"]: run["held_out"] for run in grid if run["method"] == method}
            lines.append([method, *(f"{found[lr]['fvu']:.4f} ({found[lr]['dead']:.1%})" for lr in self.lrs)])
        over_grid = markdown(["method", *(f"lr {lr:g}" for lr in self.lrs)], lines)
        titles = ["method", "lr", "FVU", "L0", "dead", "ΔCE", "seconds", "FVU as fitted", "L0 as fitted"]
        lines = []
        for method in self.methods:
            runs = [run for run in chosen if run["method"] == method]
            styles = {"fvu": ".4f", "l0": ".2f", "dead": ".2%", "delta_ce": ".4f", "seconds": ".0f"}
            cells = [spread(runs, key, style) for key, style in styles.items()]
            cells += [spread([run["as_fitted"] for run in runs], key, styles[key]) for key in ("fvu", "l0")]
            lines.append([method, f"{runs[0]['lr']:g}", *cells])
        return over_grid + "\n" + markdown(titles, lines)


def to_json(settings: Compare) -> dict[str, Any]:
    return {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(settings).items()}


if __name__ == "__main__":
    sys.exit(main(Compare, "compare", __doc__))

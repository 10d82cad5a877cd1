"""What it costs to begin at the data: `SAE.start` in units of a training step, for every SAE that has a start.

    python -m benchmarks.start [--d-in 768] [--d-sae 16384] [--batch 4096] [--saes topk,switch] [--json FILE]

Start and steps take turns: a new SAE is described its input, begins, and does three steps, of which the last counts;
medians over --rounds. Rows are made-up features, as many for the start as training takes.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import apportion as ap
from apportion.architectures import SAES
from apportion.recipes.parts import LAYOUTS
from apportion.recipes.start import LEARNED
from apportion.synthetic import GroundTruthConfig, GroundTruthSource
from apportion.training.trainer import FIT_INPUT_ROWS
from benchmarks.train_step import hardware


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, usual in (("d-in", 768), ("d-sae", 16_384), ("k", 32), ("batch", 4096), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=usual)
    parser.add_argument("--saes", default=",".join(LEARNED))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    result = {"hardware": hardware("cpu"), "settings": vars(options) | {"json": None}, "saes": {}}
    for name in options.saes.split(","):
        result["saes"][name] = found = costs(name, options)
        print(f"{name:>16}  start {found['start']:7.3f} s  step {found['step']:7.3f} s  ratio {found['ratio']:5.2f}")
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def costs(name: str, options: argparse.Namespace) -> dict[str, float]:
    """Median seconds of the start and of a step, and the median of their ratios round by round."""
    world = GroundTruthConfig(num_features=2 * options.d_in, d_in=options.d_in)
    source = GroundTruthSource(replace(world, layout=LAYOUTS[SAES[name].architecture.row_kind]), seed=0)
    rows = source.sample(FIT_INPUT_ROWS)
    starts, steps = [], []
    for seed in range(options.rounds):
        sae = ap.create(name, d_in=options.d_in, d_sae=options.d_sae, k=options.k, seed=seed)
        sae.fit_input(rows.x, rows.target)
        began = time.perf_counter()
        sae.start(rows.x, rows.target)
        starts.append(time.perf_counter() - began)
        trainer = ap.Trainer(sae, ap.TrainConfig(batch_tokens=options.batch))
        for first in range(0, 3 * options.batch, options.batch):
            batch = rows[slice(first, first + options.batch)]
            began = time.perf_counter()
            trainer.step(batch)
            seconds = time.perf_counter() - began
        steps.append(seconds)
    ratios = [start / step for start, step in zip(starts, steps, strict=True)]
    return {"start": median(starts), "step": median(steps), "ratio": median(ratios)}


if __name__ == "__main__":
    sys.exit(main())

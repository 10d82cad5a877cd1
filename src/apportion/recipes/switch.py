"""Switch SAEs against TopK: at equal width, and at equal encoder work per token.

    python -m apportion.recipes.switch --acts acts/train --eval-acts acts/valid --out results/switch

TopK of width F; Switch of the same width (1 / E of the encoder's work); Switch with E experts of width F each (the work
of the TopK and E times its parameters). Every one gets the same k and the same tokens, and takes the learning rate of
the grid with the lowest FVU on held-out rows of the training cache. FVU is measured on every other context of the
evaluation cache; steps are timed in turns afterwards, so that a busy machine is unfair to nobody. Finished runs are
not done again.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import tyro

from apportion.activations import ActivationStore, CacheSource
from apportion.architectures import SAE, create
from apportion.architectures.files import write_json
from apportion.evals import evaluate_rows, held_out_rows
from apportion.recipes.runs import at_equal_l0, best_rate, check_caches, fitted, markdown, spread
from apportion.training import TrainConfig, Trainer

logger = logging.getLogger("apportion.switch")

TIMED_STEPS, WARMUP_STEPS = 11, 3


@dataclass(frozen=True, kw_only=True)
class SwitchComparison:
    """Switch SAEs against TopK: at equal width, and at equal encoder work per token."""

    acts: Path
    """The training cache."""
    eval_acts: Path
    """The evaluation cache: other text of the same kind."""
    out: Path
    """Where runs and the table go."""
    d_sae: int = 4608
    """Width of the TopK SAE."""
    k: int = 32
    width_matched: tuple[int, ...] = (16,)
    """Numbers of experts at equal width."""
    flop_matched: tuple[int, ...] = (4, 8)
    """Numbers of experts as wide as the TopK SAE."""
    lrs: tuple[float, ...] = (1e-3, 3e-3)
    """The grid of learning rates."""
    seeds: int = 1
    """Seeds at the best learning rate."""
    batch_tokens: int = 1024
    total_tokens: int = 900_000

    def run(self) -> None:
        check_caches(self.acts, self.eval_acts)
        for settings in self.table.values():
            create(**settings, d_in=1)
        store = ActivationStore(self.acts)
        results = {name: self.measured(name, settings, store) for name, settings in self.table.items()}
        times = self.step_times(store)
        lines = [
            self.line(name, settings, runs, times)
            for (name, settings), runs in zip(self.table.items(), results.values(), strict=True)
        ]
        titles = (
            "SAE",
            "latents",
            "encoder products, MFLOP a token",
            "FVU",
            "L0",
            "dead",
            "lr",
            "step, ms",
            "16 B a parameter, MB",
        )
        text = markdown(titles, lines)
        write_json(self.out / "results.json", {"runs": results, "step_ms": times})
        (self.out / "table.md").write_text(text, encoding="utf-8")
        sys.stdout.write(text)

    @property
    def table(self) -> dict[str, dict[str, Any]]:
        common = {"k": self.k}
        table: dict[str, dict[str, Any]] = {"TopK": {"name": "topk", "d_sae": self.d_sae, **common}}
        for e in self.width_matched:
            table[f"Switch, {e} experts, width-matched"] = {
                "name": "switch",
                "d_sae": self.d_sae,
                "num_experts": e,
                **common,
            }
        for e in self.flop_matched:
            table[f"Switch, {e} experts, FLOP-matched"] = {
                "name": "switch",
                "d_sae": e * self.d_sae,
                "num_experts": e,
                **common,
            }
        return table

    def measured(self, name: str, settings: dict[str, Any], store: ActivationStore) -> list[dict[str, Any]]:
        """Each seed at the best learning rate."""
        runs = {lr: self.one(name, settings, lr, 0, store) for lr in self.lrs}
        lr = best_rate(name, {lr: run["held_out_fvu"] for lr, run in runs.items()})
        return [runs[lr], *(self.one(name, settings, lr, seed, store) for seed in range(1, self.seeds))]

    def one(self, name: str, settings: dict[str, Any], lr: float, seed: int, store: ActivationStore) -> dict[str, Any]:
        folder = self.out / "runs" / f"{''.join(c if c.isalnum() else '_' for c in name)}-lr{lr:g}-seed{seed}"
        source = CacheSource(store, seed=seed)
        sae = create(**settings, d_in=store.d_in, seed=seed)
        sae, _ = fitted(folder, sae, self.config(lr, seed), source)
        held_out = evaluate_rows(
            {"sae": sae}, store, held_out_rows(store, source.held_out_share), max_tokens=50_000, progress=False
        )
        run = {"lr": lr, "seed": seed, "held_out_fvu": held_out["sae"].result()["fvu"]}
        run |= {
            key: value for key, value in at_equal_l0(sae, ActivationStore(self.eval_acts)).items() if key != "as_fitted"
        }
        logger.info(
            "%s, lr %g, seed %d: FVU %.4f on held-out rows, %.4f", name, lr, seed, run["held_out_fvu"], run["fvu"]
        )
        return run

    def config(self, lr: float, seed: int) -> TrainConfig:
        return TrainConfig(lr=lr, batch_tokens=self.batch_tokens, total_tokens=self.total_tokens, seed=seed)

    def step_times(self, store: ActivationStore) -> dict[str, float]:
        """Median milliseconds of a training step, taken in turns."""
        x = store.gather(store.mask.nonzero().squeeze(1)[: self.batch_tokens])
        trainers = {
            name: Trainer(create(**settings, d_in=store.d_in, seed=0), self.config(self.lrs[0], 0))
            for name, settings in self.table.items()
        }
        seconds: dict[str, list[float]] = {name: [] for name in trainers}
        for _ in range(WARMUP_STEPS + TIMED_STEPS):
            for name, trainer in trainers.items():
                start = perf_counter()
                trainer.step(x)
                seconds[name].append(perf_counter() - start)
        return {name: 1e3 * median(values[WARMUP_STEPS:]) for name, values in seconds.items()}

    def line(
        self, name: str, settings: dict[str, Any], runs: list[dict[str, Any]], times: dict[str, float]
    ) -> list[str]:
        sae: SAE = create(**settings, d_in=ActivationStore(self.acts).d_in)
        experts = settings.get("num_experts", 1)
        flop = 2 * sae.d_in * (sae.d_sae / experts + (experts if experts > 1 else 0))
        megabytes = 16 * sum(p.numel() for p in sae.parameters()) / 1e6
        figures = [spread(runs, key, style) for key, style in (("fvu", ".4f"), ("l0", ".2f"), ("dead", ".1%"))]
        return [
            name,
            str(sae.d_sae),
            f"{flop / 1e6:.1f}",
            *figures,
            f"{runs[0]['lr']:g}",
            f"{times[name]:.0f}",
            f"{megabytes:.0f}",
        ]


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    tyro.cli(SwitchComparison).run()


if __name__ == "__main__":
    main()

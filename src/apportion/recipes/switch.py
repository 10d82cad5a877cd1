"""Switch SAEs against TopK: of equal width, and with experts each as wide as the TopK SAE.

    python -m apportion.recipes.switch --acts acts/train --eval-acts acts/valid --out results/switch

A Switch SAE of the width F of the TopK SAE does 1 / E of the encoder's work; one with E experts of width F each does
the work of the TopK SAE and has E times its parameters. Every one gets the same k and the same tokens and takes the
learning rate of the grid with the lowest FVU, for the first seed, on held-out rows of the training cache. Thresholds
are calibrated on every other context of the evaluation cache, figures are over the rest; steps are timed in turns
afterwards, so that a busy machine is unfair to nobody (peak memory, at any size: benchmarks/, case switch).

What is finished is written to disk at once and not done again when the command is given a second time; Ctrl-C saves the
run it interrupts.
"""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import asdict, dataclass
from functools import cached_property
from math import exp
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

from apportion.architectures import SAE, create
from apportion.architectures.affine import Affine
from apportion.architectures.switch import Switch
from apportion.disk import read_json, write_json, write_text
from apportion.evals import evaluate_rows, held_out_rows
from apportion.evals.geometry import duplicated, nearest_cosines
from apportion.metrics import entropy, load
from apportion.recipes.command import listed, main
from apportion.recipes.runs import at_equal_l0, best_rate, between, check_same_place, fitted, markdown, same_run, spread
from apportion.rows import ActivationStore, CacheSource
from apportion.training import TrainConfig, Trainer

logger = logging.getLogger("apportion.switch")

WARMUP_STEPS, TIMED_STEPS = 3, 11
LOAD_ROWS = 50_000
"""Over which the experts' loads are counted."""
COLUMNS = {
    "fvu": ("FVU", ".4f"),
    "l0": ("L0", ".2f"),
    "dead": ("dead", ".1%"),
    "duplicated": ("duplicated", ".1%"),
    "experts_in_use": ("experts in use", ".2f"),
}
"""Of results: title, format."""


@dataclass(frozen=True)
class Arm:
    """One kind of SAE in the comparison."""

    title: str
    d_sae: int
    num_experts: int = 1
    """1: no Switch but a TopK SAE."""

    def new(self, d_in: int, k: int, seed: int = 0) -> SAE:
        if self.num_experts == 1:
            return create("topk", d_in=d_in, d_sae=self.d_sae, k=k, seed=seed)
        return create("switch", d_in=d_in, d_sae=self.d_sae, k=k, num_experts=self.num_experts, seed=seed)

    def encoder_mflop(self, d_in: int) -> float:
        """Of the encoder's products for one token, in millions, with the router's."""
        rows = self.d_sae / self.num_experts + (self.num_experts if self.num_experts > 1 else 0)
        return 2e-6 * d_in * rows


@dataclass(frozen=True, kw_only=True)
class SwitchComparison:
    """Compare Switch SAEs with TopK, at equal width and at equal work."""

    acts: Path
    """The training cache."""
    eval_acts: Path
    """The evaluation cache: other text of the same kind."""
    out: Path
    """Where runs and the table go."""
    docs: Path | None = None
    """A markdown file that gets the table between <!-- switch --> and <!-- /switch -->."""
    d_sae: int = 4608
    """Width of the TopK SAE."""
    k: int = 32
    """Active latents per token."""
    width_matched: listed(int, "E,E,..") = (16,)  # pyright: ignore[reportInvalidTypeForm]
    """Numbers of experts at equal width."""
    flop_matched: listed(int, "E,E,..") = (4, 8)  # pyright: ignore[reportInvalidTypeForm]
    """Numbers of experts as wide as the TopK SAE."""
    lrs: listed(float, "LR,LR,..") = (1e-3, 3e-3)  # pyright: ignore[reportInvalidTypeForm]
    """Learning rates that every SAE may choose from."""
    seeds: listed(int, "0,1,..") = (0, 1, 2)  # pyright: ignore[reportInvalidTypeForm]
    """Seeds of initial weights and data order."""
    batch_tokens: int = 1024
    """Tokens of a step."""
    total_tokens: int = 900_000
    """Tokens of a run."""

    def run(self) -> None:
        self.check()
        chosen: dict[Arm, list[dict[str, Any]]] = {arm: [] for arm in self.arms}
        for seed in self.seeds:
            for arm, runs in chosen.items():
                runs.append(self.evaluated(arm, self.best_lr(arm), seed))
        milliseconds = self.step_times()
        text = self.table(chosen, milliseconds)
        write_json(self.out / "results.json", {
            "runs": {arm.title: runs for arm, runs in chosen.items()},
            "step_ms": {arm.title: ms for arm, ms in milliseconds.items()},
            "settings": json.loads(json.dumps(asdict(self), default=str)),
        })  # fmt: skip
        write_text(self.out / "table.md", text)
        if self.docs is not None:
            write_text(self.docs, between(self.docs, "switch", text))
        sys.stdout.write(text)

    def check(self) -> None:
        """What cannot work shows before anything is trained."""
        check_same_place(ActivationStore(self.acts), ActivationStore(self.eval_acts))
        if not self.seeds or not self.lrs:
            raise ValueError("Give at least one seed and one learning rate.")
        if self.docs is not None:
            between(self.docs, "switch", "")
        for arm in self.arms:
            for lr in self.lrs:
                for seed in self.seeds:
                    folder, sae = self.folder(arm, lr, seed), arm.new(self.store.d_in, self.k, seed)
                    if (folder / "run.json").exists():
                        same_run(folder, sae, self.config(lr, seed), self.source(seed))

    @cached_property
    def store(self) -> ActivationStore:
        return ActivationStore(self.acts)

    @property
    def arms(self) -> list[Arm]:
        return [
            Arm("TopK", self.d_sae),
            *(Arm(f"Switch, {e} experts, width-matched", self.d_sae, e) for e in self.width_matched),
            *(Arm(f"Switch, {e} experts, FLOP-matched", e * self.d_sae, e) for e in self.flop_matched),
        ]

    def config(self, lr: float, seed: int) -> TrainConfig:
        tokens = min(self.total_tokens, self.source(seed).num_rows)
        return TrainConfig(lr=lr, batch_tokens=self.batch_tokens, total_tokens=tokens, seed=seed)

    def source(self, seed: int) -> CacheSource:
        return CacheSource(self.store, seed=seed)

    def folder(self, arm: Arm, lr: float, seed: int) -> Path:
        words = "-".join(arm.title.replace(",", "").lower().split())
        return self.out / "runs" / f"{words}-lr{lr:g}-seed{seed}"

    def best_lr(self, arm: Arm) -> float:
        if len(self.lrs) == 1:
            return self.lrs[0]
        runs = {lr: self.evaluated(arm, lr, self.seeds[0]) for lr in self.lrs}
        return best_rate(arm.title, {lr: run["held_out_fvu"] for lr, run in runs.items()})

    def evaluated(self, arm: Arm, lr: float, seed: int) -> dict[str, Any]:
        """Train and measure one run, or read what is there."""
        folder = self.folder(arm, lr, seed)
        if (folder / "result.json").exists():
            return read_json(folder / "result.json")
        source = self.source(seed)
        sae, seconds = fitted(folder, arm.new(self.store.d_in, self.k, seed), self.config(lr, seed), source)
        rows = held_out_rows(self.store, source.held_out_share)
        held_out = evaluate_rows({"sae": sae}, self.store, rows, progress=False)["sae"].result()
        run = {"lr": lr, "seed": seed, "seconds": seconds, "held_out_fvu": held_out["fvu"]}
        run |= at_equal_l0(sae, ActivationStore(self.eval_acts))
        assert isinstance(sae, Affine)
        run |= {"duplicated": duplicated(nearest_cosines(sae.W_dec)).double().mean().item()}
        if isinstance(sae, Switch):
            run["experts_in_use"] = self.experts_in_use(sae)
        write_json(folder / "result.json", run)
        shown = (arm.title, lr, seed, run["held_out_fvu"], run["fvu"], seconds)
        logger.info("%s, lr %g, seed %d: FVU %.4f on held-out rows, %.4f; %.0f s", *shown)
        return run

    def experts_in_use(self, sae: Switch) -> float:
        """exp of the entropy of the experts' loads on evaluation rows: all of them if the load is even."""
        store = ActivationStore(self.eval_acts)
        rows = store.mask.nonzero().squeeze(1)[:LOAD_ROWS]
        return exp(entropy(load(sae.experts(store.gather(rows)), sae.num_experts)))

    def step_times(self) -> dict[Arm, float]:
        """Median milliseconds of a training step, taken in turns."""
        x = self.store.gather(self.store.mask.nonzero().squeeze(1)[: self.batch_tokens])
        trainers = {arm: Trainer(arm.new(self.store.d_in, self.k), self.config(self.lrs[0], 0)) for arm in self.arms}
        seconds: dict[Arm, list[float]] = {arm: [] for arm in trainers}
        for _ in range(WARMUP_STEPS + TIMED_STEPS):
            for arm, trainer in trainers.items():
                start = perf_counter()
                trainer.step(x)
                seconds[arm].append(perf_counter() - start)
        return {arm: 1e3 * median(values[WARMUP_STEPS:]) for arm, values in seconds.items()}

    def table(self, chosen: dict[Arm, list[dict[str, Any]]], milliseconds: dict[Arm, float]) -> str:
        """The setting and the table."""
        about, d_in = self.store.describe(), self.store.d_in
        head = (
            f"{Path(about.lm.model.name_or_path or '').name}, output of {about.hookpoint}, width {d_in}. k {self.k}, "
            f"{self.config(self.lrs[0], 0).total_tokens:,} training tokens in batches of {self.batch_tokens}, learning "
            f"rate {'chosen from ' * (len(self.lrs) > 1)}{', '.join(f'{lr:g}' for lr in self.lrs)}, "
            f"seeds {', '.join(map(str, self.seeds))}; threads {torch.get_num_threads()}."
        )
        titles = ["SAE", "latents", "encoder, MFLOP a token", "lr", *(title for title, _ in COLUMNS.values())]
        titles += ["step, ms", "16 B a parameter, MB"]
        lines = []
        for arm, runs in chosen.items():
            parameters = sum(p.numel() for p in arm.new(d_in, self.k).parameters())
            cells = [spread(runs, key, style) for key, (_, style) in COLUMNS.items()]
            cells += [f"{milliseconds[arm]:.0f}", f"{16e-6 * parameters:.0f}"]
            lines.append([arm.title, str(arm.d_sae), f"{arm.encoder_mflop(d_in):.2f}", f"{runs[0]['lr']:g}", *cells])
        return f"{head}\n\n{markdown(titles, lines)}"


if __name__ == "__main__":
    sys.exit(main(SwitchComparison, "switch", __doc__))

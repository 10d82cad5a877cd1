"""Switch SAEs against TopK: of equal width, and with experts each as wide as the TopK SAE.

    python -m apportion.recipes.switch --acts acts/train --eval-acts acts/valid --out results/switch

A Switch SAE of the width F of the TopK SAE does 1 / E of the encoder's work; one with E experts of width F each does
the work of the TopK SAE and has E times its parameters. Every one gets the same k and the same tokens and chooses from
the same learning rates (experiment.py). Thresholds are calibrated on every other context of the evaluation cache,
figures are over the rest (parts.py); steps are timed in turns afterwards, so that a busy machine is unfair to nobody
(peak memory, at any size: benchmarks/, case switch).

What is finished is written to disk at once and not done again when the command is given a second time; Ctrl-C saves the
run it interrupts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import exp
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from apportion.architectures import SAE, create
from apportion.architectures.switch import Switch
from apportion.evals import Figure
from apportion.metrics import entropy, load
from apportion.recipes.command import listed, main
from apportion.recipes.experiment import Cell, Experiment, between, over_seeds, publish, run_all, table
from apportion.recipes.parts import CachePart
from apportion.rows.batch import RowStore
from apportion.training import Trainer

WARMUP_STEPS, TIMED_STEPS = 3, 11
LOAD_ROWS = 50_000
"""Over which the experts' loads are counted."""
EXPERTS = Figure("experts_in_use", "experts in use", ".2f", "exp of the entropy of the experts' loads")


@dataclass(frozen=True)
class Kind:
    """One kind of SAE in the comparison."""

    d_sae: int
    num_experts: int = 1
    """1: no Switch but a TopK SAE."""

    def new(self, d_in: int, k: int, seed: int = 0) -> SAE:
        name, experts = ("topk", {}) if self.num_experts == 1 else ("switch", {"num_experts": self.num_experts})
        return create(name, d_in=d_in, d_sae=self.d_sae, k=k, seed=seed, **experts)

    def encoder_mflop(self, d_in: int) -> float:
        """Of the encoder's products for one token, in millions, with the router's."""
        rows = self.d_sae / self.num_experts + (self.num_experts if self.num_experts > 1 else 0)
        return 2e-6 * d_in * rows

    def parameters(self, d_in: int, k: int) -> int:
        return sum(p.numel() for p in self.new(d_in, k).parameters())


@dataclass(frozen=True, kw_only=True)
class SwitchComparison(CachePart):
    """Compare Switch SAEs with TopK, at equal width and at equal work."""

    evals: ClassVar[tuple[str, ...]] = ("geometry",)
    out: Path
    """Where runs and the table go."""
    docs: Path | None = None
    """A markdown file that gets the table between <!-- switch --> and <!-- /switch -->."""
    width_matched: listed(int, "E,E,..") = (16,)  # pyright: ignore[reportInvalidTypeForm]
    """Numbers of experts at equal width."""
    flop_matched: listed(int, "E,E,..") = (4, 8)  # pyright: ignore[reportInvalidTypeForm]
    """Numbers of experts as wide as the TopK SAE."""
    lrs: listed(float, "LR,LR,..") = (1e-3, 3e-3)  # pyright: ignore[reportInvalidTypeForm]
    """Learning rates that every SAE may choose from."""
    seeds: listed(int, "0,1,..") = (0, 1, 2)  # pyright: ignore[reportInvalidTypeForm]
    """Seeds of initial weights and data order."""

    def run(self) -> None:
        experiment = self.experiment()
        run_all(experiment)
        milliseconds = self.step_times()
        text = self.table(experiment, milliseconds)
        runs = {title: [run for run in experiment.done if run["name"] == title] for title in self.kinds}
        publish(self, text, {"runs": runs, "step_ms": milliseconds}, mark="switch")
        sys.stdout.write(text)

    def experiment(self) -> Experiment:
        self.check_rows()
        if self.docs is not None:
            between(self.docs, "switch", "")
        return Experiment(
            out=self.out / "runs",
            part=self,
            arms={title: partial(kind.new, self.d_in, self.k) for title, kind in self.kinds.items()},
            lrs=self.lrs,
            seeds=self.seeds,
            word=lambda title: "-".join(title.replace(",", "").lower().split()),
        )

    @property
    def kinds(self) -> dict[str, Kind]:
        return {
            "TopK": Kind(self.d_sae),
            **{f"Switch, {e} experts, width-matched": Kind(self.d_sae, e) for e in self.width_matched},
            **{f"Switch, {e} experts, FLOP-matched": Kind(e * self.d_sae, e) for e in self.flop_matched},
        }

    def evaluate(self, sae: SAE) -> dict[str, Any]:
        found = super().evaluate(sae)
        return found | {EXPERTS.key: self.experts_in_use(sae)} if isinstance(sae, Switch) else found

    def experts_in_use(self, sae: Switch) -> float:
        """exp of the entropy of the experts' loads on evaluation rows: all of them if the load is even."""
        return exp(entropy(load(sae.experts(some_rows(self.eval_rows(), LOAD_ROWS)), sae.num_experts)))

    def step_times(self) -> dict[str, float]:
        """Median milliseconds of a training step, taken in turns."""
        x, config = some_rows(self.train_rows(), self.batch_tokens), self.config(self.lrs[0], 0)
        trainers = {title: Trainer(kind.new(self.d_in, self.k), config) for title, kind in self.kinds.items()}
        seconds: dict[str, list[float]] = {title: [] for title in trainers}
        for _ in range(WARMUP_STEPS + TIMED_STEPS):
            for title, trainer in trainers.items():
                start = perf_counter()
                trainer.step(x)
                seconds[title].append(perf_counter() - start)
        return {title: 1e3 * median(values[WARMUP_STEPS:]) for title, values in seconds.items()}

    def table(self, experiment: Experiment, milliseconds: Mapping[str, float]) -> str:
        """The setting and the table."""
        d_in, kinds = self.d_in, self.kinds

        def of_kind(say: Callable[[str, Kind], str]) -> Cell:
            return lambda runs: say(runs[0]["name"], kinds[runs[0]["name"]])

        columns = {
            "latents": of_kind(lambda _, kind: str(kind.d_sae)),
            "encoder, MFLOP a token": of_kind(lambda _, kind: f"{kind.encoder_mflop(d_in):.2f}"),
            **over_seeds("fvu", "l0", "dead", "duplicated", EXPERTS),
            "step, ms": of_kind(lambda title, _: f"{milliseconds[title]:.0f}"),
            "16 B a parameter, MB": of_kind(lambda _, kind: f"{16e-6 * kind.parameters(d_in, self.k):.0f}"),
        }
        head = f"{self.describe()}. k {self.k}, {experiment.setting()}; threads {torch.get_num_threads()}."
        return f"{head}\n\n{table('SAE', experiment.done, columns)}"


def some_rows(store: RowStore, n: int) -> Float[Tensor, "n d_in"]:
    """The first that take part."""
    return store.batch(store.mask.nonzero().squeeze(1)[:n]).x


if __name__ == "__main__":
    sys.exit(main(SwitchComparison, "switch", __doc__))

"""Every SAE and every baseline at one budget: on rows with known features, and on a cache of activations.

    python -m apportion.recipes.family --out results/family --acts acts/train --eval-acts acts/valid \\
        --model MODEL --text valid.txt --docs docs/family.md

Two tables, mean and standard deviation over seeds, everything in eval mode. On ground truth: FVU, L0, dead latents and
recovery (synthetic/ground_truth.py, evals/recovery.py). On the cache, as in compare.py: FVU, L0, dead latents,
delta-CE and seconds; thresholds are calibrated on every other context of the evaluation cache, figures are over the
rest. All get the same k, the same number of latents and the same tokens. With several learning rates in --lrs each SAE
takes the one with the lowest FVU, for the first seed, on rows that it was neither trained nor calibrated on; those that
are steered towards k take it among rates with which they got there.

What is finished is written to disk at once and not done again when the command is given a second time; Ctrl-C saves the
run it interrupts. Without --acts only the first table is made.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import arg

from apportion.architectures import SAE, SAES, create, load
from apportion.disk import read_json, write_json, write_text
from apportion.recipes.command import listed, main
from apportion.recipes.family_parts import CachePart, Part, TruthPart
from apportion.recipes.runs import best_rate, between, fitted, markdown, same_run

logger = logging.getLogger("apportion.family")

L0_TOLERANCE = 1.1
"""A learning rate can be chosen if L0 on held-out rows is at most this many times k."""
CE_GROUP = 15
"""SAEs that share the clean and ablated passes of delta-CE; what is measured is kept after each group."""


@dataclass(frozen=True)
class Own:
    """Where an SAE does not go by its defaults."""

    settings: dict[str, Any]
    why: str


OWN: dict[str, Own] = {
    "feature_choice": Own(
        {"budgets": "zipf", "switch_at": 0.3},
        "uniform budgets cost FVU (docs/experiments.md), and which latent gets which budget is to be measured first",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Family:
    """Compare all SAEs and baselines at one budget."""

    out: Path
    """Where runs and tables go."""
    saes: listed(str, "A,B,..") = tuple(SAES)  # pyright: ignore[reportInvalidTypeForm]
    """Which SAEs."""
    seeds: listed(int, "0,1,..") = (0, 1, 2)  # pyright: ignore[reportInvalidTypeForm]
    """Seeds of initial weights and data order."""
    lrs: listed(float, "LR,LR,..") = (3e-3,)  # pyright: ignore[reportInvalidTypeForm]
    """Learning rates that every SAE may choose from."""
    docs: Path | None = None
    """A markdown file that gets the tables, between <!-- truth --> and <!-- /truth -->, <!-- cache --> and so on."""
    truth: TruthPart = field(default_factory=TruthPart)
    cache: Annotated[CachePart, arg(name="")] = field(default_factory=CachePart)

    def run(self) -> None:
        parts: list[Part] = [self.truth] if not self.cache.acts else [self.truth, self.cache]
        self.check(parts)
        self.out.mkdir(parents=True, exist_ok=True)
        failed = [failure for part in parts for failure in self.run_part(part)]
        if failed:
            raise ValueError(f"{len(failed)} runs failed; the first: {failed[0]}")

    def check(self, parts: list[Part]) -> None:
        """What cannot work shows before anything is trained."""
        if unknown := [name for name in self.saes if name not in SAES]:
            raise ValueError(f"There is no SAE named {', '.join(unknown)}. Known are: {', '.join(SAES)}.")
        if not self.seeds or not self.lrs:
            raise ValueError("Give at least one seed and one learning rate.")
        for part in parts:
            part.check()
            for name in self.saes:
                new_sae(part, name, self.seeds[0]).allocation.check_batch(part.batch_tokens)
            for name, lr, seed in product(self.saes, self.lrs, self.seeds):
                folder = self.folder(part, {"name": name, "lr": lr, "seed": seed})
                if (folder / "run.json").exists():
                    sae = new_sae(part, name, seed)
                    same_run(folder, sae, part.config(lr, seed), part.source(sae, seed))
        if self.docs is not None:
            for part in parts:
                between(self.docs, part.name, "")

    def run_part(self, part: Part) -> list[str]:
        """Do what is missing of one table, and write the table after every run; returns what failed."""
        done: list[dict[str, Any]] = []
        failed: list[str] = []
        for seed in self.seeds:
            for name in self.saes:
                if why_left_out(part, name):
                    continue
                try:
                    done.append(self.evaluated(part, name, self.best_lr(part, name), seed))
                except ValueError as error:
                    logger.error("%s, seed %d, failed: %s", name, seed, error)
                    failed.append(f"{name}, seed {seed}: {error}")
                self.write(part, done)
        unfinished = [run for run in done if part.unfinished(new_sae(part, run["name"], run["seed"]), run)]
        for group in (unfinished[i : i + CE_GROUP] for i in range(0, len(unfinished), CE_GROUP)):
            found = part.finish({str(self.folder(part, run)): load(self.folder(part, run)) for run in group})
            for run in group:
                run |= found[str(self.folder(part, run))]
                write_json(self.folder(part, run) / "result.json", run)
            self.write(part, done)
        return failed

    def folder(self, part: Part, run: dict[str, Any]) -> Path:
        return self.out / part.name / f"{run['name']}-lr{run['lr']:g}-seed{run['seed']}"

    def best_lr(self, part: Part, name: str) -> float:
        """Of the rates to choose from, the one with the lowest FVU for the first seed.

        Where L0 is reached rather than given, rates with which it came out too large do not count, or all would choose
        those: if there is none that will do, the one that comes nearest.
        """
        sae = new_sae(part, name, self.seeds[0])
        if len(self.lrs) == 1 or not any(p.requires_grad for p in sae.parameters()):
            return self.lrs[0]
        runs = [self.trained(part, name, lr, self.seeds[0])["held_out"] | {"lr": lr} for lr in self.lrs]
        fair = [run for run in runs if run["l0"] <= L0_TOLERANCE * part.k]
        return best_rate(name, {run["lr"]: run["fvu"] for run in fair or [min(runs, key=lambda run: run["l0"])]})

    def trained(self, part: Part, name: str, lr: float, seed: int) -> dict[str, Any]:
        """Train one run and look at it on held-out rows, or read what is there."""
        run: dict[str, Any] = {"name": name, "lr": lr, "seed": seed}
        folder, new = self.folder(part, run), new_sae(part, name, seed)
        record = folder / "trained.json"
        sae, run["seconds"] = fitted(folder, new, part.config(lr, seed), part.source(new, seed))
        if record.exists():
            return read_json(record)
        run["held_out"] = part.held_out(sae)
        write_json(record, run)
        shown = (part.name, name, lr, seed, run["held_out"]["fvu"], run["held_out"]["l0"], run["seconds"])
        logger.info("%s: %s, lr %g, seed %d: FVU %.4f, L0 %.2f on held-out rows, %.0f s", *shown)
        return run

    def evaluated(self, part: Part, name: str, lr: float, seed: int) -> dict[str, Any]:
        """Train and measure one run, or read what is there."""
        run = self.trained(part, name, lr, seed)
        folder = self.folder(part, run)
        if (folder / "result.json").exists():
            return read_json(folder / "result.json")
        run |= part.evaluate(load(folder))
        write_json(folder / "result.json", run)
        return run

    def write(self, part: Part, runs: list[dict[str, Any]]) -> None:
        """Table and results of a part, as far as it has come."""
        settings = json.loads(json.dumps(dataclasses.asdict(self), default=str))
        write_json(self.out / f"{part.name}.json", {"settings": settings, "runs": runs})
        text = self.table(part, runs)
        write_text(self.out / f"{part.name}.md", text)
        if self.docs is not None:
            write_text(self.docs, between(self.docs, part.name, text))

    def table(self, part: Part, runs: list[dict[str, Any]]) -> str:
        """The setting, the table, and what is not in it."""
        rates = ", ".join(f"{lr:g}" for lr in self.lrs)
        tokens = part.config(self.lrs[0], seed=0).total_tokens
        head = (
            f"{part.describe()}. k {part.k}, {part.d_sae} latents, {tokens:,} training tokens in batches of "
            f"{part.batch_tokens}, learning rate {'chosen from ' * (len(self.lrs) > 1)}{rates}, "
            f"seeds {', '.join(map(str, self.seeds))}."
        )
        lines = []
        for name in self.saes:
            of_name = [run for run in runs if run["name"] == name]
            if of_name:
                cells = [column.over_seeds(of_name, key, column.style) for key, column in part.columns.items()]
                lines.append([f"`{name}`", f"{of_name[0]['lr']:g}", *cells])
        text = f"{head}\n\n{markdown(['SAE', 'lr', *(column.title for column in part.columns.values())], lines)}\n"
        return text + "".join(f"* {note}\n" for name in self.saes for note in notes(part, name))


def notes(part: Part, name: str) -> Iterator[str]:
    """What is different about this SAE, or why it is left out."""
    if why := why_left_out(part, name):
        yield f"Not in this table: `{name}`, which {why}."
        return
    if name in OWN:
        settings = ", ".join(f"{key} = {value}" for key, value in OWN[name].settings.items())
        yield f"`{name}` with {settings}: {OWN[name].why}."
    sae = new_sae(part, name, seed=0)
    if note := part.note(sae):
        yield f"`{name}` {note}."
    if sae.row_kind == "layers":
        yield f"`{name}`, made for all layers together, sees one here."
    if num_latents := SAES[name].architecture.d_sae_for(part.d_in):
        yield f"`{name}` has {num_latents} latents."


@cache
def why_left_out(part: Part, name: str) -> str | None:
    return part.why_not(new_sae(part, name, seed=0))


def new_sae(part: Part, name: str, seed: int) -> SAE:
    """An untrained SAE as this comparison wants it."""
    settings = OWN[name].settings if name in OWN else {}
    d_sae = SAES[name].architecture.d_sae_for(part.d_in) or part.d_sae
    return create(name, d_in=part.d_in, d_sae=d_sae, k=part.k, seed=seed, **settings)


if __name__ == "__main__":
    sys.exit(main(Family, "family", __doc__))

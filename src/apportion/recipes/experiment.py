"""An experiment: arms x learning rates x seeds on one part (parts.py), each run done once and in a folder of its own.

    <arm>-lr<rate>-seed<seed>/    a run (training/run.py), with
        trained.json    seconds, and figures on rows that were neither trained nor calibrated on
        result.json     those of the evaluation besides, if the run has the rate that was chosen

An arm is made from a seed. With the first seed it is trained at every rate and chooses the one with the lowest FVU on
held-out rows; further seeds have that rate, and only runs at that rate are evaluated.

What is finished is read the next time, and what was interrupted goes on. A run that fails stops none of the others.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from math import inf
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from apportion.about import TextRecord
from apportion.architectures import SAE, load
from apportion.disk import read_json, write_json, write_text
from apportion.evals import FIGURES, Figure
from apportion.recipes.parts import Part
from apportion.rows import Source
from apportion.training import TrainConfig, Trainer
from apportion.training.run import RUN, read_run
from apportion.training.same import check_same

logger = logging.getLogger(__name__)

TRAINED, RESULT = "trained.json", "result.json"
GROUP = 15
"""Runs that `Part.finish` gets at once; what it finds is kept after each group."""

Record = dict[str, Any]
Cell = Callable[[list[Record]], str]
"""What a table says of the runs of one arm."""


@dataclass(kw_only=True)
class Experiment:
    out: Path
    """Where the folders of runs go."""
    part: Part
    arms: Mapping[str, Callable[[int], SAE]]
    """What is compared: how each is made from a seed."""
    lrs: Sequence[float]
    seeds: Sequence[int]
    given: Mapping[str, float] = field(default_factory=dict)
    """Rates of arms that take none of `lrs`."""
    limit: float = inf
    """Rates with which L0 on held-out rows came out larger are not chosen, unless there is no other."""
    write: Callable[[Experiment], None] = lambda experiment: None
    """Is called after every run, to show what is done."""
    word: Callable[[str], str] = str
    """What an arm is called on disk."""
    grid: dict[str, list[Record]] = field(default_factory=dict, init=False)
    """The runs of each arm with the first seed, one for every rate."""
    rates: dict[str, float] = field(default_factory=dict, init=False)
    """What each arm chose."""
    done: list[Record] = field(default_factory=list, init=False)
    """Runs at the chosen rates, with their evaluation."""

    def check(self) -> None:
        """What cannot work shows before anything is trained."""
        if not self.seeds or not self.lrs:
            raise ValueError("Give at least one seed and one learning rate.")
        for lr in (*self.lrs, *self.given.values()):
            self.part.config(lr, self.seeds[0])
        for make in self.arms.values():
            make(self.seeds[0]).allocation.check_batch(self.part.batch_tokens)
        check_known(self.given, self.arms, "SAE")
        rates = [
            *((name, lr) for name, lr in product(self.arms, self.lrs) if name not in self.given),
            *self.given.items(),
        ]
        for (name, lr), seed in product(rates, self.seeds):
            folder = self.folder({"name": name, "lr": lr, "seed": seed})
            if (folder / RUN).exists():
                sae = self.arms[name](seed)
                same_run(folder, sae, self.part.config(lr, seed), self.part.source(sae, seed))

    def run(self) -> list[str]:
        """Do what is missing; returns what failed."""
        self.out.mkdir(parents=True, exist_ok=True)
        failed = []
        for seed, name in product(self.seeds, self.arms):
            try:
                self.done.append(self.evaluated(self.trained(name, self.rate(name), seed)))
            except ValueError as error:
                logger.error("%s, seed %d, failed: %s", name, seed, error)
                failed.append(f"{name}, seed {seed}: {error}")
            self.write(self)
        self.finish([run for run in self.done if self.part.unfinished(run)])
        return failed

    def rate(self, name: str) -> float:
        """The learning rate of an arm, for which it is trained at each with the first seed."""
        seed = self.seeds[0]
        if name in self.given:
            return self.given[name]
        if not any(p.requires_grad for p in self.arms[name](seed).parameters()):
            return self.lrs[0]
        if name not in self.rates:
            self.grid[name] = [self.trained(name, lr, seed) for lr in self.lrs]
            found = {run["lr"]: run["held_out"] for run in self.grid[name]}
            self.rates[name] = best_rate(name, found, self.limit)
        return self.rates[name]

    def trained(self, name: str, lr: float, seed: int) -> Record:
        """Train one run and look at it on held-out rows, or read what is there."""
        run: Record = {"name": name, "lr": lr, "seed": seed}
        if ((folder := self.folder(run)) / TRAINED).exists():
            return run | read_json(folder / TRAINED)
        sae = self.arms[name](seed)
        trainer = Trainer(sae, self.part.config(lr, seed))
        sae = trainer.fit(self.part.source(sae, seed), folder, resume=True)
        run |= {"seconds": trainer.seconds, "held_out": self.part.held_out(sae)}
        write_json(folder / TRAINED, run)
        shown = (self.out.name, name, lr, seed, run["held_out"]["fvu"], run["held_out"]["l0"], run["seconds"])
        logger.info("%s: %s, lr %g, seed %d: FVU %.4f, L0 %.2f on held-out rows, %.0f s", *shown)
        return run

    def evaluated(self, run: Record) -> Record:
        """With the figures of the evaluation, measured or read."""
        record = self.folder(run) / RESULT
        if record.exists():
            return run | read_json(record)
        run = run | self.part.evaluate(load(self.folder(run)))
        write_json(record, run)
        return run

    def finish(self, missing: list[Record]) -> None:
        for group in (missing[i : i + GROUP] for i in range(0, len(missing), GROUP)):
            runs = {str(self.folder(run)): run for run in group}
            found = self.part.finish({folder: load(folder) for folder in runs})
            for folder, run in runs.items():
                run |= found[folder]
                write_json(Path(folder) / RESULT, run)
            self.write(self)

    def folder(self, run: Record) -> Path:
        return self.out / f"{self.word(run['name'])}-lr{run['lr']:g}-seed{run['seed']}"

    def setting(self) -> str:
        """Tokens, rates and seeds in words."""
        config, rates = self.part.config(self.lrs[0], seed=0), ", ".join(f"{lr:g}" for lr in self.lrs)
        rates += "".join(f" ({name} {lr:g})" for name, lr in self.given.items())
        return (
            f"{config.total_tokens:,} training tokens in batches of {config.batch_tokens}, learning rate "
            f"{'chosen from ' * (len(self.lrs) > 1)}{rates}, {''.join(f'{other}, ' for other in self.part.train)}"
            f"seeds {', '.join(map(str, self.seeds))}"
        )


def run_all(*experiments: Experiment) -> None:
    """Check and do them; ValueError in the end if runs failed."""
    for experiment in experiments:
        experiment.check()
    if failed := [failure for experiment in experiments for failure in experiment.run()]:
        raise ValueError(f"{len(failed)} runs failed; the first: {failed[0]}")


def best_rate(name: str, found: Mapping[float, Record], limit: float = inf) -> float:
    """The rate with the lowest FVU, or the lowest L0 if all are above the limit; says so at the edge of a grid."""
    fair = {lr: one for lr, one in found.items() if one["l0"] <= limit}
    if not fair:
        return min(found, key=lambda lr: found[lr]["l0"])
    best = min(fair, key=lambda lr: fair[lr]["fvu"])
    if len(fair) > 1 and best in (min(fair), max(fair)):
        logger.warning("%s: the best learning rate %g lies at the edge of the grid", name, best)
    return best


def check_known(names: Iterable[str], known: Collection[str], what: str) -> None:
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"There is no {what} named {', '.join(unknown)}. Known are: {', '.join(known)}.")


def same_run(folder: Path, sae: SAE, config: TrainConfig, source: Source) -> None:
    """ValueError if the run in this folder was made with other settings or on other rows."""
    trainer = Trainer(sae, config)
    check_same(folder, read_run(folder), trainer.describe(source), trainer.defaults())


def as_now(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Recorded settings, in which the text is described as this version does it."""
    text = recorded.get("text")
    return {**recorded, "text": text and TextRecord.from_json(text, "text").to_json()}


# Tables

SECONDS = Figure("seconds", "seconds", ".0f", "of training", "lower")


def table(first: str, runs: Iterable[Record], columns: Mapping[str, Cell], shown: Callable[[str], str] = str) -> str:
    """A line for every arm that has runs."""
    of: dict[str, list[Record]] = {}
    for run in runs:
        of.setdefault(run["name"], []).append(run)
    lines = ([shown(name), *(cell(some) for cell in columns.values())] for name, some in of.items())
    return markdown([first, *columns], lines)


def over_seeds(*figures: str | Figure, of: str = "") -> dict[str, Cell]:
    """Columns of the learning rate and of figures; of those that a run has under `of`, such as "as fitted"."""
    chosen = [FIGURES[figure] if isinstance(figure, str) else figure for figure in figures]
    columns = {f"{figure.title} {of}".rstrip(): partial(spread, figure, of.replace(" ", "_")) for figure in chosen}
    return {"lr": lambda runs: f"{runs[0]['lr']:g}", **columns}


def spread(figure: Figure, of: str, runs: Sequence[Record]) -> str:
    """Mean and standard deviation over seeds; of seconds the least, as the machine may have done other things too."""
    found = [(run[of] if of else run).get(figure.key) for run in runs]
    values = [value for value in found if value is not None]
    if not values:
        return "-"
    if figure == SECONDS:
        return figure.written(min(values))
    shown = [mean(values), *([stdev(values)] if len(values) > 1 else [])]
    return " ± ".join(figure.written(value).removeprefix("+") for value in shown)


def markdown(titles: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table in markdown."""
    rows = [titles, ["---"] * len(titles), *lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def publish(
    recipe: Any, text: str, runs: Record, record: str = "results.json", page: str = "table.md", mark: str = "table"
) -> None:
    """Write runs with the options of the recipe, and the table: to a file of its own, and between marks in `docs`."""
    settings = json.loads(json.dumps(dataclasses.asdict(recipe), default=str))
    write_json(recipe.out / record, {"settings": settings, **runs})
    write_text(recipe.out / page, text)
    if settings.get("docs") is not None:
        write_text(recipe.docs, between(recipe.docs, mark, text))


def between(file: Path, name: str, text: str) -> str:
    """The content of a markdown file with `text` between its marks <!-- name --> and <!-- /name -->."""
    content = file.read_text(encoding="utf-8") if file.exists() else ""
    before, opened, rest = content.partition(f"<!-- {name} -->\n")
    _, closed, after = rest.partition(f"<!-- /{name} -->\n")
    if not opened or not closed:
        raise ValueError(f"{file} has no lines <!-- {name} --> and <!-- /{name} --> to put the table between.")
    return before + opened + text + closed + after

"""`apportion sweep`: many SAEs on one stream. Its options are those of train; values with commas between them are tried
each, in every combination.

    apportion sweep acts/ --sae topk,mutual_choice --k 16,32 --seed 0,1 --out runs/

Each run lies in a folder of its own below --out, named after what it has of its own, exactly as `apportion train`
writes it; sweep.json says which there are, and what came of them.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from apportion.answers import DIVERGED, NOT_DONE
from apportion.cli.arguments import say
from apportion.cli.sources import Sources, goes_with
from apportion.cli.train import TrainBase, chosen_sae, train_command
from apportion.memory import free_bytes

NOT_SPLIT = {"out", "hookpoint", "target_hookpoint", "text", "dataset", "roles", "track", "resume", "requeue"}
"""Options whose values may have commas, or that are of the sweep as a whole."""
EVALUATED = 100_000
"""Rows on which a finished run is looked at, at most."""
MEMORY_SHARE = 0.8
"""Of the memory that is free, what the runs of one pass may need."""
BYTES_PER_PARAMETER = 18
"""Weights, gradients, Adam's averages, and what a step makes besides."""
HELD_SHARE = 0.3
"""Of the memory that is free, what activations of a model may take that are held for runs that come later."""
BLOCKS_HELD = 2.5
"""Of the rows that a source mixes, how many times they are in memory."""
STEP_PRODUCTS = 1.0
"""What a step takes, in units of the encoder's product, of which there are two in `_parameters`."""

log = logging.getLogger("apportion")


def variants(argv: list[str], least: int = 1) -> dict[str, list[str]]:
    """For each run its name, and the words of the train command that make it; `least` so many options with several
    values."""
    words, choices = list[str](), dict[str, list[str]]()
    i = 0
    while i < len(argv):
        word = argv[i]
        flag, equals, value = word.partition("=")
        if flag.startswith("--"):
            following = argv[i + 1] if i + 1 < len(argv) else "--"
            taken = not equals and not following.startswith("--")
            value = following if taken else value
            name = flag[2:].replace("-", "_")
            if "," in value and name not in NOT_SPLIT:
                if not (parts := [part.strip() for part in value.split(",") if part.strip()]):
                    raise ValueError(f"{flag} {value} names no value.")
                choices[flag] = parts
                i += 1 + taken
                continue
        words.append(word)
        i += 1
    if len(choices) < least:
        raise ValueError("A sweep has options with several values, such as --k 16,32: with one of each use train.")
    found = {}
    for values in product(*choices.values()):
        own = [(flag[2:], value) for flag, value in zip(choices, values, strict=True)]
        name = "-".join(value if flag == "sae" else f"{flag.replace('-', '_')}{value}" for flag, value in own)
        name = re.sub(r"[^\w.+-]", "_", name)
        if name in found:
            raise ValueError(f"Two runs would be called {name}: give each value once.")
        found[name] = [*words, *(f"--{flag}={value}" for flag, value in own)]
    return found


@dataclass
class Sweep:
    """Train many SAEs on one stream: the options of train, where values with commas between them are tried each."""

    runs: Mapping[str, TrainBase]
    """As they would be alone."""
    out: Path
    sources: Sources = field(default_factory=lambda: Sources(most_held=HELD_SHARE * free_bytes()))
    about: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """What the index says of each besides."""

    def run(self) -> int | None:
        from apportion.training.given import check_enough

        for train in self.runs.values():
            train.check()
        sources = {name: self.sources.of(train) for name, train in self.runs.items()}
        for name, source in sources.items():
            check_enough(source, self.runs[name].batch_tokens)  # type: ignore[attr-defined]
        passes = self._passes(sources)
        self._say_cost(passes, sources)
        done: dict[str, dict[str, Any]] = {}
        self._write(done)
        for names in passes:
            done |= self._train({name: sources[name] for name in names})
            self._write(done)
        self._show(done)
        if any("error" in each for each in done.values()):
            return NOT_DONE
        return DIVERGED if any(each.get("diverged") for each in done.values()) else None

    def _passes(self, sources: Mapping[str, Any]) -> list[list[str]]:
        """Runs that go on together: on one stream, or on one model's passes; as many as fit into memory."""
        together: dict[str, list[str]] = {}
        for name, train in self.runs.items():
            together.setdefault(goes_with(train), []).append(name)
        return [part for names in together.values() for part in self._that_fit(names, sources)]

    def _that_fit(self, names: list[str], sources: Mapping[str, Any]) -> list[list[str]]:
        free, parts = free_bytes() * MEMORY_SHARE, [list[str]()]
        for name in names:
            if parts[-1] and self._bytes_of([*parts[-1], name], sources) > free:
                parts.append([])
            parts[-1].append(name)
        return parts

    def _bytes_of(self, names: Iterable[str], sources: Mapping[str, Any]) -> float:
        """Memory that the runs of a pass need, about."""
        rows = {id(sources[name]): getattr(sources[name], "bytes_held", 0) for name in names}
        parameters = sum(_parameters(self.runs[name], sources[name]) for name in names)
        return BYTES_PER_PARAMETER * parameters + BLOCKS_HELD * sum(rows.values())

    def _say_cost(self, passes: list[list[str]], sources: Mapping[str, Any]) -> None:
        for names in passes:
            gigabytes = self._bytes_of(names, sources) / 1e9
            what = "one pass" if len(passes) == 1 else f"one of {len(passes)} passes"
            place = goes_with(self.runs[names[0]])
            minutes = self._seconds_of(names, sources) / 60
            log.info(
                "%d runs in %s over %s: about %.2f GB, and very roughly %s",
                len(names), what, place, gigabytes, f"{minutes:.0f} minutes" if minutes >= 1 else "a minute",
            )  # fmt: skip

    def _seconds_of(self, names: list[str], sources: Mapping[str, Any]) -> float:
        """What a pass takes, about: of the products that the SAEs make, and of the model's passes, a few are timed."""
        runs = [(self.runs[name], sources[name]) for name in names]
        operations = sum((train.tokens_of(source) or 0) * _parameters(train, source) for train, source in runs)
        seconds = STEP_PRODUCTS * operations * _seconds_per_operation()
        if (passing := getattr(sources[names[0]], "passing", None)) is not None:
            per_token, tokens = passing()
            seconds += per_token * tokens
        return seconds

    def _train(self, sources: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        from apportion.training.together import fit_together

        trainers, found = {}, dict[str, dict[str, Any]]()
        for name, source in sources.items():
            try:
                trainers[name] = self.runs[name].trainer(source)
            except ValueError as error:
                found[name] = {"error": str(error)}
        first = next(iter(self.runs.values()))
        failed = fit_together(trainers, sources, self.out, resume=first.requeue, track=first.track or ())
        for name, trainer in trainers.items():
            found[name] = {"error": str(failed[name])} if name in failed else _figures(trainer, sources[name])
        return {name: {"sae": self.runs[name].sae, **self.about.get(name, {}), **found[name]} for name in sources}

    def _write(self, done: Mapping[str, Any]) -> None:
        from apportion.disk import read_record, write_json
        from apportion.training.together import INDEX

        self.out.mkdir(parents=True, exist_ok=True)
        index = self.out / INDEX
        before = read_record(index, runs=dict)["runs"] if index.is_file() else {}
        write_json(index, {"runs": before | {name: done.get(name, {"unfinished": True}) for name in self.runs}})

    def _show(self, done: Mapping[str, Any]) -> None:
        from apportion.evals.table import print_table

        if good := {name: figures for name, figures in done.items() if "error" not in figures}:
            print_table(good)
        for name, figures in done.items():
            if "error" in figures:
                say(f"  {name} failed: {figures['error']}")
        if good:
            say(f"  next: apportion report {' '.join(str(self.out / name) for name in list(good)[:3])} --out report/")


def _parameters(train: TrainBase, source: Any) -> int:
    """How many parameters an SAE has, about."""
    from apportion.rows.opening import settings_of

    settings = settings_of(source)
    return (settings["d_in"] + settings.get("d_out", settings["d_in"])) * settings.get("num_sites", 1) * train.d_sae


@cache
def _seconds_per_operation() -> float:
    """Of a product, for each row and parameter of its factor, as torch makes it here."""
    import torch

    x, weights = torch.zeros(512, 512), torch.zeros(512, 2048)
    times = []
    for _ in range(5):
        started = perf_counter()
        torch.mm(x, weights)
        times.append(perf_counter() - started)
    return median(times) / (len(x) * weights.numel())


def _figures(trainer: Any, source: Any) -> dict[str, Any]:
    """Of a finished run: on rows of its store that it has not seen, else what calibration says."""
    from apportion.evals import evaluate_rows
    from apportion.evals.rows import unseen_rows
    from apportion.rows.arrays import ArrayStore

    sae, store = trainer.sae, getattr(source, "store", None)
    said = {"trained_tokens": trainer.tokens, "seconds": round(trainer.seconds, 1)}
    if trainer.verdict is not None:
        said |= {"verdict": trainer.verdict.text, "diverged": trainer.verdict.diverged}
    if store is None and (unseen := source.unseen(EVALUATED)) is not None:
        store, rows, what = ArrayStore(unseen.x, target=unseen.target), None, "held-out rows of its text"
    elif store is None or sae.row_kind == "layers":
        return {"l0": sae.info["calibration"]["l0"], **said}
    else:
        rows, what = unseen_rows(store, sae, str(store.folder))
        rows = rows[:EVALUATED]
    return evaluate_rows({sae.name: sae}, store, rows, progress=False)[sae.name].result() | {"rows": what, **said}


def sweep_command(argv: list[str]) -> type:
    """What --help shows: the options of train, of the first SAE that is named."""
    name, allocation, objective = chosen_sae([word.split(",")[0] for word in argv])
    command = train_command(name, allocation, objective)
    return type("Sweep", (command,), {"__doc__": Sweep.__doc__})


def sweep_of(argv: list[str], parse: Callable[[list[str]], Any]) -> Sweep:
    """The sweep that these words, behind "sweep", ask for; `parse` reads those of a train command."""
    found = variants(argv)
    runs = {name: parse(["train", *words]) for name, words in found.items()}
    out, again = folder_of(next(iter(runs.values())))
    return Sweep({name: dataclasses.replace(run, out=out / name, **again) for name, run in runs.items()}, out)


def folder_of(first: TrainBase) -> tuple[Path, dict[str, bool]]:
    """Where the runs go, of which this is one, and whether each goes on with what is there. ValueError if there is a
    sweep already, or none to go on with."""
    from apportion.training.together import INDEX

    out, again = first.out, first.resume or first.requeue
    if first.resume and not (out / INDEX).is_file():
        raise ValueError(f"There is no sweep to resume in {out}. Leave --resume out, or check the folder.")
    if not again and (out / INDEX).is_file():
        raise ValueError(f"{out} already holds a sweep. Resume it (--resume) or choose another folder.")
    return out, {"requeue": again, "resume": False}

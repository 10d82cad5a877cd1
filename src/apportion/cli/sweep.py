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
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from apportion.answers import DIVERGED, NOT_DONE
from apportion.cli.arguments import say
from apportion.cli.train import TrainBase, chosen_sae, train_command

NOT_SPLIT = {"out", "hookpoint", "target_hookpoint", "text", "dataset", "track", "resume", "requeue"}
"""Options whose values may have commas, or that are of the sweep as a whole."""
INDEX = "sweep.json"
MEMORY_SHARE = 0.8
"""Of the memory that is free, what the runs of one pass may need."""
BYTES_PER_PARAMETER = 18
"""Weights, gradients, Adam's averages, and what a step makes besides."""

log = logging.getLogger("apportion")


def variants(argv: list[str]) -> dict[str, list[str]]:
    """For each run its name, and the words of the train command that make it."""
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
    if not choices:
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

    def run(self) -> int | None:
        from apportion.training.given import check_enough

        for train in self.runs.values():
            train.check()
        passes = self._passes()
        sources = {stream: self.runs[names[0]].make_source() for stream, names in passes}
        for stream, names in passes:
            for name in names:
                check_enough(sources[stream], self.runs[name].batch_tokens)  # type: ignore[attr-defined]
            self._say_pass(stream, names, len(passes))
        done: dict[str, dict[str, Any]] = {}
        self._write(done)
        for stream, names in passes:
            done |= self._train(sources[stream], names)
            self._write(done)
        self._table(done)
        if any("error" in each for each in done.values()):
            return NOT_DONE
        return DIVERGED if any(each.get("diverged") for each in done.values()) else None

    def _passes(self) -> list[tuple[str, list[str]]]:
        """Runs that take the same batches, and fit into memory together."""
        streams: dict[str, list[str]] = {}
        for name, train in self.runs.items():
            streams.setdefault(_stream_of(train), []).append(name)
        return [(stream, part) for stream, names in streams.items() for part in self._that_fit(names)]

    def _that_fit(self, names: list[str]) -> list[list[str]]:
        free, parts, used = free_bytes() * MEMORY_SHARE, [list[str]()], 0.0
        for name in names:
            needed = BYTES_PER_PARAMETER * _parameters(self.runs[name])
            if parts[-1] and used + needed > free:
                parts, used = [*parts, []], 0.0
            parts[-1].append(name)
            used += needed
        return parts

    def _say_pass(self, stream: str, names: list[str], passes: int) -> None:
        gigabytes = sum(BYTES_PER_PARAMETER * _parameters(self.runs[name]) for name in names) / 1e9
        what = "one pass" if passes == 1 else f"one of {passes} passes"
        log.info("%d runs in %s over %s, about %.2f GB", len(names), what, stream, gigabytes)

    def _train(self, source: Any, names: list[str]) -> dict[str, dict[str, Any]]:
        from apportion.training.together import fit_together

        trainers, found = {}, dict[str, dict[str, Any]]()
        for name in names:
            try:
                trainers[name] = self.runs[name].trainer(source)
            except ValueError as error:
                found[name] = {"error": str(error)}
        first = self.runs[names[0]]
        failed = fit_together(trainers, source, self.out, resume=first.requeue, track=first.track or ())
        for name, trainer in trainers.items():
            found[name] = {"error": str(failed[name])} if name in failed else _figures(trainer, source)
        return {name: {"sae": self.runs[name].sae, **found[name]} for name in names}

    def _write(self, done: Mapping[str, Any]) -> None:
        from apportion.disk import read_record, write_json

        self.out.mkdir(parents=True, exist_ok=True)
        index = self.out / INDEX
        before = read_record(index, runs=dict)["runs"] if index.is_file() else {}
        write_json(index, {"runs": before | {name: done.get(name, {"unfinished": True}) for name in self.runs}})

    def _table(self, done: Mapping[str, Any]) -> None:
        from apportion.evals.table import print_table

        if good := {name: figures for name, figures in done.items() if "error" not in figures}:
            print_table(good)
        for name, figures in done.items():
            if "error" in figures:
                say(f"  {name} failed: {figures['error']}")
        if good:
            say(f"  next: apportion report {' '.join(str(self.out / name) for name in list(good)[:3])} --out report/")


def _stream_of(train: TrainBase) -> str:
    """Runs for which this is equal take the same batches."""
    own = ("source", "hookpoint", "target_hookpoint", "held_out_share", "order_seed", "batch_tokens", "tokens")
    own += ("context_tokens", "corpus", "filter", "loading", "training_objective")
    usual = {f.name: f.default_factory() for f in dataclasses.fields(train) if callable(f.default_factory)}
    said = {name: getattr(train, name, None) for name in own}
    said = {name: None if value == usual.get(name) else value for name, value in said.items()}
    from apportion.architectures import SAES

    kind = SAES[train.sae].architecture.row_kind
    return f"{said['source']} (" + ", ".join(f"{k} {v}" for k, v in [*said.items()][1:] if v is not None) + f", {kind})"


def _parameters(train: TrainBase) -> int:
    """About how many parameters an SAE has whose rows are not opened yet."""
    from apportion.rows.manifest import about_cache
    from apportion.rows.opening import holds_array, open_array

    d_in = open_array(train.source).d_in if holds_array(train.source) else 4096
    if Path(train.source).is_dir():
        with suppress(ValueError):
            d_in = max(site.d_in or 0 for site in about_cache(train.source).sites)
    return 2 * d_in * train.d_sae


def _figures(trainer: Any, source: Any) -> dict[str, Any]:
    """Of a finished run: on rows of its store that it has not seen, else what calibration says."""
    from apportion.evals import evaluate_rows
    from apportion.evals.rows import unseen_rows

    sae, store = trainer.sae, getattr(source, "store", None)
    said = {"trained_tokens": trainer.tokens, "seconds": round(trainer.seconds, 1)}
    if trainer.verdict is not None:
        said |= {"verdict": trainer.verdict.text, "diverged": trainer.verdict.diverged}
    if store is None or sae.row_kind == "layers":
        return {"l0": sae.info["calibration"]["l0"], **said}
    rows, what = unseen_rows(store, sae, str(store.folder))
    return evaluate_rows({sae.name: sae}, store, rows[:100_000])[sae.name].result() | {"rows": what, **said}


def free_bytes() -> float:
    """Of this machine's memory what is free; infinite where nobody says so."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return float("inf")
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), float("inf"))


def sweep_command(argv: list[str]) -> type:
    """What --help shows: the options of train, of the first SAE that is named."""
    name, allocation, objective = chosen_sae([word.split(",")[0] for word in argv])
    command = train_command(name, allocation, objective)
    return type("Sweep", (command,), {"__doc__": Sweep.__doc__})


def sweep_of(argv: list[str], parse: Callable[[list[str]], Any]) -> Sweep:
    """The sweep that these words, behind "sweep", ask for; `parse` reads those of a train command."""
    found = variants(argv)
    runs = {name: parse(["train", *words]) for name, words in found.items()}
    out, again = (first := next(iter(runs.values()))).out, {"requeue": first.resume or first.requeue, "resume": False}
    if first.resume and not (out / INDEX).is_file():
        raise ValueError(f"There is no sweep to resume in {out}. Leave --resume out, or check the folder.")
    if not again["requeue"] and (out / INDEX).is_file():
        raise ValueError(f"{out} already holds a sweep. Resume it (--resume) or choose another folder.")
    return Sweep({name: dataclasses.replace(run, out=out / name, **again) for name, run in runs.items()}, out)

"""How long a training step takes, in units of the encoder's product: ours and other libraries, in one run.

    python -m benchmarks.train_step --json result.json
    python -m benchmarks.train_step --cases main,aux --peers none --threads 1

Results go to stdout, progress to stderr. See benchmarks/README.md for what is measured and what is not fair about it.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from math import inf
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import data
from benchmarks.cases import CASES, PEERS, Case, Plan, Shape, Subject, Task
from benchmarks.runner import Report, run_case
from benchmarks.tables import print_case

SAY_EVERY_S = 30
"""Seconds between lines of progress where there is no terminal."""


@dataclass(kw_only=True)
class Options:
    """Time training steps of ours and other libraries in units of the encoder's product."""

    cases: str = ",".join(CASES)
    """Which cases, separated by commas."""
    peers: str = ",".join(PEERS)
    """Which other libraries, separated by commas; none: only ours."""
    python: tuple[str, ...] = ()
    """NAME=PATH: the Python that has a library (or `peers`: all of them); default: the one that runs this."""
    d_in: int = 768
    """Width of the activations (with --acts: theirs)."""
    d_sae: int = 16384
    """Number of latents."""
    k: int = 32
    """Active latents per token."""
    batch: int = 4096
    """Tokens per step."""
    steps: int = 11
    """Timed steps of each subject."""
    warmup: int = 3
    """Steps before the timed ones."""
    learning_steps: int = 1000
    """Steps in the case `learning`."""
    d_saes: tuple[int, ...] = Plan.d_saes
    """Values of d_sae in the case `d_sae`."""
    batches: tuple[int, ...] = Plan.batches
    """Values of batch in the case `batch`."""
    ks: tuple[int, ...] = Plan.ks
    """Values of k in the case `k`."""
    acts: Path | None = None
    """A cache of activations to train on; default: synthetic ones."""
    hookpoint: str | None = None
    """Which hookpoint of the cache, if it has several."""
    rows: int = 65_536
    """Rows of activations to train on, over and over; at least four of the largest batches are taken."""
    threads: int | None = None
    """Threads of torch; default: as torch finds it."""
    device: str = "cpu"
    """cpu or cuda."""
    seed: int = 0
    """Seed of the activations and of the weights."""
    json: Path | None = None
    """Write the results to this file."""

    def plan(self) -> Plan:
        peers = () if self.peers == "none" else _chosen(self.peers, PEERS, "--peers")
        shape = Shape(self.d_in, self.d_sae, self.k, self.batch)
        own = (self.steps, self.warmup, self.learning_steps, self.d_saes, self.batches, self.ks)
        return Plan(shape, peers, *own)

    def pythons(self) -> dict[str, str]:
        pairs = [entry.partition("=") for entry in self.python]
        for name, equals, path in pairs:
            if name not in (*PEERS, "peers") or not equals:
                raise ValueError(f"--python takes NAME=PATH with NAME one of peers, {', '.join(PEERS)}; got {name!r}.")
            if not Path(path).is_file():
                raise ValueError(f"--python {name}={path}: there is no such file.")
        return {name: path for name, _, path in pairs}


def _chosen(words: str, known: dict[str, Any], option: str) -> tuple[str, ...]:
    chosen = tuple(words.split(","))
    for word in chosen:
        if word not in known:
            raise ValueError(f"{option} takes some of {', '.join(known)}, separated by commas; got {word!r}.")
    return chosen


def run(options: Options) -> None:
    plan, pythons, names = options.plan(), options.pythons(), _chosen(options.cases, CASES, "--cases")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {options.device} cannot be used here. Use cpu.")
    if options.json is not None and not options.json.resolve().parent.is_dir():
        raise ValueError(f"--json {options.json} does not lie in an existing folder.")
    record: dict[str, Any] = about_this_run(options) | {"results": []}
    with TemporaryDirectory(prefix="apportion-benchmark-") as folder:
        rows_file = Path(folder) / "rows"
        plan = make_rows(options, plan, rows_file)
        cases = [case for name in names for case in CASES[name](plan)]

        def make_task(subject: Subject, case: Case) -> Task:
            settings = (str(rows_file), case.total_steps, options.threads, options.device, options.seed)
            return Task(subject, case.shape, *settings)

        def python_of(library: str) -> str:
            return pythons.get(library) or (pythons.get("peers") if library in PEERS else None) or sys.executable

        for case in cases:
            with progress(case) as report:
                record["results"].append(run_case(case, make_task, python_of, report))
            print_case(record["results"][-1])
            record["load_average_after"] = os.getloadavg()
            if options.json is not None:
                options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def make_rows(options: Options, plan: Plan, file: Path) -> Plan:
    """Write the activations; the plan comes back with their width."""
    largest = max(plan.shape.batch, *plan.batches) if "batch" in options.cases.split(",") else plan.shape.batch
    rows = max(options.rows, 4 * largest) + largest
    if options.acts is None:
        x = data.synthetic(rows, options.d_in, options.seed)
    else:
        x = data.from_cache(options.acts, options.hookpoint, rows, options.seed)
    data.write_rows(x, file)
    return replace(plan, shape=replace(plan.shape, d_in=x.shape[1]))


def about_this_run(options: Options) -> dict[str, Any]:
    return {
        "benchmark": "train_step",
        "command": shlex.join(["python", "-m", "benchmarks.train_step", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": hardware(options.device),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": platform.platform(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "apportion": version("apportion"),
        },
        "load_average_before": os.getloadavg(),
    }


def hardware(device: str) -> str:
    """The GPU's name, or the CPU's with what matters for products of few bits."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    text = info.read_text()
    name = next((line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name")), "CPU")
    flags = [
        flag for flag in ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_bf16") if f" {flag}" in text
    ]
    return f"{name} ({', '.join(flags)})" if flags else name


@contextmanager
def progress(case: Case) -> Iterator[Report]:
    """Yields report(text): a bar on a terminal, elsewhere a line now and then."""
    console = Console(stderr=True)
    shape = case.shape
    title = f"{case.name}: d_in {shape.d_in}, d_sae {shape.d_sae}, k {shape.k}, batch {shape.batch}"
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(title, total=case.warmup + case.steps)
        said = -inf

        def report(text: str, advance: int = 0) -> None:
            nonlocal said
            bar.update(task, description=f"{title}  {text}", advance=advance)
            if not console.is_terminal and perf_counter() - said > SAY_EVERY_S:
                said = perf_counter()
                console.print(f"{title}: {text}", highlight=False, soft_wrap=True)

        yield report


def main(argv: list[str] | None = None) -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # being told to end is like Ctrl-C: clean up
    try:
        run(tyro.cli(Options, args=argv, prog="python -m benchmarks.train_step"))
    except (ValueError, OSError) as error:
        sys.stderr.write(f"benchmarks: {' '.join(str(error).split())}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("benchmarks: interrupted; the workers have ended, finished cases are kept.\n")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

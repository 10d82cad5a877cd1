"""What it costs that nothing is lost: fsync, locks and checksums, as a share of a training run.

    python -m benchmarks.durability [--seconds 60] [--d-sae 16384] [--out FOLDER] [--json FILE]

One run of about a minute (Mutual Choice, d_in 768, k 32, batches of 4096 synthetic rows) with the default settings. The
seconds inside fsync, inside taking, checking and giving back the lock, and inside checksums are added up; all that is
spent on the checkpoint, mostly without them, is given as well. Everything is measured in one run, so that
it suffers alike from what else the machine does. --out is on the disk to be measured.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import apportion as ap
from apportion import durable, locks
from apportion.rows import ArraySource
from apportion.training import checkpoint, run
from benchmarks.train_step import hardware

SPENT: dict[str, float] = defaultdict(float)
D_IN, BATCH = 768, 4096


def timed(owner: Any, name: str, what: str) -> None:
    function: Callable[..., Any] = getattr(owner, name)

    def wrapped(*args: Any, **settings: Any) -> Any:
        began = time.perf_counter()
        try:
            return function(*args, **settings)
        finally:
            SPENT[what] += time.perf_counter() - began

    setattr(owner, name, wrapped)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--d-sae", type=int, default=16_384)
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    timed(durable, "_sync", "fsync")
    for name in ("__enter__", "__exit__", "check"):
        timed(locks.Lock, name, "locks")
    for name in ("_checksum", "_own_checksum"):
        timed(checkpoint, name, "checksums")
    timed(run.RunFolder, "save_checkpoint", "checkpoint, all in all")
    timed(run.RunFolder, "finish", "finish, all in all")

    rows = torch.randn(10 * BATCH, D_IN)
    step = seconds_per_step(rows, options.d_sae)
    steps = max(4, round(options.seconds / step))
    with tempfile.TemporaryDirectory(dir=options.out) as folder:
        trainer = new(options.d_sae, steps)
        began = time.perf_counter()
        trainer.fit(ArraySource(rows), Path(folder) / "run", progress=False)
        seconds = time.perf_counter() - began
    ours = sum(SPENT[what] for what in ("fsync", "locks", "checksums"))
    result = {
        "hardware": hardware("cpu"), "d_in": D_IN, "d_sae": options.d_sae, "batch": BATCH, "steps": steps,
        "seconds": seconds, "spent": dict(SPENT), "share": ours / seconds,
    }  # fmt: skip
    for what, spent in SPENT.items():
        print(f"{what:>26} {spent * 1000:8.1f} ms {spent / seconds:8.3%}")
    print(f"fsync, locks and checksums together: {ours / seconds:.3%} of {seconds:.1f} s")
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def new(d_sae: int, steps: int) -> ap.Trainer:
    sae = ap.create("mutual_choice", d_in=D_IN, d_sae=d_sae, k=32, seed=0)
    return ap.Trainer(sae, ap.TrainConfig(batch_tokens=BATCH, total_tokens=steps * BATCH))


def seconds_per_step(rows: torch.Tensor, d_sae: int) -> float:
    """After the first ones, which choose how to compute."""
    trainer = new(d_sae, 100)
    for batch in rows.split(BATCH)[:3]:
        trainer.step(batch)
    began = time.perf_counter()
    for batch in rows.split(BATCH)[:3]:
        trainer.step(batch)
    return (time.perf_counter() - began) / 3


if __name__ == "__main__":
    sys.exit(main())

"""A run that takes a tenth of a second and makes a checkpoint every three steps."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import apportion as ap
from apportion.language.collect import collect
from apportion.rows import ArraySource, writer

D_IN, BATCH, STEPS, EVERY = 8, 32, 14, 3


def rows() -> torch.Tensor:
    return torch.randn(400, D_IN, generator=torch.Generator().manual_seed(5)) * 2 + 1


class Watched(ArraySource):
    """Calls `act` with the number of each batch before it is handed out, counted from 1 in this process, and `held_out`
    before rows for calibration are, once all batches were."""

    def __init__(self, act: Callable[[int], Any] = lambda number: None, held_out: Callable[[], Any] = lambda: None):
        super().__init__(rows())
        self.act, self.at_held_out, self.handed_out = act, held_out, 0

    def batches(self, batch_tokens: int) -> Any:
        for number, batch in enumerate(super().batches(batch_tokens), 1):
            self.act(number)
            self.handed_out = number
            yield batch

    def held_out(self, *args: Any, **settings: Any) -> Any:
        if self.handed_out == STEPS:
            self.at_held_out()
        return super().held_out(*args, **settings)


def trainer(**settings: Any) -> ap.Trainer:
    sae = ap.create("mutual_choice", d_in=D_IN, d_sae=32, k=3, seed=1)
    defaults = {"lr": 1e-2, "batch_tokens": BATCH, "total_tokens": STEPS * BATCH, "log_every_steps": 1}
    return ap.Trainer(sae, ap.TrainConfig(**defaults | {"checkpoint_every_tokens": EVERY * BATCH} | settings))


def train(out: Path, source: ArraySource | None = None, **settings: Any) -> ap.SAE:
    """Begin, go on, or leave it."""
    return trainer(**settings).fit(source or Watched(), out, resume=True, progress=False)


def contents(folder: Path) -> dict[str, Any]:
    """What a finished run holds, but for times."""
    found: dict[str, Any] = {}
    for file in sorted(folder.rglob("*")):
        name = str(file.relative_to(folder))
        if file.name == "metrics.jsonl":
            found[name] = [{**json.loads(line), "seconds": 0} for line in file.read_text().splitlines()]
        elif file.name == "finished.json":
            found[name] = {**json.loads(file.read_text()), "seconds": 0}
        elif file.is_file():
            found[name] = file.read_bytes()
        else:
            found[name] = None
    return found


def newest_step(folder: Path) -> int:
    """The step of the newest checkpoint; 0 if there is none."""
    return max((int(p.name.split("-")[1]) for p in folder.glob("checkpoint-*") if p.name[11:].isdigit()), default=0)


TIMES = ("seconds", "tokens_per_s", "manifest_sha256")
"""What a manifest says of when it was written, and its digest."""


def cache(root: Path) -> dict[str, Any]:
    """All bytes of the cache in `root`, but for the times in its manifest."""
    found = contents(root / "acts")
    found["manifest.json"] = json.loads(found["manifest.json"]) | dict.fromkeys(TIMES)
    return found


@contextmanager
def allowed(words: str) -> Iterator[None]:
    """Where all was done before, the command says so."""
    try:
        yield
    except ValueError as error:
        if words not in str(error):
            raise


def collect_small(root: Path, lm: tuple[Any, Any]) -> None:
    text = ["the cat sat on the mat and looked at the dog"] * 20
    writer.SHARD_ROWS = 37  # shards of two contexts
    with allowed("exists already"):
        collect(
            *lm, ["model.layers.0", "model.layers.1"], text, tokens=128, out=root / "acts", context_tokens=16,
            batch_contexts=2,
        )  # fmt: skip

"""A run of twenty steps with a checkpoint every five, which takes a moment."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import apportion as ap
from apportion.rows import ArraySource

D_IN, BATCH, STEPS, EVERY = 6, 16, 20, 5


class Crash(Exception):
    pass


def crash() -> None:
    raise Crash


class Source(ArraySource):
    """Calls `act` before batch number `at` of this process is handed out."""

    def __init__(self, at: int = 0, act: Callable[[], Any] = crash) -> None:
        super().__init__(torch.randn(400, D_IN, generator=torch.Generator().manual_seed(3)))
        self.at, self.act = at, act

    def batches(self, batch_tokens: int) -> Any:
        for number, batch in enumerate(super().batches(batch_tokens), 1):
            if number == self.at:
                self.act()
            yield batch


def trainer(num_saes: int = 1, **settings: Any) -> ap.Trainer:
    saes = [ap.create("topk", d_in=D_IN, d_sae=24, k=2, seed=seed) for seed in range(num_saes)]
    usual = {"lr": 1e-2, "batch_tokens": BATCH, "total_tokens": STEPS * BATCH, "log_every_steps": 1}
    return ap.Trainer(saes, ap.TrainConfig(**usual | {"checkpoint_every_tokens": EVERY * BATCH} | settings))


def log(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """metrics.jsonl as curves."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {name: [(line["step"], line[name]) for line in lines] for name in lines[0] if name != "step"}

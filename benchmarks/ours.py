"""Our subjects: a training step of each method, and encoding in eval mode."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

import apportion as ap
from apportion.allocation import Selection
from apportion.training.objective import as_objective
from benchmarks.cases import SWITCH
from benchmarks.gate import Gate

STEPS_BEFORE_ENCODING = 10
CALIBRATION_ROWS = 16_384


def run(gate: Gate) -> None:
    encode(gate) if gate.task.subject.mode == "encode" else train(gate)


def train(gate: Gate) -> None:
    trainer = new_trainer(gate)
    dead_window, silent = trainer.config.dead_window, gate.silent()
    if gate.task.subject.aux in ("aux_k", "aux_zipf"):
        gate.before_step = lambda: trainer.learners[0].activity.silent_tokens.index_fill_(0, silent, dead_window)
    gate.reconstruct = trainer.sae
    gate.answers["missed"] = lambda: missed_matches(trainer, gate.batch(0))
    for x in gate:
        trainer.step(x)


def encode(gate: Gate) -> None:
    """Latents of raw activations in eval mode, after a few steps of training and with calibrated thresholds."""
    trainer = new_trainer(gate)
    for number in range(STEPS_BEFORE_ENCODING):
        trainer.step(gate.batch(number))
    sae, trainer_screen = trainer.sae, trainer.config.screen
    del trainer
    sae.calibrate(gate.rows[: min(CALIBRATION_ROWS, len(gate.rows) - len(gate.held_out))].to(gate.device))
    gate.reconstruct = sae.eval()
    sae.screen = trainer_screen
    with torch.no_grad():
        for x in gate:
            sae.encode(x)


def new_trainer(gate: Gate) -> ap.Trainer:
    task = gate.task
    screen = None if task.subject.precision == "float32" else task.subject.precision
    method, d_sae = task.subject.method, task.shape.d_sae
    settings: dict[str, Any] = {"d_in": task.shape.d_in, "d_sae": d_sae, "k": task.shape.k}
    if method in SWITCH:
        num_experts, widths = SWITCH[method]
        method = "switch"
        settings |= {"num_experts": num_experts, "d_sae": widths * d_sae}
    if task.subject.aux != "default":
        settings |= {"aux": task.subject.aux, "k_aux": task.k_aux, "aux_c": 0.0}
    total_tokens = None if task.total_steps is None else task.total_steps * task.shape.batch
    gate.begin()
    sae = ap.create(method, **settings, seed=task.seed).to(gate.device)
    config = ap.TrainConfig(batch_tokens=task.shape.batch, total_tokens=total_tokens, screen=screen)
    gate.describe(sae, version=version("apportion"), lr=config.lr, optimiser="Adam")
    return ap.Trainer(sae, config)


def missed_matches(trainer: ap.Trainer, x: Tensor) -> dict[str, int]:
    """How many of the matches that belong to a batch one more training step leaves out. A screen may; nothing else."""
    sae, counts = trainer.sae, {}

    def watched(saes: Any, batch: Any, context: Any) -> dict[str, Tensor]:
        terms = ap.training.local_reconstruction(saes, batch, context)
        ((found, _),) = context.seen
        wanted = encode_without_screen(sae, sae.input.apply_to(batch.x))
        places = [latents.rows() * latents.d_sae + latents.indices for latents in (wanted, found)]
        counts.update(matches=wanted.nnz, missed=int((~torch.isin(*places)).sum()))
        return terms

    objective, trainer.objective = trainer.objective, as_objective(watched)
    try:
        trainer.step(x)
    finally:
        trainer.objective = objective
    return counts


@torch.no_grad()
def encode_without_screen(sae: ap.SAE, x: Tensor) -> Any:
    """The latents of prepared rows, selected in full precision."""
    return sae.encode_scaled(x, Selection(sae.allocation.in_force()))

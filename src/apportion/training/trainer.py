"""The training loop: next batch, losses, step, log, save. Read it top to bottom.

One step:   schedules -> objective -> backward -> clipped Adam step -> count who fired
One run:    input scale -> steps -> thresholds calibrated on held-out rows -> saved SAE

`Trainer.step` works on its own in somebody else's loop; `Trainer.fit` adds a source of batches, a run folder, a
progress bar, checkpoints and calibration.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from apportion.activations.batch import ArraySource, Batch, Source
from apportion.activations.progress import progress_bar
from apportion.allocation import WarmStart
from apportion.architectures import SAE
from apportion.training.activity import Activity
from apportion.training.adam import Adam
from apportion.training.clipping import RelativeClipping
from apportion.training.config import TrainConfig
from apportion.training.interrupt import finish_step_on_interrupt
from apportion.training.objectives import Objective, TrainingContext, local_reconstruction
from apportion.training.run import MAY_DIFFER, RunFolder

logger = logging.getLogger(__name__)

FIT_INPUT_ROWS = 32_768
"""Rows from which mean and scale of the input are estimated."""
CALIBRATION_ROWS = 1_000_000
"""Held-out rows on which thresholds are calibrated, at most."""
CHECK_FINITE_STEPS = 100
"""Steps between checks that the loss is finite."""


class Trainer:
    """Trains one SAE. Raises ValueError at once for settings that cannot work together."""

    def __init__(
        self, sae: SAE, config: TrainConfig | None = None, objective: Objective = local_reconstruction
    ) -> None:
        self.config = config or TrainConfig()
        self.sae = sae.to(getattr(torch, self.config.dtype))
        self.objective = objective
        sae.allocation.check_batch(self.config.batch_tokens)
        if self.config.total_tokens is None and sae.allocation.needs_end:
            raise ValueError("switch_at is a share of the run, so it needs total_tokens; set it, or use switch_at = 0.")
        device = sae.mean.device
        self.activity = Activity(sae.d_sae, self.config.dead_window, self.config.density_window).to(device)
        self.clipping = RelativeClipping(self.config.clip_ratio).to(device)
        self.warm = WarmStart()
        self.optimizer = Adam(
            sae.parameters(), unit_rows=sae.unit_rows(), beta1=self.config.beta1, beta2=self.config.beta2
        )
        self.steps = 0
        self.tokens = 0
        self.seconds = 0.0
        self._input_ready = not sae.input.needs_fit

    def step(self, batch: Batch | Float[Tensor, "*lead d_in"]) -> dict[str, Tensor]:
        """One optimiser step on the whole batch; a plain tensor counts as already filtered.

        Returns 0-d tensors: loss, each weighted term, fvu_batch, l0, dead (share), grad_norm, lr.
        """
        batch = self._accept(batch)
        sae = self.sae.train()
        context = self._context(len(batch.x))
        sae.allocation.begin_step(context)
        sae.allocation.forget_threshold()
        sae.info |= sae.allocation.findings()

        with self._screen_in_force():
            terms = self.objective([sae], batch, context)
        loss = torch.stack(list(terms.values())).sum()
        loss.backward()
        grad_norm = self.optimizer.gradient_norm()
        lr = self.config.lr_at(self.tokens)
        self.optimizer.step(lr, self.clipping.scale(grad_norm))

        ((latents, fvu),) = context.seen
        self.activity.update(latents.counts(), len(batch.x))
        self.steps += 1
        self.tokens += len(batch.x)
        metrics = {
            "loss": loss.detach(),
            **{name: term.detach() for name, term in terms.items()},
            "fvu_batch": fvu,
            "l0": torch.tensor(latents.nnz / len(batch.x)),
            "dead": self.activity.dead().double().mean(),
            "grad_norm": grad_norm,
            "lr": torch.tensor(lr),
        }
        if self.steps % CHECK_FINITE_STEPS == 1:
            self._check_finite(metrics)
        return metrics

    @contextmanager
    def _screen_in_force(self) -> Iterator[None]:
        """The configured screen, for this step only: calibration and evaluation are not screened unless asked for."""
        before, self.sae.screen = self.sae.screen, self.config.screen
        try:
            yield
        finally:
            self.sae.screen = before

    def _check_finite(self, metrics: dict[str, Tensor]) -> None:
        for name in ("loss", "grad_norm"):
            if not math.isfinite(value := metrics[name].item()):
                raise ValueError(
                    f"{name} is {value} at step {self.steps}: the activations hold NaN or infinity, "
                    f"or lr = {self.config.lr:g} is too high."
                )

    def _accept(self, batch: Batch | Tensor) -> Batch:
        if isinstance(batch, Tensor):
            batch = Batch(batch.reshape(-1, batch.shape[-1]))
        if batch.mask is not None:
            batch = batch.rows()
        if batch.x.ndim != 2 or batch.x.shape[-1] != self.sae.d_in:
            raise ValueError(f"This SAE trains on rows [n, d_in = {self.sae.d_in}], got {list(batch.x.shape)}.")
        if not len(batch.x):
            raise ValueError("A training step needs at least one row; all rows of this batch are masked out.")
        if not self._input_ready:
            self.sae.fit_input(batch.x)
            self._input_ready = True
        return batch

    def _context(self, batch_tokens: int) -> TrainingContext:
        return TrainingContext(
            progress=self.config.progress_at(self.tokens),
            batch_tokens=batch_tokens,
            dead=self.activity.dead(),
            density=self.activity.density(),
            warm=self.warm,
        )

    def fit(
        self, source: Source | Tensor, out: str | Path | None = None, *, resume: bool = False, progress: bool = True
    ) -> SAE:
        """Train on `total_tokens` rows of `source`, calibrate on its held-out rows, return the SAE in eval mode.

        A tensor [rows, d_in] counts as filtered; a tenth of it is held out and `seed` orders the rest.
        `out` is the run folder: run.json (the whole configuration), metrics.jsonl, checkpoints, and at the end the SAE.
        Ctrl-C finishes the step, saves a checkpoint and raises KeyboardInterrupt; `resume` goes on from there, with the
        same result as an uninterrupted run.
        """
        if isinstance(source, Tensor):
            source = ArraySource(source, seed=self.config.seed)
        total_steps = self._check_run(source)
        if self.steps >= total_steps:
            raise ValueError(f"This trainer has already done its {total_steps} steps. Make a new one to train further.")
        run = None if out is None else RunFolder(Path(out), self._describe(source), resume)
        self.sae.info["source"] = source.describe()
        if run is not None and resume and run.load_checkpoint(self, source):
            logger.info("resuming %s at step %d", out, self.steps)
        if not self._input_ready:
            self.sae.fit_input(source.sample(FIT_INPUT_ROWS))
            self._input_ready = True
        self._train(source, run, total_steps, progress)
        self.sae.info["source"] = source.describe()  # with the counts of a source that filters as it goes
        settings = {name: value for name, value in asdict(self.config).items() if name not in MAY_DIFFER}
        self.sae.info["training"] = settings | {"tokens": self.tokens}
        self.sae.calibrate(source.held_out(CALIBRATION_ROWS))
        if run is not None:
            run.finish(self)
        return self.sae.eval()

    def _train(self, source: Source, run: RunFolder | None, total_steps: int, progress: bool) -> None:
        """All remaining steps, with log lines and checkpoints."""
        bar = progress_bar("training", total_steps * self.config.batch_tokens, self.tokens, show=progress)
        with bar as show, finish_step_on_interrupt() as interrupted:
            started, last_checkpoint = time.perf_counter() - self.seconds, self.tokens
            for batch in self._remaining(source, total_steps):
                metrics = self.step(batch)
                self.seconds = time.perf_counter() - started
                last, stop = self.steps == total_steps, interrupted()
                log = last or self.steps % self.config.log_every_steps == 0
                save = last or stop or self.tokens - last_checkpoint >= self.config.checkpoint_every_tokens
                if log or save:
                    self._check_finite(metrics)
                if log:
                    values = {name: value.item() for name, value in metrics.items()}
                    show(self.tokens, fvu=values["fvu_batch"], l0=values["l0"], dead=f"{values['dead']:.2%}")
                    if run is not None:
                        run.log({"step": self.steps, "tokens": self.tokens, "seconds": self.seconds, **values})
                if run is not None and save:
                    run.save_checkpoint(self, source)
                    last_checkpoint = self.tokens
                if stop:
                    raise KeyboardInterrupt

    def _remaining(self, source: Source, total_steps: int) -> Iterator[Batch]:
        if self.steps >= total_steps:
            return
        for batch in source.batches(self.config.batch_tokens):
            yield batch
            if self.steps >= total_steps:
                return

    def _check_run(self, source: Source) -> int:
        total = self.config.total_steps
        if total is None:
            raise ValueError("fit needs total_tokens in its TrainConfig; for an endless run call step in a loop.")
        if source.d_in != self.sae.d_in:
            raise ValueError(f"The SAE has d_in = {self.sae.d_in}, the activations have width {source.d_in}.")
        if source.num_rows is not None and source.num_rows < self.config.batch_tokens:
            raise ValueError(
                f"The source has {source.num_rows} training rows, fewer than batch_tokens = "
                f"{self.config.batch_tokens}. Collect more tokens or lower batch_tokens."
            )
        if source.describe().get("rows_calibrate") == 0:
            raise ValueError("The source keeps no rows held out, and calibration at the end needs some.")
        return total

    def _describe(self, source: Source) -> dict[str, Any]:
        return {
            "sae": {"name": self.sae.name, "settings": self.sae.settings()},
            "train": asdict(self.config),
            "source": source.describe(),
        }

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything besides the SAE that the next step depends on: tensors and plain values."""
        tensors = {f"activity.{name}": t for name, t in self.activity.state_dict().items()}
        tensors |= {f"clipping.{name}": t for name, t in self.clipping.state_dict().items()}
        for name, p in self.sae.named_parameters():
            for key, value in self.optimizer.state(p).items():
                tensors[f"adam.{name}.{key}"] = value
        if self.warm.bounds is not None:
            tensors["warm.bounds"] = self.warm.bounds
        return tensors, {"steps": self.steps, "tokens": self.tokens, "seconds": self.seconds}

    def load_state(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Restore what `state` returned; the SAE itself is restored separately."""
        for part, module in (("activity.", self.activity), ("clipping.", self.clipping)):
            module.load_state_dict({n.removeprefix(part): t for n, t in tensors.items() if n.startswith(part)})
        for name, p in self.sae.named_parameters():
            prefix = f"adam.{name}."
            state = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
            if state:
                self.optimizer.load_state(p, state)
        self.warm.bounds = tensors.get("warm.bounds")
        self.steps, self.tokens, self.seconds = values["steps"], values["tokens"], values["seconds"]
        self._input_ready = True

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
from collections.abc import Generator, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apportion.about import About
from apportion.architectures import SAE, SAES
from apportion.architectures.inputs import as_tensor
from apportion.devices import on_gpu
from apportion.disk import all_finite
from apportion.interrupt import GivenUp, Interrupted, Interrupts
from apportion.processes import refuse_several_processes
from apportion.progress import progress_bar
from apportion.rows.batch import Batch, Source, as_stored, in_float
from apportion.rows.sane import SaneRows
from apportion.settings import in_records, plain_number
from apportion.torch_state import usual
from apportion.tracking import Tracker
from apportion.tracking.feed import Feeds
from apportion.training.checkpoint import Checkpoint
from apportion.training.config import TrainConfig
from apportion.training.given import HeldOut, check_enough, source_of
from apportion.training.learner import Learner, under
from apportion.training.objective import Losses, Objective, TrainingContext, as_objective, local_reconstruction
from apportion.training.run import RunFolder, restore
from apportion.training.same import MAY_DIFFER
from apportion.training.screen import check_state as check_screen
from apportion.training.verdict import ROWS as VERDICT_ROWS
from apportion.training.verdict import Verdict, verdict

logger = logging.getLogger(__name__)

FIT_INPUT_ROWS = 32_768
"""Rows from which mean and scale of the input are estimated."""
FETCHED_ROWS = 4096
"""Rows held out that are looked at before training, where they have to be fetched."""
CHECK_FINITE_STEPS = 100
"""Steps between checks that the loss is finite."""


class Trainer:
    """Trains one SAE, or several side by side on the same batches. ValueError at once for what cannot work together."""

    @usual(learning=True)
    def __init__(
        self,
        sae: SAE | Sequence[SAE],
        config: TrainConfig | None = None,
        objective: Objective | Losses = local_reconstruction,
    ) -> None:
        self.config = config or TrainConfig()
        self.saes = [s.to(getattr(torch, self.config.dtype)) for s in ([sae] if isinstance(sae, SAE) else sae)]
        self.objective = as_objective(objective)
        if not self.saes:
            raise ValueError("Trainer needs at least one SAE, got an empty list.")
        for s in self.saes:
            if s.row_shape != self.saes[0].row_shape:
                raise ValueError(
                    f"SAEs trained side by side take the same rows, got {self.saes[0].row_shape} and {s.row_shape}."
                )
            s.allocation.check_batch(self.config.batch_tokens)
            if self.config.total_tokens is None and s.allocation.needs_end:
                raise ValueError(
                    "switch_at is a share of the run, so it needs total_tokens; set it, or use switch_at = 0."
                )
        self.sae, self.learners = self.saes[0], [Learner(s, self.config) for s in self.saes]
        """The SAE, or the first of several; and what belongs to each."""
        self.trains = any(learner.trains for learner in self.learners)
        """False if there is nothing to learn, as for PCA and neurons."""
        self.steps = 0
        self.tokens = 0
        self.seconds = 0.0
        self.verdict: Verdict | None = None
        """After `fit`: what is wrong with the result, if anything is."""
        self._input_ready = not any(s.needs_fit or s.needs_start for s in self.saes)
        self._torn = False

    @usual(learning=True)
    def step(self, batch: Any) -> dict[str, Tensor]:
        """One optimiser step on the whole batch; a plain tensor or array counts as already filtered.

        Returns 0-d tensors: loss, each weighted term, fvu_batch, l0, dead (share), grad_norm, lr. With several SAEs
        losses are summed over them, the other figures averaged.

        Raises ValueError for rows of another width, or none. A batch with NaN or infinity changes no weight. On a CPU
        it raises ValueError; on a GPU, where looking means waiting, only in the first step and every
        CHECK_FINITE_STEPS after it (`fit` also looks where it logs or saves), and shows in the loss until then.
        """
        if not self.trains:
            raise ValueError(f"{self.sae.name} has nothing to train; fit prepares and calibrates it.")
        batch = self._accept(batch)
        for own in self.learners:
            own.screening.settle(own.sae, batch.rows())
        progress, lr = self.config.progress_at(self.tokens), self.config.lr_at(self.tokens)
        context = TrainingContext(
            tuple(own.begin_step(progress, self.steps, len(batch.x), lr / self.config.lr) for own in self.learners),
            logged=self.config.logs_step(self.steps + 1),
        )
        terms = self.objective(self.saes, batch, context)
        loss = torch.stack(list(terms.values())).sum()
        loss.backward()
        norms = {own: own.gradient_norm() for own in self.learners if own.trains}
        if not on_gpu(loss) and not math.isfinite(loss.item() + sum(norm.item() for norm in norms.values())):
            for own in self.learners:
                own.optimizer.drop()
            self._check_finite({"loss": loss.detach(), "grad_norm": torch.stack(list(norms.values())).mean()})
        for own, norm in norms.items():
            own.update(lr, norm)
        for own, (latents, _), of_step in zip(self.learners, context.seen, context.each, strict=True):
            own.count(latents, of_step)
        self.steps += 1
        self.tokens += len(batch.x)
        self.objective.after_step(self)
        metrics = {
            "loss": loss.detach(),
            **{name: term.detach() for name, term in terms.items()},
            **context.figures,
            "fvu_batch": torch.stack([fvu for _, fvu in context.seen]).mean(),
            "l0": torch.tensor(sum(own.l0 or 0.0 for own in self.learners) / len(self.learners)),
            "dead": torch.stack([own.activity.dead().double().mean() for own in self.learners]).mean(),
            "grad_norm": torch.stack(list(norms.values())).mean(),
            "lr": torch.tensor(lr),
        }
        if shares := [own.screening.share for own in self.learners if own.screening.share is not None]:
            metrics["missed"] = torch.tensor(max(shares))
        if self.steps % CHECK_FINITE_STEPS == 1:
            self._check_finite(metrics)
        return metrics

    def _check_finite(self, metrics: dict[str, Tensor]) -> None:
        for name in ("loss", "grad_norm"):
            if not math.isfinite(value := metrics[name].item()):
                raise ValueError(
                    f"{name} is {value} at step {self.steps}: the activations hold NaN or infinity, "
                    f"or lr = {self.config.lr:g} is too high."
                )

    def _accept(self, batch: Any) -> Batch:
        row = self.sae.row_shape
        if not isinstance(batch, Batch):
            batch = as_tensor(batch)
            batch = batch.clone() if batch.is_inference() else batch
            batch = Batch(batch.reshape(-1, *row) if batch.shape[-len(row) :] == row else batch)
        device = self.sae.device  # rows of 16 bits are moved as they are
        batch = replace(batch, x=batch.x.detach().to(device))  # whatever they were made of is not to learn
        batch = in_float(batch) if batch.x.element_size() < 4 else batch
        rows = batch.rows()
        if not self.objective.whole_contexts:
            batch = rows
        if batch.x.shape[1:] != row:
            wanted = ", ".join(str(n) for n in row)
            raise ValueError(
                f"This SAE trains on rows [n, {wanted}] (d_in = {self.sae.d_in}), got {list(batch.x.shape)}."
            )
        if not len(rows.x):
            raise ValueError("A training step needs at least one row; all rows of this batch are masked out.")
        for name, part in (("x", rows.x), ("target", rows.target)):  # on a GPU looking means waiting
            if part is not None and not on_gpu(part) and not all_finite(part):
                bad = int((~part.flatten(1).isfinite()).any(1).nonzero()[0])
                where = "" if rows.index is None else f" (row {int(rows.index[bad])} of the source)"
                raise ValueError(
                    f"{name} holds NaN or infinity in step {self.steps + 1}{where}: filter such rows out first."
                )
        self._fit_input(rows)
        return batch

    def _fit_input(self, batch: Batch) -> None:
        """Estimate the input descriptions from these rows, and begin, if that has not happened yet."""
        if not self._input_ready:
            needed = any(sae.needs_fit for sae in self.saes)
            for sae in self.saes:
                if needed:
                    sae.fit_input(batch.x, batch.target)
                sae.start(batch.x, batch.target)
            self._input_ready = True

    @usual(learning=True)
    def fit(
        self,
        source: Source | Batch | Tensor | Iterable[Any],
        out: str | Path | None = None,
        *,
        resume: bool = False,
        progress: bool = True,
        track: str | Tracker | Iterable[Any] = (),
    ) -> SAE:
        """Train on `total_tokens` rows of `source`, calibrate on held-out rows; returns the (first) SAE in eval mode.

        A tensor or array [rows, d_in] counts as filtered; a tenth of it is held out and `seed` orders the rest. So does
        what a list, a DataLoader or a generator of them yields; the latter two in their order (see `StreamSource`).
        `out` is the run folder: run.json (the whole configuration), metrics.jsonl, checkpoints, and at the end the SAE.
        Ctrl-C finishes the step, saves a checkpoint and raises `Interrupted`, a KeyboardInterrupt that says what is on
        the disk; so does being told to end (see interrupt.py). With `resume` a run goes on from its last checkpoint,
        with the same result as an uninterrupted one; one that has not begun begins, and of one that is finished the
        SAE is returned as it is. Rows that would spoil it (NaN, absurdly large ones) are a ValueError before it begins.
        `track` names services that also show the curves of the run folder ("wandb,tensorboard"), or gives objects that
        do (see tracking/tracker.py); whatever happens to them, the run goes on.
        If the result is poor (held-out FVU above 1, L0 far from k) that is logged and noted in `verdict` and in the
        SAE's info; the last checkpoints then stay.
        """
        feeds = Feeds(track)
        if feeds and out is None:
            raise ValueError(f"track = {track!r} shows the log of a run folder: give `out`, the folder, too.")
        source = source_of(source, self.config.seed, len(self.sae.row_shape), self.sae.needs_target)
        with Interrupts() as interrupts:
            for _ in self.steps_of_fit(source, out, interrupts, feeds, resume=resume, progress=progress):
                pass
        return self.sae

    def steps_of_fit(
        self,
        source: Source,
        out: str | Path | None,
        interrupts: Interrupts,
        feeds: Feeds,
        *,
        resume: bool = False,
        progress: bool = True,
    ) -> Generator[None]:
        """`fit`, which stops behind each step until the next one is asked for (together.py)."""
        total_steps = self._check_run(source)
        if self.steps >= total_steps:
            raise ValueError(f"This trainer has already done its {total_steps} steps. Make a new one to train further.")
        with ExitStack() as until_then:
            run = None
            if out is not None:
                refuse_several_processes()
                description = self.describe(source)
                run = until_then.enter_context(RunFolder(Path(out), description, resume, self.defaults(), feeds))
            try:
                with feeds:
                    yield from self._run(source, run, total_steps, progress, interrupts)
                    with interrupts.let_through():
                        feeds.end()
            except KeyboardInterrupt as stopped:
                self._torn = isinstance(stopped, GivenUp)
                raise Interrupted(f"stopped at step {self.steps}" if run is None else run.left(self)) from None

    def _run(
        self, source: Source, run: RunFolder | None, total_steps: int, progress: bool, interrupts: Interrupts
    ) -> Generator[None]:
        """All that is left of a run."""
        for sae in self.saes:
            sae.source = source.describe()
        if run is not None and not run.begin(self, source):
            for sae in self.saes:
                sae.eval()
            return
        if self._torn:
            raise ValueError("This trainer was broken off within a step, and there is no checkpoint: make a new one.")
        with interrupts.let_through():
            if not getattr(source, "makes_rows", False) and self.steps < total_steps:
                self._fit_input(self._sane_sample(source))
            elif not self._input_ready:
                self._fit_input(source.sample(FIT_INPUT_ROWS))
            if run is not None:
                run.track(self.steps)
        if self.trains:
            yield from self._train(source, run, total_steps, progress, interrupts)
        with interrupts.let_through():
            self._calibrate(source)
        with interrupts.held():
            if run is not None:
                run.finish(self)

    def _calibrate(self, source: Source) -> None:
        """Set thresholds on held-out rows, and note what the SAEs were trained on, and how."""
        settings = {name: value for name, value in asdict(self.config).items() if name not in MAY_DIFFER}
        for sae in self.saes:
            sae.source = source.describe()  # with the counts of a source that filters as it goes
            sae.info["training"] = settings | {"tokens": self.tokens, **self._objective()}
            sae.calibrate(HeldOut(source))
            sae.eval()
        self._judge(source)

    def _sane_sample(self, source: Source) -> Batch:
        """Rows to estimate the input from. ValueError for such as would spoil the run, also among those held out: as
        many of these are looked at as cost less than a hundredth of the run."""
        sane = SaneRows(sample := source.sample(FIT_INPUT_ROWS))
        fetched, many = getattr(source, "is_fetched", False), max(FIT_INPUT_ROWS, (self.config.total_tokens or 0) // 10)
        for batch in source.held_out(FETCHED_ROWS if fetched else many):
            sane.check(batch, "The held-out rows")
        return sample

    def _judge(self, source: Source) -> None:
        """Set `verdict`, and say it."""
        found = []
        for own in self.learners:
            if own.trains and (one := verdict(own.sae, source.held_out(VERDICT_ROWS), self.objective.reconstructs)):
                own.sae.info["training"] |= {"verdict": one.text, "diverged": one.diverged}
                found.append(one)
        if found:
            self.verdict = Verdict("; ".join(one.text for one in found), any(one.diverged for one in found))
            what = "training has come to nothing" if self.verdict.diverged else "training has not come far"
            remedy = "Lower lr, train longer, or look at the rows."
            logger.warning("%s: %s (lr = %g). %s", what, self.verdict.text, self.config.lr, remedy)

    def _train(
        self, source: Source, run: RunFolder | None, total_steps: int, progress: bool, interrupts: Interrupts
    ) -> Generator[None]:
        """All remaining steps, with log lines and checkpoints."""
        with progress_bar("training", total_steps * self.config.batch_tokens, self.tokens, show=progress) as show:
            saved_tokens, saved_seconds, started = self.tokens, self.seconds, time.perf_counter()
            for batch in islice(as_stored(source)(self.config.batch_tokens), total_steps - self.steps):
                metrics = self.step(batch)
                self.seconds, started = self.seconds + time.perf_counter() - started, time.perf_counter()
                last, stop = self.steps == total_steps, interrupts.arrived
                log = self.config.logs_step(self.steps)
                save = last or stop or self.config.saves_after(self.tokens - saved_tokens, self.seconds - saved_seconds)
                if log or save:
                    self._check_finite(metrics)
                if log:
                    values = {name: plain_number(value) for name, value in metrics.items()}
                    show(self.tokens, fvu=values["fvu_batch"], l0=values["l0"], dead=f"{values['dead']:.2%}")
                    if run is not None:
                        run.log({"step": self.steps, "tokens": self.tokens, "seconds": self.seconds, **values})
                if run is not None and save:
                    with interrupts.held():
                        run.save_checkpoint(self, source)
                    saved_tokens, saved_seconds = self.tokens, self.seconds
                if stop or (save and interrupts.arrived):
                    interrupts.end()
                yield
                started = time.perf_counter()

    def _check_run(self, source: Source) -> int:
        total = self.config.total_steps
        if total is None:
            raise ValueError("fit needs total_tokens in its TrainConfig; for an endless run call step in a loop.")
        if source.d_in != self.sae.d_in:
            raise ValueError(f"The SAE has d_in = {self.sae.d_in}, the activations have width {source.d_in}.")
        check_enough(source, self.config.batch_tokens)
        about = source.describe()
        if not isinstance(about, About):
            raise ValueError(
                f"{type(source).__name__}.describe() returns a {type(about).__name__}, and should return an About "
                "(apportion.about); About.from_json makes one of a dict."
            )
        if about.rows_calibrate == 0:
            raise ValueError("The source keeps no rows held out, and calibration at the end needs some.")
        return total

    def describe(self, source: Source) -> dict[str, Any]:
        """What makes a run what it is, for its record."""
        return {
            "sae": {"name": self.sae.name, "settings": self.sae.settings()},
            **({"num_saes": len(self.saes)} if len(self.saes) > 1 else {}),
            **self._objective(),
            "train": asdict(self.config),
            "source": source.describe().to_json(),
        }

    def defaults(self) -> dict[str, dict[str, Any]]:
        """What a setting means that the record of an older run lacks."""
        named = SAES.get(self.sae.name)
        return {
            "sae": {} if named is None else named.settings(self.sae.allocation_name, to_train=False),
            "train": {f.name: in_records(f) for f in fields(TrainConfig)},
            "objective": self.objective.defaults(),
        }

    def _objective(self) -> dict[str, Any]:
        """The objective's own description, if it has one."""
        described = self.objective.describe()
        return {"objective": described} if described else {}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything besides the SAEs that the next step depends on: tensors and plain values."""
        tensors = {f"{i}.{name}": t for i, own in enumerate(self.learners) for name, t in own.state().items()}
        values = {"steps": self.steps, "tokens": self.tokens, "seconds": self.seconds}
        return tensors, values | {"screens": [own.screening.state() for own in self.learners]}

    def check_state(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """ValueError unless this is all of what `state` returned after a step, of a trainer like this one."""
        for name, kind in (("steps", int), ("tokens", int), ("seconds", int | float)):
            if isinstance(values.get(name), bool) or not isinstance(values.get(name), kind):
                raise ValueError(f"{name} is {values.get(name)!r}")
        screens = values.get("screens", [{}] * len(self.learners))
        if not isinstance(screens, list) or len(screens) != len(self.learners):
            raise ValueError(f"screens is {screens!r}")
        for i, (own, screen) in enumerate(zip(self.learners, screens, strict=True)):
            own.check_state(under(f"{i}.", tensors))
            check_screen(screen)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go back to where a run was; everything is checked already."""
        for sae, saved in zip(self.saes, checkpoint.saes, strict=True):
            restore(sae, saved)
        self.load_state(checkpoint.tensors, checkpoint.values)

    def load_state(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Restore what `state` returned; the SAEs themselves are restored separately."""
        for i, own in enumerate(self.learners):
            own.load_state(under(f"{i}.", tensors))
        for own, state in zip(self.learners, values.get("screens", [{}] * len(self.learners)), strict=True):
            own.screening.load_state(state)
        self.steps, self.tokens, self.seconds = values["steps"], values["tokens"], values["seconds"]
        self._input_ready = True
        self._torn = False

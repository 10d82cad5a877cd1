"""Settings of a training run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from apportion.settings import check_names, newer, require, settle


class _Named(type):
    """Says which setting may have been meant, where there is none of that name."""

    def __call__(cls, *args: Any, **settings: Any) -> Any:
        check_names(settings, cls.__dataclass_fields__, cls.__name__)  # type: ignore[attr-defined]
        return super().__call__(*args, **settings)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(metaclass=_Named):
    lr: float = 1e-3
    """Peak learning rate of Adam. Nothing moves FVU more: try 3e-4, 1e-3, 3e-3."""
    batch_tokens: int = 2048
    """Rows (tokens) per optimiser step. Mutual and Feature Choice allocate over the whole batch."""
    total_tokens: int | None = None
    """Rows to train on. None: no end, constant learning rate, every schedule at its final value."""
    warmup_share: float = 0.05
    """Share of the run in which the learning rate rises linearly from zero."""
    decay_share: float = 0.4
    """Share of the run, at its end, in which the learning rate falls linearly to zero. docs/start.md has what this and
    beta1 are worth."""
    clip_ratio: float = 2.0
    """Gradients are scaled down to this multiple of their typical (running geometric mean) global norm. A few batches
    with unusually large gradients would otherwise spoil Adam's averages for hundreds of steps and kill latents."""
    beta1: float = 0.8
    """Adam's average of gradients."""
    beta2: float = 0.999
    """Adam's average of squared gradients."""
    dead_window_tokens: int | None = None
    """A latent is dead after so many tokens without firing. None: 10M, or a tenth of a shorter run."""
    density_window_tokens: int | None = None
    """Window of the running firing rates. None: 1M, or a tenth of a shorter run."""
    dtype: Literal["float32", "float64"] = "float32"
    """Precision of the weights."""
    screen: Literal["auto", "bfloat16", "int8"] | None = newer("auto", before=None)
    """How candidate matches are found while training: with a product in bfloat16, or in whole numbers of 8 bits, or in
    full precision (None). Their codes, the selection and all gradients are float32 in any case. auto: the fastest at
    this shape on this machine is measured at the first step, and kept. It assumes inputs that are centred, as the input
    description makes them: kernels/select.py says when a match can be missed; how many are is measured and logged."""
    seed: int = 0
    """Seed of the data order where fit is given a tensor; other sources bring their own."""
    log_every_steps: int = 10
    """Steps between lines in metrics.jsonl and updates of the progress bar."""
    checkpoint_every_tokens: int = 20_000_000
    """Tokens between checkpoints; one is also written on Ctrl-C."""
    checkpoint_every_minutes: float = 10.0
    """Minutes between checkpoints, if that is sooner."""

    def __post_init__(self) -> None:
        settle(self)
        require(self, ("beta1", "beta2"), lambda value: 0 <= value < 1, "must be at least 0 and below 1")
        positive = ("lr", "batch_tokens", "clip_ratio", "log_every_steps", "checkpoint_every_tokens")
        require(self, (*positive, "checkpoint_every_minutes"), lambda value: value > 0, "must be positive")
        windows = ("dead_window_tokens", "density_window_tokens")
        require(self, windows, lambda value: value is None or value >= 1, "must be at least 1")
        if self.screen not in (None, "auto") and self.dtype != "float32":
            raise ValueError(f"screen = {self.screen!r} needs dtype float32, got {self.dtype!r}. Drop one of the two.")
        if self.total_tokens is not None and self.total_tokens < self.batch_tokens:
            raise ValueError(
                f"total_tokens = {self.total_tokens} is less than one batch of {self.batch_tokens}. "
                "Train on more tokens or lower batch_tokens."
            )
        if min(self.warmup_share, self.decay_share) < 0 or self.warmup_share + self.decay_share > 1:
            raise ValueError(
                f"warmup_share and decay_share are shares of the run that add up to at most 1, "
                f"got {self.warmup_share} and {self.decay_share}."
            )

    @property
    def total_steps(self) -> int | None:
        return None if self.total_tokens is None else self.total_tokens // self.batch_tokens

    @property
    def dead_window(self) -> int:
        return self.dead_window_tokens or max(1, min(10_000_000, (self.total_tokens or 100_000_000) // 10))

    @property
    def density_window(self) -> int:
        return self.density_window_tokens or max(1, min(1_000_000, (self.total_tokens or 10_000_000) // 10))

    def logs_step(self, step: int) -> bool:
        """Whether the figures of this step, counted from 1, are written down."""
        return step % self.log_every_steps == 0 or step == self.total_steps

    def saves_after(self, tokens: int, seconds: float) -> bool:
        """Whether a checkpoint is due so long after the last one."""
        return tokens >= self.checkpoint_every_tokens or seconds >= 60 * self.checkpoint_every_minutes

    def progress_at(self, tokens: int) -> float:
        """Share of the run that is done after so many tokens; 1 for a run without an end."""
        return 1.0 if self.total_steps is None else min(1.0, tokens / (self.total_steps * self.batch_tokens))

    def lr_at(self, tokens: int) -> float:
        """Learning rate after so many tokens: linear warm-up, constant, linear decay to zero."""
        if self.total_steps is None:
            return self.lr
        step = tokens / self.batch_tokens
        warmup, decay = self.warmup_share * self.total_steps, self.decay_share * self.total_steps
        rise = (step + 1) / warmup if step + 1 < warmup else 1.0
        left = max(0.0, self.total_steps - step)
        fall = left / decay if left < decay else float(left > 0)
        return self.lr * min(rise, fall)

"""What is minimised: an objective turns (saes, batch, context) into named, weighted losses.

Local reconstruction is the plain case: each SAE reconstructs its input (or the batch's target) on its own. Others are
in the room `objectives`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, final

from torch import Tensor

from apportion.allocation import StepContext
from apportion.architectures import SAE
from apportion.group import Group
from apportion.latents import Latents
from apportion.metrics import batch_fvu
from apportion.rows.batch import Batch

if TYPE_CHECKING:
    from apportion.training.trainer import Trainer


@dataclass(frozen=True)
class TrainingContext:
    """What an objective is told about the step, and a place for what it sees on the way."""

    each: tuple[StepContext, ...]
    """For each SAE in turn: progress, dead latents, densities, how matches are chosen."""
    logged: bool = False
    """Whether this step's figures will be written down: the time for costly ones."""
    figures: dict[str, Tensor] = field(default_factory=dict)
    """What an objective wants to report besides its losses, as 0-d tensors."""
    seen: list[tuple[Latents, Tensor]] = field(default_factory=list)

    @property
    def group(self) -> Group:
        """The processes that make this step together."""
        return self.each[0].group

    def observe(self, latents: Latents, y: Tensor, y_hat: Tensor) -> None:
        """To be called once for each SAE in turn: the trainer counts firings and reports L0 and FVU from it."""
        self.seen.append((latents, batch_fvu(y.detach().flatten(1), y_hat.detach().flatten(1))))


Losses = Callable[[Sequence[SAE], Batch, TrainingContext], dict[str, Tensor]]


class Objective(ABC):
    """Named, weighted losses; their sum is minimised. A plain function of the same arguments will do for a Trainer."""

    whole_contexts: ClassVar[bool] = False
    """True: it is given batches of whole contexts as they come, with rows that the mask leaves out."""
    least_saes: ClassVar[int] = 1
    """It makes sense for so many SAEs side by side."""
    name: ClassVar[str] = ""
    config: Any = None
    """Its settings, a dataclass, if it has any."""

    @classmethod
    def of(cls, config: Any, source: Any) -> Objective:
        """With these settings, for a run on `source`."""
        return cls() if config is None else cls(config)  # type: ignore[call-arg]

    @property
    def reconstructs(self) -> bool:
        """False: a poor reconstruction is no sign that training went wrong."""
        return True

    @abstractmethod
    def __call__(self, saes: Sequence[SAE], batch: Batch, context: TrainingContext) -> dict[str, Tensor]:
        """The losses. Calls `context.observe` for each SAE in turn."""

    def after_step(self, trainer: Trainer) -> None:  # noqa: B027  (most need nothing)
        """What else is done behind each step."""

    def describe(self) -> dict[str, Any]:
        """Name and settings for the run's record, JSON-able; nothing for one without settings."""
        return {} if self.config is None else {"name": self.name, **asdict(self.config)}

    def defaults(self) -> dict[str, Any]:
        """What a setting means that the record of an older run lacks."""
        return {} if self.config is None else {f.name: f.default for f in fields(self.config)}


@final
class LocalReconstruction(Objective):
    """mean ||y~ - y~_hat||^2 / d_out on scaled data, and the SAE's own terms; summed over SAEs."""

    def __call__(self, saes: Sequence[SAE], batch: Batch, context: TrainingContext) -> dict[str, Tensor]:
        total: dict[str, Tensor] = {}
        for sae, own in zip(saes, context.each, strict=True):
            x, y = sae.prepare(batch.x, batch.target)
            made = sae.forward_scaled(x, own)
            context.observe(made.latents, y, made.y_hat)
            reconstruction = sae.reconstruction_loss(y, made, own.group)
            add_terms(total, {"reconstruction": reconstruction} | sae.own_terms(x, y, made, own))
        return total


local_reconstruction = LocalReconstruction()


OF_OBJECTIVES = ("whole_contexts", "reconstructs", "after_step", "describe")


@final
class OfFunction(Objective):
    """The objective that a plain function is."""

    def __init__(self, losses: Losses) -> None:
        self.losses = losses

    def __call__(self, saes: Sequence[SAE], batch: Batch, context: TrainingContext) -> dict[str, Tensor]:
        return self.losses(saes, batch, context)


def as_objective(given: Objective | Losses) -> Objective:
    """ValueError for what is neither an Objective nor a function: what else it has of one would go unnoticed."""
    if isinstance(given, Objective):
        return given
    own = [name for name in OF_OBJECTIVES if hasattr(given, name)]
    if callable(given) and not isinstance(given, type) and not own:
        return OfFunction(given)
    what = f"{type(given).__name__} with {', '.join(own)}" if own else type(given).__name__
    raise ValueError(f"An objective is a subclass of apportion.training.Objective, or a plain function; got a {what}.")


def add_terms(total: dict[str, Tensor], terms: dict[str, Tensor]) -> None:
    """Add losses to those of the same name."""
    for name, term in terms.items():
        total[name] = total[name] + term if name in total else term

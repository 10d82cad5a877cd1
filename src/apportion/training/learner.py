"""One SAE with all that training keeps for it: activity of latents, bounds, clipping, Adam's averages."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from apportion.allocation import StepContext
from apportion.architectures import SAE, rebuild
from apportion.latents import Latents
from apportion.training.activity import Activity
from apportion.training.adam import Adam
from apportion.training.clipping import RelativeClipping
from apportion.training.config import TrainConfig
from apportion.training.screen import Screening

PER_OUTPUT = {"b_dec", "W_skip"}
"""Parameters whose rows are dimensions of the output."""


class Learner:
    def __init__(self, sae: SAE, config: TrainConfig) -> None:
        self.sae, self.config = sae, config
        device = sae.device
        self.activity = Activity(sae.d_sae, config.dead_window, config.density_window).to(device)
        self.clipping = RelativeClipping(config.clip_ratio).to(device)
        self.bounds: Tensor | None = None
        """Of the selection, carried from step to step."""
        self.screening = Screening(sae, config.screen if config.dtype == "float32" else None)
        betas = {"beta1": config.beta1, "beta2": config.beta2}
        self.optimizer = Adam(sae.parameters(), unit_rows=sae.unit_rows(), lr_factors=sae.lr_factors(), **betas)
        self.trains = bool(self.optimizer.parameters)
        """False for a baseline without anything to learn."""
        self.l0: float | None = None
        """Of the previous step."""

    def begin_step(self, progress: float, steps: int, batch_tokens: int, lr_share: float) -> StepContext:
        """Put the SAE in train mode and advance its schedules."""
        sae = self.sae.train()
        context = StepContext(
            progress=progress,
            lr_share=lr_share,
            steps=steps,
            batch_tokens=batch_tokens,
            dead=self.activity.dead(),
            density=self.activity.density(),
            l0=self.l0,
            selection=self.screening.selection(sae, self.bounds),
        )
        sae.begin_step(context)
        sae.allocation.forget_threshold()
        sae.info |= sae.allocation.findings()
        return context

    def gradient_norm(self) -> Float[Tensor, ""]:
        """Of all gradients, before clipping."""
        return self.optimizer.gradient_norm()

    def update(self, lr: float, norm: Float[Tensor, ""]) -> None:
        """Clip, step, spend the gradients, whose norm is given."""
        self.optimizer.step(lr, self.clipping.scale(norm))
        self.sae.after_step()

    def count(self, latents: Latents, context: StepContext) -> None:
        """Take note of what fired in this step, and of the bounds that it leaves to the next."""
        group = context.group
        tokens, matches = group.count(latents.tokens), group.count(latents.nnz)
        self.activity.update(group.total(latents.counts()), tokens)
        self.l0 = matches / max(tokens, 1)
        if context.selection is not None:
            self.bounds = context.selection.next_warm
            self.screening.note(context.selection)

    @torch.no_grad()
    def redraw(self, latents: Int[Tensor, " n"], seed: int) -> None:
        """Give latents the weights of a new SAE; optimiser, counters and bounds forget what they were.

        Everything that has one row per latent is redrawn (what has one per output has not, even if d_out = d_sae).
        Rows whose norm is learned get the mean norm that these have by now: at that of a new SAE they would take the
        budget of all others.
        """
        sae = self.sae
        fresh = rebuild(sae.name, **sae.settings() | {"seed": seed})
        for name, p in sae.named_parameters():
            if p.shape[:1] == (sae.d_sae,) and name not in PER_OUTPUT:
                rows = fresh.get_parameter(name).to(p)
                if p.ndim > 1 and p not in self.optimizer.unit_rows:
                    rows = rows * (p.flatten(1).norm(dim=1).mean() / rows.flatten(1).norm(dim=1).mean())
                p[latents] = rows[latents]
                self.optimizer.forget(p, latents)
        self.activity.forget(latents)
        self.bounds = None

    def _counts(self) -> dict[str, Tensor]:
        parts = {"activity": self.activity, "clipping": self.clipping}
        return {f"{part}.{name}": t for part, module in parts.items() for name, t in module.state_dict().items()}

    def state(self) -> dict[str, Tensor]:
        """Everything besides the SAE that its next step depends on."""
        tensors = self._counts()
        for name, p in self.sae.named_parameters():
            tensors |= {f"adam.{name}.{key}": value for key, value in self.optimizer.state(p).items()}
        tensors |= {f"carried.{name}": t for name, t in self.sae.carried().items()}
        if self.bounds is not None:
            tensors["warm.bounds"] = self.bounds
        if self.l0 is not None:
            tensors["l0"] = self.activity.weight.new_tensor(self.l0)
        return tensors

    def check_state(self, tensors: dict[str, Tensor]) -> None:
        """ValueError unless this is all of what `state` returned after a step, for an SAE like this one."""
        wanted = {name: t.shape for name, t in self._counts().items()}
        for name, p in self.sae.named_parameters():
            if p in set(self.optimizer.parameters):
                wanted |= {f"adam.{name}.{key}": shape for key, shape in self.optimizer.shapes(p).items()}
        carried = {f"carried.{name}" for name in under("carried.", tensors)}
        wanted |= {name: torch.Size([self.sae.d_sae]) for name in carried}
        for name, shape in wanted.items():
            if name not in tensors or tensors[name].shape != shape:
                raise ValueError(f"{name} is missing, or has another shape")
        if more := tensors.keys() - wanted.keys() - {"warm.bounds", "l0"}:
            raise ValueError(f"unexpected {', '.join(sorted(more))}")

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `state` returned."""
        self.activity.load_state_dict(under("activity.", tensors))
        self.clipping.load_state_dict(under("clipping.", tensors))
        for name, p in self.sae.named_parameters():
            if state := under(f"adam.{name}.", tensors):
                self.optimizer.load_state(p, state)
        self.sae.carry_on(under("carried.", tensors))
        self.bounds = tensors.get("warm.bounds")
        self.l0 = tensors["l0"].item() if "l0" in tensors else None


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin so, by the rest of their names."""
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

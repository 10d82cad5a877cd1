"""The upper part of a language model as a function of the activations at a hookpoint.

    upper = UpperLayers(model, "model.layers.8", later=("model.layers.9", "model.layers.10"))
    above = upper(ids, x)               above.logits, above.later["model.layers.9"]; gradients reach x

The model runs with x in place of what it has at the hookpoint. If the hookpoint is the output of a layer in a stack (or
the input of the one above), the layers up to there are passed over; some models hand more from layer to layer than one
stream, so a trial at the start makes sure that this changes nothing. Otherwise they run, without a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from apportion.language.hookpoints import check_seen, expand, hooked
from apportion.rows.hookpoint import Hookpoint

TRIAL_TOKENS = 6


@dataclass(frozen=True)
class Above:
    """What the upper layers made, in the model's dtype."""

    logits: Float[Tensor, "contexts positions vocab"]
    later: dict[str, Float[Tensor, "contexts positions d"]]


class UpperLayers:
    """`later` are hookpoints above `hookpoint`; None: the outputs of all later layers of its stack."""

    def __init__(self, model: Any, hookpoint: str, later: Iterable[str] | None = ()) -> None:
        names = expand(model, hookpoint)
        if len(names) > 1:
            raise ValueError(f"hookpoint {hookpoint!r} stands for {len(names)} modules: name one of them")
        self.model, self.hookpoint = model, names[0]
        wanted = later_layers(model, self.hookpoint) if later is None else list(later)
        self.later = tuple(expand(model, wanted)) if wanted else ()
        self.skipped: list[tuple[nn.Module, bool]] = []
        self._try()

    def __call__(self, ids: Int[Tensor, "contexts positions"], x: Float[Tensor, "contexts positions d_in"]) -> Above:
        """The logits of `ids` and the activations at the later hookpoints, given those at the hookpoint."""
        seen: dict[str, Tensor] = {}
        with passed_over(self.skipped):
            logits = self._run(ids, {self.hookpoint: lambda h: x.to(h), **_looks(self.later, seen)})
        return Above(logits, seen)

    def _run(self, ids: Tensor, changes: dict[str, Callable[[Tensor], Tensor | None]]) -> Tensor:
        device = next(self.model.parameters()).device
        with hooked(self.model, changes):
            return self.model(input_ids=ids.long().to(device), use_cache=False).logits

    @torch.no_grad()
    def _try(self) -> None:
        """Check the order of the hookpoints, and see whether the layers below can be passed over."""
        ids = torch.arange(TRIAL_TOKENS)[None]
        seen: dict[str, Tensor] = {}
        results: dict[nn.Module, Any] = {}
        below = stack_below(self.model, self.hookpoint)
        with ExitStack() as stack:
            for m in below:
                stack.callback(m.register_forward_hook(lambda m, args, result: results.update({m: result})).remove)
            clean = self._run(ids, _looks((*self.later, self.hookpoint), seen))
        check_seen((self.hookpoint, *self.later), seen)
        order = list(seen)
        for name in self.later:
            if order.index(name) <= order.index(self.hookpoint):
                raise ValueError(f"{name!r} does not come after {self.hookpoint!r}: choose a later hookpoint")
        if all(isinstance(r, Tensor) or (isinstance(r, tuple) and len(r) == 1) for r in results.values()):
            self.skipped = [(m, isinstance(r, tuple)) for m, r in results.items()]
            self._run(ids.flip(1), {})  # what a layer has kept of its last pass must not help
            if not torch.allclose(self(ids, seen[self.hookpoint]).logits, clean, rtol=1e-4, atol=1e-4):
                self.skipped = []


def _looks(names: Iterable[str], seen: dict[str, Tensor]) -> dict[str, Callable[[Tensor], Tensor | None]]:
    """Functions for `hooked` that keep what they see."""
    return {name: lambda h, name=name: seen.update({name: h.clone()}) for name in names}  # later ones may work in place


def stack_below(model: nn.Module, hookpoint: str) -> list[nn.Module]:
    """The layers of the stack whose output (at the last of them) is what stands at the hookpoint; none otherwise."""
    _, stack, below = _place(model, hookpoint)
    return stack[:below]


def later_layers(model: nn.Module, hookpoint: str) -> list[str]:
    """The outputs of all layers of the stack that lie above the hookpoint."""
    name, stack, below = _place(model, hookpoint)
    if not stack:
        raise ValueError(f"{hookpoint!r} is not a layer of a stack: name the later hookpoints yourself")
    return [f"{name}.{i}" for i in range(below, len(stack))]


def _place(model: nn.Module, hookpoint: str) -> tuple[str, list[nn.Module], int]:
    """The stack that the hookpoint's module is a layer of, by name, and how many of its layers lie below; else none."""
    point = Hookpoint.parse(hookpoint)
    name, _, index = point.path.rpartition(".")
    stack = dict(model.named_modules()).get(name)
    if not isinstance(stack, nn.ModuleList) or point.element:  # what else a layer is given or returns is no stream
        return "", [], 0
    return name, list(stack), int(index) + (point.side == "out")


@contextmanager
def passed_over(layers: Iterable[tuple[nn.Module, bool]]) -> Iterator[None]:
    """Within the block these layers hand on the stream unchanged, in a tuple where the flag says so."""

    def hand_on(in_tuple: bool, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (hidden_states,) if in_tuple else hidden_states

    before = [(m, m.__dict__.get("forward")) for m, _ in layers]
    try:
        for module, in_tuple in layers:
            module.forward = partial(hand_on, in_tuple)
        yield
    finally:
        for module, own in before:
            if own is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = own

"""What a notebook may have changed, as this library assumes it, for the length of a call.

    @usual()                          default dtype float32 and default device CPU
    with usual(learning=True):        besides, gradients on, and no inference mode
    with in_eval_mode(model):         no module of the model trains

Everything is as it was found afterwards. Gradients are left alone where a user decides about them (encode, decode).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ContextDecorator, ExitStack, contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn


class usual(ContextDecorator):
    """As a context or a decorator; it may be nested."""

    def __init__(self, learning: bool = False) -> None:
        self.learning = learning
        self._stacks: list[ExitStack] = []

    def __enter__(self) -> usual:
        stack = ExitStack()
        self._stacks.append(stack)
        if (dtype := torch.get_default_dtype()) != torch.float32:
            torch.set_default_dtype(torch.float32)
            stack.callback(torch.set_default_dtype, dtype)
        if torch.empty(0).device.type != "cpu":  # get_default_device fails in torch 2.6 once it was set to None
            stack.enter_context(torch.device("cpu"))
        if self.learning:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
        return self

    def __exit__(self, *error: Any) -> None:
        self._stacks.pop().close()

    def _recreate_cm(self) -> usual:
        """Each call of a decorated function has a context of its own."""
        return usual(self.learning)


@dataclass
class _Held:
    """A module that is in eval mode for the sake of some blocks."""

    blocks: int
    trained: bool
    """Before the first of them."""


_held: WeakKeyDictionary[nn.Module, _Held] = WeakKeyDictionary()
_lock = Lock()


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Within the block no module of the model trains (no dropout); afterwards each does what it did before.

    Several threads may be within at a time: modules go back when the last one leaves, in whatever order they do.
    """
    modules = list(model.modules())
    with _lock:
        for module in modules:
            _held.setdefault(module, _Held(0, module.training)).blocks += 1
            module.training = False
    try:
        yield
    finally:
        with _lock:
            for module in modules:
                held = _held[module]
                held.blocks -= 1
                if not held.blocks:
                    module.training = held.trained
                    del _held[module]

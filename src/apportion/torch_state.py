"""Global settings of torch that a notebook may have changed, as this library assumes them, for the length of a call.

    @usual()                          default dtype float32 and default device CPU
    with usual(learning=True):        besides, gradients on, and no inference mode

Everything is as it was found afterwards. Gradients are left alone where a user decides about them (encode, decode).
"""

from __future__ import annotations

from contextlib import ContextDecorator, ExitStack
from typing import Any

import torch


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
        if torch.get_default_device().type != "cpu":
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

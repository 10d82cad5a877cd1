"""Does it matter to a model what stands at a hookpoint? An intervention where it does not would change nothing.

Some modules return several things of which the model uses another one (a router of a mixture of experts returns logits
beside the weights it has made of them), or are there for a loss only. So the model is tried once on a few tokens, as it
is and with noise at the hookpoint: equal outputs mean that nobody reads it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from apportion.activations.hookpoints import Hookpoint, hooked
from apportion.activations.model import in_eval_mode
from apportion.activations.passes import parameters_of

logger = logging.getLogger(__name__)

TRIAL_TOKENS = 6
_read: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()
"""Hookpoints that are known to matter."""


def check_read(model: nn.Module, hookpoint: str) -> None:
    """ValueError if nothing in the model reads what stands at the hookpoint.

    A model that cannot be run on token ids alone is not tried; nothing is said of a place that it does not reach on
    these few tokens (an expert, a tower for images), or that carries no float numbers.
    """
    name = str(Hookpoint.parse(hookpoint))
    known = _read.setdefault(model, set())
    if name in known or not _takes_tokens(model):
        return
    reached: list[bool] = []

    def noisy(x: Tensor) -> Tensor | None:
        if not x.is_floating_point() or not x.numel():
            return None
        reached.append(True)
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
        return x + noise * (1 + x.float().abs().mean()).to(x.dtype)

    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), in_eval_mode(model):
            matters = not torch.equal(_output(model, {}), _output(model, {name: noisy}))
    except Exception as error:  # a model may want anything; the first real pass says so better
        logger.debug("%s could not be tried on token ids: %s", type(model).__name__, error)
        return
    if reached and not matters:
        raise ValueError(
            f"nothing in the model reads what stands at {name!r}, so that an intervention there changes nothing: "
            "choose the module whose output is used, such as the whole block"
        )
    known.add(name)


def _takes_tokens(model: nn.Module) -> bool:
    return "input_ids" in parameters_of(model) and next(model.parameters(), None) is not None


def _output(model: Any, changes: dict[str, Callable[[Tensor], Tensor | None]]) -> Tensor:
    """What the model makes of a few tokens."""
    ids = torch.arange(TRIAL_TOKENS, device=next(model.parameters()).device)[None]
    inputs: dict[str, Any] = {"input_ids": ids}
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    if "use_cache" in parameters_of(model):
        inputs["use_cache"] = False
    with hooked(model, changes):
        result = model(**inputs)
    for name in ("logits", "last_hidden_state"):
        if isinstance(getattr(result, name, None), Tensor):
            return getattr(result, name)
    return result if isinstance(result, Tensor) else result[0]

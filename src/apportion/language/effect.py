"""Does it matter to a model what stands at a hookpoint? An intervention where it does not would change nothing.

Some modules return several things of which the model uses another one (a router of a mixture of experts returns logits
beside the weights it has made of them), or are there for a loss only. So the model is tried once on a few tokens, as it
is and with noise at the hookpoint: equal outputs mean that nobody reads it. What runs on images or sound, or for some
tokens only (an expert), is not tried by that.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from apportion.language.hookpoints import Change, hooked, module_at, place_in
from apportion.language.passes import inputs_for, parameters_of
from apportion.torch_state import in_eval_mode

logger = logging.getLogger(__name__)

TRIAL_TOKENS = 6
OTHER_INPUTS = ("pixel", "image", "video", "audio", "input_features", "input_values")
"""How the arguments of models begin that take more than tokens."""
_read: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()
"""Hookpoints that are known to matter."""


def check_read(model: nn.Module, hookpoint: str) -> None:
    """ValueError if nothing in the model reads what stands at the hookpoint.

    A model that cannot be run on token ids alone is not tried.
    """
    name = str(point := place_in(model, hookpoint))
    known, seen = _read.setdefault(model, set()), list[Tensor]()
    if name in known or not _takes_tokens(model):
        return
    if _never_runs(module_at(model, point)):
        raise ValueError(f"{name!r} holds modules and is none that runs: choose one of them, such as {name + '.0'!r}")

    def noisy(x: Tensor) -> Tensor | None:
        seen.append(x)
        if not x.is_floating_point():
            return None
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
        return x + noise * (1 + x.float().abs().mean()).to(x.dtype)

    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), in_eval_mode(model):
            matters = not torch.equal(_output(model), _output(model, {name: noisy}))
    except Exception as error:  # a model may want anything; the first real pass says so better
        logger.debug("%s could not be tried on token ids: %s", type(model).__name__, error)
        return
    if not any(x.shape[:-1].numel() for x in seen) and (takes_more(model) or ".experts." in name):
        return
    if not all(x.is_floating_point() for x in seen):  # token ids, say, which noise leaves as they are
        return
    if not matters:
        raise ValueError(
            f"nothing in the model reads what stands at {name!r}, so that an intervention there changes nothing: "
            "choose the module whose output is used, such as the whole block"
        )
    known.add(name)


def _takes_tokens(model: nn.Module) -> bool:
    return "input_ids" in parameters_of(model) and next(model.parameters(), None) is not None


def takes_more(model: nn.Module) -> bool:
    return any(name.startswith(OTHER_INPUTS) for name in parameters_of(model))


def _never_runs(module: nn.Module) -> bool:
    """True for lists of modules and the like."""
    return type(module).forward is nn.Module.forward


def _output(model: Any, changes: Mapping[str, Change] = MappingProxyType({})) -> Tensor:
    """What the model makes of a few tokens."""
    with hooked(model, changes):
        result = model(**inputs_for(model, torch.arange(TRIAL_TOKENS)[None]))
    for name in ("logits", "last_hidden_state"):
        if isinstance(getattr(result, name, None), Tensor):
            return getattr(result, name)
    return result if isinstance(result, Tensor) else result[0]

"""The tokens of a forward pass: what they are, which of them are padding, and where each stands in its text.

    with watched(model, "model.layers.8") as watch:
        model(**inputs)         in a hook at that hookpoint:    watch.at(x).positions, .attended, .tokens

Everything comes from what the model itself is given in that pass, so that it is right in `generate`, with any cache and
with none, for padded batches and for packed ones:

    attended     2-D attention_mask: its last columns. A 4-D mask (or a dict of them, as some models pass): a token is
                 attended if it attends to itself. None: all are
    position     attended tokens before it, those in the cache included, as far as it attends to them. Without a mask:
                 position_ids; else cache_position; else counted from the length of the cache
                 Whatever the masks say, position_ids of 0 begin a text (packed documents)

So position 0 is the first *attended* token. The modules that are asked are the model and those around the hookpoint
that take `input_ids`: the innermost wins, because in an encoder-decoder or a multimodal model only that one is given
the tokens of its own stream. Transformers calls things differently over time: the cache is `cache`, `past_key_values`
or `cache_params`; recurrent ones have no length, only the word that something came before.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from apportion.rows.hookpoint import without_compiling

CACHES = ("cache", "past_key_values", "cache_params", "past_key_value", "state", "mems")
"""What a model's arguments call the memory of earlier tokens."""
BLOCKED = -1e4
"""Additive masks are at most this where attention is not allowed."""


@dataclass(frozen=True)
class Tokens:
    """Of the rows at a hookpoint, all in the leading shape of x."""

    positions: Int[Tensor, "*lead"]
    """0 at the first attended token of a text; undefined for padding."""
    attended: Bool[Tensor, "*lead"] | None
    """False for padding; None: there is none."""
    ids: Int[Tensor, "*lead"] | None
    """None if the model was given embeddings."""

    def map(self, change: Callable[[Tensor], Tensor]) -> Tokens:
        return replace(self, **{name: change(part) for name, part in vars(self).items() if part is not None})


class Watch:
    """What is known of the current forward pass; of the last one, when a layer is run again for its gradients.

    Each thread has its own pass: several may use a model at the same time. One that has none (gradients are computed
    in threads of their own) sees the last one of any.
    """

    def __init__(self) -> None:
        self._here, self._last = threading.local(), None

    @property
    def tokens(self) -> Tokens | None:
        return getattr(self._here, "tokens", self._last)

    @tokens.setter
    def tokens(self, tokens: Tokens | None) -> None:
        self._here.tokens = self._last = tokens

    def at(self, x: Tensor) -> Tokens | None:
        """The tokens of the rows of x [*lead, d]; None if no forward pass has said.

        x may be flattened, [tokens, d], have the tokens first, [length, batch, d], or hold the last tokens only.
        ValueError if its rows are no tokens of the pass.
        """
        if self.tokens is None:
            return None
        batch, length = self.tokens.positions.shape
        lead = x.shape[:-1]
        tokens = self.tokens.map(lambda part: part.to(x.device))
        if lead == (length, batch) and batch != length:
            return tokens.map(lambda part: part.T)
        if lead.numel() == batch * length:
            return tokens.map(lambda part: part.reshape(lead))
        if len(lead) == 2 and lead[0] == batch and lead[1] < length:
            return tokens.map(lambda part: part[:, -lead[1] :])
        raise ValueError(
            f"the activations have shape {tuple(x.shape)}, and the model was given {batch} x {length} tokens: which "
            "row is which token is not known here. Choose a hookpoint with one row per token."
        )


def by_context(x: Tensor, shape: torch.Size) -> Tensor:
    """x as [contexts, length, d], from what a module makes of tokens of that `shape`: flattened, or tokens first."""
    tokens_first = x.ndim == 3 and x.shape[:2] == (shape[1], shape[0]) and shape[0] != shape[1]
    return x.transpose(0, 1) if tokens_first else x.reshape(*shape, x.shape[-1])


@contextmanager
def watched(model: nn.Module, hookpoint: str) -> Iterator[Watch]:
    """Within the block, take note of what the model is given in each forward pass; of nothing for a hookpoint in a
    tower of the model that reads no text."""
    watch = Watch()

    def note(names: list[str], module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        outer = watch.tokens if module is not model else None
        watch.tokens = tokens_given(dict(zip(names, args, strict=False)) | dict(kwargs), outer)

    with ExitStack() as stack:
        for module in askable(model, hookpoint) if _reads_text(model, hookpoint) else ():
            handle = module.register_forward_pre_hook(partial(note, parameters_of(module)), with_kwargs=True)
            stack.callback(handle.remove)
        yield watch


def askable(model: nn.Module, hookpoint: str) -> list[nn.Module]:
    """The model and the modules around the hookpoint that take tokens, from the outside in."""
    path, found = hookpoint.partition(":")[0], [model]
    for name, module in modules_of(model).items():
        if name and path.startswith(f"{name}.") and "input_ids" in parameters_of(module):
            found.append(module)
    return found


def _reads_text(model: nn.Module, hookpoint: str) -> bool:
    """False inside of a part that has a configuration of another kind than the module around it that takes tokens."""
    path = f"{hookpoint.partition(':')[0]}."
    reader = askable(model, hookpoint)[-1]
    around = [module for name, module in modules_of(model).items() if not name or path.startswith(f"{name}.")]
    own = next((c for m in reversed(around) if (c := getattr(m, "config", None)) is not None), None)
    config = getattr(reader, "config", None)
    return config is None or type(own) in (type(config), type(text_config(reader)))


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """All modules by their names; those of compiled ones are what they are without torch.compile."""
    return {without_compiling(name): module for name, module in model.named_modules()}


def parameters_of(module: nn.Module) -> list[str]:
    """The names of what its forward takes."""
    try:
        return list(inspect.signature(module.forward).parameters)
    except (TypeError, ValueError):
        return []


_locks: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()


def alone(model: nn.Module) -> Any:
    """Within the block no other thread runs the model in such a block: it would run into the hooks of this one."""
    return _locks.setdefault(model, threading.RLock())


def inputs_for(model: nn.Module, ids: Int[Tensor, "contexts positions"]) -> dict[str, Any]:
    """The arguments of a forward pass over these tokens alone: without a cache, and the same for a decoder."""
    ids = ids.long().to(next(model.parameters()).device)
    more = {"use_cache": False, "decoder_input_ids": ids}
    return {"input_ids": ids} | {name: more[name] for name in more if name in parameters_of(model)}


def text_config(model: Any) -> Any:
    """The configuration of the model, or of its text tower if it has several."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def tokens_given(arguments: Mapping[str, Any], outer: Tokens | None = None) -> Tokens | None:
    """The tokens that a model is given by these arguments; `outer` are those of the module around it.

    None if there are none among them (the model may take images).
    """
    ids, embeddings = arguments.get("input_ids"), arguments.get("inputs_embeds")
    shape = ids.shape if isinstance(ids, Tensor) else embeddings.shape[:2] if isinstance(embeddings, Tensor) else None
    if shape is None or len(shape) != 2:
        return outer
    if not isinstance(ids, Tensor) and outer is not None and outer.positions.shape == shape:
        return outer
    given = ids if isinstance(ids, Tensor) else embeddings
    assert isinstance(given, Tensor)
    steps = torch.arange(shape[1], device=given.device)
    past = _tokens_before(arguments)
    slots = past + steps
    attended, positions = _by_mask(arguments.get("attention_mask"), slots, shape)
    if attended is not None and bool(attended.all()):
        attended = None
    stated = _position_ids(arguments.get("position_ids"), shape)
    if positions is None:
        positions = slots.expand(shape) if stated is None else stated
    elif stated is not None:
        positions = positions.masked_fill(stated.to(positions.device) == 0, 0)
    return Tokens(positions, attended, ids if isinstance(ids, Tensor) else None)


def _tokens_before(arguments: Mapping[str, Any]) -> int:
    """How many tokens the model has seen before these; at least 1 if only that is known."""
    at = arguments.get("cache_position")
    if isinstance(at, Tensor) and at.numel():
        return int(at.flatten()[0])
    for name in CACHES:
        if (cache := arguments.get(name)) is not None:
            return _length(cache)
    return 0


def _length(cache: Any) -> int:
    """Tokens in a cache; 1 if it only tells that there are some."""
    if isinstance(cache, tuple | list):  # keys and values of each layer, or recurrent states
        return 1 if len(cache) else 0
    with suppress(AttributeError, ValueError):  # caches of recurrent layers have no length
        if length := int(cache.get_seq_length() or 0):
            return length
    before = [getattr(layer, "has_previous_state", False) for layer in getattr(cache, "layers", None) or [cache]]
    return int(any(any(b.values()) if isinstance(b, dict) else b is True for b in before))


def _by_mask(mask: Any, slots: Tensor, shape: torch.Size) -> tuple[Tensor | None, Tensor | None]:
    """Which tokens are attended, and their positions; None where the mask does not say."""
    if isinstance(mask, Mapping):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if not isinstance(mask, Tensor):
        return None, None
    batch, length = shape
    if mask.ndim == 2 and mask.shape[1] >= length:
        kept = mask != 0
        before = int(slots[0]) if mask.shape[1] == length else 0  # else the cached tokens are part of the mask
        counted = (kept.cumsum(1) - 1)[:, -length:] + before
        return kept[:, -length:].expand(batch, length), counted.expand(batch, length)
    if mask.ndim == 4 and mask.shape[-2] == length and mask.shape[-1] > int(slots[-1]):
        allowed, at = _allowed(mask), slots.to(mask.device)[None, :, None]
        own = allowed.gather(2, at.expand(len(allowed), -1, 1)).squeeze(2)
        sees_all, last = allowed.all(2), at.squeeze(2) + 1 == allowed.shape[2]
        own &= ~sees_all | last | sees_all.all(1, keepdim=True)  # causal masks may leave rows of padding open
        before = (allowed & (torch.arange(allowed.shape[2], device=mask.device) < at)).sum(2)
        return own.expand(batch, length), before.expand(batch, length)
    return None, None


def _allowed(mask: Tensor) -> Bool[Tensor, "batch length keys"]:
    """Which tokens may attend to which, from a 4-D mask: bool, 0 and 1, or what is added to attention."""
    one = mask[:, 0]
    return one > BLOCKED if one.is_floating_point() else one != 0


def _position_ids(stated: Any, shape: torch.Size) -> Tensor | None:
    """As one number per token; of several (rotary positions in text, height and width) those in the text."""
    if not isinstance(stated, Tensor):
        return None
    stated = stated[0] if stated.ndim == 3 else stated
    if stated.ndim != 2 or stated.shape[1] != shape[1] or stated.shape[0] not in (1, shape[0]):
        return None
    return stated.expand(shape)

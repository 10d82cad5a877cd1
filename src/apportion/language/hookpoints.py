"""Hookpoints: where in a transformers model activations are read, and where they are put back.

A hookpoint is the dotted path of a module, with the side of the module one means:

    model.layers.8            what the module returns (the same as ``model.layers.8:out``)
    model.layers.8.mlp:in     what the module is given: its first positional argument, or ``hidden_states=``
    model.layers.8.mlp:out[1] an element of the tuple it returns, counted from 0; of ``:in`` an argument of its forward
    model.layers.*            a glob; each ``*`` stands for one dotted part and matches in the order of the model

Modules may return a tensor or a tuple; without a number the tensor is meant, or the first element. Both are read and
written alike. Everything here is plain PyTorch hooks, removed again whatever happens. `capture` leaves the forward pass
as soon as the last wanted activation has been seen, so the layers above it and the language-model head are never
computed.

Compiled code (torch.compile, of a model, of parts of it, of a function around it) keeps no hooks; where hooks are in
place it runs uncompiled, and nothing is compiled (with the hooks in it). A module that runs several times in a forward
pass (ALBERT's layer, looped models) has no single activation per token, so it is no hookpoint: that is refused in the
first pass.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from apportion.language.hook_names import EMBEDDINGS, SCALED, is_foreign, to_hookpoint
from apportion.language.passes import alone, askable, modules_of, parameters_of, text_config
from apportion.rows.hookpoint import Hookpoint, matches, nearest_names


def module_at(model: nn.Module, hookpoint: Hookpoint) -> nn.Module:
    """The module of `model` that a hookpoint names; ValueError with the nearest names if there is none."""
    modules = modules_of(model)
    if hookpoint.path not in modules:
        raise ValueError(f"the model has no module {hookpoint.path!r}{nearest_names(hookpoint.path, modules)}")
    return modules[hookpoint.path]


def place_in(model: nn.Module, name: str) -> Hookpoint:
    """The hookpoint that `name` stands for in the model: one as it is, or a name of TransformerLens or interp-engine.

    A module of that name goes first. ValueError for a name that has no module in this model.
    """
    point = Hookpoint.parse(name)
    if not is_foreign(name) or name in (modules := modules_of(model)):
        return point
    family = model_family(model)
    if name in EMBEDDINGS:
        if name == "hook_embed" and family in SCALED:
            raise ValueError(f"{family} models scale what {name!r} names: use 'blocks.0.hook_resid_pre'")
        embedding = getattr(model, "get_input_embeddings", lambda: None)()
        found = [path for path, module in modules.items() if module is embedding]
        if not found:
            raise ValueError(f"{type(model).__name__} does not say what embeds its tokens: give the path of a module")
        return Hookpoint(found[0])
    return Hookpoint.parse(to_hookpoint(name, family, layer_stack(model)[0]))


def model_family(model: nn.Module) -> str:
    """The type of the model, or of its part that reads text, by which places have names (hook_names.py)."""
    config = text_config(model)
    kind = str(getattr(config, "model_type", type(model).__name__))
    behind = not getattr(config, "do_layer_norm_before", True)  # the smallest OPT norms behind its sums
    return f"{kind} (norms behind the sums)" if behind else kind


def expand(model: nn.Module, hookpoints: str | Iterable[str]) -> list[str]:
    """The canonical names of `hookpoints` with globs expanded in the order of the model, each name once.

    They may be names that other libraries use, see `place_in`.
    """
    names = [name for name in modules_of(model) if name]
    found: dict[str, None] = {}
    for text in [hookpoints] if isinstance(hookpoints, str) else hookpoints:
        point = place_in(model, text)
        hits = [name for name in names if name == point.path or matches(name, point.path)]
        if not hits:
            what = "no module that matches" if any(c in point.path for c in "*?[") else "no module"
            raise ValueError(f"the model has {what} {point.path!r}{nearest_names(point.path, names)}")
        found |= dict.fromkeys(str(point.at(name)) for name in hits)
    if not found:
        raise ValueError("no hookpoint was given: name at least one, for example 'model.layers.8'")
    return list(found)


def middle_layer(model: nn.Module) -> str:
    """The hookpoint at the output of the middle layer."""
    name, length = layer_stack(model)
    return f"{name}.{(length - 1) // 2}"


def layer_stack(model: nn.Module) -> tuple[str, int]:
    """The path of the list of layers, and how many there are: of the list of modules that is as long as the model has
    layers, else the longest; in the text tower if there are several towers, in the encoder if there is a decoder."""
    stacks = [(len(m), name) for name, m in modules_of(model).items() if isinstance(m, nn.ModuleList) and len(m)]
    if (text := text_config(model)) is not getattr(model, "config", None):
        towers = [n for n, m in modules_of(model).items() if n and getattr(m, "config", None) is text]
        stacks = [s for s in stacks if any(s[1].startswith(f"{tower}.") for tower in towers)] or stacks
    if not stacks:
        raise ValueError(f"{type(model).__name__} has no list of layers: give a hookpoint, as the path of a module")
    layers = getattr(text, "num_hidden_layers", None)
    length, name = next((stack for stack in stacks if stack[0] == layers), max(stacks, key=lambda stack: stack[0]))
    return name, length


def _returned(value: Any, hookpoint: Hookpoint) -> Tensor:
    """The tensor in what a module returned."""
    tensor = value
    if isinstance(value, (tuple, list)) and value:
        if hookpoint.element >= len(value):
            raise ValueError(
                f"hookpoint {str(hookpoint)!r} does not exist: the module returns {len(value)} things, so "
                f"{hookpoint.path}:out[{len(value) - 1}] is the last"
            )
        tensor = value[hookpoint.element]
    elif hookpoint.element:
        raise ValueError(
            f"hookpoint {str(hookpoint)!r} does not exist: the module returns no tuple but {_kind(value)}; write "
            f"{hookpoint.path!r}"
        )
    if not isinstance(tensor, Tensor):
        raise ValueError(
            f"hookpoint {str(hookpoint)!r} carries no tensor but {_kind(tensor)}: choose a module that returns a "
            f"tensor, or an element of a tuple that is one, as in '{hookpoint.path}:out[1]'"
        )
    return tensor


def _kind(value: Any) -> str:
    return "a tensor" if isinstance(value, Tensor) else type(value).__name__


def _with_returned(value: Any, tensor: Tensor, hookpoint: Hookpoint) -> Any:
    """What a module returned, with its tensor replaced."""
    if not isinstance(value, (tuple, list)):
        return tensor
    elements = [*value[: hookpoint.element], tensor, *value[hookpoint.element + 1 :]]
    return tuple(elements) if isinstance(value, tuple) else elements


def _argument(module: nn.Module, hookpoint: Hookpoint, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | str:
    """Where among the arguments a module was given its tensor: a position, or a name. ValueError if there is none."""
    names = dict(enumerate(parameters_of(module))) | {0: "hidden_states"}
    place = hookpoint.element if hookpoint.element < len(args) else names.get(hookpoint.element, "")
    given = args[place] if isinstance(place, int) else kwargs.get(place)
    if isinstance(given, Tensor):
        return place
    if hookpoint.element:
        got = f"{len(args)} by position" + "".join(f", {name}=" for name in kwargs)
        raise ValueError(
            f"hookpoint {str(hookpoint)!r} carries no tensor but {_kind(given)}: the module was given {got}; choose "
            "one of these that is a tensor"
        )
    raise ValueError(
        f"hookpoint {str(hookpoint)!r} has no input tensor (no positional argument and no "
        "hidden_states=): choose another module"
    )


Change = Callable[[Tensor], Tensor | None]


def _attach(model: nn.Module, hookpoint: Hookpoint, change: Change) -> RemovableHandle:
    """Call `change` with the tensor at the hookpoint in each forward pass; a tensor it returns replaces it."""

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        place = _argument(module, hookpoint, args, kwargs)
        new = change(args[place] if isinstance(place, int) else kwargs[place])
        if new is None:
            return None
        if isinstance(place, int):
            return (*args[:place], new, *args[place + 1 :]), kwargs
        return args, {**kwargs, place: new}

    def after(module: nn.Module, args: tuple[Any, ...], result: Any) -> Any:
        new = change(_returned(result, hookpoint))
        return None if new is None else _with_returned(result, new, hookpoint)

    module = module_at(model, hookpoint)
    if hookpoint.side == "in":
        return module.register_forward_pre_hook(before, with_kwargs=True)
    return module.register_forward_hook(after)


@contextmanager
def hooked(model: nn.Module, changes: Mapping[str, Change]) -> Iterator[None]:
    """Within the block, each forward pass maps the tensor at every hookpoint through its function.

    A function that returns None only looks. The hooks are removed at the end of the block, also after an exception.
    ValueError in a forward pass that runs a hookpoint's module more than once.
    """
    points = {text: place_in(model, text) for text in changes}
    with ExitStack() as stack:
        once = stack.enter_context(_once_each(model, [point.path for point in points.values()]))
        for text, change in changes.items():
            handle = _attach(model, points[text], partial(once, text, change))
            stack.callback(handle.remove)
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


class _Pass(threading.local):
    """What of a forward pass has been run so far; each thread has its own."""

    def __init__(self) -> None:
        self.depth, self.seen = 0, set[str]()


@contextmanager
def _once_each(model: nn.Module, paths: list[str]) -> Iterator[Callable[[str, Change, Tensor], Tensor | None]]:
    """Yields what calls functions that a forward pass may call once. What runs outside of one (a layer that is run
    again for its gradients) is not counted."""
    passes = [model, *(m for path in paths for m in askable(model, path))]
    now = _Pass()

    def begin(module: nn.Module, args: Any) -> None:
        if not now.depth:
            now.seen.clear()
        now.depth += 1

    def end(module: nn.Module, args: Any, result: Any) -> None:
        now.depth = max(0, now.depth - 1)

    def once(text: str, change: Change, x: Tensor) -> Tensor | None:
        if now.depth and text in now.seen:
            raise ValueError(
                f"the model runs {text!r} several times in one forward pass, so that a token has several "
                "activations there: choose a module that runs once"
            )
        now.seen.add(text)
        return change(x)

    with ExitStack() as stack:
        for module in dict.fromkeys(passes):
            stack.callback(module.register_forward_pre_hook(begin).remove)
            stack.callback(module.register_forward_hook(end, always_call=True).remove)
        yield once


class _SeenAll(Exception):
    """Raised from a hook to leave a forward pass whose remaining layers nobody needs."""


def capture(
    model: nn.Module, hookpoints: Iterable[str], *args: Any, stop: bool = True, **kwargs: Any
) -> dict[str, Tensor]:
    """Run ``model(*args, **kwargs)`` and return copies of the tensors at `hookpoints`, by canonical name.

    With `stop` the pass ends as soon as all of them have been seen, in whatever order they were given.
    """
    names = [str(place_in(model, text)) for text in hookpoints]
    seen: dict[str, Tensor] = {}

    def keep(name: str, tensor: Tensor) -> None:
        if name not in seen:
            seen[name] = tensor.clone()  # a later layer may work in place
        if stop and len(seen) == len(set(names)):
            raise _SeenAll

    with suppress(_SeenAll), alone(model), hooked(model, {name: partial(keep, name) for name in names}):
        model(*args, **kwargs)
    check_seen(names, seen)
    return {name: seen[name] for name in names}


def check_seen(names: Iterable[str], seen: Container[str]) -> None:
    """ValueError for a hookpoint that a forward pass never came to."""
    for name in names:
        if name not in seen:
            raise ValueError(f"the forward pass never ran {name!r}: choose a module the model uses on text")

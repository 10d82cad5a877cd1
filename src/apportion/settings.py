"""Settings are plain numbers: those of numpy and torch become Python's, whole ones that belong in an int become ints.

A dataclass of settings calls `settle(self)` first thing in its __post_init__, which also looks at words that are one of
a few. A function that takes settings by name calls `check_names`, which knows what other libraries call them. A
setting that came later, and whose default is not what was done before, is made by `newer`.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import Field, fields, is_dataclass
from difflib import get_close_matches
from functools import cache
from itertools import pairwise
from textwrap import dedent
from typing import Any, Literal, get_args, get_origin, get_type_hints

from apportion.fields import fits, in_words

ELSEWHERE = {
    "learning_rate": "lr",
    **dict.fromkeys(("batch_size", "train_batch_size", "train_batch_size_tokens"), "batch_tokens"),
    **dict.fromkeys(("steps", "max_steps", "training_tokens", "num_tokens"), "total_tokens"),
    **dict.fromkeys(("warmup_steps", "lr_warm_up_steps"), "warmup_share"),
    **dict.fromkeys(("decay_steps", "lr_decay_steps"), "decay_share"),
    "adam_beta1": "beta1",
    "adam_beta2": "beta2",
    "max_grad_norm": "clip_ratio",
    "dead_feature_window": "dead_window_tokens",
    **dict.fromkeys(("dict_size", "num_latents"), "d_sae"),
    **dict.fromkeys(("activation_dim", "act_size"), "d_in"),
    "hook_name": "hookpoint",
}
"""What a setting is called in other libraries, and here."""


def newer(default: Any, before: Any) -> Any:
    """A field of a dataclass of settings; `before` is what records meant that lack it, for they are older than it."""
    return dataclasses.field(default=default, metadata={"before": before})


def in_records(setting: Field[Any]) -> Any:
    """What a record means that lacks this setting."""
    return setting.metadata.get("before", setting.default)


def plain_number(value: Any) -> Any:
    """A number of numpy, or a tensor with one number, as Python's; anything else as it is."""
    if hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
        return value.item()
    return value


def settle(config: Any, strict: bool = True) -> None:
    """Make the numbers of a frozen dataclass plain; ValueError for what is none of the choices of a Literal. If
    `strict`, also for a fraction where a whole number belongs; else it stays, for somebody who can say more of it."""
    hints = get_type_hints(type(config))
    for field in fields(config):
        value = plain_number(getattr(config, field.name))
        if isinstance(value, float) and takes_whole(hints[field.name]):
            if strict and not value.is_integer():
                raise ValueError(f"{field.name} must be a whole number, got {value!r}.")
            value = int(value) if value.is_integer() else value
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueError(f"{field.name} = {value} does not fit into 64 bits. Use a number below 2**63.")
        check_choice(field.name, value, hints[field.name])
        object.__setattr__(config, field.name, value)


def check_kinds(config: type, values: Mapping[str, Any]) -> None:
    """ValueError for a value that is not of the kind that a dataclass of settings says it is, or none of its choices.

    A fraction where a whole number belongs is left to `settle`.
    """
    hints = get_type_hints(config)
    for name in [field.name for field in fields(config) if field.name in values]:
        value, kind = values[name], hints[name]
        check_choice(name, value, kind)
        if not fits(value, kind) and not (takes_whole(kind) and fits(value, float)):
            raise ValueError(f"{name} must be {in_words(kind)}, got {value!r}.")


def check_choice(name: str, value: Any, kind: Any) -> None:
    """ValueError for a value that is none of the choices of a Literal, or of a Literal or None."""
    choices = [word for part in (kind, *get_args(kind)) if get_origin(part) is Literal for word in get_args(part)]
    if choices and not fits(value, kind):
        raise ValueError(f"{name} cannot be {value!r}; {nearest(str(value), choices + ['None'] * fits(None, kind))}")


def meanings(config: type) -> dict[str, str]:
    """The docstring under each field of a dataclass and of those that it extends, in one line."""
    found: dict[str, str] = {}
    for kind in [kind for kind in reversed(config.__mro__) if is_dataclass(kind)]:
        found |= _own_meanings(kind)
    return found


@cache
def _own_meanings(kind: type) -> dict[str, str]:
    found: dict[str, str] = {}
    with suppress(OSError, TypeError):  # a class without a file
        (made,) = ast.parse(dedent(inspect.getsource(kind))).body
        for field, doc in pairwise(made.body):  # type: ignore[attr-defined]
            match field, doc:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    found[name] = " ".join(text.split())
    return found


def takes_whole(kind: Any) -> bool:
    """True for int, and for int or None."""
    return kind is int or kind == int | None


def require(config: Any, names: Iterable[str], fine: Callable[[Any], bool], what: str) -> None:
    """ValueError for the first of these settings whose value is not fine; `what` says what it has to be."""
    for name in names:
        if not fine(value := getattr(config, name)):
            raise ValueError(f"{name} {what}, got {value}.")


def check_names(given: Iterable[str], known: Iterable[str], what: str) -> None:
    """ValueError for a setting that does not exist, with the nearest that does."""
    known = list(known)
    for name in given:
        if name not in known:
            raise ValueError(f"{what} has no setting {name!r}; {nearest(name, known)}")


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of a message: what somebody may have meant."""
    known = list(known)
    close = [ELSEWHERE[word]] if ELSEWHERE.get(word) in known else get_close_matches(word, known, n=2, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"known are: {', '.join(known)}."

"""What a JSON object has to hold, said by type hints: {"rows": int, "probe": list[float] | None}."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin


def fits(value: Any, kind: Any) -> bool:
    """Is a value of the kind that a type hint names? As in JSON: a whole number is a float too, a bool is no number,
    and what is to become a dataclass is an object."""
    kind = dict if is_dataclass(kind) else kind
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return any(fits(value, part) for part in parts)
    if origin is Literal:
        return any(type(value) is type(part) and value == part for part in parts)
    if origin in (list, tuple):
        return isinstance(value, list | tuple) and all(fits(item, parts[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(fits(k, parts[0]) and fits(v, parts[1]) for k, v in value.items())
    if kind in (int, float):
        return isinstance(value, (int, float) if kind is float else int) and not isinstance(value, bool)
    return isinstance(value, NoneType if kind is None else kind)


def check_fields(
    values: Mapping[str, Any], needed: Mapping[str, Any], optional: Mapping[str, Any], where: str = ""
) -> None:
    """ValueError naming the first field that is missing or of another kind than its type hint; others may be there."""
    for name, kind in {**needed, **optional}.items():
        full = f"{where}.{name}" if where else name
        if name in values and not fits(values[name], kind):
            text = repr(values[name])
            raise ValueError(f"{full} is {text[:60] + '...' * (len(text) > 60)}, and should be {in_words(kind)}.")
        if name not in values and name in needed:
            raise ValueError(f"{full} is missing.")


WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", NoneType: "null"}
WORDS |= {dict: "an object", list: "a list", tuple: "a list"}


def in_words(kind: Any) -> str:
    """A type hint as it is said in a message."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(in_words(part) for part in parts)
    if origin is Literal:
        return f"one of {', '.join(map(str, parts))}"
    if origin in (list, tuple, dict):
        return f"{WORDS[origin]} of which each is {in_words(parts[1] if origin is dict else parts[0])}"
    return WORDS[dict] if is_dataclass(kind) else WORDS.get(kind, str(kind))

"""What the recipes' command lines share: lists as options, the log, and how they answer (answers.py)."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated, Any, Protocol, runtime_checkable

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from apportion.answers import answered


@runtime_checkable
class Recipe(Protocol):
    """A dataclass whose fields are the options."""

    def run(self) -> None: ...


def listed(kind: type, name: str) -> Any:
    """A comma-separated list on the command line."""
    return Annotated[
        tuple[kind, ...],
        PrimitiveConstructorSpec(
            nargs=1,
            metavar=name,
            instance_from_str=lambda words: tuple(kind(word) for word in words[0].split(",") if word),
            is_instance=lambda value: isinstance(value, tuple),
            str_from_instance=lambda value: [",".join(str(v) for v in value)],
        ),
    ]


def assigned(words: str) -> tuple[str, Any]:
    """NAME=VALUE; a value is what it is in JSON, or a word."""
    name, given, value = words.partition("=")
    if not (name and given):
        raise ValueError(f"{words!r} is not of the form NAME=VALUE.")
    with suppress(json.JSONDecodeError):
        return name, json.loads(value)
    return name, value


def main(
    recipe: type[Recipe], name: str, about: str | None, argv: Sequence[str] | None = None, *, prog: str = ""
) -> int:
    """Read the options, run, and return the exit code.

    `name` is that of the module in this folder, or of its logger after "apportion." if it is elsewhere; `prog` is how
    it is called, if not as a recipe.
    """
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    for logger in ("recipes", name):
        logging.getLogger(f"apportion.{logger}").setLevel(logging.INFO)

    def run(words: list[str]) -> None:
        tyro.cli(recipe, args=words, prog=prog or f"python -m apportion.recipes.{name}", description=about).run()

    return answered(name, run, argv, stopped="stopped; what was finished is kept.")

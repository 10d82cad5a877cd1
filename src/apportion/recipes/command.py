"""What the recipes' command lines share: lists as options, and how mistakes and Ctrl-C are answered."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Sequence
from typing import Annotated, Any, Protocol

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from apportion.trust import shown


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


def main(recipe: type[Recipe], name: str, about: str | None, argv: Sequence[str] | None = None) -> int:
    """Read the options, run, and return the exit code: 2 with one line for a mistake, 130 for Ctrl-C.

    `name` is that of the module in this folder, and of its logger after "apportion.".
    """
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    logging.getLogger(f"apportion.{name}").setLevel(logging.INFO)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # being told to end is like Ctrl-C: clean up
    try:
        tyro.cli(recipe, args=argv, prog=f"python -m apportion.recipes.{name}", description=about).run()
    except (ValueError, OSError) as error:
        sys.stderr.write(f"{name}: {shown(' '.join(str(error).split()))}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write(f"{name}: stopped; what was finished is kept.\n")
        return 130
    return 0

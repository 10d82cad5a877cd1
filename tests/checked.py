"""The type checker of the tests (conftest.py): beartype, for which a whole number is a float too.

jaxtyping asks twice, for the parameters before a call, and for these and what is returned after it. Only the second
counts, so that a function may refuse a mistake in words: what it lets pass must be what its annotations say. Of a
dataclass it is what the fields hold in the end, whatever they were given as.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    own = inspect.signature(function).parameters.values()
    returned = [p.name for p in own if p.name.startswith("ret") and p.kind is p.KEYWORD_ONLY]
    if not returned:
        return function
    wrapped = checked(function)

    def made(self: Any, *args: Any, **given: Any) -> Any:
        if not is_dataclass(self):
            return wrapped(self, *args, **given)
        return wrapped(self, **{f.name: getattr(self, f.name) for f in fields(self) if f.init}, **{returned[0]: None})

    return made if function.__name__ == "__init__" else wrapped

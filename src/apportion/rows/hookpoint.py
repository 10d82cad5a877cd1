"""The name of a hookpoint, the place in a model that rows come from: the dotted path of a module, and its side.

model.layers.8            what the module returns (the same as ``model.layers.8:out``)
model.layers.8.mlp:in     what the module is given
model.layers.8.mlp:out[1] the second thing it returns, counted from 0; ``:out[0]`` is ``:out``
model.layers.*            a glob of paths; each ``*`` stands for one dotted part
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

FORM = re.compile(r"([^:]+)(?::(in|out)(?:\[([0-9]{1,4})\])?)?")
"""A path, which may hold the brackets of a glob; a side; which of the things that are given or returned there."""


@dataclass(frozen=True)
class Hookpoint:
    """A module path, a side of that module, and which of its arguments or of the elements of a tuple it returns."""

    path: str
    side: str = "out"
    element: int = 0

    @staticmethod
    def parse(text: str) -> Hookpoint:
        """Read "path", "path:side" or "path:side[element]"; ValueError for anything else."""
        found = FORM.fullmatch(text)
        if found is None:
            raise ValueError(
                f"{text!r} is not a hookpoint: write a module path such as 'model.layers.8' (its output), "
                "'model.layers.8.mlp:in' (its input) or 'model.layers.8.mlp:out[1]' (the second thing it returns)"
            )
        path, side, element = found.groups()
        return Hookpoint(without_compiling(path), side or "out", int(element or 0))

    def at(self, path: str) -> Hookpoint:
        """The same place of another module."""
        return replace(self, path=path)

    def __str__(self) -> str:
        if self.element:
            return f"{self.path}:{self.side}[{self.element}]"
        return self.path if self.side == "out" else f"{self.path}:{self.side}"


def nearest_names(path: str, names: Iterable[str]) -> str:
    """A hint such as "; the nearest are ..." for an error message."""
    near = difflib.get_close_matches(path, [name for name in names if name], n=4, cutoff=0.3)
    return f"; the nearest are {', '.join(repr(name) for name in near)}" if near else ""


def matches(name: str, pattern: str) -> bool:
    """Does the dotted `name` match the glob part by part, so that ``*`` never crosses a dot?"""
    parts, globs = name.split("."), pattern.split(".")
    return len(parts) == len(globs) and all(fnmatchcase(part, glob) for part, glob in zip(parts, globs, strict=True))


def without_compiling(name: str) -> str:
    """The name of a module without the parts that torch.compile adds."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def choose_from(names: Iterable[str], wanted: str) -> list[str]:
    """Those of the hookpoints `names` that `wanted` stands for: hookpoints or globs, separated by commas.

    Each once; in the order of `wanted`, those of a glob in the order of `names`.
    """
    known, found = list(names), dict[str, None]()
    for text in wanted.split(","):
        point = Hookpoint.parse(text.strip())
        points = {name: Hookpoint.parse(name) for name in known}
        hits = [
            n for n, p in points.items() if p == point or (p.at(point.path) == point and matches(p.path, point.path))
        ]
        if not hits:
            raise ValueError(f"there is no hookpoint {str(point)!r}: choose among {', '.join(known)}")
        found |= dict.fromkeys(hits)
    return list(found)

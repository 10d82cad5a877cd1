"""The name of a hookpoint, the place in a model that rows come from: the dotted path of a module, and its side.

model.layers.8            what the module returns (the same as ``model.layers.8:out``)
model.layers.8.mlp:in     what the module is given
model.layers.*            a glob; each ``*`` stands for one dotted part
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

SIDES = ("in", "out")


@dataclass(frozen=True)
class Hookpoint:
    """A module path and a side of that module."""

    path: str
    side: str = "out"

    @staticmethod
    def parse(text: str) -> Hookpoint:
        """Read "path" or "path:side"; ValueError for anything else."""
        path, colon, side = text.partition(":")
        side = side if colon else "out"
        if not path or side not in SIDES:
            raise ValueError(
                f"{text!r} is not a hookpoint: write a module path such as 'model.layers.8' "
                "(its output) or 'model.layers.8.mlp:in' (its input)"
            )
        return Hookpoint(without_compiling(path), side)

    def __str__(self) -> str:
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
        hits = [n for n, p in points.items() if p.side == point.side and (p == point or matches(p.path, point.path))]
        if not hits:
            raise ValueError(f"there is no hookpoint {str(point)!r}: choose among {', '.join(known)}")
        found |= dict.fromkeys(hits)
    return list(found)

"""The sites of a layer, by the words of Llama Scope (arXiv 2410.20526): where a suite of SAEs reads.

residual      what the layer returns
attention     what attention adds to the residual stream
mlp           what the MLP adds to it
transcoder    what the MLP is given, and as target what it adds
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from apportion.language.hookpoints import expand, layer_stack, model_family, place_in
from apportion.rows.hookpoint import Hookpoint, matches

SITES = ("residual", "attention", "mlp", "transcoder")
NAMED = {"attention": "hook_attn_out", "mlp": "hook_mlp_out", "mlp in": "mlp.hook_in"}
"""What TransformerLens calls them, in the families whose names are known (hook_names.py)."""
PARTS = {
    "attention": ("self_attn", "attn", "attention", "self_attention"),
    "mlp": ("mlp", "feed_forward", "ffn", "block_sparse_moe"),
}
"""What the parts of a layer are called elsewhere."""


@dataclass(frozen=True)
class Place:
    layer: str
    """Its path."""
    site: str
    hookpoint: str
    target: str | None = None

    @property
    def number(self) -> int | None:
        """Of the layer."""
        return int(found[1]) if (found := re.search(r"\.(\d+)$", self.layer)) else None

    @property
    def name(self) -> str:
        layer = re.sub(r"[^\w-]", "_", self.layer) if self.number is None else f"layer{self.number:02d}"
        return f"{layer}-{self.site}"


def check_sites(sites: Iterable[str]) -> None:
    for site in sites:
        if site not in SITES:
            raise ValueError(f"There is no site {site!r}; there are {', '.join(SITES)}.")


def places_in_model(model: Any, layers: str, sites: Iterable[str]) -> list[Place]:
    """The places that these sites stand for at each of `layers` (a hookpoint, often a glob)."""
    stack, known = layer_stack(model)[0], _modules(model)

    def find(layer: str, what: str) -> str:
        number = layer.removeprefix(f"{stack}.")
        if not number.isdigit():
            raise ValueError(f"{layer!r} is no layer of the model, which has them in {stack!r}: ask for its residual")
        try:
            return str(place_in(model, f"blocks.{number}.{NAMED[what]}"))
        except ValueError:
            return _part(layer, what, known.__contains__, f"a {model_family(model)} model")

    return [_place(layer, site, find) for layer in expand(model, layers) for site in sites]


def places_in_cache(names: Iterable[str], layers: str, sites: Iterable[str]) -> list[Place]:
    """The same of a cache that has these hookpoints."""
    names = [*names]
    there = dict.fromkeys(above for name in names for above in _paths(name) if matches(above, layers))
    if not there:
        raise ValueError(f"the cache has nothing at {layers!r}; it has {', '.join(names)}")

    def find(layer: str, what: str) -> str:
        return _part(layer, what, names.__contains__, "the cache")

    places = [_place(layer, site, find) for layer in there for site in sites]
    for place in places:
        if missing := {place.hookpoint, place.target} - {None, *names}:
            raise ValueError(f"the cache does not have {missing.pop()!r}; it has {', '.join(names)}")
    return places


def _place(layer: str, site: str, find: Callable[[str, str], str]) -> Place:
    if site == "residual":
        return Place(layer, site, layer)
    if site == "transcoder":
        return Place(layer, site, find(layer, "mlp in"), find(layer, "mlp"))
    return Place(layer, site, find(layer, site))


def _part(layer: str, what: str, has: Callable[[str], bool], where: str) -> str:
    """A part of a layer by the name that it has in most models."""
    kind, side = (what.removesuffix(" in"), ":in" if what.endswith(" in") else "")
    for name in PARTS[kind]:
        if has(found := f"{layer}.{name}{side}"):
            return found
        if has(f"{layer}.{name}") and side:
            return found
    known = ", ".join(PARTS[kind])
    raise ValueError(
        f"{where} has no {kind} in {layer!r} ({known}): name the modules themselves, as in --hookpoints "
        f"'{layer}.*' --sites residual"
    )


def _modules(model: Any) -> set[str]:
    return {name for name, _ in model.named_modules()}


def _paths(name: str) -> Iterable[str]:
    """A hookpoint, and the modules around it."""
    yield name
    parts = Hookpoint.parse(name).path.split(".")
    yield from (".".join(parts[:n]) for n in range(len(parts), 0, -1))

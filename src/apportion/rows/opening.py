"""The rows that an SAE takes, from a cache or a file: of one hookpoint, of a pair, of several together, of every layer.

`SAE.row_kind` is the word for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from apportion.architectures import SAE
from apportion.architectures.base import RowKind
from apportion.rows.arrays import ArrayStore, open_array
from apportion.rows.batch import RowStore
from apportion.rows.layout import MANIFEST
from apportion.rows.manifest import read_manifest
from apportion.rows.sites import LayersStore, PairStore, SitesStore, open_stores
from apportion.rows.store import ActivationStore
from apportion.urls import url_of


def joined(kind: RowKind, stores: Sequence[ActivationStore]) -> RowStore:
    """Rows of this kind, made of the same tokens at one hookpoint or several; of a pair x is the first."""
    if kind == "one":
        return stores[0]
    return PairStore(*stores) if kind == "pair" else {"sites": SitesStore, "layers": LayersStore}[kind](stores)


def open_rows(
    folder: str | Path,
    kind: RowKind,
    hookpoint: str | None,
    target_hookpoint: str | None = None,
    name: str = "this SAE",
) -> RowStore:
    """The rows of a cache for an SAE of that kind; `hookpoint` may be a list with commas and globs where it takes
    several. ValueError, in which `name` stands for the SAE, if the cache has no such rows."""
    if holds_array(folder):
        return _array_for(kind, open_array(folder), name)
    if kind == "one":
        return ActivationStore(folder, hookpoint)
    here = f"{folder} has {', '.join(read_manifest(folder)['hookpoints'])}."
    if kind != "pair":
        stores = open_stores(folder, hookpoint)
    elif hookpoint is None or target_hookpoint is None:
        raise ValueError(f"{name} needs --hookpoint (what it reads) and --target-hookpoint (what it predicts). {here}")
    else:
        stores = [ActivationStore(folder, place) for place in (hookpoint, target_hookpoint)]
        if stores[0].hookpoint == stores[1].hookpoint:
            raise ValueError(f"{name} cannot read and predict the same: {stores[0].hookpoint}. {here}")
    if len(stores) < 2:
        raise ValueError(
            f"{name} takes two hookpoints or more, as in --hookpoint model.layers.1,model.layers.2. {here}"
        )
    return joined(kind, stores)


def holds_rows(path: str | Path) -> bool:
    """Is it a cache, or a file of rows?"""
    return url_of(path) is not None or holds_array(path) or (Path(path) / MANIFEST).exists()


def holds_array(path: str | Path) -> bool:
    return url_of(path) is None and Path(path).suffix == ".npy"


def _array_for(kind: RowKind, store: ArrayStore, name: str) -> ArrayStore:
    """ValueError if the rows of a file are not those that an SAE of this kind takes."""
    if kind == "pair":
        raise ValueError(
            f"{name} predicts a target, and a file holds only what it reads: train it in Python, on ArrayStore(x, "
            "target=y), or on a cache of two hookpoints."
        )
    if (store.x.ndim == 3) != (kind == "sites"):
        wanted = "[n, num_sites, d_in]" if kind == "sites" else "[n, d_in]"
        raise ValueError(f"{name} takes rows {wanted}, and {store.file} has shape {list(store.x.shape)}.")
    return store


def rows_for(sae: SAE, folder: str | Path | None = None) -> RowStore:
    """The rows of a cache for this SAE, at its own hookpoints; None: of the cache, or caches, it was trained on."""
    if folder is None and sae.source.folders:
        names = [site.hookpoint for site in sae.source.sites]
        return joined(sae.row_kind, [ActivationStore(*one) for one in zip(sae.source.folders, names, strict=True)])
    if (place := folder or sae.source.folder) is None:
        raise ValueError(f"{sae.name} does not say which cache it was trained on: name one.")
    return open_rows(place, sae.row_kind, sae.hookpoint, sae.target_hookpoint, sae.name)


def settings_of(source: Any) -> dict[str, Any]:
    """Settings of an SAE that follow from the rows it will be trained on."""
    rows = getattr(source, "store", source)
    more = {name: getattr(rows, name, None) for name in ("d_out", "target_hookpoint", "num_sites")}
    known = {name: value for name, value in more.items() if value is not None}
    return {"d_in": source.d_in, "hookpoint": source.hookpoint, **known}

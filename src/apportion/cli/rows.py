"""Which rows of a cache an SAE takes: of one hookpoint, of a pair, of several together, of every layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from apportion.architectures import SAES

Kind = Literal["one", "pair", "sites", "layers"]


def kind_of(name: str) -> Kind:
    """What a row of this SAE is made of: "layers" are rows of one hookpoint each, of all of them in turn."""
    settings = SAES[name].settings()
    if "target_hookpoint" in settings:
        return "pair"
    if "num_sites" in settings:
        return "sites"
    return "layers" if SAES[name].all_hookpoints else "one"


def open_rows(folder: str | Path, name: str, hookpoint: str | None, target_hookpoint: str | None = None) -> Any:
    """The rows of a cache for this SAE; `hookpoint` may be a list with commas and globs where it takes several."""
    from apportion.rows.manifest import read_manifest
    from apportion.rows.sites import LayersStore, PairStore, SitesStore, open_stores
    from apportion.rows.store import ActivationStore

    kind = kind_of(name)
    if kind == "one":
        return ActivationStore(folder, hookpoint)
    here = f"{folder} has {', '.join(read_manifest(Path(folder))['hookpoints'])}."
    if kind == "pair":
        if hookpoint is None or target_hookpoint is None:
            raise ValueError(
                f"{name} needs --hookpoint (what it reads) and --target-hookpoint (what it predicts). {here}"
            )
        x, target = ActivationStore(folder, hookpoint), ActivationStore(folder, target_hookpoint)
        if x.hookpoint == target.hookpoint:
            raise ValueError(f"{name} cannot read and predict the same: {x.hookpoint}. {here}")
        return PairStore(x, target)
    stores = open_stores(folder, hookpoint)
    if len(stores) < 2:
        raise ValueError(
            f"{name} takes two hookpoints or more, as in --hookpoint model.layers.1,model.layers.2. {here}"
        )
    return SitesStore(stores) if kind == "sites" else LayersStore(stores)


def settings_of(source: Any) -> dict[str, Any]:
    """Settings of an SAE that follow from the rows it will be trained on."""
    store = getattr(source, "store", None)
    more = {name: getattr(store, name) for name in ("d_out", "target_hookpoint", "num_sites") if hasattr(store, name)}
    return {"d_in": source.d_in, "hookpoint": source.hookpoint, **more}

"""A released SAE on disk: config.json and model.safetensors. Nothing is ever unpickled.

config.json         {"format": "apportion", "version": 1, "sae": name, "settings": {...}, "info": {...}, "id": digest}
model.safetensors   parameters, input description, thresholds and densities, under their names in the module

Saving over an SAE replaces both or neither: one rename puts the new weights in place, whose metadata hold the config
that belongs to them. If a crash comes between that and the rename of the config, `load` finds one with another id, and
takes that of the weights. (A config edited by hand keeps its id, and is taken as it is.)
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from apportion.architectures.checks import check_info, check_tensors
from apportion.disk import json_text, plain, replacing, write_tensors

if TYPE_CHECKING:
    from apportion.architectures.base import SAE

VERSION = 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"
OWN_CONFIG = "config"
"""In the metadata of the weights: the text of the config that belongs to them."""


def save(sae: SAE, folder: Path) -> None:
    """Write both files, or leave what was there. ValueError for what `load` would not read."""
    folder = folder.expanduser()
    tensors = {name: t.detach().contiguous().cpu() for name, t in sae.state_dict().items()}
    try:
        check_info(plain(sae.info))
        check_tensors(sae, tensors)
    except ValueError as error:
        raise ValueError(f"This SAE could not be read again, and is not saved: {error}") from None
    folder.mkdir(parents=True, exist_ok=True)
    config = {"format": "apportion", "version": VERSION, "sae": sae.name, "settings": sae.settings(), "info": sae.info}
    text = json_text(config | {"id": hashlib.sha256(json_text(config).encode()).hexdigest()})
    with replacing(folder / CONFIG) as partial:
        partial.write_text(text, encoding="utf-8")
        write_tensors(folder / WEIGHTS, tensors, {OWN_CONFIG: text})

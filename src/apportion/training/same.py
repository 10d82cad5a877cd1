"""Is a run that is to be resumed the one that was begun?"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from apportion import about
from apportion.about import About, ModelRecord
from apportion.disk import json_text
from apportion.same_model import model_difference

MAY_DIFFER = {"log_every_steps", "checkpoint_every_tokens", "checkpoint_every_minutes"} | about.MAY_DIFFER
"""What may change when a run is resumed: how it is watched, and what says nothing of which rows it is trained on."""


def check_same(
    folder: Path, before: Mapping[str, Any], now: Mapping[str, Any], defaults: Mapping[str, Mapping[str, Any]]
) -> None:
    """ValueError unless a run's record and the present description say the same.

    A setting that the record lacks, because the version that wrote it had none, meant its default, which `defaults` has
    for each part. Of the source only what was recorded is compared.
    """
    now = json.loads(json_text(now))  # as a record has it
    for part in ("sae", "objective", "train"):
        old, new = (_settings(record, part) for record in (before, now))
        usual = {name: value for name, value in defaults[part].items() if name in new}
        _compare(folder, part, usual | old, new, old.keys() | new.keys())
    old = _source(before["source"], folder)
    _compare(folder, "source", old, now["source"], old)
    _compare(folder, "sae", before["sae"], now["sae"], ["name"])
    _compare(folder, "run", {"num_saes": 1, **before}, {"num_saes": 1, **now}, ["num_saes"])


def _settings(record: Mapping[str, Any], part: str) -> dict[str, Any]:
    """Those of the SAE, of the objective (which may have none), of training."""
    return record["sae"]["settings"] if part == "sae" else record.get(part) or {}


def _source(recorded: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What a record says of its source, as this version writes it."""
    try:
        return json.loads(json_text(About.from_json(recorded, "source").to_json()))
    except ValueError as error:
        raise ValueError(f"{folder / 'run.json'} is damaged: {error} Begin anew elsewhere.") from None


def _compare(folder: Path, part: str, old: Mapping[str, Any], new: Mapping[str, Any], names: Any) -> None:
    for name in sorted(names):
        if name not in MAY_DIFFER and not _same(name, old.get(name), new.get(name)):
            raise ValueError(
                f"{folder} was started with {part} {name} = {old.get(name)!r}, now it is {new.get(name)!r}. "
                "Resume with the same settings, or start a new run in another folder."
            )


def _same(name: str, old: Any, new: Any) -> bool:
    """Models are compared by what they compute: their records differ between versions of transformers."""
    if name != "model" or not (isinstance(old, dict) and isinstance(new, dict)):
        return old == new
    return model_difference(ModelRecord.from_json(old), ModelRecord.from_json(new)) is None

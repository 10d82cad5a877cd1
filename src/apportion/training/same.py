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

MAY_DIFFER = {
    *("log_every_steps", "checkpoint_every_tokens", "checkpoint_every_minutes"),
    *about.MAY_DIFFER,
}
"""What may change when a run is resumed: how it is watched, and what says nothing of which rows it is trained on."""


def check_same(
    folder: Path, before: Mapping[str, Any], now: Mapping[str, Any], defaults: Mapping[str, Mapping[str, Any]]
) -> None:
    """ValueError unless a run's record and the present description say the same.

    A setting that the record lacks, because the version that wrote it had none, meant its default, which `defaults` has
    for each part. Of the source only what was recorded is compared.
    """
    now = json.loads(json_text(now))  # as a record has it
    for part, where in (("sae", ("sae", "settings")), ("objective", ("objective",)), ("train", ("train",)),
                        ("source", ("source",))):  # fmt: skip
        old, new = _at(before, where, folder, optional=part == "objective"), _at(now, where, folder, optional=True)
        if part != "source":
            old = {name: defaults.get(part, {}).get(name) for name in new.keys() & defaults.get(part, {}).keys()} | old
        else:
            old = _source(old, folder)
        _compare(folder, part, old, new, old.keys() if part == "source" else old.keys() | new.keys())
    for part, name, default in (("sae", "name", None), ("run", "num_saes", 1)):
        old, new = (record["sae"] if part == "sae" else record for record in (before, now))
        _compare(folder, part, {name: old.get(name, default)}, {name: new.get(name, default)}, [name])


def _at(record: Mapping[str, Any], where: tuple[str, ...], folder: Path, optional: bool) -> dict[str, Any]:
    found: Any = record
    for name in where:
        found = found.get(name) if isinstance(found, Mapping) else None
    if found is None and optional:
        return {}
    if not isinstance(found, dict):
        raise ValueError(f"{folder / 'run.json'} is damaged: it has no {'.'.join(where)}. Begin anew elsewhere.")
    return found


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

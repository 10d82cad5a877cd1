"""One checkpoint of a run: a folder that is there whole or not at all.

model.safetensors, config.json    the SAE; of several, each in its folder sae-<i>
trainer.safetensors               averages of Adam, counters, bounds
trainer.json                      steps, tokens, position of the source; sha256 of every file and of itself
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors.torch import load_file
from torch import Tensor

from apportion.activations.batch import Source
from apportion.architectures import SAE
from apportion.architectures.files import load
from apportion.disk import json_text, plain, read_json, whole_folder, write_json, write_tensors

if TYPE_CHECKING:
    from apportion.training.trainer import Trainer

TENSORS, VALUES = "trainer.safetensors", "trainer.json"


class Checkpoint(NamedTuple):
    saes: list[SAE]
    tensors: dict[str, Tensor]
    values: dict[str, Any]


def write_checkpoint(folder: Path, trainer: Trainer, source: Source) -> None:
    from apportion.training.run import subfolders

    tensors, values = trainer.state()
    with whole_folder(folder, last=[VALUES]) as partial:
        for sae, name in zip(trainer.saes, subfolders(trainer), strict=True):
            sae.save(partial / name)
        write_tensors(partial / TENSORS, {name: t.detach().cpu() for name, t in tensors.items()})
        record = plain({**values, "source": source.state_dict()})
        record["sha256"] = {str(file.relative_to(partial)): _digest(file) for file in _files(partial)}
        record["sha256"][VALUES] = _own_digest(record)
        write_json(partial / VALUES, record)


def read_checkpoint(folder: Path, trainer: Trainer) -> Checkpoint:
    """All of it, checked; any exception for one that is damaged, incomplete, or does not fit the trainer."""
    from apportion.training.run import subfolders

    values = read_json(folder / VALUES)
    for name, digest in values.get("sha256", {}).items():  # older versions did not write them
        found = _own_digest(values) if name == VALUES else _digest(folder / name)
        if found != digest:
            raise ValueError(f"{name} changed since it was written")
    saved = [load(folder / name) for name in subfolders(trainer)]
    for ours, theirs in zip(trainer.saes, saved, strict=True):
        if (ours.name, ours.settings()) != (theirs.name, theirs.settings()):
            raise ValueError(f"it holds another SAE ({theirs.name})")
    tensors = load_file(folder / TENSORS)
    trainer.check_state(tensors, values)
    return Checkpoint(saved, tensors, values)


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _own_digest(record: dict[str, Any]) -> str:
    """Of what the record says, apart from this."""
    others = {name: digest for name, digest in record["sha256"].items() if name != VALUES}
    return hashlib.sha256(json_text({**record, "sha256": others}).encode()).hexdigest()

"""One checkpoint of a run: a folder that is there whole or not at all.

model.safetensors, config.json    the SAE; of several, each in its folder sae-<i>
trainer.safetensors               averages of Adam, counters, bounds
trainer.json                      steps, tokens, position of the source; checksums (crc32) of every file and of itself
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors.torch import load_file
from torch import Tensor

from apportion.architectures import SAE
from apportion.architectures.loading import load
from apportion.disk import json_text, plain, read_json, whole_folder, write_json, write_tensors
from apportion.rows.batch import Source

if TYPE_CHECKING:
    from apportion.training.trainer import Trainer

TENSORS, VALUES = "trainer.safetensors", "trainer.json"


class Checkpoint(NamedTuple):
    saes: list[SAE]
    tensors: dict[str, Tensor]
    values: dict[str, Any]


def write_checkpoint(folder: Path, trainer: Trainer, source: Source) -> None:
    tensors, values = trainer.state()
    with whole_folder(folder, last=[VALUES]) as partial:
        for sae, name in zip(trainer.saes, subfolders(trainer), strict=True):
            sae.save(partial / name)
        write_tensors(partial / TENSORS, {name: t.detach().cpu() for name, t in tensors.items()})
        record = plain({**values, "source": source.state_dict()})
        files = sorted(file for file in partial.rglob("*") if file.is_file())
        record["crc32"] = {str(file.relative_to(partial)): _checksum(file) for file in files}
        record["crc32"][VALUES] = _own_checksum(record)
        write_json(partial / VALUES, record)


def read_checkpoint(folder: Path, trainer: Trainer) -> Checkpoint:
    """All of it, checked; any exception for one that is damaged, incomplete, or does not fit the trainer."""
    values = read_json(folder / VALUES)
    for name, wanted in values.get("crc32", {}).items():  # older versions did not write them
        found = _own_checksum(values) if name == VALUES else _checksum(folder / name)
        if found != wanted:
            raise ValueError(f"{name} changed since it was written")
    saved = [load(folder / name) for name in subfolders(trainer)]
    for ours, theirs in zip(trainer.saes, saved, strict=True):
        if (ours.name, ours.settings()) != (theirs.name, theirs.settings()):
            raise ValueError(f"it holds another SAE ({theirs.name})")
    tensors = load_file(folder / TENSORS)
    trainer.check_state(tensors, values)
    return Checkpoint(saved, tensors, values)


def _checksum(file: Path) -> str:
    found = 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            found = zlib.crc32(block, found)
    return f"{found:08x}"


def _own_checksum(record: dict[str, Any]) -> str:
    """Of what the record says, apart from this."""
    others = {name: found for name, found in record["crc32"].items() if name != VALUES}
    return f"{zlib.crc32(json_text({**record, 'crc32': others}).encode()):08x}"


def subfolders(trainer: Trainer) -> list[str]:
    """Where the SAEs of a run lie in its folder: a single one right in it."""
    return ["."] if len(trainer.saes) == 1 else [f"sae-{i}" for i in range(len(trainer.saes))]

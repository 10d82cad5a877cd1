"""The folder of a training run.

run.json            the whole configuration: SAE, training, source, versions
metrics.jsonl       one line every few steps
checkpoint-<step>/  everything to go on from there; only the newest is kept
config.json, model.safetensors    the finished SAE: ap.load(folder); of several, each in its folder sae-<i>
"""

from __future__ import annotations

import json
import shutil
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from apportion.activations.fingerprint import model_difference
from apportion.architectures.files import load
from apportion.disk import damaged, naming, plain, read_record, whole_folder, write_json, write_tensors, write_text

if TYPE_CHECKING:
    from apportion.activations.batch import Source
    from apportion.training.trainer import Trainer

MAY_DIFFER = {
    "log_every_steps", "checkpoint_every_tokens", "folder", "folders", "filtered", "filtered_share", "rows_seen",
    "seconds", "tokens_per_s",
}  # fmt: skip
"""What may change when a run is resumed: how it is watched, where the cache lies and how long it took to collect,
counts of a source that runs live."""


def read_run(folder: Path) -> dict[str, Any]:
    """run.json; ValueError if it lacks what every run has."""
    objective = (dict, type(None))
    return read_record(
        folder / "run.json", sae__name=str, sae__settings=dict, train=dict, source=dict, objective=objective
    )


class RunFolder:
    def __init__(self, folder: Path, description: dict[str, Any], resume: bool) -> None:
        folder = self.folder = folder.expanduser()
        record = folder / "run.json"
        if record.exists():
            if not resume:
                raise ValueError(f"{folder} already holds a run. Resume it (--resume) or choose another folder.")
            self._check_same(read_run(folder), description)
            return
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"{folder} exists and is not a run of apportion. Choose another folder.")
        folder.mkdir(parents=True, exist_ok=True)
        versions = {name: version(name) for name in ("apportion", "torch")} | {"python": sys.version.split()[0]}
        write_json(record, {**description, "versions": versions})

    def _check_same(self, before: dict[str, Any], now: dict[str, Any]) -> None:
        before, now = json.loads(json.dumps(before)), json.loads(json.dumps(now))
        for part, old, new in (
            ("sae", before["sae"]["settings"], now["sae"]["settings"]),
            ("sae", {"name": before["sae"]["name"]}, {"name": now["sae"]["name"]}),
            ("run", {"num_saes": before.get("num_saes", 1)}, {"num_saes": now.get("num_saes", 1)}),
            ("objective", before.get("objective") or {}, now.get("objective") or {}),
            ("train", before["train"], now["train"]),
            ("source", before["source"], now["source"]),
        ):
            added = new.keys() - old.keys() if part == "source" else set()  # older versions did not record it
            for key in sorted((old.keys() | new.keys()) - added):
                if key not in MAY_DIFFER and not _same(key, old.get(key), new.get(key)):
                    raise ValueError(
                        f"{self.folder} was started with {part} {key} = {old.get(key)!r}, now it is {new.get(key)!r}. "
                        "Resume with the same settings, or start a new run in another folder."
                    )

    def log(self, values: dict[str, float]) -> None:
        lines = self.folder / "metrics.jsonl"
        with naming(lines), lines.open("a", encoding="utf-8") as file:
            file.write(json.dumps(plain(values)) + "\n")

    def _checkpoints(self) -> list[Path]:
        found = [p for p in self.folder.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
        return sorted(found, key=lambda p: int(p.name.split("-")[1]))

    def save_checkpoint(self, trainer: Trainer, source: Source) -> None:
        """Write a new checkpoint, then remove older ones; a crash in between leaves a whole one."""
        older = {p for p in self.folder.glob("checkpoint-*") if p.is_dir()}  # also what a crash left unfinished
        tensors, values = trainer.state()
        with whole_folder(final := self.folder / f"checkpoint-{trainer.steps}", last=["trainer.json"]) as partial:
            for sae, name in zip(trainer.saes, subfolders(trainer), strict=True):
                sae.save(partial / name)
            write_tensors(partial / "trainer.safetensors", {name: t.detach().cpu() for name, t in tensors.items()})
            write_json(partial / "trainer.json", {**values, "source": source.state_dict()})
        for folder in older - {final}:
            shutil.rmtree(folder)

    def load_checkpoint(self, trainer: Trainer, source: Source) -> bool:
        """Restore trainer, SAE and source from the newest checkpoint; False if there is none."""
        checkpoints = self._checkpoints()
        if not checkpoints and (self.folder / subfolders(trainer)[0] / "config.json").exists():
            raise ValueError(f"The run in {self.folder} is finished: ap.load reads it. Choose another for a new run.")
        if not checkpoints:
            self._cut_metrics(0)
            return False
        folder = checkpoints[-1]
        for sae, name in zip(trainer.saes, subfolders(trainer), strict=True):
            saved = load(folder / name)
            sae.load_state_dict(saved.state_dict())
            sae.info |= saved.info
        values = read_record(folder / "trainer.json", steps=int, tokens=int, seconds=(int, float), source=dict)
        try:
            trainer.load_state(load_file(folder / "trainer.safetensors"), values)
            source.load_state_dict(values["source"])
        except (SafetensorError, KeyError, TypeError, RuntimeError) as error:
            raise damaged(folder, error, "is a damaged checkpoint") from error
        self._cut_metrics(trainer.steps)
        return True

    def _cut_metrics(self, steps: int) -> None:
        """Forget logged lines after the checkpoint; they will be written again."""
        file = self.folder / "metrics.jsonl"
        if file.exists():
            lines = [line for line in file.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
            write_text(file, "".join(line for line in lines if json.loads(line)["step"] <= steps))

    def finish(self, trainer: Trainer, keep: bool = False) -> None:
        """The finished SAE replaces the checkpoints, unless these are to be kept."""
        for sae, name in zip(trainer.saes, subfolders(trainer), strict=True):
            sae.save(self.folder / name)
        for folder in () if keep else self.folder.glob("checkpoint-*"):
            shutil.rmtree(folder)


def _same(key: str, old: Any, new: Any) -> bool:
    """Models are compared by what they compute: their records differ between versions of transformers."""
    if key != "model" or not (isinstance(old, dict) and isinstance(new, dict)):
        return old == new
    return model_difference(old, new) is None


def subfolders(trainer: Trainer) -> list[str]:
    """Where the SAEs of a run lie in its folder: a single one right in it."""
    return ["."] if len(trainer.saes) == 1 else [f"sae-{i}" for i in range(len(trainer.saes))]

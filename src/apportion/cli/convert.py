"""`apportion convert`: an SAE from one format into another, checked number for number."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from apportion.cli.arguments import say


@dataclass(kw_only=True)
class Convert:
    """Write an SAE in the format of another library, or one of another library in ours, and compare the two."""

    source: Annotated[Positional[str], arg(metavar="SRC")]
    """A folder, a file, or a repository of the Hugging Face Hub (org/name), in any format that apportion reads."""
    folder: Annotated[Positional[Path], arg(metavar="DST")]
    """The folder to write; it must be new or empty."""
    to: str
    """apportion, sae_lens, dictionary_learning, sparsify or gemma_scope."""
    subfolder: str | None = None
    """Where in the source the SAE lies."""
    format: str | None = None
    """The format of the source, where its files do not tell."""
    config: str | None = None
    """What the source's files do not store, as JSON: '{"k": 32}'."""
    model_class_name: str | None = None
    """For sae_lens: HookedTransformer or AutoModelForCausalLM, whichever is to run the model."""

    def run(self) -> None:
        import torch

        from apportion.interop.export import OURS, PRECISE, check_format, check_model_class, export
        from apportion.interop.load import load
        from apportion.interop.probe import difference
        from apportion.interop.writing import empty_folder

        check_format(self.to)
        check_model_class(self.model_class_name, self.to)
        empty_folder(self.folder)
        where = (self.source, self.subfolder, self.format, self._config())
        sae = load(*where)
        if self.to != OURS and sae.dtype not in PRECISE:  # written in float32: nothing is rounded on the way
            sae = load(*where, dtype=torch.float32)
        export(sae, self.folder, self.to, model_class_name=self.model_class_name)
        found = difference(sae, load(self.folder, format=self.to), self.to)
        about = f"{sae.name}, d_in {sae.d_in}, d_sae {sae.d_sae}"
        say(f"{self.source} ({about}) is now {self.folder} ({self.to})")
        say(
            f"largest difference, relative to the largest entry, on {found.rows} probe rows (L0 {found.l0:.1f}): "
            f"latents {found.latents:.1e}, reconstructions {found.reconstructions:.1e}"
        )

    def _config(self) -> dict[str, Any] | None:
        if self.config is None:
            return None
        try:
            config = json.loads(self.config)
        except ValueError:
            config = None
        if not isinstance(config, dict):
            raise ValueError(f"--config {self.config!r} is not a JSON object such as '{{\"k\": 32}}'.")
        return config

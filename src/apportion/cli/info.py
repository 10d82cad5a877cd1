"""`apportion info`: what a folder holds."""

from __future__ import annotations

import json
from dataclasses import dataclass

from tyro.conf import Positional

from apportion.cli.arguments import say
from apportion.cli.cache import say_cache, verify
from apportion.trust import expanded
from apportion.urls import url_of


@dataclass(kw_only=True)
class Info:
    """Say what a folder holds: a cache, a run, or a saved SAE, also of another library."""

    path: Positional[str | None] = None
    """The folder; of a cache also a URL."""
    kernels: bool = False
    """Say which kernels run on this machine, and why."""
    verify: bool = False
    """For a cache: read all of it and compare with the checksums in its manifest."""

    def run(self) -> None:
        if self.kernels:
            from apportion.kernels.dispatch import explain

            say("\n".join(explain()))
        if self.path is None:
            if not self.kernels:
                raise ValueError("Name a folder: a cache, a run or a saved SAE; or ask for --kernels.")
            return
        folder = expanded(self.path)
        if url_of(self.path) is not None or (folder / "manifest.json").exists():
            say_cache(self.path)
            if self.verify:
                verify(self.path)
            say("  all checksums agree" if self.verify else "  checksums not compared (--verify)")
        elif (folder / "run.json").exists() and not (folder / "config.json").exists():
            say(f"{self.path}: a run that has not finished. Go on with apportion train ... --resume")
        else:
            from apportion.interop.load import load

            sae = load(self.path)
            about = f"{sae.name}, d_in {sae.d_in}, d_sae {sae.d_sae}, k {sae.k}, {sae.hookpoint or 'no hookpoint'}"
            if "format" in sae.info:
                about += f", from {sae.info['format']}"
            say(f"{self.path}: {about}")
            say(json.dumps({"settings": sae.settings(), **sae.info}, indent=2))

"""apportion demo: three SAEs at one budget on one model, and a report about them."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from apportion.answers import DIVERGED
from apportion.cli.arguments import Count, Model, Text, best_device, say


@dataclass(kw_only=True)
class Demo:
    """Train TopK, Mutual Choice and Feature Choice at one budget, evaluate them, and write a report to look at."""

    model: str = "embedded"
    """A transformers model: a local folder or a Hub id; embedded is the small story model inside the package."""
    out: Path = Path("apportion-demo")
    """The folder for everything that the demo makes; a second call goes on from what is there."""
    corpus: Annotated[Text, arg(name="")] = field(default_factory=Text)
    hookpoint: str | None = None
    """Where to read activations; default: the output of the middle layer."""
    tokens: Count = 1_000_000
    """How many tokens to collect."""
    k: int = 16
    """Active latents per token: the sparsity budget."""
    d_sae: int | None = None
    """Number of latents; default: eight times the width of the activations."""
    lr: float = 5e-3
    """Learning rate of all three."""
    seed: int = 0
    """Seed of initial weights and data order."""
    loading: Annotated[Model, arg(name="")] = field(default_factory=Model)

    def run(self) -> int | None:
        from apportion.evals.table import print_table
        from apportion.recipes import demo

        shared = {f.name: getattr(self, f.name) for f in fields(demo.Demo) if hasattr(self, f.name)}
        text = None if self.corpus == Text() else self.corpus.source()
        request = demo.Demo(**shared, text=text, device=best_device(self.loading.device), load=self.loading.load)
        try:
            report = request.run()
        except KeyboardInterrupt:
            say(f"\nStopped. What is finished lies in {self.out}; the same command goes on from there.")
            raise
        print_table(report.figures["methods"])
        say(f"\nOpen {self.out / 'report.html'}")
        trained = [method["training"] for method in report.figures["methods"].values()]
        useless = [one["verdict"] for one in trained if one.get("diverged")]
        if useless:
            say(f"But it tells of results that are of no use: {'; '.join(useless)}")
            return DIVERGED
        return None

"""`apportion train`: its options are those below, of TrainConfig, and of the SAE that --sae names."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from tyro.conf import Positional, arg

from apportion.architectures import SAES
from apportion.cli.arguments import Count, Filter, Text, best_device, say
from apportion.training import TrainConfig

SAE_FLAGS_OWN = {"d_in", "d_sae", "k", "seed", "hookpoint"}
"""SAE settings that the train command asks for itself, or that follow from the activations."""


@dataclass(kw_only=True)
class TrainBase:
    """Train a sparse autoencoder on a cache, or directly on a model."""

    source: Positional[str]
    """A cache made by collect, or a transformers model (then also --hookpoint and --text or --dataset)."""
    out: Path
    """The run folder to create."""
    sae: str = "mutual_choice"
    """Which SAE; its own options follow below (see --help with another --sae)."""
    k: float = 32
    """Active latents per token: the sparsity budget."""
    d_sae: int = 16_384
    """Number of latents."""
    hookpoint: str | None = None
    """Which hookpoint; needed for a model and for a cache that holds several."""
    tokens: Count | None = None
    """Rows to train on; default: every training row of the cache once."""
    held_out_share: float = 0.1
    """Share of contexts that is kept for calibration and never trained on."""
    corpus: Annotated[Text, arg(name="")] = field(default_factory=Text)
    filter: Annotated[Filter, arg(name="")] = field(default_factory=Filter)
    context_tokens: int = 256
    """Length of contexts, when training on a model."""
    device: str = "auto"
    """cpu, cuda, ...; auto takes a GPU if there is one."""
    resume: bool = False
    """Go on with the run in --out after an interruption."""
    seed: int = 0
    """Seed of initial weights and data order."""

    def run(self) -> None:
        from apportion.architectures import create
        from apportion.training import Trainer

        self._check_out()
        settings = {n: getattr(self, n) for n in SAES[self.sae].settings() if n not in SAE_FLAGS_OWN}
        k = int(self.k) if self.k == int(self.k) else self.k
        settings |= {"d_sae": self.d_sae, "seed": self.seed} | ({"k": k} if "k" in SAES[self.sae].settings() else {})
        train = {f.name: getattr(self, f.name) for f in dataclasses.fields(TrainConfig) if hasattr(self, f.name)}
        device = best_device(self.device)
        # Mistakes in the settings show before anything is loaded.
        create(self.sae, d_in=1, **settings).allocation.check_batch(TrainConfig(**train).batch_tokens)
        source = self._source()
        sae = create(self.sae, d_in=source.d_in, hookpoint=source.hookpoint, **settings)
        config = TrainConfig(**train | {"total_tokens": self.tokens or source.num_rows, "seed": self.seed})
        if source.num_rows and config.total_tokens and config.total_tokens > source.num_rows:
            epochs = config.total_tokens / source.num_rows
            logging.getLogger("apportion").warning("--tokens asks for %.1f epochs of the training rows", epochs)
        trainer = Trainer(sae.to(device), config)
        try:
            trainer.fit(source, self.out, resume=self.resume)
        except KeyboardInterrupt:
            say(f"\nStopped after {trainer.tokens:,} tokens; everything is in {self.out}. Go on with --resume.")
            raise
        calibration = sae.info["calibration"]
        say(f"{self.out}: {sae.name} on {trainer.tokens:,} tokens of {sae.hookpoint}")
        say(f"  calibrated on {calibration['tokens']:,} held-out tokens: L0 {calibration['l0']:.2f}")
        say(f"  next: apportion eval {self.out}")

    def _check_out(self) -> None:
        if self.resume and not (self.out / "run.json").exists():
            raise ValueError(f"There is no run to resume in {self.out}. Leave --resume out, or check the folder.")
        if not self.resume and (self.out / "run.json").exists():
            raise ValueError(f"{self.out} already holds a run. Resume it (--resume) or choose another folder.")
        if not 0 < self.held_out_share < 1:
            raise ValueError(f"--held-out-share must lie between 0 and 1, got {self.held_out_share}.")

    def _source(self) -> Any:
        from apportion.activations import ActivationStore, CacheSource, LiveSource, load_model, read_contexts
        from apportion.activations.hookpoints import expand

        if not Path(self.source).exists() and self.source.count("/") != 1 and self.source != "embedded":
            raise ValueError(f"There is no cache or model at {self.source!r}.")
        if (Path(self.source) / "manifest.json").exists():
            if self.corpus != Text() or self.filter != Filter():
                raise ValueError(f"{self.source} is a cache: its text and filter were chosen when it was collected.")
            store = ActivationStore(self.source, self.hookpoint)
            return CacheSource(store, self.held_out_share, self.seed)
        if Path(self.source).is_dir() and not (Path(self.source) / "config.json").exists():
            raise ValueError(f"{self.source} is neither a cache (no manifest.json) nor a model (no config.json).")
        if self.hookpoint is None or self.tokens is None:
            raise ValueError("To train on a model give --hookpoint and --tokens (and --text or --dataset).")
        text = self.corpus.source()
        model, tokenizer = load_model(self.source)
        model.to(best_device(self.device))
        expand(model, self.hookpoint)
        wanted = int(self.tokens / max(1 - self.held_out_share, 1e-9) * 1.05) + self.context_tokens
        contexts = read_contexts(tokenizer, text, tokens=wanted, context_tokens=self.context_tokens)
        return LiveSource(
            model,
            tokenizer,
            self.hookpoint,
            contexts,
            token_filter=self.filter.token_filter(),
            held_out_share=self.held_out_share,
            seed=self.seed,
            text=text.describe(),
        )


def train_command(name: str) -> type:
    """The train command with the typed options of one SAE and of TrainConfig."""
    docs = setting_docs(name)
    own = {f.name for f in dataclasses.fields(TrainBase)}
    entry = SAES[name]
    extra: list[Any] = []
    for config in (TrainConfig, entry.architecture.Config, entry.rule.Config):
        hints = get_type_hints(config)
        for f in dataclasses.fields(config):
            if f.name in own | SAE_FLAGS_OWN | {"total_tokens"}:
                continue
            default = entry.defaults.get(f.name, f.default)
            extra.append((f.name, Annotated[hints[f.name], arg(help=docs[f.name])], field(default=default)))
    namespace = {"__doc__": TrainBase.__doc__}
    return dataclasses.make_dataclass("Train", extra, bases=(TrainBase,), kw_only=True, namespace=namespace)


def setting_docs(name: str) -> dict[str, str]:
    """The documentation string under every setting."""
    from tyro._docstrings import get_field_docstring

    entry = SAES[name]
    docs = {}
    for config in (TrainConfig, entry.architecture.Config, entry.rule.Config):
        for f in dataclasses.fields(config):
            docs[f.name] = get_field_docstring(config, f.name, ()) or ""
    return docs


def chosen_sae(argv: list[str]) -> str:
    """The value of --sae, which decides what other options there are."""
    given = [word.partition("=")[2] or following for word, following in pairwise([*argv, ""]) if is_flag(word, "sae")]
    name = given[-1] if given else TrainBase.sae
    if name not in SAES:
        raise ValueError(f"There is no SAE named {name!r}. Known are: {', '.join(SAES)}.")
    return name


def is_flag(word: str, name: str) -> bool:
    return word.partition("=")[0] == f"--{name}"

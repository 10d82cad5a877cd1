"""The first five minutes: TopK, Mutual Choice and Feature Choice at one budget on one model, and a report about them.

    apportion demo                                       the story model inside the package, offline, a few minutes
    apportion demo --model HuggingFaceTB/SmolLM2-135M    any other model, on the same stories unless told otherwise

Activations are collected in the middle of the model; nine tenths of the contexts are trained on, the rest calibrates
and evaluates. Whatever is finished lies in the folder and is not done again when the command is given a second time.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apportion.architectures import SAE, create
from apportion.disk import occupied, read_json, write_json, write_text
from apportion.embedded import stories
from apportion.evals import held_out_rows
from apportion.evals.report import Report, make_report
from apportion.extras import need
from apportion.language import TextSource, load_model
from apportion.language.collect import collect, is_collected
from apportion.language.hookpoints import expand, middle_layer
from apportion.language.model import width_at
from apportion.recipes.experiment import as_now
from apportion.rows import ActivationStore, CacheSource
from apportion.training import TrainConfig, Trainer

logger = logging.getLogger(__name__)

RECORD, STORIES = "demo.json", "stories.jsonl"
MAY_DIFFER = ("out", "device", "load", "eval_tokens", "ce_tokens")
"""What another call in the same folder may say otherwise."""
METHODS: dict[str, dict[str, Any]] = {
    "topk": {},
    "mutual_choice": {},
    "feature_choice": {"budgets": "zipf", "switch_at": 0.3},
}
"""What is compared, with the settings that differ from the defaults."""


@dataclass(frozen=True, kw_only=True)
class Demo:
    model: str = "embedded"
    """A transformers model: a local folder or a Hub id; embedded is the small story model inside the package."""
    out: Path = Path("apportion-demo")
    """The folder for everything that the demo makes."""
    text: TextSource | None = None
    """Text to run the model on; default: stories that the embedded model wrote."""
    hookpoint: str | None = None
    """Where to read activations; default: the output of the middle layer."""
    tokens: int = 1_000_000
    """Tokens to collect."""
    k: int = 16
    """Active latents per token."""
    d_sae: int | None = None
    """Number of latents; default: eight times the width of the activations."""
    lr: float = 5e-3
    batch_tokens: int = 1024
    context_tokens: int = 256
    eval_tokens: int = 50_000
    """Held-out tokens for FVU, L0, dead latents and examples."""
    ce_tokens: int = 16_384
    """Held-out tokens for delta-CE."""
    seed: int = 0
    device: str = "cpu"
    load: Callable[[str], tuple[Any, Any]] = load_model
    """How the model is loaded."""

    def run(self) -> Report:
        """Do what is not done yet; returns the report, which lies in `out` as report.html and report.json."""
        need("The demo", "transformers", "matplotlib", "jinja2")
        if self.tokens < 10 * self.batch_tokens:
            raise ValueError(
                f"tokens = {self.tokens} is too few for training and evaluation. "
                f"Use at least {10 * self.batch_tokens:,}, better a million."
            )
        model, tokenizer = self.load(self.model)
        hookpoint, *others = expand(model, self.hookpoint or middle_layer(model))
        if others:
            raise ValueError(
                f"{self.hookpoint} names {1 + len(others)} hookpoints; the demo takes one, {hookpoint} say."
            )
        d_in = width_at(model, hookpoint)
        saes = {name: self._new(name, d_in) for name in METHODS}
        self._claim_folder({"hookpoint": hookpoint})
        acts = self.out / "acts"
        if not is_collected(acts):
            logger.info("Collecting activations of %s at %s", self.model, hookpoint)
            manifest = collect(
                model, tokenizer, hookpoint, self._text(), tokens=self.tokens, out=acts,
                context_tokens=self.context_tokens,
            )  # fmt: skip
            if manifest["rows"] < 10 * self.batch_tokens:
                self._forget(acts)  # a longer text may follow
                raise ValueError(
                    f"The text has only {manifest['rows']:,} tokens, too few for training and evaluation. "
                    f"Give one of at least {10 * self.batch_tokens:,}."
                )
        store = ActivationStore(acts)
        saes = {name: self._trained(sae, store) for name, sae in saes.items()}
        logger.info("Evaluating, and drawing up the report")
        rows = held_out_rows(store, CacheSource(store).held_out_share)
        rows = rows[: self.eval_tokens // self.context_tokens * self.context_tokens]
        report = make_report(saes, store, rows, model, tokenizer, ce_tokens=self.ce_tokens)
        report.write(self.out / "report.html", self.out / "report.json")
        return report

    def _claim_folder(self, found: dict[str, Any]) -> None:
        """Refuse a folder that holds something else; note what this one is for."""
        mine = {name: value for name, value in vars(self).items() if name not in MAY_DIFFER}
        mine = json.loads(json.dumps(mine | found | {"text": self.text and self.text.describe().to_json()}))
        record = self.out / RECORD
        if record.exists():
            theirs = as_now(read_json(record))
            for key in mine:
                if theirs.get(key) != mine[key]:
                    raise ValueError(
                        f"{self.out} holds a demo with {key} = {theirs.get(key)!r}, now it is {mine[key]!r}. "
                        "Choose another --out, or remove that folder."
                    )
            return
        if occupied(self.out):
            raise ValueError(f"{self.out} exists and holds no demo. Choose another --out.")
        self.out.mkdir(parents=True, exist_ok=True)
        write_json(record, mine)

    def _forget(self, acts: Path) -> None:
        """Remove what this call has written so far; the folder too, if nothing else is in it."""
        shutil.rmtree(acts)
        (self.out / RECORD).unlink()
        if self.text is None:
            (self.out / STORIES).unlink()
        with suppress(OSError):
            self.out.rmdir()

    def _text(self) -> TextSource:
        if self.text is not None:
            return self.text
        file = self.out / STORIES
        write_text(file, "".join(json.dumps({"text": story}, ensure_ascii=False) + "\n" for story in stories()))
        return TextSource(file)

    def _new(self, name: str, d_in: int) -> SAE:
        sae = create(name, d_in=d_in, d_sae=self.d_sae or 8 * d_in, k=self.k, seed=self.seed, **METHODS[name])
        sae.allocation.check_batch(self._batch(sae))
        return sae

    def _batch(self, sae: SAE) -> int:
        """Large enough for Feature Choice to use every latent."""
        return max(self.batch_tokens, math.ceil(sae.d_sae / self.k))

    def _trained(self, sae: SAE, store: ActivationStore) -> SAE:
        source, batch = CacheSource(store, seed=self.seed), self._batch(sae)
        total = source.num_rows // batch * batch
        config = TrainConfig(lr=self.lr, batch_tokens=batch, total_tokens=total, seed=self.seed)
        logger.info("Training %s: %d latents, %d of them per token", sae.name, sae.d_sae, self.k)
        return Trainer(sae.to(self.device), config).fit(source, self.out / "runs" / sae.name, resume=True)

"""Measure the embedded language model and write its model card.

    python tools/embedded_card.py --model model/ --compare stories15m/ --valid "held-out stories" valid.txt

Compared is the loss in nats per character of the same text, in float32, which does not depend on the tokeniser. Every
story stands alone behind the model's BOS token, as in training, and both models read the same beginning of it: up to
the last word with which it still fits into one context of each. What comes after it, BOS or END, is not scored.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from embedded_corpus import Sampling, ends, sample_stories
from embedded_model import TrainModel, stories

from apportion.disk import read_json, write_text
from apportion.language import load_model
from apportion.recipes.command import main

logger = logging.getLogger("apportion.embedded_card")

NUM_SAMPLES = 3

ORIGIN = """\
sampled from stories15M of [llama2.c](https://github.com/karpathy/llama2.c) (MIT licence), a story model of 15 million
parameters, itself trained on [TinyStories](https://arxiv.org/abs/2305.07759), with nucleus sampling (0.97 of the 100
likeliest tokens). So this model is distilled from that one."""


@dataclass(frozen=True, kw_only=True)
class WriteCard:
    """Measure the embedded language model and write its model card."""

    model: Path
    """The folder that embedded_model.py wrote; its README.md will be the card."""
    compare: str
    """The model to compare with: a folder or a Hub id."""
    valid: dict[str, Path]
    """What to call each text that none of the stories were trained on, and its file."""
    characters: int = 500_000
    """At most about so many characters of each text."""
    sampling: Sampling = field(default_factory=Sampling)
    """How the samples in the card are drawn."""
    seed: int = 1

    def run(self) -> None:
        if not (self.model / "training.json").is_file():
            raise ValueError(f"{self.model} has no training.json: finish the training with embedded_model.py first.")
        training = read_json(self.model / "training.json")
        texts = {name: stories(file) for name, file in self.valid.items()}
        if empty := [str(self.valid[name]) for name, found in texts.items() if not found]:
            raise ValueError(f"There is no story in {', '.join(empty)}: give stories separated by blank lines.")
        models = {"this model": load_model(self.model), Path(self.compare).name: load_model(self.compare)}
        card = "\n".join(
            [
                header(*models["this model"]),
                training_section(training, self),
                loss_section(models, texts, self.characters),
                samples_section(*models["this model"], self.sampling, self.seed),
                "## Licence\n\nApache-2.0, like apportion.\n",
            ]
        )
        write_text(self.model / "README.md", card)
        sys.stdout.write(card)


def header(model: Any, tokenizer: Any) -> str:
    config = model.config
    return f"""\
---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# A story-writing language model of {parameters(model) / 1e6:.1f} M parameters

It ships inside the Python package `apportion`, so that sparse autoencoders can be tried without a download: small, but
a real language model. It writes simple English stories and knows nothing else.

```python
from apportion.language import load_model

model, tokenizer = load_model("embedded")
```

| | |
| --- | --- |
| architecture | {type(model).__name__} (transformers), pre-norm, SwiGLU, rotary positions, tied embeddings |
| parameters | {parameters(model):,}, stored in float16 |
| layers | {config.num_hidden_layers} |
| width | {config.hidden_size}; MLP {config.intermediate_size} |
| attention heads | {config.num_attention_heads} |
| context | {config.max_position_embeddings} tokens |
| tokeniser | byte-level BPE, {len(tokenizer):,} pieces |
| BOS and EOS | `{tokenizer.bos_token}`, stands before each story |
"""


def training_section(training: dict[str, Any], card: WriteCard) -> str:
    train, settings = training["train"], training["settings"]
    epochs = training["tokens_seen"] / train["tokens"]
    defaults = {f.name: f.default for f in fields(TrainModel)}
    changed = {key: value for key, value in settings.items() if value != defaults[key]}
    flags = "".join(f" --{key.replace('_', '-')} {value}" for key, value in changed.items())
    valid = "".join(f' "{name}" {file.name}' for name, file in card.valid.items())
    return f"""\
## Training

{train["stories"]:,} simple English stories ({train["characters"]:,} characters, {train["tokens"]:,} tokens),
{ORIGIN}

Trained on {training["tokens_seen"]:,} tokens ({epochs:.1f} epochs) in batches of {settings["batch_contexts"]} contexts
with AdamW, learning rate {settings["lr"]:g} with warm-up and cosine decay, weight decay {settings["weight_decay"]:g},
seed {settings["seed"]}. To make it, the stories that it wrote, and this card:

    python tools/embedded_model.py --text train.txt --valid valid.txt --out model/{flags}
    python tools/embedded_corpus.py --model model/ --out stories.txt.xz
    python tools/embedded_card.py --model model/ --compare {Path(card.compare).name}/ --valid{valid}
"""


def loss_section(models: dict[str, tuple[Any, Any]], texts: dict[str, list[str]], characters: int) -> str:
    names = [f"{name} ({parameters(model) / 1e6:.1f} M)" for name, (model, _) in models.items()]
    rows = [f"| text | stories | characters | {' | '.join(names)} |", "| --- " * (3 + len(names)) + "|"]
    for name, texts_here in texts.items():
        scored = list(up_to(characters, (fitting(text, models.values()) for text in texts_here)))
        losses = [loss_per_character(model, tokenizer, scored) for model, tokenizer in models.values()]
        numbers = [f"{len(scored):,}", f"{sum(map(len, scored)):,}", *(f"{loss:.4f}" for loss in losses)]
        logger.info("%s: %s", name, numbers)
        rows.append(f"| {name} | {' | '.join(numbers)} |")
    table = "\n".join(rows)
    return f"""\
## Loss

Nats per character, computed in float32. Each story stands alone behind the BOS token; both models read the same
beginning of it, which fits into one context of each. The end of a story is not scored.

{table}
"""


def samples_section(model: Any, tokenizer: Any, sampling: Sampling, seed: int) -> str:
    samples = []
    for ids in islice(sample_stories(model, tokenizer, sampling, seed, NUM_SAMPLES), NUM_SAMPLES):
        text = tokenizer.decode(ids, skip_special_tokens=True)
        cut = "" if ids[-1] in ends(tokenizer) else "\n[the context is full]"
        samples.append(f"```text\n{text}{cut}\n```\n")
    how = ", ".join(f"{name} {value:g}" for name, value in asdict(sampling).items())
    return f"""\
## Samples

The first {NUM_SAMPLES} of seed {seed}, unedited ({how}).

{chr(10).join(samples)}"""


def parameters(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())


def up_to(characters: int, texts: Iterator[str]) -> Iterator[str]:
    """Whole texts until they hold so many characters."""
    total = 0
    for text in texts:
        if total >= characters:
            return
        total += len(text)
        yield text


def fitting(text: str, models: Collection[tuple[Any, Any]]) -> str:
    """The longest beginning of whole words that fits into one context of every model, behind BOS."""
    while any(
        len(tokenizer(text, add_special_tokens=False)["input_ids"]) >= model.config.max_position_embeddings
        for model, tokenizer in models
    ):
        text = text.rsplit(maxsplit=1)[0]
    return text


@torch.no_grad()
def loss_per_character(model: Any, tokenizer: Any, texts: Sequence[str]) -> float:
    """Nats per character, each text in one context behind BOS."""
    total = 0.0
    for text in texts:
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]])
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        total += F.cross_entropy(logits.float(), ids[0, 1:], reduction="sum").item()
    return total / sum(map(len, texts))


if __name__ == "__main__":
    sys.exit(main(WriteCard, "embedded_card", __doc__, prog="python tools/embedded_card.py"))

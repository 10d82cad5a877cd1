"""Let the embedded language model write the stories that come with the package.

    python tools/embedded_corpus.py --model model/ --out stories.txt.xz

Every story begins behind END and is sampled token by token, from the nucleus (`top_p`) of the `top_k` likeliest
tokens. Kept are the stories that the model itself ended within its context, each text once, until they hold the tokens
asked for; the file holds them in the order they were written, separated by blank lines.

One uniform number per story and position decides its tokens (`draw`), so a story does not depend on the stories that
are sampled beside it: the same seed gives the same file for any `batch_stories`, up to rounding in the logits.
"""

from __future__ import annotations

import lzma
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from apportion.disk import replacing
from apportion.language import load_model
from apportion.progress import progress_bar
from apportion.recipes.command import main

GIVE_UP_STORIES = 2000
"""Raise when so many stories in a row brought nothing new."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn: a wider nucleus makes up words, a lower temperature repeats itself."""

    temperature: float = 1.0
    top_k: int = 100
    """Draw from so many of the likeliest tokens."""
    top_p: float = 0.9
    """Of those, from the fewest that hold this share of their probability."""

    def __post_init__(self) -> None:
        for name, fine in (("temperature", self.temperature > 0), ("top_k", self.top_k >= 1)):
            if not fine:
                raise ValueError(f"{name}={getattr(self, name)} must be positive.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie in (0, 1]; 1 leaves nothing out.")


@dataclass(frozen=True, kw_only=True)
class WriteCorpus:
    """Write a corpus of stories with the embedded language model."""

    model: str
    """The model: a folder."""
    out: Path
    """The file to write, xz-compressed text."""
    tokens: int = 1_060_000
    """How many tokens the stories shall have, counting one END for each."""
    sampling: Sampling = field(default_factory=Sampling)
    batch_stories: int = 64
    """Stories sampled side by side."""
    seed: int = 0

    def run(self) -> None:
        if self.tokens < 1 or self.batch_stories < 1:
            raise ValueError(f"tokens={self.tokens} and batch_stories={self.batch_stories} must be positive.")
        if not self.out.parent.is_dir():
            raise ValueError(f"There is no folder {self.out.parent}: create it, or write the corpus elsewhere.")
        model, tokenizer = load_model(self.model)
        stories, tokens, fates, started = [], 0, Counter(), perf_counter()
        with progress_bar("writing stories", self.tokens) as show:
            for text, fate in self.written(model, tokenizer):
                fates[fate] += 1
                if fate == "kept":
                    stories.append(text)
                    tokens += len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 1
                    show(tokens, stories=f"{len(stories):,}")
                if tokens >= self.tokens:
                    break
        seconds = perf_counter() - started
        corpus = "\n\n".join(stories) + "\n"
        write_xz(self.out, corpus)
        sys.stdout.write(
            f"{self.out}: {len(stories):,} stories, {tokens:,} tokens, {len(corpus):,} characters, "
            f"{self.out.stat().st_size:,} bytes compressed\n"
            f"{fates.total():,} stories sampled ({', '.join(f'{n:,} {fate}' for fate, n in fates.most_common())}), "
            f"{tokens / seconds:,.0f} kept tokens/s\n"
        )

    def written(self, model: Any, tokenizer: Any) -> Iterator[tuple[str, str]]:
        """One story after the other, and whether it is kept or why not."""
        seen: set[str] = set()
        in_vain = 0
        for ids in sample_stories(model, tokenizer, self.sampling, self.seed, self.batch_stories):
            text = tokenizer.decode(ids, skip_special_tokens=True).strip()
            fate = "kept"
            if ids[-1] not in ends(tokenizer):
                fate = "not ended"
            elif not text or "\n\n" in text or "\ufffd" in text:
                fate = "malformed"
            elif text in seen:
                fate = "duplicate"
            seen.add(text)
            in_vain = 0 if fate == "kept" else in_vain + 1
            if in_vain == GIVE_UP_STORIES:
                raise ValueError(
                    f"The last {in_vain:,} stories of {self.model} brought nothing new (the last one: {fate}): train "
                    "the model longer, raise the temperature, or ask for fewer tokens."
                )
            yield text, fate


def sample_stories(
    model: Any, tokenizer: Any, sampling: Sampling, seed: int, batch_stories: int
) -> Iterator[list[int]]:
    """Endlessly many stories, as token ids without the first END; the last id is an END unless the context was full."""
    generator = torch.Generator().manual_seed(seed)
    room = model.config.max_position_embeddings - 1
    while True:
        uniforms = torch.rand(batch_stories, room, generator=generator)
        yield from sample_batch(model, tokenizer.bos_token_id, ends(tokenizer), uniforms, sampling)


@torch.inference_mode()
def sample_batch(
    model: Any, start: int, ends: set[int], uniforms: Float[Tensor, "stories room"], sampling: Sampling
) -> list[list[int]]:
    """One story for each row of uniforms, in step; finished ones leave the batch and its key-value cache at once."""
    from transformers import DynamicCache

    stories: list[list[int]] = [[] for _ in uniforms]
    going = torch.arange(len(uniforms))
    tokens, cache = torch.full((len(uniforms),), start), DynamicCache()
    for position in range(uniforms.shape[1]):
        logits = model(input_ids=tokens[:, None], past_key_values=cache, use_cache=True).logits[:, -1]
        tokens = draw(logits, uniforms[going, position], sampling)
        for story, token in zip(going.tolist(), tokens.tolist(), strict=True):
            stories[story].append(token)
        stay = ~torch.isin(tokens, torch.tensor(sorted(ends)))
        if not stay.any():
            break
        if not stay.all():
            cache.batch_select_indices(stay.nonzero()[:, 0])
            going, tokens = going[stay], tokens[stay]
    return stories


def draw(
    logits: Float[Tensor, "rows vocab"], uniforms: Float[Tensor, " rows"], sampling: Sampling
) -> Int[Tensor, " rows"]:
    """Where the cumulated probability, likeliest token first, passes the uniform number."""
    likeliest = (logits.float() / sampling.temperature).topk(min(sampling.top_k, logits.shape[-1]))
    probability = likeliest.values.softmax(-1)
    cumulated = probability.cumsum(-1)
    nucleus = cumulated.masked_fill(cumulated - probability >= sampling.top_p, 0).amax(-1)
    place = torch.searchsorted(cumulated, (uniforms * nucleus)[:, None], right=True)
    return likeliest.indices.gather(-1, place.clamp(max=cumulated.shape[-1] - 1))[:, 0]


def ends(tokenizer: Any) -> set[int]:
    """The tokens that end a story: EOS, and BOS, which is the beginning of the next one."""
    return {tokenizer.bos_token_id, tokenizer.eos_token_id}


def write_xz(file: Path, text: str) -> None:
    with replacing(file) as partial:
        partial.write_bytes(lzma.compress(text.encode("utf-8"), preset=9 | lzma.PRESET_EXTREME))


if __name__ == "__main__":
    sys.exit(main(WriteCorpus, "embedded_corpus", __doc__, prog="python tools/embedded_corpus.py"))

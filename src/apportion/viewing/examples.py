"""What a latent fires on: its strongest examples in context, a few at random, and the tokens it prefers.

The strongest examples alone flatter a latent (they show its best side), so each latent also comes with examples drawn
at random among all tokens it fires on. Of either kind, at most one example is taken from each context.

    for one in ap.examples_of(sae, ActivationStore("acts"), [7, 12], tokenizer):
        print(one.latent, one.density, one.top_tokens)
        for text in one.strongest:                      "the cat <<sat>> on": the token that the example is about
            print(text)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from apportion.architectures import SAE
from apportion.language.model import load_tokenizer
from apportion.rows.order import seeded
from apportion.rows.store import ActivationStore

CHUNK = 4096
BEFORE, AFTER = 16, 6
"""Tokens shown on either side of the token that an example is about."""


@dataclass(frozen=True)
class Example:
    """Tokens of one context around the token `focus`, and how strongly the latent fires on each of them."""

    tokens: list[int]
    activations: list[float]
    focus: int


@dataclass(frozen=True)
class LatentExamples:
    """One latent: share of tokens it fires on, its largest activation, examples, and the tokens it prefers."""

    latent: int
    density: float
    largest: float
    strongest: list[Example]
    random: list[Example]
    tokens: list[tuple[int, float]]
    """Token ids with their share of the latent's summed activation, largest first."""

    @property
    def labelled(self) -> list[tuple[Example, str]]:
        """All examples, each with how it was chosen."""
        return [(e, "strongest") for e in self.strongest] + [(e, "random") for e in self.random]


@torch.inference_mode()
def activations_on(
    sae: SAE, store: ActivationStore, rows: Int[Tensor, " n"], latents: Int[Tensor, " m"]
) -> Float[Tensor, "n m"]:
    """What `latents` do on `rows` of a cache, in eval mode; 0 on rows that the token filter leaves out."""
    parts = []
    with sae.in_eval_mode():
        for ids in rows.split(CHUNK):
            codes = sae.encode(store.gather(ids).to(sae.device)).select(latents.to(sae.device))
            parts.append(codes.dense().cpu() * store.mask[ids][:, None])
    return torch.cat(parts)


@dataclass(frozen=True)
class LatentTexts:
    """What one latent fires on, as text. In each example the token that it is about stands in << >>."""

    latent: int
    density: float
    """Share of tokens it fires on."""
    largest: float
    """Its largest activation."""
    strongest: list[str]
    """Around the tokens on which it fires most strongly, one for each context."""
    random: list[str]
    """Around tokens drawn at random among all on which it fires."""
    top_tokens: list[tuple[str, float]]
    """Tokens with their share of the latent's summed activation, largest first."""


def examples_of(
    sae: SAE,
    store: ActivationStore,
    latents: Iterable[int] | Int[Tensor, " m"],
    tokenizer: Any = None,
    *,
    rows: Int[Tensor, " n"] | None = None,
    strongest: int = 5,
    random: int = 2,
    num_tokens: int = 5,
) -> list[LatentTexts]:
    """Which text do these latents fire on? In eval mode, on `rows` of a cache (whole contexts; all by default).

    `tokenizer` is by default the one of the model that the cache was made with. A latent that fires nowhere has no
    examples and density 0. ValueError for a latent that does not exist, and for a cache of token ids without a
    tokenizer.
    """
    wanted = torch.as_tensor([int(latent) for latent in latents], dtype=torch.int64)
    for latent in wanted.tolist():
        if not 0 <= latent < sae.d_sae:
            raise ValueError(f"latent={latent} does not exist: this SAE has latents 0 to {sae.d_sae - 1}")
    if tokenizer is None:
        name = store.describe().lm.model.name_or_path
        tokenizer = None if name is None else load_tokenizer(name)
    if tokenizer is None:
        raise ValueError("examples as text need a tokenizer, and the cache does not say which: give tokenizer=")
    rows = torch.arange(store.rows) if rows is None else rows
    found = {one.latent: one for one in find_examples(
        sae, store, rows, wanted, strongest=strongest, random=random, num_tokens=num_tokens, silent=True
    )}  # fmt: skip
    return [as_texts(found[latent], tokenizer) for latent in wanted.tolist()]


def as_texts(found: LatentExamples, tokenizer: Any) -> LatentTexts:
    def marked(example: Example) -> str:
        shown = example_pieces(tokenizer, example)
        return "".join(f"<<{piece.text}>>" if piece.is_focus else piece.text for piece in shown)

    return LatentTexts(
        latent=found.latent,
        density=found.density,
        largest=found.largest,
        strongest=[marked(e) for e in found.strongest],
        random=[marked(e) for e in found.random],
        top_tokens=[(tokenizer.decode([token]), share) for token, share in found.tokens],
    )


def pieces(tokenizer: Any, tokens: list[int]) -> list[str]:
    """The text of each token as it stands in the whole; a character of several tokens belongs to the last of them."""
    texts, before = [], ""
    for end in range(1, len(tokens) + 1):
        text = tokenizer.decode(tokens[:end], clean_up_tokenization_spaces=False)
        complete = not text.endswith("\ufffd") or end == len(tokens)
        texts.append(text[len(before) :] if complete else "")
        before = text if complete else before
    return texts


@dataclass(frozen=True)
class ExamplePiece:
    text: str
    activation: float
    is_focus: bool


def example_pieces(tokenizer: Any, example: Example) -> list[ExamplePiece]:
    """The text of an example, piece by piece; tokens that share a character are one piece."""
    found: list[ExamplePiece] = []
    activation, is_focus = 0.0, False
    for place, text in enumerate(pieces(tokenizer, example.tokens)):
        activation, is_focus = max(activation, example.activations[place]), is_focus or place == example.focus
        if text:
            found.append(ExamplePiece(text, activation, is_focus))
            activation, is_focus = 0.0, False
    return found


def find_examples(
    sae: SAE,
    store: ActivationStore,
    rows: Int[Tensor, " n"],
    latents: Int[Tensor, " m"],
    *,
    silent: bool = False,
    strongest: int = 5,
    random: int = 2,
    num_tokens: int = 5,
) -> list[LatentExamples]:
    """Examples of each of `latents` on `rows` of a cache (whole contexts, in order), as token ids.

    ValueError for a latent that does not fire there, unless `silent` ones are to have no examples.
    """
    activations = activations_on(sae, store, rows, latents)
    tokens, contexts = store.tokens[rows], store.contexts[rows]
    taking_part = int(store.mask[rows].sum())
    found = []
    for latent, column in zip(latents.tolist(), activations.T.contiguous(), strict=True):
        firing = column.nonzero().squeeze(1)
        if not len(firing) and silent:
            found.append(LatentExamples(latent, 0.0, 0.0, [], [], []))
            continue
        if not len(firing):
            raise ValueError(f"Latent {latent} does not fire on these {len(rows)} tokens. Choose one that does.")
        ranked = firing[column[firing].argsort(descending=True, stable=True)]
        top = _one_per_context(ranked, contexts, strongest)
        shuffled = firing[torch.randperm(len(firing), generator=seeded("examples", latent))]
        others = _one_per_context(shuffled, contexts, random)
        mass = torch.zeros(int(tokens.max()) + 1, dtype=torch.float64)
        mass.index_add_(0, tokens[firing].long(), column[firing].double())
        shares = (mass / mass.sum()).topk(min(num_tokens, len(mass)))
        preferred = [(i, s) for i, s in zip(shares.indices.tolist(), shares.values.tolist(), strict=True) if s > 0]
        found.append(
            LatentExamples(
                latent=latent,
                density=len(firing) / taking_part,
                largest=column[ranked[0]].item(),
                strongest=[_example(i, column, tokens, contexts) for i in top.tolist()],
                random=[_example(i, column, tokens, contexts) for i in others.tolist()],
                tokens=preferred,
            )
        )
    return found


def _one_per_context(places: Int[Tensor, " n"], contexts: Int[Tensor, " rows"], count: int) -> Int[Tensor, " m"]:
    """The first `count` of `places` that lie in different contexts."""
    chosen, seen = [], set()
    for place in places.tolist():
        if len(chosen) == count:
            break
        context = int(contexts[place])
        if context not in seen:
            seen.add(context)
            chosen.append(place)
    return torch.tensor(chosen, dtype=torch.int64)


def _example(place: int, column: Tensor, tokens: Tensor, contexts: Tensor) -> Example:
    window = slice(max(0, place - BEFORE), place + AFTER + 1)
    same = (contexts[window] == contexts[place]).nonzero().squeeze(1) + window.start
    return Example(
        tokens=tokens[same].tolist(),
        activations=[round(a, 4) for a in column[same].tolist()],
        focus=place - int(same[0]),
    )

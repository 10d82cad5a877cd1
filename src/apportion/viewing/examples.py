"""What a latent fires on: its strongest examples with their neighbours, a few at random, and the tokens it prefers.

The strongest examples alone flatter a latent (they show its best side), so each latent also comes with examples drawn
at random among all rows it fires on. Of either kind, at most one example is taken from each group (context).

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
from apportion.rows.batch import RowStore, chunks
from apportion.rows.order import seeded
from apportion.viewing.units import Units, units_of


@dataclass(frozen=True)
class Piece:
    """A row of an example, or several that only together can be shown."""

    text: str
    activation: float
    """How strongly the latent fires there."""
    is_focus: bool
    """Whether the example is about it."""


@dataclass(frozen=True)
class LatentExamples:
    """What one latent fires on."""

    latent: int
    density: float
    """Share of rows it fires on."""
    largest: float
    """Its largest activation."""
    strongest: list[list[Piece]]
    """Around the rows on which it fires most strongly, one for each group."""
    random: list[list[Piece]]
    """Around rows drawn at random among all on which it fires."""
    preferred: list[tuple[str, float]]
    """Tokens with their share of the latent's summed activation, largest first; nothing where rows are no tokens."""

    @property
    def labelled(self) -> list[tuple[list[Piece], str]]:
        """All examples, each with how it was chosen."""
        return [(e, "strongest") for e in self.strongest] + [(e, "random") for e in self.random]

    def as_texts(self) -> LatentTexts:
        def marked(example: list[Piece]) -> str:
            return "".join(f"<<{piece.text}>>" if piece.is_focus else piece.text for piece in example)

        strongest, random = ([marked(e) for e in examples] for examples in (self.strongest, self.random))
        return LatentTexts(self.latent, self.density, self.largest, strongest, random, self.preferred)


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
    store: RowStore,
    latents: Iterable[int] | Int[Tensor, " m"],
    tokenizer: Any = None,
    *,
    rows: Int[Tensor, " n"] | None = None,
    strongest: int = 5,
    random: int = 2,
    num_tokens: int = 5,
) -> list[LatentTexts]:
    """Which text do these latents fire on? In eval mode, on `rows` of a cache (whole contexts; all by default).

    `tokenizer` is by default the one of the model that the cache was made with. Of rows that are no tokens the examples
    are their numbers. A latent that fires nowhere has no examples and density 0. ValueError for a latent that does not
    exist, and for a cache of token ids without a tokenizer.
    """
    wanted = torch.as_tensor([int(latent) for latent in latents], dtype=torch.int64)
    for latent in wanted.tolist():
        if not 0 <= latent < sae.d_sae:
            raise ValueError(f"latent={latent} does not exist: this SAE has latents 0 to {sae.d_sae - 1}")
    if tokenizer is None and "tokens" in store.labels:
        name = store.describe().lm.model.name_or_path
        if name is None or (tokenizer := load_tokenizer(name)) is None:
            raise ValueError("examples as text need a tokenizer, and the cache does not say which: give tokenizer=")
    rows = torch.arange(store.rows) if rows is None else rows
    limits = {"strongest": strongest, "random": random, "num_tokens": num_tokens}
    found = find_examples(sae, store, rows, wanted, units_of(store, tokenizer), silent=True, **limits)
    return [one.as_texts() for one in found]


def find_examples(
    sae: SAE,
    store: RowStore,
    rows: Int[Tensor, " n"],
    latents: Int[Tensor, " m"],
    units: Units,
    *,
    silent: bool = False,
    strongest: int = 5,
    random: int = 2,
    num_tokens: int = 5,
) -> list[LatentExamples]:
    """Examples of each of `latents` on `rows` of a store (whole groups, in order).

    ValueError for a latent that does not fire there, unless `silent` ones are to have no examples.
    """
    activations = activations_on(sae, store, rows, latents)
    finder = _Finder(units, rows, store.groups[rows], int(store.mask[rows].sum()))
    found = []
    for latent, column in zip(latents.tolist(), activations.T.contiguous(), strict=True):
        firing = column.nonzero().squeeze(1)
        if not len(firing) and not silent:
            raise ValueError(f"Latent {latent} does not fire on these {len(rows)} tokens. Choose one that does.")
        found.append(finder.examples(latent, column, firing, strongest, random, num_tokens))
    return found


@torch.inference_mode()
def activations_on(
    sae: SAE, store: RowStore, rows: Int[Tensor, " n"], latents: Int[Tensor, " m"]
) -> Float[Tensor, "n m"]:
    """What `latents` do on `rows` of a store, in eval mode; 0 on rows that take no part."""
    parts = []
    with sae.in_eval_mode():
        for batch in chunks(store, rows):
            assert batch.mask is not None
            codes = sae.encode(batch.x.to(sae.device)).select(latents.to(sae.device))
            parts.append(codes.dense().cpu() * batch.mask[:, None])
    return torch.cat(parts)


@dataclass(frozen=True)
class _Finder:
    """Finds examples among some rows of a store; places are places among these."""

    units: Units
    rows: Int[Tensor, " n"]
    groups: Int[Tensor, " n"]
    taking_part: int

    def examples(
        self, latent: int, column: Tensor, firing: Tensor, strongest: int, random: int, num_tokens: int
    ) -> LatentExamples:
        if not len(firing):
            return LatentExamples(latent, 0.0, 0.0, [], [], [])
        ranked = firing[column[firing].argsort(descending=True, stable=True)]
        shuffled = firing[torch.randperm(len(firing), generator=seeded("examples", latent))]
        return LatentExamples(
            latent=latent,
            density=len(firing) / self.taking_part,
            largest=column[ranked[0]].item(),
            strongest=[self.example(place, column) for place in self.apart(ranked, strongest)],
            random=[self.example(place, column) for place in self.apart(shuffled, random)],
            preferred=self.preferred(column, firing, num_tokens),
        )

    def apart(self, places: Int[Tensor, " m"], count: int) -> list[int]:
        """The first `count` of `places` that lie in different groups."""
        chosen: dict[int, int] = {}
        for place in places.tolist():
            if len(chosen) == count:
                break
            chosen.setdefault(int(self.groups[place]), place)
        return list(chosen.values())

    def example(self, place: int, column: Float[Tensor, " n"]) -> list[Piece]:
        """The neighbourhood of one row; rows that share a character are one piece."""
        window = slice(max(0, place - self.units.before), place + self.units.after + 1)
        same = (self.groups[window] == self.groups[place]).nonzero().squeeze(1) + window.start
        found, activation, is_focus = list[Piece](), 0.0, False
        for near, text in zip(same.tolist(), self.units.pieces(self.rows[same]), strict=True):
            activation, is_focus = max(activation, round(column[near].item(), 4)), is_focus or near == place
            if text:
                found.append(Piece(text, activation, is_focus))
                activation, is_focus = 0.0, False
        return found

    def preferred(self, column: Tensor, firing: Tensor, count: int) -> list[tuple[str, float]]:
        if (sorts := self.units.sorts()) is None:
            return []
        of_rows = sorts[self.rows]
        mass = torch.zeros(int(of_rows.max()) + 1, dtype=torch.float64)
        mass.index_add_(0, of_rows[firing].long(), column[firing].double())
        shares = (mass / mass.sum()).topk(min(count, len(mass)))
        pairs = zip(shares.indices.tolist(), shares.values.tolist(), strict=True)
        return [(self.units.name_of(sort), share) for sort, share in pairs if share > 0]

"""What a latent fires on: its strongest examples in context, a few at random, and the tokens it prefers.

The strongest examples alone flatter a latent (they show its best side), so each latent also comes with examples drawn
at random among all tokens it fires on. Of either kind, at most one example is taken from each context.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from apportion.activations.order import seeded
from apportion.activations.store import ActivationStore
from apportion.architectures import SAE

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
            codes = sae.encode(store.gather(ids).to(sae.mean.device)).select(latents.to(sae.mean.device))
            parts.append(codes.dense().cpu() * store.mask[ids][:, None])
    return torch.cat(parts)


def examples_of(
    sae: SAE,
    store: ActivationStore,
    rows: Int[Tensor, " n"],
    latents: Int[Tensor, " m"],
    *,
    strongest: int = 5,
    random: int = 2,
    num_tokens: int = 5,
) -> list[LatentExamples]:
    """Examples of each of `latents` on `rows` of a cache (whole contexts, in order)."""
    activations = activations_on(sae, store, rows, latents)
    tokens, contexts = store.tokens[rows], store.contexts[rows]
    taking_part = int(store.mask[rows].sum())
    found = []
    for latent, column in zip(latents.tolist(), activations.T.contiguous(), strict=True):
        firing = column.nonzero().squeeze(1)
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

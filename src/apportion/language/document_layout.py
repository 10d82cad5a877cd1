"""How documents lie in contexts, and what is known of each token besides its id.

    packed       end to end, cut into contexts of equal length; attention runs across, or stays within documents
    documents    each in a context of its own (a long one in several, one after the other), filled up on one side

A context is its token ids, int32 [context_tokens], where everything is as usual. Else it is int32 [3, context_tokens]:

    ids
    positions    of each token in what it can attend to, from 0; -1 for padding
    rows         1 for tokens whose activations are rows; 0 for padding, and for what roles that are not asked for say
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

PAD = -1
CHOICES = {"contexts": ("packed", "documents"), "attention": ("all", "documents"), "padding": ("right", "left")}


@dataclass(frozen=True)
class Layout:
    """ValueError for what there is not."""

    contexts: str = "packed"
    attention: str = "all"
    """Of packed contexts: all tokens before, or those of the same document."""
    padding: str = "right"
    """On which side a document is filled up that has a context of its own."""
    roles: tuple[str, ...] = ()
    """Of conversations, whose words are rows; empty: all tokens are."""

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"{name}={value!r} is not known: use {' or '.join(known)}")

    @property
    def is_usual(self) -> bool:
        return self == Layout()

    @property
    def padded(self) -> bool:
        return self.contexts == "documents"

    @property
    def within(self) -> bool:
        """Whether attention stays within documents."""
        return self.padded or self.attention == "documents"

    def to_json(self) -> dict[str, Any] | None:
        """None if it is as usual."""
        return None if self.is_usual else asdict(self) | {"roles": list(self.roles)}

    @staticmethod
    def from_json(said: dict[str, Any] | None) -> Layout:
        values: dict[str, Any] = {**(said or {})}
        values["roles"] = tuple(values.get("roles", ()))
        return Layout(**values)


def ids_of(contexts: Int[Tensor, "n *columns context_tokens"]) -> Int[Tensor, "n context_tokens"]:
    return contexts if contexts.ndim == 2 else contexts[:, 0]


def positions_of(contexts: Int[Tensor, "n *columns context_tokens"]) -> Int[Tensor, "n context_tokens"]:
    if contexts.ndim == 3:
        return contexts[:, 1]
    return torch.arange(contexts.shape[1], dtype=contexts.dtype, device=contexts.device).expand_as(contexts)


def are_rows(contexts: Int[Tensor, "n *columns context_tokens"]) -> Bool[Tensor, "n context_tokens"]:
    """Which tokens are rows."""
    return torch.ones_like(contexts, dtype=torch.bool) if contexts.ndim == 2 else contexts[:, 2] != 0


def num_rows(contexts: Int[Tensor, "n *columns context_tokens"]) -> int:
    return contexts.numel() if contexts.ndim == 2 else int(are_rows(contexts).sum())


def labels_of(contexts: Int[Tensor, "n *columns context_tokens"], first: int = 0) -> Int[Tensor, "3 rows"]:
    """Tokens, positions and numbers of contexts, the first of which is `first`, of the rows."""
    ids = ids_of(contexts)
    numbers = torch.arange(first, first + len(ids), device=ids.device)[:, None].expand_as(ids)
    rows = are_rows(contexts)
    return torch.stack([column[rows].long() for column in (ids, positions_of(contexts), numbers)])

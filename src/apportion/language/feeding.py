"""What a model is given so that documents in one pass do not see each other.

Models differ in what they make of masks and positions, so it is tried: a few short documents run alone, and together in
each of these ways, and the first way is taken in which every row is the same, to the model's own rounding.

    mask         attention_mask [contexts, tokens], and positions where the model takes them: for padding alone
    positions    position_ids that begin anew with each document; transformers finds where they do
    causal       attention_mask [contexts, 1, tokens, tokens]: only tokens before, of the same document
    both         the same for encoders: all tokens of the same document
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from apportion.language.document_layout import PAD
from apportion.language.passes import inputs_for, parameters_of, text_config

LENGTHS = (4, 6, 3)
"""Of the documents that are tried."""
TOLERANCES = {torch.float32: 1e-3, torch.float64: 1e-6}
"""How far rows may be from those of a document alone, of their norm."""
TOLERANCE = 0.06
"""The same for numbers of 16 bits or fewer."""

Positions = Int[Tensor, "contexts tokens"]
Run = Callable[[dict[str, Any]], list[Tensor]]
"""Runs the model on these arguments; the activations at each hookpoint, [contexts, tokens, d]."""

_known: WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], str]] = WeakKeyDictionary()


def inputs_apart(
    model: nn.Module, ids: Int[Tensor, "contexts tokens"], positions: Positions, way: str
) -> dict[str, Any]:
    """The arguments of a pass over contexts with these positions, in one of the ways."""
    inputs, takes = inputs_for(model, ids), parameters_of(model)
    positions = positions.long().to(inputs["input_ids"].device)
    if "position_ids" in takes:
        inputs["position_ids"] = positions.clamp_min(0)
    if way == "mask":
        inputs["attention_mask"] = (positions != PAD).long()
    elif way in ("causal", "both"):
        allowed = together(positions)[:, None]
        if way == "causal":
            allowed = allowed.tril()
        dtype = next(model.parameters()).dtype
        dtype = dtype if dtype.is_floating_point else torch.float32
        blocked = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=positions.device)
        inputs["attention_mask"] = torch.where(allowed, blocked.new_zeros(()), blocked)
    return inputs


def together(positions: Positions) -> Bool[Tensor, "contexts tokens tokens"]:
    """Which tokens are of one document; padding is alone."""
    begins = torch.ones_like(positions, dtype=torch.bool)
    begins[:, 1:] = (positions[:, 1:] != positions[:, :-1] + 1) | (positions[:, 1:] <= 0)
    documents = begins.cumsum(1)
    return documents[:, :, None] == documents[:, None, :]


def way_for(model: nn.Module, hookpoints: tuple[str, ...], padded: bool, tokens: int, run: Run) -> str:
    """How documents are kept apart in this model. ValueError if it mixes them in every way."""
    known = _known.setdefault(model, {})
    if (key := (hookpoints, padded)) not in known:
        known[key] = _tried(model, padded, run)
    window = getattr(text_config(model), "sliding_window", None)
    if known[key] == "causal" and isinstance(window, int) and window < tokens:
        raise ValueError(
            f"{type(model).__name__} attends to {window} tokens in some layers, which gets lost where documents are "
            f"kept apart: use context_tokens={window} or fewer"
        )
    return known[key]


def _tried(model: nn.Module, padded: bool, run: Run) -> str:
    ids, positions = _documents(model, padded)
    alone = _alone(model, ids, positions, run)
    dtype = next(model.parameters()).dtype
    found = {}
    for way in ("mask", "positions", "causal", "both") if padded else ("positions", "causal", "both"):
        if way == "positions" and "position_ids" not in parameters_of(model):
            continue
        try:
            rows = [x[positions.to(x.device) != PAD] for x in run(inputs_apart(model, ids, positions, way))]
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
            continue  # it does not take masks of that form
        found[way] = max(_distance(one, other) for one, other in zip(rows, alone, strict=True))
        if found[way] <= TOLERANCES.get(dtype, TOLERANCE):
            return way
    raise ValueError(
        f"{type(model).__name__} does not keep documents apart in one pass: rows are "
        f"{min(found.values(), default=float('nan')):.2g} of their norm from those of a document alone. Use packed "
        "contexts with attention to all (contexts='packed', attention='all'), or one document at a time"
    )


def _documents(model: nn.Module, padded: bool) -> tuple[Tensor, Positions]:
    """Contexts of short documents: filled up on either side, or end to end."""
    config = text_config(model)
    vocabulary = getattr(config, "vocab_size", None) or 64
    special = {getattr(config, f"{kind}_token_id", None) for kind in ("pad", "bos", "eos")}
    usable = torch.tensor([i for i in range(min(vocabulary, 4096)) if i not in special])
    drawn = torch.randint(len(usable), (sum(LENGTHS),), generator=torch.Generator().manual_seed(0))
    texts, ramps = usable[drawn].split(list(LENGTHS)), [torch.arange(length) for length in LENGTHS]
    if not padded:
        return torch.cat(list(texts))[None], torch.cat(ramps)[None]
    width = max(LENGTHS) + 2
    fill = getattr(config, "pad_token_id", None) or 0
    ids, positions = torch.full((2 * len(LENGTHS), width), fill), torch.full((2 * len(LENGTHS), width), PAD)
    for row, (text, ramp) in enumerate(zip(texts, ramps, strict=True)):
        ids[row, : len(text)], positions[row, : len(text)] = text, ramp
        ids[~row, -len(text) :], positions[~row, -len(text) :] = text, ramp
    return ids, positions


def _alone(model: nn.Module, ids: Tensor, positions: Positions, run: Run) -> list[Tensor]:
    """The rows of each document, run by itself, in the order in which they lie in the contexts."""
    rows: list[list[Tensor]] = []
    for own, at in zip(ids, positions, strict=True):
        kept, at = own[at != PAD], at[at != PAD]
        begins = [*(at == 0).nonzero().flatten().tolist(), len(at)]
        for start, stop in pairwise(begins):
            rows.append([x[0] for x in run(inputs_for(model, kept[None, start:stop]))])
    return [torch.cat(parts) for parts in zip(*rows, strict=True)]


def _distance(one: Tensor, other: Tensor) -> float:
    """Of the rows that are farthest from each other, in units of the norm of rows."""
    one, other = one.float(), other.float()
    return float((one - other).norm(dim=-1).max() / other.norm(dim=-1).mean().clamp_min(1e-12))

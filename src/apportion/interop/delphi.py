"""The activation cache of delphi (EleutherAI), from which it explains latents without running a model.

    <folder>/<hookpoint>/<first>_<last>.safetensors     one file for each range of latents, both ends included
        locations    uint16 or uint32 [matches, 3]: context, position, latent - first
        activations  float16 [matches]
        tokens       int64 [contexts, positions]
    <folder>/<hookpoint>/config.json                    how text was cut, and the name of the model

Matches up to 1e-5 are left out, as delphi does. Codes are in raw units, as in the files that `ap.export` writes: those
of `sae.encode` times `unit`, so that activations mean the same in all tools.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from apportion.architectures import SAE
from apportion.disk import whole_folder, write_json, write_tensors
from apportion.interop.export import unit
from apportion.interop.writing import empty_folder
from apportion.rows.store import ActivationStore
from apportion.trust import expanded, within

SMALLEST = 1e-5
LARGEST = torch.finfo(torch.float16).max
ROWS = 8192
"""Rows of a store that are encoded together, about."""

Contexts: TypeAlias = tuple[Int[Tensor, "contexts positions"], Float[Tensor, "contexts positions d_in"]]


def write_delphi_cache(
    sae: SAE, source: ActivationStore | Iterable[Contexts], folder: str | Path, n_splits: int = 5
) -> Path:
    """Encode `source` and write what is active into a folder of delphi's; returns that of the hookpoint in it.

    `source` is a cache of activations, whose filtered tokens are left out, or pairs (tokens [contexts, positions],
    x [contexts, positions, d_in]), all of one length. Memory: 14 bytes a match. Raises ValueError for latents that
    cannot be cut into `n_splits` ranges, contexts of different lengths, and a folder that exists.
    """
    if not 1 <= n_splits <= sae.d_sae:
        raise ValueError(f"n_splits must lie between 1 and d_sae = {sae.d_sae}, got {n_splits}.")
    store = source if isinstance(source, ActivationStore) else None
    hookpoint = sae.hookpoint or (store.hookpoint if store else "sae")
    target = empty_folder(within(expanded(folder), hookpoint))
    blocks = _of_store(store) if store else _of_pairs(source)  # type: ignore[arg-type]
    tokens, locations, activations = _matches(sae, blocks)
    language = (store.describe() if store else sae.source).lm
    config = {
        "dataset_repo": language.text.where or "",
        "dataset_split": language.text.split or "train",
        "dataset_name": "",
        "dataset_column": language.text.field or "text",
        "batch_size": 32,
        "cache_ctx_len": tokens.shape[1],
        "n_tokens": tokens.numel(),
        "n_splits": n_splits,
        "model_name": language.model.name_or_path,
    }
    edges = torch.linspace(0, sae.d_sae, n_splits + 1).long().tolist()
    with whole_folder(target) as partial:
        for first, end in pairwise(edges):
            here = (locations[:, 2] >= first) & (locations[:, 2] < end)
            moved = locations[here] - torch.tensor([0, 0, first], dtype=torch.int32)
            small = max(len(tokens), tokens.shape[1], end - first) <= 2**16
            columns = {
                "locations": moved.to(torch.uint16 if small else torch.uint32),
                "activations": activations[here],
                "tokens": tokens,
            }
            write_tensors(partial / f"{first}_{end - 1}.safetensors", columns)
        write_json(partial / "config.json", config)
    return target


Block: TypeAlias = tuple[Int[Tensor, "contexts positions"], Float[Tensor, "rows d_in"], Bool[Tensor, " rows"] | None]


def _of_store(store: ActivationStore) -> Iterator[Block]:
    length = store.context_tokens
    if store.rows % length or store.describe().lm.layout is not None:
        raise ValueError(f"{store.folder} has {store.rows} rows, which are no whole contexts of {length} tokens.")
    for rows in torch.arange(store.rows).split(max(1, ROWS // length) * length):
        tokens, _ = store.gather_labels(rows)
        yield tokens.reshape(-1, length), store.gather(rows), store.mask[rows]


def _of_pairs(pairs: Iterable[tuple[Tensor, Tensor]]) -> Iterator[Block]:
    for tokens, x in pairs:
        if tokens.ndim != 2 or x.shape[:-1] != tokens.shape:
            raise ValueError(
                "Give pairs of tokens [contexts, positions] and x [contexts, positions, d_in], "
                f"got {list(tokens.shape)} and {list(x.shape)}."
            )
        yield tokens, x.flatten(0, 1), None


@torch.no_grad()
def _matches(
    sae: SAE, blocks: Iterable[Block]
) -> tuple[Int[Tensor, "contexts positions"], Int[Tensor, "matches 3"], Float[Tensor, " matches"]]:
    """All tokens, where latents are active, and how strongly."""
    texts, places, values = [], [], []
    contexts = 0
    size = unit(sae)
    with sae.in_eval_mode():
        for tokens, x, mask in blocks:
            if texts and tokens.shape[1] != texts[0].shape[1]:
                raise ValueError(f"Contexts of {tokens.shape[1]} tokens follow some of {texts[0].shape[1]}.")
            kept = torch.arange(len(x)) if mask is None else mask.nonzero().squeeze(1)
            latents = sae.encode(x[kept.to(x.device)].to(sae.device))
            latents = latents.with_values(latents.values * size[latents.indices])
            latents = latents.where(latents.values.abs() > SMALLEST).to("cpu")
            row, length = kept[latents.rows()], tokens.shape[1]
            places.append(torch.stack([contexts + row // length, row % length, latents.indices], dim=1).int())
            values.append(latents.values.clamp(-LARGEST, LARGEST).half())
            texts.append(tokens.long().cpu())
            contexts += len(tokens)
    if not texts:
        raise ValueError("There are no contexts to encode.")
    return torch.cat(texts), torch.cat(places), torch.cat(values)

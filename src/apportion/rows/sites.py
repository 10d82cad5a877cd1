"""Rows made of several hookpoints, for SAEs that need more than one activation of a token.

    PairStore     x [d_in] at one hookpoint, target [d_out] at another              transcoders
    SitesStore    x [num_sites, d_in]: one token at all hookpoints together           crosscoders
    LayersStore   x [d_in]: every (token, layer) is a row, `Batch.site` the layer     one SAE for all layers (MLSAE)

Each reads like an `ActivationStore`: `CacheSource(store)` trains on it, `evaluate_rows(saes, store)` measures on it.
Row i of a cache is the same token at every hookpoint. Caches of two models are aligned as well if they were collected
from the same text with the same tokenizer, which is checked. A token takes part only if the filter of every hookpoint
keeps it.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from functools import cached_property, reduce
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from apportion.about import About, Language, ModelRecord, Site
from apportion.rows.batch import Batch
from apportion.rows.hookpoint import choose_from
from apportion.rows.manifest import read_manifest
from apportion.rows.store import ActivationStore
from apportion.urls import in_full


def open_stores(folder: str | Path, hookpoints: str | None = None) -> list[ActivationStore]:
    """A cache at several hookpoints: names or globs separated by commas, or None for all that it has."""
    names = list(read_manifest(folder)["hookpoints"])
    return [ActivationStore(folder, n) for n in (names if hookpoints is None else choose_from(names, hookpoints))]


class Aligned(ABC):
    """Base of the stores here: several `ActivationStore`s whose rows are the same tokens."""

    def __init__(self, stores: Sequence[ActivationStore], one_width: bool = True) -> None:
        if len(stores) < 2:
            here = ", ".join(s.hookpoint for s in stores) or "none"
            raise ValueError(f"{type(self).__name__} joins two hookpoints or more, got {here}. Name at least two.")
        self.stores = list(stores)
        self.folder, self.d_in, self.rows = stores[0].folder, stores[0].d_in, stores[0].rows
        self.hookpoint = ",".join(store.hookpoint for store in stores)
        for other in stores[1:]:
            _check_aligned(stores[0], other)
            if one_width and other.d_in != self.d_in:
                raise ValueError(
                    f"{stores[0].hookpoint} has width {self.d_in}, {other.hookpoint} has {other.d_in}: "
                    "choose hookpoints of one width"
                )

    @property
    def part_rows(self) -> list[int]:
        """Rows of each part; all of them in one where the stores have other parts."""
        each = [store.part_rows for store in self.stores]
        return each[0] if all(one == each[0] for one in each) else [self.stores[0].rows]

    @property
    def row_bytes(self) -> int:
        return sum(store.row_bytes for store in self.stores)

    @property
    def most_parts(self) -> int | None:
        """How many parts can be here at the same time; None where all of them are."""
        known = [store.most_parts for store in self.stores if store.most_parts is not None]
        return min(known) // len(self.stores) if known else None

    def held(self, parts: Sequence[int]) -> Aligned:
        """These stores with those parts in memory, where all have the same."""
        if len(self.part_rows) == 1:
            return self
        found = copy(self)
        found.stores = [store.held(parts) for store in self.stores]
        return found

    @cached_property
    def mask(self) -> Bool[Tensor, " rows"]:
        """True for the tokens that every hookpoint keeps."""
        return reduce(torch.logical_and, (store.mask for store in self.stores))

    def __getstate__(self) -> dict[str, Any]:
        """The stores, which are sent as paths, and not what was made of them."""
        return {name: value for name, value in vars(self).items() if name != "mask"}

    @property
    def groups(self) -> Int[Tensor, " rows"]:
        return self.stores[0].groups

    @property
    def labels(self) -> dict[str, Int[Tensor, " rows"]]:
        return self.stores[0].labels

    @abstractmethod
    def batch(self, indices: Int[Tensor, " n"]) -> Batch:
        """The rows at `indices` with their labels."""

    def describe(self) -> About:
        """What the hookpoints share, and under `sites` what each has of its own; `filtered_share` is of tokens."""
        each = [store.describe() for store in self.stores]
        sites, language = [store.site for store in self.stores], each[0].lm
        folders = [in_full(store.folder) for store in self.stores]
        if apart := len(set(folders)) > 1:
            models = [Language(model=about.lm.model, model_dtype=about.lm.model_dtype) for about in each]
            sites = [replace(site, language=model) for site, model in zip(sites, models, strict=True)]
            language = replace(language, model=ModelRecord(), model_dtype=None)
        together = Site(hookpoint=self.hookpoint, d_in=self.d_in, filtered_share=1 - self.mask.double().mean().item())
        return each[0].of_site(
            together,
            language=language,
            folders=tuple(folders) if apart else (),
            content_sha256=hashlib.sha256("".join(about.content_sha256 or "" for about in each).encode()).hexdigest(),
            sites=tuple(sites),
        )


class PairStore(Aligned):
    """What a transcoder takes: activations at one hookpoint, and as target those of the same token at another."""

    def __init__(self, x: ActivationStore, target: ActivationStore) -> None:
        super().__init__([x, target], one_width=False)
        self.d_out, self.hookpoint, self.target_hookpoint = target.d_in, x.hookpoint, target.hookpoint

    def batch(self, indices: Int[Tensor, " n"]) -> Batch:
        x, target = self.stores
        return replace(x.batch(indices), target=target.gather(indices))

    def describe(self) -> About:
        return replace(super().describe(), target_hookpoint=self.target_hookpoint)


class SitesStore(Aligned):
    """What a crosscoder takes: the activations of a token at all hookpoints, [num_sites, d_in]."""

    def __init__(self, stores: Sequence[ActivationStore]) -> None:
        super().__init__(stores)
        self.num_sites = len(stores)

    def gather(self, indices: Int[Tensor, " n"]) -> Float[Tensor, "n num_sites d_in"]:
        return torch.stack([store.gather(indices) for store in self.stores], dim=1)

    def batch(self, indices: Int[Tensor, " n"]) -> Batch:
        tokens, positions = self.stores[0].gather_labels(indices)
        return Batch(self.gather(indices), tokens=tokens, positions=positions)


class LayersStore(Aligned):
    """What one SAE for all layers takes: row t * num_layers + l is token t at hookpoint l."""

    def __init__(self, stores: Sequence[ActivationStore]) -> None:
        super().__init__(stores)
        self.rows = len(stores) * stores[0].rows

    @cached_property
    def mask(self) -> Bool[Tensor, " rows"]:
        return super().mask.repeat_interleave(len(self.stores))

    @property
    def part_rows(self) -> list[int]:
        return [rows * len(self.stores) for rows in super().part_rows]

    @property
    def row_bytes(self) -> int:
        return self.stores[0].row_bytes

    @property
    def groups(self) -> Int[Tensor, " rows"]:
        return super().groups.repeat_interleave(len(self.stores))

    @property
    def labels(self) -> dict[str, Int[Tensor, " rows"]]:
        return {name: column.repeat_interleave(len(self.stores)) for name, column in super().labels.items()}

    def batch(self, indices: Int[Tensor, " n"]) -> Batch:
        token = indices.div(len(self.stores), rounding_mode="floor")
        site = indices - token * len(self.stores)
        x = torch.empty(len(indices), self.d_in)
        for number, store in enumerate(self.stores):
            here = (site == number).nonzero().squeeze(1)
            x[here] = store.gather(token[here])
        tokens, positions = self.stores[0].gather_labels(token)
        return Batch(x, tokens=tokens, positions=positions, site=site)

    def describe(self) -> About:
        return replace(super().describe(), rows=self.rows)


def _check_aligned(one: ActivationStore, other: ActivationStore) -> None:
    """ValueError unless row i of both is the same token."""
    if in_full(one.folder) == in_full(other.folder):
        return
    if not (torch.equal(one.tokens, other.tokens) and torch.equal(one.contexts, other.contexts)):
        raise ValueError(
            f"the caches {str(one.folder)!r} and {str(other.folder)!r} hold different tokens: collect both from the "
            "same text with the same tokenizer, number of tokens and context length"
        )

"""The two parts of the family's comparison: what is trained on, how it is measured, what the table shows.

Which rows an SAE gets follows from the SAE: crosscoders read two sites, transcoders one site and write the other. Both
exist on ground truth, where every feature then has a direction at each site; a cache of one hookpoint has neither.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from apportion.activations import ActivationStore, CacheSource, GroundTruthConfig, GroundTruthSource, Source
from apportion.activations.batch import Batch
from apportion.activations.world import World
from apportion.architectures import SAE
from apportion.evals import Measurement, evaluate_rows, held_out_rows
from apportion.evals.recovery import recovery
from apportion.latents import Latents
from apportion.recipes.runs import at_equal_l0, check_caches, in_language_model
from apportion.training import TrainConfig

VALIDATION_SEED = 1 << 20
"""Rows to choose the learning rate by: of no seed that anybody trains with."""

Columns = dict[str, tuple[str, str]]

Layout = Literal["row", "sites", "target"]


def layout_of(sae: SAE) -> Layout:
    """Which rows it takes: plain ones, several sites, or a row with another row as target."""
    if len(sae.row_shape) > 1:
        return "sites"
    return "target" if sae.needs_target else "row"


@dataclass(frozen=True, kw_only=True)
class Part(ABC):
    name: ClassVar[str]
    columns: ClassVar[Columns]
    """What the table shows: key of the result -> title, format."""
    k: int
    """Active latents per token."""
    d_sae: int
    """Latents of every SAE; baselines with a fixed basis have as many as the basis."""
    total_tokens: int
    """Tokens of a run."""
    batch_tokens: int = 1024
    """Tokens of a step."""

    @property
    @abstractmethod
    def d_in(self) -> int: ...

    @abstractmethod
    def check(self) -> None:
        """ValueError if this part cannot be run."""

    @abstractmethod
    def describe(self) -> str:
        """The setting in words, for the line above the table."""

    def why_not(self, sae: SAE) -> str | None:
        """Why it cannot take part, or None if it can."""
        return None

    @abstractmethod
    def source(self, sae: SAE, seed: int) -> Source: ...

    @abstractmethod
    def held_out(self, sae: SAE) -> dict[str, Any]:
        """Measured on rows that were neither trained nor calibrated on; to choose settings by."""

    @abstractmethod
    def evaluate(self, sae: SAE) -> dict[str, Any]:
        """The figures of the table, JSON-able."""

    def unfinished(self, result: dict[str, Any]) -> bool:
        """True if `finish` has something to add to these figures."""
        return False

    def finish(self, saes: Mapping[str, SAE]) -> dict[str, dict[str, Any]]:
        """Figures that are cheaper to get for several SAEs at once."""
        return {name: {} for name in saes}

    def config(self, lr: float, seed: int) -> TrainConfig:
        """Settings of a run; everything else is at its default."""
        return TrainConfig(lr=lr, batch_tokens=self.batch_tokens, total_tokens=self.total_tokens, seed=seed)


@dataclass(frozen=True, kw_only=True)
class TruthPart(Part):
    name = "truth"
    columns: ClassVar[Columns] = {
        "fvu": ("FVU", ".4f"),
        "l0": ("L0", ".2f"),
        "dead": ("dead", ".1%"),
        "l0_correlation": ("r(L0, true)", ".2f"),
        "mcc": ("MCC", ".3f"),
        "f1": ("F1", ".3f"),
        "cosine_of_features": ("cosine of features", ".3f"),
        "cosine_of_latents": ("cosine of latents", ".3f"),
        "uniqueness": ("unique", ".3f"),
    }
    k: int = 4
    d_sae: int = 256
    total_tokens: int = 1_000_000
    world: GroundTruthConfig = field(default_factory=GroundTruthConfig)
    """The features."""
    eval_tokens: int = 50_000
    """Tokens to evaluate on."""

    @property
    def d_in(self) -> int:
        return self.world.d_in

    def check(self) -> None:
        World(self.world)

    def describe(self) -> str:
        w = self.world
        return (
            f"{w.num_features} features in {w.d_in} dimensions, {w.active:g} of them active on average (levels of "
            f"difficulty {', '.join(f'{level:g}' for level in w.levels)}), {w.num_roots} trees of {w.tree_size}; "
            f"evaluated on {self.eval_tokens:,} tokens that are the same for all"
        )

    def source(self, sae: SAE, seed: int) -> GroundTruthSource:
        return GroundTruthSource(replace(self.world, layout=layout_of(sae)), seed)

    def held_out(self, sae: SAE) -> dict[str, Any]:
        batch, _, _ = known_rows(replace(self.world, layout=layout_of(sae)), VALIDATION_SEED, self.eval_tokens)
        measurement = Measurement(sae)
        measurement.add(batch.x, torch.ones(len(batch.x), dtype=torch.bool), target=batch.target)
        return measurement.result()

    def evaluate(self, sae: SAE) -> dict[str, Any]:
        return recovery(sae, *known_rows(replace(self.world, layout=layout_of(sae)), 0, self.eval_tokens))


@lru_cache(maxsize=6)
def known_rows(world: GroundTruthConfig, seed: int, n: int) -> tuple[Batch, Latents, Tensor]:
    """Rows, their true codes and the true directions."""
    source = GroundTruthSource(world, seed)
    return *source.truth(n), source.directions


@lru_cache(maxsize=2)
def opened(folder: Path) -> ActivationStore:
    return ActivationStore(folder)


@dataclass(frozen=True, kw_only=True)
class CachePart(Part):
    name = "cache"
    columns: ClassVar[Columns] = {
        "fvu": ("FVU", ".4f"),
        "l0": ("L0", ".2f"),
        "dead": ("dead", ".2%"),
        "delta_ce": ("ΔCE", ".4f"),
        "seconds": ("seconds", ".0f"),
    }
    k: int = 32
    d_sae: int = 4608
    total_tokens: int = 900_000
    acts: Path | None = None
    """The training cache; without it there is no second table."""
    eval_acts: Path | None = None
    """The evaluation cache: other text of the same kind."""
    model: str | None = None
    """The language model, for delta-CE."""
    text: Path | None = None
    """The text of the evaluation cache, for delta-CE."""
    ce_tokens: int = 16_384
    """Tokens over which delta-CE is measured."""

    @property
    def train_store(self) -> ActivationStore:
        assert self.acts is not None, "checked"
        return opened(self.acts)

    @property
    def d_in(self) -> int:
        return self.train_store.d_in

    def check(self) -> None:
        if self.acts is None or self.eval_acts is None:
            raise ValueError("The comparison on activations needs two caches: give --acts and --eval-acts.")
        if (self.model is None) != (self.text is None):
            raise ValueError("delta-CE needs both --model and --text; leave both out to do without.")
        check_caches(self.acts, self.eval_acts)

    def describe(self) -> str:
        about, name = self.train_store.describe(), Path(self.train_store.describe()["model"]["name_or_path"]).name
        return f"{name}, output of {about['hookpoint']}, width {self.d_in}"

    def why_not(self, sae: SAE) -> str | None:
        reasons = {
            "sites": "reads several hookpoints at once, and the cache has one",
            "target": "predicts another hookpoint, and the cache has one",
        }
        return reasons.get(layout_of(sae))

    def source(self, sae: SAE, seed: int) -> CacheSource:
        return CacheSource(self.train_store, seed=seed)

    def config(self, lr: float, seed: int) -> TrainConfig:
        config, rows = super().config(lr, seed), CacheSource(self.train_store).num_rows
        return replace(config, total_tokens=min(self.total_tokens, rows))

    def held_out(self, sae: SAE) -> dict[str, Any]:
        store = self.train_store
        rows = held_out_rows(store, CacheSource(store).held_out_share)
        return evaluate_rows({"sae": sae}, store, rows, progress=False)["sae"].result()

    def evaluate(self, sae: SAE) -> dict[str, Any]:
        assert self.eval_acts is not None, "checked"
        return at_equal_l0(sae, opened(self.eval_acts))

    def unfinished(self, result: dict[str, Any]) -> bool:
        return self.model is not None and "delta_ce" not in result

    def finish(self, saes: Mapping[str, SAE]) -> dict[str, dict[str, Any]]:
        assert self.eval_acts and self.model and self.text, "checked"
        return in_language_model(saes, opened(self.eval_acts), self.model, self.text, self.ce_tokens)

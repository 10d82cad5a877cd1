"""The two parts of the family's comparison: what is trained on, how it is measured, what the table shows.

Which rows an SAE gets follows from the SAE: crosscoders read two sites, transcoders one site and write the other. Both
exist on ground truth, where every feature then has a direction at each site. On caches they need to be told which
hookpoints to take, and are left out otherwise.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from apportion.architectures import SAE
from apportion.architectures.base import RowKind
from apportion.evals import Measurement, evaluate_rows, held_out_rows
from apportion.evals.recovery import recovery
from apportion.latents import Latents
from apportion.recipes.command import listed
from apportion.recipes.runs import at_equal_l0, check_same_place, in_language_model, least, spread
from apportion.rows import ActivationStore, CacheSource, Source
from apportion.rows.batch import Batch, RowStore
from apportion.rows.manifest import read_manifest
from apportion.rows.opening import joined
from apportion.synthetic import GroundTruthConfig, GroundTruthSource
from apportion.synthetic.world import Layout, World
from apportion.training import TrainConfig

VALIDATION_SEED = 1 << 20
"""Rows to choose the learning rate by: of no seed that anybody trains with."""


class Column(NamedTuple):
    """One column of a table."""

    title: str
    style: str
    """Format of a figure."""
    over_seeds: Callable[[list[dict[str, Any]], str, str], str] = spread
    """What is shown of a key of all runs."""


Columns = dict[str, Column]

LAYOUTS: dict[RowKind, Layout] = {"one": "row", "layers": "row", "pair": "target", "sites": "sites"}
"""In which layout ground truth has rows of a kind."""


def kind_here(sae: SAE) -> RowKind:
    """Which rows it takes here, where one for all layers sees one of them."""
    return "one" if sae.row_kind == "layers" else sae.row_kind


@dataclass(frozen=True, kw_only=True)
class Part(ABC):
    name: ClassVar[str]
    columns: ClassVar[Columns]
    """What the table shows, by key of the result."""
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

    def note(self, sae: SAE) -> str | None:
        """What is different about it here, for a line under the table."""
        return None

    def unfinished(self, sae: SAE, result: dict[str, Any]) -> bool:
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
        "fvu": Column("FVU", ".4f"),
        "l0": Column("L0", ".2f"),
        "dead": Column("dead", ".1%"),
        "l0_correlation": Column("r(L0, true)", ".2f"),
        "mcc": Column("MCC", ".3f"),
        "f1": Column("F1", ".3f"),
        "cosine_of_features": Column("cosine of features", ".3f"),
        "cosine_of_latents": Column("cosine of latents", ".3f"),
        "uniqueness": Column("unique", ".3f"),
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
        return GroundTruthSource(replace(self.world, layout=LAYOUTS[sae.row_kind]), seed)

    def held_out(self, sae: SAE) -> dict[str, Any]:
        batch, _, _ = known_rows(replace(self.world, layout=LAYOUTS[sae.row_kind]), VALIDATION_SEED, self.eval_tokens)
        measurement = Measurement(sae)
        measurement.add(batch.x, torch.ones(len(batch.x), dtype=torch.bool), target=batch.target)
        return measurement.result()

    def evaluate(self, sae: SAE) -> dict[str, Any]:
        return recovery(sae, *known_rows(replace(self.world, layout=LAYOUTS[sae.row_kind]), 0, self.eval_tokens))


@lru_cache(maxsize=6)
def known_rows(world: GroundTruthConfig, seed: int, n: int) -> tuple[Batch, Latents, Tensor]:
    """Rows, their true codes and the true directions."""
    source = GroundTruthSource(world, seed)
    return *source.truth(n), source.directions


@lru_cache(maxsize=6)
def opened(folders: tuple[Path, ...], kind: RowKind, hookpoints: tuple[str | None, ...]) -> RowStore:
    """The rows for SAEs of this kind, from the first cache that has all these hookpoints."""
    has = {folder: read_manifest(folder)["hookpoints"] for folder in folders}
    folder = next((f for f in folders if all(h is None or h in has[f] for h in hookpoints)), folders[0])
    return joined(kind, [ActivationStore(folder, hookpoint) for hookpoint in hookpoints])


@dataclass(frozen=True, kw_only=True)
class CachePart(Part):
    name = "cache"
    columns: ClassVar[Columns] = {
        "fvu": Column("FVU", ".4f"),
        "l0": Column("L0", ".2f"),
        "dead": Column("dead", ".2%"),
        "delta_ce": Column("ΔCE", ".4f"),
        "seconds": Column("seconds", ".0f", least),
    }
    k: int = 32
    d_sae: int = 4608
    total_tokens: int = 900_000
    acts: listed(Path, "CACHE,..") = ()  # pyright: ignore[reportInvalidTypeForm]
    """The training cache, or several; without it there is no second table."""
    eval_acts: listed(Path, "CACHE,..") = ()  # pyright: ignore[reportInvalidTypeForm]
    """The evaluation cache, or several: other text of the same kind."""
    hookpoint: str | None = None
    """Which hookpoint, if the first cache has several."""
    pair: listed(str, "A,B") = ()  # pyright: ignore[reportInvalidTypeForm]
    """For transcoders: two hookpoints of one cache, what they read and what they predict."""
    sites: listed(str, "A,B") = ()  # pyright: ignore[reportInvalidTypeForm]
    """For crosscoders: two hookpoints of one cache, which they take together."""
    model: str | None = None
    """The language model, for delta-CE."""
    text: Path | None = None
    """The text of the evaluation cache, for delta-CE."""
    ce_tokens: int = 16_384
    """Tokens over which delta-CE is measured."""

    @property
    def hookpoints(self) -> dict[RowKind, tuple[str | None, ...]]:
        """What rows of each kind are made of; nothing if there are none."""
        return {"one": (self.hookpoint,), "pair": self.pair, "sites": self.sites}

    def train_rows(self, kind: RowKind = "one") -> RowStore:
        return opened(self.acts, kind, self.hookpoints[kind])

    def eval_rows(self, kind: RowKind) -> RowStore:
        return opened(self.eval_acts, kind, self.hookpoints[kind])

    @property
    def d_in(self) -> int:
        return self.train_rows().d_in

    def check(self) -> None:
        if not self.acts or not self.eval_acts:
            raise ValueError("The comparison on activations needs two caches: give --acts and --eval-acts.")
        if (self.model is None) != (self.text is None):
            raise ValueError("delta-CE needs both --model and --text; leave both out to do without.")
        for name, two in (("pair", self.pair), ("sites", self.sites)):
            if two and len(set(two)) != 2:
                raise ValueError(f"--{name} takes two different hookpoints, separated by a comma; got {','.join(two)}.")
        for kind, hookpoints in self.hookpoints.items():
            if hookpoints:
                train, evaluation = self.train_rows(kind), self.eval_rows(kind)
                check_same_place(train, evaluation)
                if train.d_in != self.d_in or evaluation.d_in != self.d_in:
                    raise ValueError(f"{train.hookpoint} has width {train.d_in}, and the comparison {self.d_in}.")

    def describe(self) -> str:
        about = self.train_rows().describe()
        return f"{Path(about.lm.model.name_or_path or '').name}, output of {about.hookpoint}, width {self.d_in}"

    def why_not(self, sae: SAE) -> str | None:
        kind = kind_here(sae)
        missing = {"sites": "takes two hookpoints at once (--sites)", "pair": "predicts another hookpoint (--pair)"}
        return None if self.hookpoints[kind] else missing[kind]

    def note(self, sae: SAE) -> str | None:
        kind = kind_here(sae)
        if kind == "one":
            return None
        first, second = self.hookpoints[kind]
        if kind == "pair":
            return f"reads {first} and predicts {second}, which FVU and ΔCE are about"
        return f"takes {first} and {second}; FVU is over both, ΔCE is of one place and not measured"

    def source(self, sae: SAE, seed: int) -> CacheSource:
        return CacheSource(self.train_rows(kind_here(sae)), seed=seed)

    def config(self, lr: float, seed: int) -> TrainConfig:
        config, rows = super().config(lr, seed), CacheSource(self.train_rows()).num_rows
        return replace(config, total_tokens=min(self.total_tokens, rows))

    def held_out(self, sae: SAE) -> dict[str, Any]:
        store = self.train_rows(kind_here(sae))
        rows = held_out_rows(store, CacheSource(store).held_out_share)
        return evaluate_rows({"sae": sae}, store, rows, progress=False)["sae"].result()

    def evaluate(self, sae: SAE) -> dict[str, Any]:
        return at_equal_l0(sae, self.eval_rows(kind_here(sae)))

    def unfinished(self, sae: SAE, result: dict[str, Any]) -> bool:
        return self.model is not None and kind_here(sae) != "sites" and "delta_ce" not in result

    def finish(self, saes: Mapping[str, SAE]) -> dict[str, dict[str, Any]]:
        assert self.model and self.text, "checked"
        groups: dict[RowKind, dict[str, SAE]] = {}
        for name, sae in saes.items():
            groups.setdefault(kind_here(sae), {})[name] = sae
        found: dict[str, dict[str, Any]] = {}
        for kind, alike in groups.items():
            found |= in_language_model(alike, self.eval_rows(kind), self.model, self.text, self.ce_tokens)
        return found

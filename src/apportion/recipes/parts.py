"""What experiments train on and how they measure: made-up features, or caches of activations.

Which rows an SAE gets follows from the SAE: crosscoders read two sites, transcoders one site and write the other, and
one for all layers sees one of them. Ground truth has rows of every kind.

Figures on caches are over every other context of the evaluation cache, with thresholds calibrated on the contexts in
between: other text has another difficulty, and SAEs are to be compared at equal L0. Before that they are measured as
fitted. delta-CE is over contexts of the same half.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from apportion.architectures import SAE, SAES
from apportion.architectures.base import RowKind
from apportion.evals import evaluate, held_out_rows
from apportion.evals.language_model import evaluate_cache_in_model
from apportion.evals.rows import halves, recalibrate
from apportion.language import load_model
from apportion.language.fingerprint import model_fingerprint
from apportion.recipes.command import assigned, listed
from apportion.rows import ActivationStore, CacheSource, Source
from apportion.rows.batch import RowStore
from apportion.rows.manifest import read_manifest
from apportion.rows.opening import joined
from apportion.rows.sites import PairStore
from apportion.same_model import model_difference
from apportion.synthetic import GroundTruthConfig, GroundTruthSource
from apportion.synthetic.ground_truth import TruthStore
from apportion.synthetic.world import Layout, World
from apportion.training import TrainConfig

VALIDATION_SEED = 1 << 20
"""Rows to choose the learning rate by: of no seed that anybody trains with."""
LAYOUTS: dict[RowKind, Layout] = {"one": "row", "layers": "row", "pair": "target", "sites": "sites"}
"""In which layout ground truth has rows of a kind."""


@dataclass(frozen=True, kw_only=True)
class Part(ABC):
    k: int
    """Active latents per token."""
    d_sae: int
    """Latents of every SAE; baselines with a fixed basis have as many as the basis."""
    total_tokens: int
    """Tokens of a run."""
    batch_tokens: int = 1024
    """Tokens of a step."""
    train: listed(str, "NAME=VALUE,..") = ()  # pyright: ignore[reportInvalidTypeForm]
    """Other settings of training that are not at their default, such as decay_share=0.4."""

    @property
    @abstractmethod
    def d_in(self) -> int: ...

    @abstractmethod
    def describe(self) -> str:
        """The setting in words, for the line above the table."""

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
        own = {"lr": lr, "seed": seed, "batch_tokens": self.batch_tokens, "total_tokens": self.total_tokens}
        others = dict(map(assigned, self.train))
        if twice := own.keys() & others:
            raise ValueError(f"--train takes no {', '.join(sorted(twice))}, which has an option of its own.")
        return TrainConfig(**own, **others)


@dataclass(frozen=True, kw_only=True)
class TruthPart(Part):
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

    def check_rows(self) -> None:
        World(self.world)

    def describe(self) -> str:
        w = self.world
        return (
            f"{w.num_features} features in {w.d_in} dimensions, {w.active:g} of them active on average (levels of "
            f"difficulty {', '.join(f'{level:g}' for level in w.levels)}), {w.num_roots} trees of {w.tree_size}; "
            f"evaluated on {self.eval_tokens:,} tokens that are the same for all"
        )

    def seen_by(self, sae: SAE) -> GroundTruthConfig:
        """The features in rows of the kind that this SAE takes."""
        return replace(self.world, layout=LAYOUTS[sae.row_kind])

    def source(self, sae: SAE, seed: int) -> GroundTruthSource:
        return GroundTruthSource(self.seen_by(sae), seed)

    def held_out(self, sae: SAE) -> dict[str, Any]:
        return evaluate(sae, known_rows(self.seen_by(sae), VALIDATION_SEED, self.eval_tokens))

    def evaluate(self, sae: SAE) -> dict[str, Any]:
        return evaluate(sae, known_rows(self.seen_by(sae), 0, self.eval_tokens), evals=("recovery",))


@lru_cache(maxsize=6)
def known_rows(world: GroundTruthConfig, seed: int, n: int) -> TruthStore:
    return GroundTruthSource(world, seed).store(n)


@dataclass(frozen=True, kw_only=True)
class CachePart(Part):
    evals: ClassVar[tuple[str, ...]] = ()
    """Evaluators to ask besides."""
    k: int = 32
    d_sae: int = 4608
    total_tokens: int = 900_000
    acts: listed(Path, "CACHE,..") = ()  # pyright: ignore[reportInvalidTypeForm]
    """The training cache; several where not all hookpoints are in one."""
    eval_acts: listed(Path, "CACHE,..") = ()  # pyright: ignore[reportInvalidTypeForm]
    """The evaluation cache, or several: other text of the same kind."""
    hookpoint: str | None = None
    """Which hookpoint, if the first cache has several."""
    model: str | None = None
    """The language model, for delta-CE."""
    ce_tokens: int = 16_384
    """Tokens over which delta-CE is measured."""

    @property
    def hookpoints(self) -> dict[RowKind, tuple[str | None, ...]]:
        """What rows of each kind are made of; nothing if there are none."""
        return {"one": (self.hookpoint,)}

    def train_rows(self, kind: RowKind = "one") -> RowStore:
        return opened(self.acts, kind, self.hookpoints[kind])

    def eval_rows(self, kind: RowKind = "one") -> RowStore:
        return opened(self.eval_acts, kind, self.hookpoints[kind])

    @property
    def d_in(self) -> int:
        return self.train_rows().d_in

    def check_rows(self) -> None:
        if not self.acts or not self.eval_acts:
            raise ValueError("The comparison on activations needs two caches: give --acts and --eval-acts.")
        for kind, hookpoints in self.hookpoints.items():
            if hookpoints:
                train, evaluation = self.train_rows(kind), self.eval_rows(kind)
                check_same_place(train, evaluation)
                if train.d_in != self.d_in or evaluation.d_in != self.d_in:
                    raise ValueError(f"{train.hookpoint} has width {train.d_in}, and the comparison {self.d_in}.")
        if self.model is not None:
            self.language_model(self.model)

    def language_model(self, name: str) -> Any:
        """ValueError if it is not the one that made the caches."""
        model, store = load_model(name)[0], self.eval_rows()
        if difference := model_difference(store.describe().lm.model, model_fingerprint(model)):
            raise ValueError(f"--model {name} is not the model of {store.folder}: {difference}.")
        return model

    def describe(self) -> str:
        about = self.train_rows().describe()
        return f"{Path(about.lm.model.name_or_path or '').name}, output of {about.hookpoint}, width {self.d_in}"

    def source(self, sae: SAE, seed: int) -> CacheSource:
        return CacheSource(self.train_rows(kind_here(sae)), seed=seed)

    def config(self, lr: float, seed: int) -> TrainConfig:
        config, rows = super().config(lr, seed), CacheSource(self.train_rows()).num_rows
        return replace(config, total_tokens=min(self.total_tokens, rows))

    def held_out(self, sae: SAE) -> dict[str, Any]:
        store = self.train_rows(kind_here(sae))
        return evaluate(sae, store, held_out_rows(store, CacheSource(store).held_out_share))

    def halves(self, kind: RowKind = "one") -> tuple[RowStore, Int[Tensor, " n"], Int[Tensor, " m"]]:
        """The evaluation cache, its rows to calibrate on and those to evaluate on."""
        store = self.eval_rows(kind)
        return store, *halves(store, torch.arange(store.rows))

    def evaluate(self, sae: SAE) -> dict[str, Any]:
        store, calibrate, rows = self.halves(kind_here(sae))
        as_fitted = evaluate(sae, store, rows)
        recalibrate(sae, store, calibrate)
        return {"as_fitted": as_fitted, **evaluate(sae, store, rows, evals=self.evals)}

    def unfinished(self, result: dict[str, Any]) -> bool:
        several = SAES[result["sae"]].architecture.row_kind == "sites"
        return self.model is not None and not several and "delta_ce" not in result

    def finish(self, saes: Mapping[str, SAE]) -> dict[str, dict[str, Any]]:
        """delta-CE and what belongs to it; clean and ablated passes are shared by SAEs of one kind."""
        model, found, key = self.language_model(self.model or ""), {}, "l0_difficulty_correlation"
        kinds: set[RowKind] = {kind_here(sae) for sae in saes.values()}
        for kind in kinds:
            alike = {name: sae for name, sae in saes.items() if kind_here(sae) == kind}
            store, calibrate, rows = self.halves(kind)
            for sae in alike.values():
                recalibrate(sae, store, calibrate)
            assert isinstance(store, ActivationStore | PairStore), "others are finished"
            measured, entropies = evaluate_cache_in_model(alike, store, rows, model, self.ce_tokens)
            found |= {name: entropies.of(name) | {key: measured[name].result()[key]} for name in alike}
        return found


@lru_cache(maxsize=6)
def opened(folders: tuple[Path, ...], kind: RowKind, hookpoints: tuple[str | None, ...]) -> RowStore:
    """The rows for SAEs of this kind, from the first cache that has all these hookpoints."""
    has = {folder: read_manifest(folder)["hookpoints"] for folder in folders}
    folder = next((f for f in folders if all(h is None or h in has[f] for h in hookpoints)), folders[0])
    return joined(kind, [ActivationStore(folder, hookpoint) for hookpoint in hookpoints])


def kind_here(sae: SAE) -> RowKind:
    """Which rows it takes here, where one for all layers sees one of them."""
    return "one" if sae.row_kind == "layers" else sae.row_kind


def check_same_place(train: RowStore, evaluation: RowStore) -> None:
    """ValueError if two caches are not of the same model and hookpoint."""
    a, b = train.describe(), evaluation.describe()
    for key, same in (("model", a.lm.model == b.lm.model), ("hookpoint", a.hookpoint == b.hookpoint)):
        if not same:
            raise ValueError(f"{train.folder} and {evaluation.folder} differ in {key}. Use caches of one hookpoint.")

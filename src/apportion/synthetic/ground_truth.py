"""Rows whose features are known: what an SAE recovers can be counted.

    x = sum_j c_j f_j + shift + noise        f_j unit directions, more of them than dimensions; c_j >= 0 the true codes

Token t has a difficulty u_t, one of the configured levels at random (mean 1). Feature j, of probability p_j, fires if a
standard normal g_tj lies below the quantile of p_j u_t; a feature below another in a tree fires only together with that
one, and never with a sibling. Its magnitude is c_j = |m_j + magnitude_sd * normal|. What the features are is decided in
world.py. The ingredients are those of SynthSAEBench-16k (arXiv 2602.14687), in our own form.

Everything is made as it is needed, in blocks that follow from (seed, number of the block): the rows never end and never
repeat, and a position is two numbers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from itertools import count
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from apportion.about import About
from apportion.kernels import decode_matches
from apportion.latents import Latents, concatenated, from_matches
from apportion.rows.arrays import ArrayStore
from apportion.rows.batch import Batch, regrouped
from apportion.rows.order import check_same_source, seeded
from apportion.synthetic.world import GroundTruthConfig, World

BLOCK_ENTRIES = 2**21
"""Rows times features of one block."""


class GroundTruthSource:
    """Endless rows of one world, on the CPU."""

    makes_rows = True
    num_rows = None
    """There are no epochs."""

    def __init__(self, config: GroundTruthConfig | None = None, seed: int = 0, held_out_rows: int = 200_000) -> None:
        """`seed` is that of the rows (the world has its own); `held_out_rows` are offered for calibration."""
        if held_out_rows < 1:
            raise ValueError(f"held_out_rows must be at least 1 (calibration needs some), got {held_out_rows}.")
        self.config, self.seed, self.held_out_rows = config or GroundTruthConfig(), seed, held_out_rows
        self.world, self.d_in = World(self.config), self.config.d_in
        self.block_rows = max(1, BLOCK_ENTRIES // self.config.num_features)
        self._position = (0, 0)

    @property
    def directions(self) -> Float[Tensor, " num_features *out"]:
        """What decoder rows should be: unit directions; with two sites [num_features, 2, d_in]."""
        of_sites = self.world.directions
        return of_sites if self.config.layout == "sites" else of_sites[:, -1]

    def truth(self, n: int) -> tuple[Batch, Latents]:
        """`n` rows to evaluate on, neither trained nor calibrated on, with their true codes; the same at each call."""
        if n < 1:
            raise ValueError(f"truth needs at least one row, got {n}.")
        blocks = [self._block("truth", number) for number in range(-(-n // self.block_rows))]
        x = torch.cat([x for x, _ in blocks])[:n]
        return self._batch(x), concatenated([codes for _, codes in blocks])[:n]

    def store(self, n: int) -> TruthStore:
        """The same, as a store to evaluate on."""
        batch, codes = self.truth(n)
        return TruthStore(batch, codes, self.directions)

    def batches(self, batch_tokens: int) -> Iterator[Batch]:
        if batch_tokens < 1:
            raise ValueError(f"batch_tokens must be at least 1, got {batch_tokens}.")
        for batch, position in self._rows("train", batch_tokens, *self._position):
            self._position = position
            yield batch

    def sample(self, n: int) -> Batch:
        return next(self._rows("sample", n))[0]

    def held_out(self, max_rows: int, chunk: int = 4096) -> Iterator[Batch]:
        left = min(max_rows, self.held_out_rows)
        for batch, _ in self._rows("held out", chunk):
            if left <= 0:
                return
            yield batch[:left]
            left -= len(batch)

    def state_dict(self) -> dict[str, Any]:
        block, row = self._position
        return {"block": block, "row": row, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_same_source(state, self._identity())
        self._position = (state["block"], state["row"])

    def describe(self) -> About:
        counts = {"d_in": self.d_in, "rows_calibrate": self.held_out_rows}
        return About(kind="ground truth", dtype="float32", **counts, **self._identity())

    def _identity(self) -> dict[str, Any]:
        """What must be equal for a position to mean the same rows."""
        return {"seed": self.seed, "world": json.loads(json.dumps(asdict(self.config)))}

    def _batch(self, x: Float[Tensor, "n sites d_in"]) -> Batch:
        if self.config.layout == "sites":
            return Batch(x)
        return Batch(x[:, 0], target=x[:, 1] if self.config.layout == "target" else None)

    def _rows(self, stream: str, n: int, block: int = 0, row: int = 0) -> Iterator[tuple[Batch, tuple[int, int]]]:
        """Endlessly `n` rows of a stream, with the position behind them; `row` rows of `block` have been handed out."""
        blocks = (Batch(self._block(stream, number)[0]) for number in count(block))
        for batch, number, end in regrouped(blocks, n, row):
            yield self._batch(batch.x), (block + number, end)

    def _block(self, stream: str, number: int) -> tuple[Float[Tensor, "rows sites d_in"], Latents]:
        """Block `number` of a stream: rows and their true codes."""
        config, world, n = self.config, self.world, self.block_rows
        generator = seeded("ground truth", self.seed, stream, number)
        rows, ids = self._firings(n, generator).nonzero(as_tuple=True)
        spread = torch.randn(len(ids), generator=generator)
        values = (world.magnitude[ids] + config.magnitude_sd * spread).abs()
        codes = from_matches(rows, ids, values, config.num_features, (n,))
        x = decode_matches(codes, world.directions.flatten(1)).unflatten(1, world.directions.shape[1:])
        if config.shift:
            x = x + world.shift
        if config.noise:
            x = x + config.noise * torch.randn(x.shape, generator=generator)
        return x, codes

    def _firings(self, n: int, generator: torch.Generator) -> Bool[Tensor, "n num_features"]:
        config, world = self.config, self.world
        level = torch.randint(len(config.levels), (n,), generator=generator)
        normals = torch.randn(n, config.num_top, generator=generator)
        if config.correlation_rank:
            shared = torch.randn(n, config.correlation_rank, generator=generator)
            normals = torch.addmm(normals.mul_(world.own), shared, world.loadings.T)
        fires = torch.zeros(n, config.num_features, dtype=torch.bool)
        fires[:, : config.num_top] = normals < world.cuts[level]
        for parents, children in world.generations:
            chosen = torch.rand(n, len(parents), 1, generator=generator) * config.branching / config.child_share
            of_parent = fires[:, parents, None] & (chosen.floor() == torch.arange(config.branching))
            fires[:, children] = of_parent.flatten(1)
        return fires


class TruthStore(ArrayStore):
    """Rows with their true codes, and the true directions."""

    def __init__(self, batch: Batch, codes: Latents, directions: Float[Tensor, " num_features *out"]) -> None:
        super().__init__(batch.x, target=batch.target)
        self.codes, self.directions = codes, directions

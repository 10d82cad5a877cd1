"""The activations that everyone trains on: a file of rows, made once per run and mapped by every worker.

Synthetic rows have what makes real ones hard: directions in superposition, whose frequencies fall like a Zipf curve,
a mean far from zero, and noise.

    x = mean + sum over the active directions j of magnitude * direction_j + noise

Directions are drawn with probability ~ 1 / (j + 7), ACTIVE of them per row (with replacement); magnitudes are
exponential; the noise has NOISE_SHARE of the variance.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVE = 48
"""Directions per row; more than the usual k = 32, so that no SAE reconstructs everything."""
NOISE_SHARE = 0.1
MEAN_SHARE = 0.5
"""Squared norm of the mean relative to the variance around it."""
CHUNK_ROWS = 16_384


def synthetic(rows: int, d_in: int, seed: int = 0) -> Tensor:
    """Rows [rows, d_in] with a variance of 1 per dimension on average."""
    generator = torch.Generator().manual_seed(seed)
    num_directions = 16 * d_in
    directions = F.normalize(torch.randn(num_directions, d_in, generator=generator), dim=1)
    frequency = 1 / (torch.arange(num_directions) + 7.0)
    mean = F.normalize(torch.randn(d_in, generator=generator), dim=0) * (MEAN_SHARE * d_in) ** 0.5
    scale = ((1 - NOISE_SHARE) * d_in / (2 * ACTIVE)) ** 0.5  # E[magnitude^2] = 2
    x = torch.randn(rows, d_in, generator=generator).mul_(NOISE_SHARE**0.5).add_(mean)
    for part in x.split(CHUNK_ROWS):
        active = torch.multinomial(frequency, ACTIVE * len(part), replacement=True, generator=generator)
        magnitude = torch.empty(len(part), ACTIVE).exponential_(generator=generator)
        part += scale * F.embedding_bag(active.view(-1, ACTIVE), directions, per_sample_weights=magnitude, mode="sum")
    return x


def from_cache(folder: Path, hookpoint: str | None, rows: int, seed: int = 0) -> Tensor:
    """Random rows of a cache that `apportion collect` wrote, those that its filter left in."""
    from apportion.rows import ActivationStore

    store = ActivationStore(folder, hookpoint)
    kept = store.mask.nonzero().squeeze(1)
    if len(kept) < rows:
        raise ValueError(f"The cache {str(folder)!r} has {len(kept)} rows; these settings need {rows}. Lower --rows.")
    chosen = torch.randperm(len(kept), generator=torch.Generator().manual_seed(seed))[:rows]
    return store.gather(kept[chosen])


def write_rows(x: Tensor, file: Path) -> None:
    x.contiguous().numpy().tofile(file)


def map_rows(file: Path, d_in: int) -> Tensor:
    """The rows of a file, mapped; every page is touched, so that reading one later costs nobody memory or time."""
    size = Path(file).stat().st_size // 4
    x = torch.from_file(str(file), shared=False, size=size, dtype=torch.float32).view(-1, d_in)
    x.sum()
    return x

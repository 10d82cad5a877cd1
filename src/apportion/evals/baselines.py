"""What the simplest methods reach on the same tokens."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from apportion.rows.batch import RowStore, chunks

CHUNK = 16384


def pca_curve(store: RowStore, rows: Int[Tensor, " n"]) -> Float[Tensor, " d_in_plus_1"]:
    """FVU of a PCA with 0, 1, .., d_in components, fitted on the very rows it is measured on (those that take part).

    Fitting on the evaluation rows favours the PCA: no linear subspace of that many dimensions does better on them.
    Unlike an SAE with L0 = k it spends its k numbers on the same k directions for every token.
    """
    rows = rows[store.mask[rows]]
    if not len(rows):
        raise ValueError("Nothing to fit a PCA on: no row passed the token filter. Give more text.")
    shift = store.batch(rows[:CHUNK]).x.double().mean(0)
    total, products = torch.zeros_like(shift), torch.zeros(store.d_in, store.d_in, dtype=torch.float64)
    for batch in chunks(store, rows, CHUNK):
        x = batch.x.double() - shift
        total += x.sum(0)
        products += x.T @ x
    scatter = products - torch.outer(total, total) / len(rows)
    variances = torch.linalg.eigvalsh(scatter).flip(0).clamp_min(0)
    explained = torch.cat([variances.new_zeros(1), variances.cumsum(0)])
    return 1 - explained / variances.sum()

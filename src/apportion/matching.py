"""Which rows of two dictionaries belong together, by cosine: nearest rows both ways, or one-to-one.

    nearest_rows   i(j) = argmax_i <a_j, b_i>, and the same for the rows of b; in row blocks, never [n, m] at once
    one_to_one     distinct pi(j) with the largest sum_j <a_j, b_pi(j)>; the whole matrix, on the CPU, O(n^2 m)

Both return indices only. Gradients flow through the cosines of the pairs, which the caller takes (`pair_cosines`).
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from apportion.blocks import block_rows


def directions(W: Float[Tensor, " n *row"]) -> Float[Tensor, "n d"]:
    """Rows as unit vectors, several sites as one vector; zero rows stay zero."""
    return F.normalize(W.flatten(1), dim=1)


@torch.no_grad()
def nearest_rows(
    a: Float[Tensor, "n d"], b: Float[Tensor, "m d"], *, skip_same: bool = False
) -> tuple[Int[Tensor, " n"], Int[Tensor, " m"]]:
    """For each unit row of `a` the row of `b` with the largest cosine, and for each row of `b` that of `a`.

    `skip_same` leaves out pairs of equal index: the nearest *other* row within one dictionary.
    """
    size, of_a = block_rows(len(b), a), []
    of_b = torch.zeros(len(b), dtype=torch.int64, device=a.device)
    highest = a.new_full((len(b),), -torch.inf)
    for start in range(0, len(a), size):
        cosines = a[start : start + size] @ b.T
        if skip_same:
            cosines.diagonal(start).fill_(-torch.inf)
        of_a.append(cosines.argmax(1))
        value, row = cosines.max(0)
        better = value > highest
        highest, of_b = torch.where(better, value, highest), torch.where(better, row + start, of_b)
    return torch.cat(of_a), of_b


@torch.no_grad()
def one_to_one(a: Float[Tensor, "n d"], b: Float[Tensor, "m d"]) -> Int[Tensor, " n"]:
    """For each unit row of `a` a row of `b` of its own, with the largest sum of cosines. ValueError if n > m."""
    if len(a) > len(b):
        raise ValueError(f"one-to-one matching of {len(a)} rows needs as many on the other side, got {len(b)}.")
    return torch.from_numpy(assign(-(a @ b.T).double().cpu().numpy())).to(a.device)


def assign(cost: np.ndarray) -> np.ndarray:
    """For each row of `cost` [n, m], n <= m, a column of its own, with the smallest sum of costs.

    Shortest augmenting paths (Jonker and Volgenant 1987): u_i + v_j <= cost_ij throughout, with equality on assigned
    pairs. A row whose cheapest column is free takes it; with clear matches few rows are left after that.
    """
    n, m = cost.shape
    u, v = cost.min(1) if n else np.zeros(0), np.zeros(m)
    row_of = np.full(m, -1)
    columns, takers = np.unique(cost.argmin(1), return_index=True) if n else (np.zeros(0, int), np.zeros(0, int))
    row_of[columns] = takers
    for free in np.setdiff1d(np.arange(n), takers):
        reached, distance, before = np.zeros(m, dtype=bool), np.full(m, np.inf), np.full(m, -1)
        rows_on_tree, columns_on_tree = [], []
        row, column = free, -1
        while row >= 0:
            rows_on_tree.append(row)
            through = cost[row] - u[row] - v
            nearer = ~reached & (through < distance)
            distance[nearer], before[nearer] = through[nearer], column
            column = int(np.where(reached, np.inf, distance).argmin())
            step = distance[column]
            u[rows_on_tree] += step
            v[columns_on_tree] -= step
            distance[~reached] -= step
            reached[column] = True
            columns_on_tree.append(column)
            row = row_of[column]
        while column >= 0:
            previous = before[column]
            row_of[column] = row_of[previous] if previous >= 0 else free
            column = previous
    chosen = np.zeros(n, dtype=np.int64)
    chosen[row_of[row_of >= 0]] = np.flatnonzero(row_of >= 0)
    return chosen


def pair_cosines(a: Float[Tensor, "n d"], b: Float[Tensor, "m d"], matches: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """<a_j, b_matches(j)> for unit rows; gradients reach both."""
    return (a * b[matches]).sum(1)

"""Adam that passes over memory as seldom as it can: projection, clipping, update and unit rows, block by block.

    g_j    <- g_j - <g_j, w_j> w_j                    rows that have unit norm: only the direction can change
    norm   =  sqrt(sum g^2)                           over all parameters, after the projection
    w      <- Adam(w, scale * g)                      scale: from the clipping, which sees the norm
    w_j    <- w_j / ||w_j||                           rows that have unit norm

A weight matrix, its gradient and its two averages are far larger than any cache, so each separate operation on them
costs a pass over memory. Here the first pass reads gradient and weights and takes inner products (the norm after the
projection is ||g_j||^2 - <g_j, w_j>^2); the second does everything else on blocks of rows that stay in the cache
meanwhile. The update is torch's own fused Adam (arXiv 1412.6980), without weight decay; on a GPU the second pass is one
Triton kernel.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.optim.adam import adam

from apportion.devices import on_gpu
from apportion.kernels.dispatch import backend_for

BLOCK_ENTRIES = 2**19
"""Entries of a block: weights, gradient and both averages of it (8 MB) stay in the cache."""
EPS = 1e-8


@dataclass
class Moments:
    """Adam's averages of one parameter, and the steps they come from."""

    exp_avg: Tensor
    exp_avg_sq: Tensor
    steps: int = 0


class Adam:
    """Updates `parameters`; those among `unit_rows` keep rows of unit norm; `lr_factors` (default 1) multiply lr."""

    def __init__(
        self,
        parameters: Iterable[Tensor],
        *,
        unit_rows: Iterable[Tensor] = (),
        lr_factors: Mapping[Tensor, float] | None = None,
        beta1: float = 0.9,
        beta2: float = 0.999,
    ) -> None:
        self.parameters = [p for p in parameters if p.requires_grad]
        self.unit_rows = set(unit_rows)
        self.lr_factors = lr_factors or {}
        self.beta1, self.beta2 = beta1, beta2
        self.moments: dict[Tensor, Moments] = {}
        self._along: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def gradient_norm(self) -> Float[Tensor, ""]:
        """The norm of all gradients after the projection (which `step` makes); float64, on the device."""
        squares = []
        for p in self._with_gradient():
            assert p.grad is not None
            if p in self.unit_rows:
                square, self._along[p] = _squares_across(p.grad, p)
            else:
                square = torch.stack([g.flatten().dot(g.flatten()) for g in _blocks(p.grad)]).double().sum()
            squares.append(square)
        return torch.stack(squares).sum().sqrt()

    @torch.no_grad()
    def step(self, lr: float, scale: Float[Tensor, ""]) -> None:
        """One update with gradients times `scale`; to be called after `gradient_norm`. Gradients are spent."""
        for p in self._with_gradient():
            assert p not in self.unit_rows or p in self._along, "gradient_norm comes before step"
            m, own_lr = self.moments.get(p) or self._begin(p), lr * self.lr_factors.get(p, 1.0)
            if backend_for(p) == "triton" and p.dtype == torch.float32:
                self._step_in_triton(p, m, own_lr, scale)
            else:
                self._step_in_blocks(p, m, own_lr, scale)
            m.steps += 1
            p.grad = None
        self._along.clear()

    def drop(self) -> None:
        """Spend the gradients without a step."""
        for p in self._with_gradient():
            p.grad = None
        self._along.clear()

    def _step_in_blocks(self, p: Tensor, m: Moments, lr: float, scale: Tensor) -> None:
        assert p.grad is not None
        along, start = self._along.get(p), 0
        for w, g, exp_avg, exp_avg_sq in zip(*(_blocks(t) for t in (p, p.grad, m.exp_avg, m.exp_avg_sq)), strict=True):
            if along is not None:
                g.addcmul_(along[start : start + len(w)], w, value=-1)
            g.mul_(scale)
            if on_gpu(g):  # a scale of 0 means gradients that are not finite, and looking at it would mean waiting
                g.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
            steps = torch.full((), float(m.steps), device=p.device)
            adam(
                [w], [g], [exp_avg], [exp_avg_sq], [], [steps],
                fused=True, amsgrad=False, maximize=False, weight_decay=0.0,
                beta1=self.beta1, beta2=self.beta2, lr=lr, eps=EPS,
            )  # fmt: skip
            if along is not None:
                w.div_(torch.linalg.vector_norm(w, dim=1, keepdim=True).clamp_min(torch.finfo(w.dtype).eps))
            start += len(w)

    def _step_in_triton(self, p: Tensor, m: Moments, lr: float, scale: Tensor) -> None:
        from apportion.kernels.triton_kernels import adam_rows

        assert p.grad is not None
        adam_rows(
            p.detach(), p.grad.contiguous(), m.exp_avg, m.exp_avg_sq, m.steps + 1, lr, self.beta1, self.beta2, EPS,
            scale.float(), unit_rows=p in self.unit_rows,
        )  # fmt: skip

    def state(self, p: Tensor) -> dict[str, Tensor]:
        """What to save of a parameter; empty before its first step."""
        if p not in self.moments:
            return {}
        m = self.moments[p]
        return {"exp_avg": m.exp_avg, "exp_avg_sq": m.exp_avg_sq, "step": torch.tensor(float(m.steps))}

    def shapes(self, p: Tensor) -> dict[str, torch.Size]:
        """What `state` has of a parameter after its first step."""
        return {"exp_avg": p.shape, "exp_avg_sq": p.shape, "step": torch.Size()}

    def load_state(self, p: Tensor, state: dict[str, Tensor]) -> None:
        """Restore what `state` returned."""
        m = self._begin(p)
        for name in ("exp_avg", "exp_avg_sq"):
            getattr(m, name).copy_(state[name])
        m.steps = int(state["step"])

    def forget(self, p: Tensor, rows: Int[Tensor, " n"]) -> None:
        """Begin the averages of some rows anew."""
        if p in self.moments:
            self.moments[p].exp_avg[rows] = 0
            self.moments[p].exp_avg_sq[rows] = 0

    def _begin(self, p: Tensor) -> Moments:
        self.moments[p] = Moments(torch.zeros_like(p), torch.zeros_like(p))
        return self.moments[p]

    def _with_gradient(self) -> list[Tensor]:
        return [p for p in self.parameters if p.grad is not None]


def _blocks(t: Tensor) -> Iterator[Tensor]:
    """Views of consecutive rows; on a GPU, whose caches are no help here, all of them at once."""
    t = t.detach()
    if on_gpu(t) or t.numel() <= BLOCK_ENTRIES or t.ndim < 2:
        return iter([t])
    return iter(t.split(max(1, BLOCK_ENTRIES // t[0].numel())))


def _squares_across(
    gradient: Float[Tensor, "n d"], weights: Float[Tensor, "n d"]
) -> tuple[Float[Tensor, ""], Float[Tensor, "n 1"]]:
    """Sum of squares of the gradient without its part along unit rows, and that part's length for each row."""
    squares, along = [], []
    for g, w in zip(_blocks(gradient), _blocks(weights), strict=True):
        along.append((g * w).sum(1, keepdim=True))
        across = torch.linalg.vector_norm(g, dim=1, keepdim=True).square() - along[-1].square()
        squares.append(across.clamp_min(0).double().sum())
    return torch.stack(squares).sum(), torch.cat(along)

"""How an SAE prepares its input: x~ from x, and back.

    none                x~ = x
    dataset             x~ = s (x - mu)       mu the centre and s a scale of the training data: E||x~||^2 = d_in;
                                              several sites have a scale each
    token_standardise   x~ = (x - mean_d x) / (std_d x + 1e-5)         each vector on its own (MLSAE, OpenAI's TopK)
    token_norm          x~ = x sqrt(d_in) / ||x||                      each vector on its own

The summand 1e-5 keeps constant vectors finite; the way back, x = x~ std_d x + mean_d x, is without it, as in the
libraries that these come from.

`dataset` is the default and folds into weights; the per-token kinds do not, and need x again to go back.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Literal, final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from apportion.metrics import no_spread

InputNorm = Literal["none", "token_standardise", "token_norm", "dataset"]
Centre = Literal["mean", "geometric_median"]
PER_TOKEN = ("token_standardise", "token_norm")
SMALLEST = {"token_standardise": 1e-5, "token_norm": 1e-8}
"""Added to what a vector is divided by."""
SCALES = (1e-15, 1e15)
"""Between what scales lie: outputs are divided by them, and energies have their squares, so they stay well within
float32."""
HINT_ROWS = 32
"""Rows that tell something about centre and scale."""

logger = logging.getLogger(__name__)


def is_array(x: Any) -> bool:
    """True for what is one array of rows: a tensor, a numpy array, nested lists of numbers; False for many of them."""
    if not isinstance(x, list | tuple):
        return isinstance(x, Tensor) or hasattr(x, "__array__")
    while isinstance(x, list | tuple) and x:
        x = x[0]
    return isinstance(x, int | float | np.number)


def as_tensor(x: Any) -> Tensor:
    """A tensor, numpy array or nested list of numbers as a tensor of float numbers; ValueError for anything else."""
    if not isinstance(x, Tensor):
        try:
            x = np.asarray(x)
            x = np.ascontiguousarray(x, dtype=np.float64 if x.dtype == object else x.dtype.newbyteorder("="))
            x = torch.as_tensor(x)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"expected activations as a tensor or array of numbers [..., d_in], got {type(x).__name__}: "
                "torch.stack or numpy.stack makes one of many"
            ) from error
    if x.is_complex():
        raise ValueError("activations are real numbers, got complex ones: give their real part, or both side by side.")
    return x if x.is_floating_point() else x.float()


def first_tensor(item: Any) -> Tensor:
    """The rows in what a DataLoader or the like yields: an array, a tuple that begins with one, a dict with an x."""
    if is_array(item):
        return as_tensor(item)
    if isinstance(item, Mapping):
        return as_tensor(item[_column_of_rows(item)])
    return as_tensor(item[0] if isinstance(item, list | tuple) and item else item)


def _column_of_rows(item: Mapping[str, Any]) -> str:
    """Which of the columns of a dict the rows are: x, or the only one there is, or the only one that is no label."""
    found = [name for name, column in item.items() if name == "x" or len(item) == 1]
    found = found or [name for name, column in item.items() if _may_be_rows(column)]
    if len(found) != 1:
        raise ValueError(f"which of {', '.join(map(str, item))} are the activations? Call them x, or give them alone.")
    return found[0]


def _may_be_rows(column: Any) -> bool:
    try:
        return is_array(column) and torch.as_tensor(column).is_floating_point()
    except (TypeError, ValueError, RuntimeError):
        return False


@final
class InputDescription(nn.Module):
    """Mean [*sites, d_in] and scale [*sites] as buffers; until `fit`, s = 1 and mu = 0."""

    mean: Tensor
    scale: Tensor

    def __init__(self, shape: tuple[int, ...], kind: InputNorm, centre: Centre) -> None:
        super().__init__()
        self.kind, self.centre = kind, centre
        self._hinted = False
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("scale", torch.ones(shape[:-1]))

    @property
    def needs_fit(self) -> bool:
        """True while a `dataset` description still has its initial values."""
        return self.kind == "dataset" and bool((self.scale == 1).all()) and not bool(self.mean.any())

    @torch.no_grad()
    def hint(self, x: Float[Tensor, " n *sites d_in"]) -> None:
        """Say once if `fit` is missing, which nothing raises about: rows far off centre or scale are learnt badly."""
        if self._hinted or len(x) < HINT_ROWS or not self.needs_fit:
            return
        self._hinted = True
        energy = x.detach().double().square().sum(-1).mean() / x.shape[-1]
        centre = x.detach().double().mean(0).square().sum(-1).mean() / x.shape[-1]
        if not 0.1 < energy < 10 or centre > 0.5 * energy:
            logger.warning(
                "the input description of this SAE has not been fitted, and these rows are not of the scale it assumes "
                "(mean square %.3g, of which the mean row is %.0f %%): call sae.fit_input(x) before training",
                energy, 100 * centre / energy.clamp_min(1e-300),
            )  # fmt: skip

    @torch.no_grad()
    def fit(self, x: Float[Tensor, " n *sites d_in"]) -> None:
        """Set mean and scale from filtered rows (a few 10,000 suffice); does nothing unless the kind is `dataset`."""
        if self.kind != "dataset":
            return
        x = x.double()
        centre = geometric_median(x) if self.centre == "geometric_median" else x.mean(0)
        energy = (x - centre).square().sum(-1).mean(0)
        if bool(no_spread(energy, x.square().sum(-1).mean(0)).any()) or not bool(energy.isfinite().all()):
            raise ValueError(
                f"The {len(x)} rows given to fit the input scale have a mean squared distance of {energy.min():g} "
                "from their centre; a positive, finite one is needed. Give more rows, without NaN and not all equal."
            )
        scale = (x.shape[-1] / energy).sqrt()
        if bool(((scale < SCALES[0]) | (scale > SCALES[1])).any()):
            raise ValueError(
                f"The rows given to fit the input scale have a mean squared distance of {energy.min():g} from their "
                "centre, with which float32 cannot work. Multiply all rows by one number, so that it comes near to 1."
            )
        self.mean.copy_(centre)
        self.scale.copy_(scale)

    def apply_to(self, x: Float[Tensor, " n *sites d_in"]) -> Float[Tensor, " n *sites d_in"]:
        if self.kind == "dataset":
            return (x - self.mean) * self.scale[..., None]
        if self.kind == "none":
            return x
        shift, size = _token_statistics(x, self.kind)
        return (x - shift) / (size + SMALLEST[self.kind])

    def undo(
        self, x_hat: Float[Tensor, " n *sites d_in"], x: Float[Tensor, " n *sites d_in"] | None
    ) -> Float[Tensor, " n *sites d_in"]:
        """From scaled data back to raw units; the per-token kinds need the raw input `x`."""
        if self.kind == "dataset":
            return x_hat / self.scale[..., None] + self.mean
        if self.kind == "none":
            return x_hat
        if x is None:
            raise ValueError(f"This SAE normalises each token ({self.kind}): call decode(latents, x) with the input x.")
        shift, size = _token_statistics(x, self.kind)
        return x_hat * size + shift


def _token_statistics(x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Shift and size of each vector, the latter 0 for a constant one."""
    if kind == "token_norm":
        size = x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5
        return torch.zeros((), dtype=x.dtype, device=x.device), size
    if not len(x):  # std would warn
        return x[..., :1], x[..., :1]
    return x.mean(-1, keepdim=True), x.std(-1, keepdim=True)


def geometric_median(
    x: Float[Tensor, " n *sites d"], iterations: int = 100, tolerance: float = 1e-6
) -> Float[Tensor, "*sites d"]:
    """The point with the smallest mean distance to all rows (Weiszfeld's algorithm); robust against outliers."""
    centre = x.mean(0)
    for _ in range(iterations):
        weights = 1 / (x - centre).norm(dim=-1, keepdim=True).clamp_min(1e-12)
        moved = (weights * x).sum(0) / weights.sum(0)
        step = (moved - centre).norm()
        centre = moved
        if bool(step <= tolerance * centre.norm().clamp_min(1e-12)):
            break
    return centre

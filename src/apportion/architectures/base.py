"""What every sparse autoencoder of this library is: raw x in, `Latents` in between, raw x_hat out.

    x  --input description-->  x~  --encode-->  Latents  --decode-->  x~_hat  --undo-->  x_hat

Public `encode` and `decode` always speak raw activations [..., d_in]; everything with "scaled" in its name works on
prepared, flattened rows [tokens, d_in] with E||x~||^2 = d_in, and is what the training loop uses.

A subclass is final and lives in one file with its paper. It supplies `encode_scaled`, `decode_scaled`, `affinities`
and `fold_in`; if it needs to, `prepare` (targets), `forward_scaled`, `reconstruction_loss` and `own_terms` (training),
`begin_step` (schedules). This file owns shapes, calibration and files.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import asdict, dataclass, fields, replace
from math import prod
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from apportion import losses
from apportion.about import About
from apportion.allocation import Rule, Screen, Selection, StepContext
from apportion.architectures.calibrate import calibrate
from apportion.architectures.files import save
from apportion.architectures.inputs import PER_TOKEN, Centre, InputDescription, InputNorm, as_tensor
from apportion.group import ALONE, Group
from apportion.latents import Latents
from apportion.settings import settle
from apportion.torch_state import in_eval_mode, usual

RowKind = Literal["one", "pair", "sites", "layers"]
"""A row is an activation at one hookpoint; at a pair, of which the second is the target; or at several together."""


@dataclass(frozen=True, kw_only=True)
class SAEConfig:
    """Settings that every architecture has."""

    d_in: int
    """Width of the activations."""
    d_sae: int
    """Number of latents."""
    input_norm: InputNorm = "dataset"
    """How inputs are prepared: dataset (centre and scale of the training data), token_standardise, token_norm, none."""
    centre: Centre = "mean"
    """Centre of the dataset normalisation."""
    affinity: Literal["code", "code_times_decoder_norm"] = "code"
    """What matches compete by; the two are equal while decoder rows have unit norm."""
    hookpoint: str | None = None
    """Where in the model the activations come from, e.g. model.layers.8."""
    seed: int | None = None
    """Seed of the initial weights; None uses torch's global generator."""

    def __post_init__(self) -> None:
        settle(self)
        for name in ("d_in", "d_sae"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {getattr(self, name)!r}.")


@dataclass(frozen=True)
class Pass:
    """What the forward pass of a training step made, on scaled data.

    An architecture whose losses want to know more has a subclass with more fields.
    """

    latents: Latents
    y_hat: Float[Tensor, " tokens *out"]
    """Reconstruction of the target."""


class SAE(nn.Module, ABC):
    """A sparse autoencoder: an architecture (how codes are computed and decoded) with a rule of allocation."""

    Config: ClassVar[type[SAEConfig]]
    name: str
    """The name in the table of SAEs that it was created by."""
    row_kind: ClassVar[RowKind] = "one"
    """What a row is made of. "layers" are rows of one hookpoint each, of all of them in turn."""
    constants: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """What a term of `own_terms` holds constant, on purpose: names of parameters, as far as `own_terms` itself uses
    them, and "made" for all that `forward_scaled` made. The conformance suite goes by it."""
    form: ClassVar[Literal["affine", "gated", "switch"] | None] = None
    """What it computes in eval mode, where other libraries know it too, by the equations of interop/parts.py: affine
    (relu of pre_acts where chosen, one decoder, perhaps a skip), gated, switch. None: something of its own."""
    allocation_name: str | None = None
    """The name of its rule, where the rule is a setting."""

    def __init__(self, config: SAEConfig, allocation: Rule) -> None:
        super().__init__()
        self.config = config
        self.allocation = allocation
        self.input = InputDescription(self.row_shape, config.input_norm, config.centre)
        self.info: dict[str, Any] = {}
        self.screen: Screen = None
        """"bfloat16": find candidates with a product in bfloat16, several times faster; codes stay float32. It assumes
        centred inputs (kernels/select.py). Not saved; a Trainer goes by its TrainConfig instead."""

    @property
    def d_in(self) -> int:
        return self.config.d_in

    @property
    def d_sae(self) -> int:
        return self.config.d_sae

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of one row of activations: (d_in,), or (num_sites, d_in)."""
        return (self.d_in,)

    @property
    def k(self) -> float | None:
        """Active latents per token that were asked for: the budget of the rule, or what sparsity is steered to."""
        return getattr(self.config, "k", self.allocation.k)

    @property
    def source(self) -> About:
        """What is known of the rows that it was trained on. In `info`, which is what files hold, it is as JSON."""
        return About.from_json(self.info.get("source", {}), "info.source")

    @source.setter
    def source(self, about: About) -> None:
        self.info["source"] = about.to_json()

    @property
    def needs_target(self) -> bool:
        """True if a training step needs `Batch.target`."""
        return self.row_kind == "pair"

    @property
    def hookpoint(self) -> str | None:
        """Where its activations come from: the setting, or what it was trained on."""
        return self.config.hookpoint or self.source.hookpoint

    @property
    def target_hookpoint(self) -> str | None:
        """Where its targets come from, if it has any: the setting, or what it was trained on."""
        return getattr(self.config, "target_hookpoint", None) or self.source.target_hookpoint

    @property
    def mean(self) -> Float[Tensor, "*sites d_in"]:
        """mu of the input description; 0 unless input_norm is dataset."""
        return self.input.mean

    @property
    def scale(self) -> Float[Tensor, "*sites"]:
        """s of the input description; codes are in units of 1/s."""
        return self.input.scale

    @property
    def needs_fit(self) -> bool:
        """True until `fit_input` has set what it sets."""
        return self.input.needs_fit

    @property
    def decode_needs_x(self) -> bool:
        """True if `decode` cannot do without the input: tokens are normalised singly, or there is a skip."""
        return self.input.kind in PER_TOKEN

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return self.mean.device

    @classmethod
    def d_sae_for(cls, d_in: int) -> int | None:
        """The number of latents where it follows from d_in; None where it is a setting."""
        return None

    # What an architecture supplies

    @abstractmethod
    def encode_scaled(self, x: Float[Tensor, " tokens *row"], selection: Selection) -> Latents:
        """Codes of prepared rows, of the matches that `selection` chooses."""

    @abstractmethod
    def decode_scaled(
        self, latents: Latents, x: Float[Tensor, " tokens *row"] | None = None
    ) -> Float[Tensor, " tokens *out"]:
        """Prepared reconstruction; `x` are prepared rows, given if `decode_needs_x`."""

    @abstractmethod
    def affinities(self, latents: Latents) -> Float[Tensor, " nnz"]:
        """What the matches competed by."""

    @abstractmethod
    def fold_in(self, mean: Float[Tensor, "*sites d_in"], scale: Float[Tensor, "*sites"]) -> None:
        """Change the weights so that they take raw rows where they took scale * (x - mean). See `folded`."""

    def undo(self, y_hat: Float[Tensor, " tokens *out"], x: Float[Tensor, " tokens *row"] | None) -> Tensor:
        """From a prepared reconstruction to raw units; `x` are raw rows."""
        return self.input.undo(y_hat, x)

    def prepare(
        self, x: Float[Tensor, " tokens *row"], target: Float[Tensor, " tokens *out"] | None = None
    ) -> tuple[Float[Tensor, " tokens *row"], Float[Tensor, " tokens *out"]]:
        """Prepared input and what it is to be reconstructed to, from raw rows of a training batch."""
        if target is not None:
            raise ValueError(f"{self.name} reconstructs its input and takes no target; use a transcoder for one.")
        x = self.input.apply_to(x.to(self.device, self.dtype))
        return x, x

    @usual()
    def fit_input(self, x: Any, target: Any = None) -> None:
        """Estimate mean and scale of the input description from raw, filtered activations [*lead, d_in], tensors or
        arrays (`dataset` only)."""
        self.input.fit(self._rows(x))

    @property
    def needs_start(self) -> bool:
        """Whether `start` would set anything."""
        return False

    def start(self, x: Any, target: Any = None) -> None:
        """Set the weights that training begins with, from raw, filtered rows. Here they are those it was made with."""

    def begin_step(self, context: StepContext) -> None:
        """Advance schedules; called once at the start of every training step."""
        self.allocation.begin_step(context)

    def carried(self) -> dict[str, Float[Tensor, " d_sae"]]:
        """What the next step of training depends on besides weights, buffers and the context; one number per latent."""
        return {}

    def carry_on(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `carried` returned."""

    def forward_scaled(self, x: Float[Tensor, " tokens *row"], context: StepContext) -> Pass:
        """The forward pass of a training step."""
        latents = self.encode_scaled(x, self.selection(context))
        return Pass(latents, self.decode_scaled(latents, x))

    def reconstruction_loss(
        self, y: Float[Tensor, " tokens *out"], made: Pass, group: Group = ALONE
    ) -> Float[Tensor, ""]:
        return losses.reconstruction(y, made.y_hat, group)

    def own_terms(self, x: Tensor, y: Tensor, made: Pass, context: StepContext) -> dict[str, Tensor]:
        """Weighted losses besides reconstruction of `y`, on scaled data."""
        return {}

    def lr_factors(self) -> dict[Tensor, float]:
        """Parameters that want another learning rate, with the factor between the two. The Trainer goes by it."""
        return {}

    def unit_rows(self) -> list[nn.Parameter]:
        """Matrices whose rows are held at unit norm. The Trainer does it; other loops call `constrain`."""
        return []

    @torch.no_grad()
    def constrain(self) -> None:
        """After the optimiser's step: make the rows of unit norm again (zero rows stay zero), then `after_step`."""
        for p in self.unit_rows():
            p.div_(p.norm(dim=1, keepdim=True).clamp_min(torch.finfo(p.dtype).eps))
        self.after_step()

    def after_step(self) -> None:
        """What else has to hold after every step of the optimiser; rows of `unit_rows` have unit norm by then."""

    # What users call

    @usual()
    def encode(self, x: Any) -> Latents:
        """The active latents of raw activations [..., d_in] (or [..., num_sites, d_in]). Changes nothing in the SAE.

        Raises ValueError for a wrong shape, NaN or infinite entries, or eval mode without thresholds.
        """
        x = as_tensor(x)
        rows = self.finite_rows(x)
        if self.training:
            self.input.hint(rows)
        latents = self.encode_scaled(self.input.apply_to(rows), self.selection())
        lead = tuple(x.shape[: -len(self.row_shape)])
        return Latents(latents.values, latents.indices, latents.offsets, latents.d_sae, lead)

    def selection(self, context: StepContext | None = None, rule: Rule | None = None) -> Selection:
        """How matches are chosen: as the training step says; else by `rule`, or the one in force (in eval mode its
        thresholds)."""
        given = None if context is None else context.selection
        return given or Selection(rule or self.allocation.in_force(), screen=self.screen)

    @usual()
    def decode(self, latents: Latents | Float[Tensor, "*lead d_sae"], x: Any = None) -> Float[Tensor, "*y_shape"]:
        """Reconstruction in raw units from Latents or a dense code. ValueError without `x` if `decode_needs_x`."""
        width = latents.shape[-1] if isinstance(latents, Tensor) else latents.d_sae
        if width != self.d_sae:
            raise ValueError(f"decode: expected codes of width d_sae = {self.d_sae}, got {width}.")
        if isinstance(latents, Tensor):
            latents = Latents.from_dense(latents.to(self.dtype))
        if self.decode_needs_x and x is None:
            raise ValueError(
                f"decode(latents, x) needs the input x here: {self.name} "
                + ("has a skip." if self.input.kind not in PER_TOKEN else f"normalises each token ({self.input.kind}).")
            )
        rows = None if x is None else self._rows(x)
        prepared = self.input.apply_to(rows) if rows is not None and self.decode_needs_x else None
        x_hat = self.undo(self.decode_scaled(latents, prepared), rows)
        x_hat = x_hat.reshape(*latents.shape, *x_hat.shape[1:])
        return x_hat.to(x.dtype) if isinstance(x, Tensor) else x_hat

    def forward(self, x: Any) -> Float[Tensor, "*y_shape"]:
        return self.decode(self.encode(x), x)

    def _rows(self, x: Any) -> Float[Tensor, " tokens *row"]:
        x = as_tensor(x)
        lead = x.ndim - len(self.row_shape)
        if lead < 0 or x.shape[lead:] != self.row_shape:
            wanted = ", ".join(str(n) for n in self.row_shape)
            raise ValueError(f"Expected activations [..., {wanted}] (d_in = {self.d_in}), got {list(x.shape)}.")
        return x.reshape(prod(x.shape[:lead]), *self.row_shape).to(self.dtype)

    def finite_rows(self, x: Tensor, index: Tensor | None = None) -> Tensor:
        """Rows, if they are finite; `index` says where each lies in its source, to name one that is not."""
        rows = self._rows(x)
        if not bool(torch.isfinite(rows.detach().sum())) and not bool(torch.isfinite(rows.detach()).all()):
            bad = int((~torch.isfinite(rows.detach().flatten(1))).any(1).nonzero()[0])
            bad = bad if index is None else int(index[bad])
            raise ValueError(f"Row {bad} of the activations holds NaN or infinity. Filter such rows out first.")
        return rows

    @torch.no_grad()
    @usual()
    def calibrate(self, xs: Float[Tensor, "*lead d_in"] | Iterable[Any]) -> float:
        """Set the eval-mode thresholds so that the expected L0 on data like `xs` is k; returns the measured L0.

        `xs` are raw, filtered activations, best 100,000 rows or more that were not trained on: one tensor or
        array, or an iterable of them or of Batches (their mask says which rows take part), a DataLoader for example.
        Their order does not matter. For TopK no parameter changes. The measured L0 and the number of rows are recorded
        in `sae.info` and saved. Memory: about 30 k bytes a row, and 1 GB.

        Raises ValueError for no rows, NaN, or a generator (which gives its rows only once) whose rows are so far from
        random order that once is not enough.
        """
        return calibrate(self, xs)

    @torch.no_grad()
    @usual()
    def folded(self) -> SAE:
        """A copy that takes raw activations as they are (input_norm none): what other libraries' files hold.

        Reconstructions are equal; codes, thresholds and encoder biases are in raw units, 1 / s times as large. With
        the input description z~ = W_enc (s (x - mu) - b_dec~) + b_enc~, a plain SAE becomes

            b_dec = mu + b_dec~ / s,   b_enc = b_enc~ / s,   theta = theta~ / s        (W_enc and W_dec stay)

        and without the subtraction of b_dec, b_enc = b_enc~ / s - W_enc mu. Raises ValueError for per-token
        normalisation, which cannot be folded.
        """
        if self.input.kind in PER_TOKEN:
            raise ValueError(f"input_norm = {self.input.kind!r} depends on each token and does not fold into weights.")
        copy = deepcopy(self)
        if copy.input.kind == "dataset":
            copy.fold_in(self.mean, self.scale)
            copy.input = InputDescription(self.row_shape, "none", self.config.centre).to(self.mean)
        copy.config = replace(self.config, input_norm="none")
        return copy

    def in_eval_mode(self) -> AbstractContextManager[None]:
        """Eval mode within the block; the mode is restored at its end."""
        return in_eval_mode(self)

    def settings(self) -> dict[str, Any]:
        """Everything `create` needs to build it again (`architectures.rebuild`, if the rule is not for training)."""
        chosen = {} if self.allocation_name is None else {"allocation": self.allocation_name}
        config = self.allocation.config
        of_rule = asdict(config)
        if self.allocation.not_to_train:  # no settings of a new SAE: only what was found in a file
            of_rule = {f.name: of_rule[f.name] for f in fields(config) if of_rule[f.name] != f.default}
        return asdict(self.config) | chosen | of_rule

    def save(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors; `ap.load(folder)` reads them."""
        save(self, Path(folder))

    def extra_repr(self) -> str:
        return f"{self.name}, d_in={self.d_in}, d_sae={self.d_sae}, k={self.k}"

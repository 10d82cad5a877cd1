"""Our SAEs as what evaluation and dashboard tools expect of one: dense codes, raw units, decoder rows of unit norm.

    to_sae_bench    SAEBench's contract for SAEs of one's own (sae_bench/custom_saes)
    to_sae_lens     a real sae_lens.SAE, which SAEDashboard and Neuronpedia take as well; needs the package sae-lens

In the former codes are ||W_dec_j|| as large as in files that `ap.export` writes; reconstructions are equal. Both leave
rows alone that were outliers in training (outliers.py); positions and special tokens they cannot know from rows.
"""

from __future__ import annotations

import re
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from apportion.architectures import SAE
from apportion.architectures.inputs import PER_TOKEN, InputDescription
from apportion.interop.assemble import take_apart
from apportion.interop.contexts import outlier_limit
from apportion.interop.export import PRECISE, export
from apportion.interop.folding import SMALLEST_NORM
from apportion.interop.lens_metadata import lens_metadata, lens_name
from apportion.interop.outliers import Outliers
from apportion.interop.parts import Parts
from apportion.interop.writing import dtype_name, layer_of


@dataclass
class SaeBenchConfig:
    """What SAEBench reads in `cfg`."""

    model_name: str | None
    d_in: int
    d_sae: int
    hook_layer: int | None
    hook_name: str | None
    context_size: int | None = None
    hook_head_index: int | None = None
    architecture: str = ""
    apply_b_dec_to_input: bool = True
    finetuning_scaling_factor: bool = False
    activation_fn_str: str = "relu"
    activation_fn_kwargs: dict[str, Any] = field(default_factory=dict)
    prepend_bos: bool = True
    normalize_activations: str = "none"
    dtype: str = "float32"
    device: str = "cpu"
    model_from_pretrained_kwargs: dict[str, Any] = field(default_factory=dict)
    dataset_path: str = ""
    dataset_trust_remote_code: bool = False
    seqpos_slice: tuple[int | None, ...] = (None,)
    training_tokens: int = -1
    sae_lens_training_version: str | None = None
    neuronpedia_id: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@final
class SaeBenchSAE(nn.Module):
    """An SAE in eval mode with dense codes, W_enc [d_in, d_sae] and W_dec [d_sae, d_in] with rows of norm 1 (or 0).

    Where tokens are normalised singly, `decode` goes by the rows that were last encoded, which have to be its own. Of a
    hook_z, rows may come by heads [..., heads, d_head] while `hook_z_reshaping_mode` is on, and are returned so.
    """

    threshold: Tensor
    """Of kind jumprelu."""
    r_mag: Tensor
    b_mag: Tensor
    b_gate: Tensor
    """These three of kind gated."""
    W_router: Tensor
    b_router: Tensor
    """These two of kind switch."""
    norms: Tensor
    """Of topk and switch, whose choice is made by codes before decoder norms are folded in."""

    def __init__(self, parts: Parts, cfg: SaeBenchConfig, outlier_limit: float | None = None) -> None:
        super().__init__()
        self.cfg, self.kind, self.outliers = cfg, parts.kind, Outliers(outlier_limit)
        self.hook_z_reshaping_mode, self.d_head = str(cfg.hook_name).endswith("hook_z"), None
        norms = parts.W_dec.norm(dim=1).clamp_min(SMALLEST_NORM)
        self.W_enc = nn.Parameter((parts.W_enc * norms[:, None]).T.contiguous())
        self.W_dec = nn.Parameter(parts.W_dec / norms[:, None])
        self.b_enc = nn.Parameter(parts.b_enc * norms)
        self.b_dec = nn.Parameter(parts.b_dec.clone())
        if parts.kind in ("topk", "switch"):
            assert parts.k is not None
            self.k = int(parts.k)
            self.register_buffer("norms", norms)
        if parts.threshold is not None:
            self.threshold = nn.Parameter(parts.threshold * norms)
        for name, tensor in (parts.gate | parts.router).items():
            setattr(self, name, nn.Parameter(tensor * norms if name in ("b_gate", "b_mag") else tensor))
        self.input = InputDescription((cfg.d_in,), parts.input_norm, "mean")
        self.encoded: Tensor | None = None
        """The rows that were last encoded, where `decode` needs them."""

    @property
    def dtype(self) -> torch.dtype:
        return self.W_dec.dtype

    @property
    def device(self) -> torch.device:
        return self.W_dec.device

    def to(self, *args: Any, **kwargs: Any) -> SaeBenchSAE:
        moved = super().to(*args, **kwargs)
        self.cfg.dtype, self.cfg.device = str(self.dtype).removeprefix("torch."), str(self.device)
        return moved

    def turn_on_forward_pass_hook_z_reshaping(self) -> None:
        self.hook_z_reshaping_mode = True

    def turn_off_forward_pass_hook_z_reshaping(self) -> None:
        self.hook_z_reshaping_mode, self.d_head = False, None

    def encode(self, x: Float[Tensor, "*x_shape"]) -> Float[Tensor, "*lead d_sae"]:
        if self.hook_z_reshaping_mode:
            self.d_head = None if x.shape[-1] == self.cfg.d_in else x.shape[-1]
            x = x if self.d_head is None else x.flatten(-2)
        rows = x.reshape(-1, x.shape[-1]).to(self.dtype)
        if self.input.kind in PER_TOKEN:
            self.encoded = rows
        rows = self.input.apply_to(rows)
        centred = rows - self.b_dec if self.cfg.apply_b_dec_to_input else rows
        codes = self._codes(rows, centred @ self.W_enc).reshape(*x.shape[:-1], self.cfg.d_sae)
        return self.outliers.silence(x, codes)

    def _codes(self, rows: Float[Tensor, "n d_in"], u: Float[Tensor, "n d_sae"]) -> Float[Tensor, "n d_sae"]:
        """The codes of each kind (parts.py) from prepared rows and their product with W_enc."""
        if self.kind == "gated":
            return (self.r_mag.exp() * u + self.b_mag).relu() * (u + self.b_gate > 0)
        pre_acts = u + self.b_enc
        codes = pre_acts.relu()
        if self.kind == "jumprelu":
            return codes * (pre_acts > self.threshold)
        if self.kind == "switch":
            p = ((rows - self.b_router) @ self.W_router.T).softmax(dim=-1)
            gate, expert = p.max(dim=-1, keepdim=True)
            owner = torch.arange(self.cfg.d_sae, device=u.device) // (self.cfg.d_sae // len(self.W_router))
            codes = codes * gate * (owner == expert)
        if self.kind in ("topk", "switch"):
            best = (codes / self.norms).topk(self.k, dim=-1).indices
            codes = torch.zeros_like(codes).scatter(-1, best, codes.gather(-1, best))
        return codes

    def decode(self, feature_acts: Float[Tensor, "*lead d_sae"]) -> Float[Tensor, "*y_shape"]:
        x_hat = feature_acts.reshape(-1, feature_acts.shape[-1]) @ self.W_dec + self.b_dec
        if self.input.kind in PER_TOKEN and (self.encoded is None or len(self.encoded) != len(x_hat)):
            raise ValueError(f"This SAE normalises each token ({self.input.kind}): encode the same rows before decode.")
        x_hat = self.outliers.put_back(feature_acts, self.input.undo(x_hat, self.encoded))
        x_hat = x_hat.reshape(*feature_acts.shape[:-1], -1)
        return x_hat if self.d_head is None else x_hat.unflatten(-1, (-1, self.d_head))

    def forward(self, x: Float[Tensor, "*lead d_in"]) -> Float[Tensor, "*lead d_in"]:
        return self.decode(self.encode(x))


def to_sae_bench(
    sae: SAE, model_name: str | None = None, hook_name: str | None = None, *, pass_outliers: bool = True
) -> SaeBenchSAE:
    """`sae` for SAEBench: `run_eval(config, [(name, ap.to_sae_bench(sae))], device, output_path)`.

    The names of its model and of its place in it are those of TransformerLens; give them where `sae` does not know.
    Rows that its training left out for their norm pass through unchanged, unless `pass_outliers` is False.
    Raises ValueError for transcoders, which do not reconstruct their input, and for SAEs that need to be calibrated.
    """
    if sae.needs_target:
        raise ValueError(f"SAEBench evaluates SAEs that reconstruct their input, and {sae.name} does not.")
    parts = take_apart(sae if sae.dtype in PRECISE else deepcopy(sae).float())
    metadata = lens_metadata(parts)
    hook_name = hook_name or lens_name(parts, parts.hookpoint)
    numbered = re.match(r"blocks\.(\d+)\.", hook_name or "")
    d_sae, d_in = parts.W_enc.shape
    cfg = SaeBenchConfig(
        model_name=model_name or metadata["model_name"],
        d_in=d_in,
        d_sae=d_sae,
        hook_layer=int(numbered[1]) if numbered else layer_of(parts),
        hook_name=hook_name,
        context_size=metadata["context_size"],
        architecture=sae.name,
        apply_b_dec_to_input=parts.subtract_b_dec,
        activation_fn_str="topk" if parts.kind in ("topk", "switch") else "relu",
        activation_fn_kwargs={"k": parts.k} if parts.kind in ("topk", "switch") else {},
        prepend_bos=metadata["prepend_bos"],
        dtype=dtype_name(parts),
        model_from_pretrained_kwargs=metadata["model_from_pretrained_kwargs"] or {},
        dataset_path=metadata["dataset_path"] or "",
        seqpos_slice=tuple(metadata["seqpos_slice"] or (None,)),
        training_tokens=metadata["training_tokens"] or -1,
        neuronpedia_id=metadata["neuronpedia_id"],
    )
    limit = outlier_limit(sae.source, sae.hookpoint) if pass_outliers else None
    return SaeBenchSAE(parts, cfg, limit).to(sae.device, sae.dtype).eval()


def to_sae_lens(
    sae: SAE, device: str = "cpu", *, model_class_name: str | None = None, pass_outliers: bool = True
) -> Any:
    """`sae` as a sae_lens.SAE (standard, topk, jumprelu, gated or a transcoder), with its codes in raw units.

    Rows that its training left out for their norm pass through unchanged, unless `pass_outliers` is False (transcoders
    never do so: what goes in is not what comes out). `model_class_name` is as for `ap.export`. Raises
    ImportError without the package sae-lens, and ValueError as `ap.export` does.
    """
    try:
        from sae_lens import SAE as Lens  # type: ignore[import-not-found]
    except ImportError as error:
        raise ImportError("to_sae_lens needs the package sae-lens: pip install sae-lens") from error
    with TemporaryDirectory() as folder:
        export(sae, Path(folder) / "sae", "sae_lens", model_class_name=model_class_name)
        lens = Lens.load_from_disk(Path(folder) / "sae", device=device)
    limit = outlier_limit(sae.source, sae.hookpoint) if pass_outliers and not sae.needs_target else None
    if limit is not None:
        lens.outliers, lens.__class__ = Outliers(limit), type(type(lens).__name__, (PassesOutliers, type(lens)), {})
    return lens


class PassesOutliers:
    """Before one of SAELens's classes: what its `encode` and `decode` do besides."""

    outliers: Outliers

    def encode(self, x: Tensor) -> Tensor:
        return self.outliers.silence(x, super().encode(x))  # type: ignore[misc]

    def decode(self, feature_acts: Tensor) -> Tensor:
        return self.outliers.put_back(feature_acts, super().decode(feature_acts))  # type: ignore[misc]

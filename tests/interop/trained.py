"""SAEs as of a training, for the tests that write them: every kind that exists, under every rule it can have."""

from __future__ import annotations

from typing import Any

import torch
from naive import D_IN, D_SAE, K, rand

import apportion as ap
from apportion.architectures import rebuild
from apportion.architectures.affine import Affine

DATA = rand(400, D_IN, seed=50, scale=3) + torch.linspace(-4, 9, D_IN)
"""What they were trained on: of no particular scale, and not centred."""


def trained(name: str, dtype: torch.dtype = torch.float32, data: torch.Tensor = DATA, **settings: Any) -> ap.SAE:
    """Random weights, decoder rows of any norm, fitted and calibrated, in eval mode."""
    budget = {} if settings.get("allocation") == "threshold" else {"k": K}
    sae = rebuild(name, **({"d_in": D_IN, "d_sae": D_SAE, "seed": 0} | budget | settings)).to(dtype)
    assert isinstance(sae, Affine)
    with torch.no_grad():
        for i, p in enumerate(sae.parameters()):
            p.add_(rand(*p.shape, seed=i, scale=0.3).to(dtype))
        if name == "jumprelu":
            sae.allocation.log_threshold.copy_(rand(D_SAE, seed=70, scale=0.5) - 1)
    x = data.to(dtype)
    sae.fit_input(x, (x[:, :1] - 2 * x[:, : sae.out_shape[0]]) if sae.needs_target else None)
    sae.calibrate(x)
    return sae.eval()


def transcoders(**settings: Any) -> list[tuple[str, dict[str, Any]]]:
    return [
        (name, {"allocation": rule} | settings)
        for name in ("transcoder", "skip_transcoder")
        for rule in ("threshold", "topk", "mutual_choice", "feature_choice")
    ]


SAES: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in ("topk", "mutual_choice", "feature_choice", "multi_topk", "relu", "jumprelu", "gated")),
    *((name, {"subtract_b_dec": False}) for name in ("topk", "mutual_choice", "jumprelu", "gated")),
    ("relu", {"subtract_b_dec": True}),
    *((name, {"affinity": "code_times_decoder_norm"}) for name in ("topk", "mutual_choice", "relu", "gated")),
    *((name, {"input_norm": "none"}) for name in ("topk", "feature_choice", "jumprelu")),
    ("topk", {"input_norm": "token_norm"}),
    ("feature_choice", {"input_norm": "token_standardise"}),
    ("mlsae", {}),
    ("mlsae", {"allocation": "mutual_choice", "affinity": "code_times_decoder_norm"}),
    ("matryoshka", {}),
    ("matryoshka", {"allocation": "feature_choice"}),
    ("frozen_decoder", {}),
    ("switch", {"num_experts": 4}),
    ("mutual_choice", {"k": 2.5}),
    ("relu", {"theta": 0.4}),
    *transcoders(),
    *transcoders(d_out=4),
    ("transcoder", {"allocation": "mutual_choice", "input_norm": "token_standardise"}),
]

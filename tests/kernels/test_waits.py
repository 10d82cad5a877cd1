"""How often a training step on a GPU waits for the device: counted on a CPU, which follows the branches of a GPU."""

from __future__ import annotations

import os
import traceback
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import apportion as ap
from apportion.kernels import dispatch

if torch.cuda.is_available():
    pytest.skip("where there is a GPU, Triton is not interpreted", allow_module_level=True)
with pytest.MonkeyPatch.context() as at_import:  # triton looks at this variable when it is imported
    at_import.setenv("TRITON_INTERPRET", "1")
    pytest.importorskip("triton.language", reason="triton is made for Linux only")
    from apportion.kernels import triton_kernels

TOKENS, D_IN, D_SAE, K = 64, 16, 96, 4

READS = {"_local_scalar_dense", "nonzero", "masked_select", "bincount", "unique", "_unique2", "unique_consecutive"}
"""Operations that give the host something to know: a value, or how large their result is."""


class Waits(TorchDispatchMode):
    """Counts them. What runs within a Triton kernel's interpreter does not count."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()
        self.inside = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        if not self.inside and self.waits(name, args, kwargs or {}):
            self.note(name)
        return func(*args, **kwargs or {})

    def note(self, name: str) -> None:
        ours = [f for f in traceback.extract_stack() if "src/apportion" in f.filename.replace(os.sep, "/")]
        self.seen[f"{name} in {Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else name] += 1

    def waits(self, name: str, args: tuple, kwargs: dict) -> bool:
        if name == "repeat_interleave":
            return kwargs.get("output_size") is None and isinstance(args[0], torch.Tensor) and len(args) == 1
        masks = args[1] if name in ("index", "index_put", "index_put_") else ()
        if any(mask is not None and mask.dtype == torch.bool for mask in masks):
            return not (name.startswith("index_put") and args[2].ndim == 0)  # that is masked_fill
        return name in READS


@pytest.fixture
def waits(monkeypatch) -> Waits:
    counted, launch = Waits(), triton_kernels._launch

    def aside(*args, **kwargs):
        counted.inside = True
        try:
            launch(*args, **kwargs)
        finally:
            counted.inside = False

    def noted(name: str, method):
        def call(self, *args, **kwargs):
            counted.inside or counted.note(name)
            return method(self, *args, **kwargs)

        return call

    for name in ("tolist", "numpy", "cpu"):  # which no operation stands for on a CPU
        monkeypatch.setattr(torch.Tensor, name, noted(name, getattr(torch.Tensor, name)))
    monkeypatch.setattr(triton_kernels, "_launch", aside)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return counted


def after_some_steps(name: str, steps: int, **settings) -> tuple[ap.Trainer, torch.Tensor]:
    """A trainer with silent latents, at a step in which no curve is fitted."""
    config = ap.TrainConfig(
        total_tokens=TOKENS * 200,
        batch_tokens=TOKENS,
        lr=1e-3,
        dead_window_tokens=3 * TOKENS,
        density_window_tokens=20 * TOKENS,
    )
    trainer = ap.Trainer(ap.create(name, d_in=D_IN, d_sae=D_SAE, k=K, seed=0, **settings), config)
    x = torch.randn(TOKENS, D_IN, generator=torch.Generator().manual_seed(0))
    for _ in range(steps):
        trainer.step(x)
    return trainer, x


@pytest.mark.parametrize("screen", [None, "bfloat16"])
@pytest.mark.parametrize(
    ("name", "settings", "most"),
    [
        ("mutual_choice", {"aux": "none"}, 2),
        ("mutual_choice", {"aux": "aux_k"}, 2),
        ("mutual_choice", {"aux": "aux_zipf"}, 2),
        ("topk", {"aux": "aux_k"}, 2),
        ("topk", {"aux": "none"}, 2),
        ("feature_choice", {}, 2),
        ("feature_choice", {"budgets": "zipf", "switch_at": 0.1}, 2),
        ("matryoshka", {}, 3),  # how many matches each group has
        ("multi_topk", {}, 4),  # and how many are among the best, and how many are not
    ],
)
def test_a_step_waits_seldom(waits, name, settings, most, screen):
    trainer, x = after_some_steps(name, 66, **settings)
    own = trainer.learners[0]
    own.screening.screen, own.screening.settled = screen, "all"
    own.screening.asked, own.screening.steps = screen, 1  # no check is due
    with dispatch.use("triton"):
        waits.seen.clear()
        with waits:
            trainer.step(x)
    assert 0 < waits.seen.total() <= most, waits.seen

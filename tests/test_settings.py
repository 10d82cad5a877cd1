"""Settings are plain numbers, wherever they come from; names of other libraries get a hint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import apportion as ap

X = torch.randn(2000, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("number", [np.int64, np.int32, np.uint8, torch.tensor, np.float64, float], ids=repr)
def test_whole_numbers_of_every_kind(number: Any) -> None:
    sae = ap.create("topk", d_in=number(16), d_sae=number(64), k=number(4), seed=number(0))
    assert (sae.d_in, sae.d_sae, sae.k, sae.config.seed) == (16, 64, 4, 0)
    settings = sae.settings()
    assert all(type(settings[name]) is int for name in ("d_in", "d_sae", "k", "seed"))
    config = ap.TrainConfig(batch_tokens=number(200), total_tokens=number(200), seed=number(1))
    assert (config.batch_tokens, config.total_tokens) == (200, 200) and type(config.batch_tokens) is int


@pytest.mark.parametrize("number", [np.float32, np.float64, torch.tensor], ids=repr)
def test_fractions_of_every_kind(number: Any, tmp_path: Path) -> None:
    config = ap.TrainConfig(lr=number(0.5), clip_ratio=number(2.0), total_tokens=512, batch_tokens=256)
    assert config.lr == 0.5 and type(config.lr) is float
    sae = ap.create("mutual_choice", d_in=16, d_sae=64, k=number(2.5), seed=0)
    assert sae.k == 2.5 and type(sae.k) is float
    ap.Trainer(sae, config).fit(X, tmp_path / "run", progress=False)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["train"]["lr"] == 0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_tokens": 256.5}, "batch_tokens must be a whole number, got 256.5"),
        ({"beta1": 1.5}, "beta1 must be at least 0 and below 1, got 1.5"),
        ({"beta2": -0.1}, "beta2 must be at least 0"),
        ({"beta2": 1.0}, "beta2 must be at least 0 and below 1"),
        ({"learning_rate": 1e-3}, "no setting 'learning_rate'; did you mean lr?"),
        ({"batch_size": 4}, "did you mean batch_tokens?"),
        ({"warmup_steps": 4}, "did you mean warmup_share?"),
        ({"totaltokens": 4}, "did you mean total_tokens or batch_tokens?"),
        ({"zebra": 4}, "known are: lr, batch_tokens"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        ap.TrainConfig(**settings)


def test_settings_of_saes_get_hints_too() -> None:
    with pytest.raises(ValueError, match=r"did you mean d_sae\?"):
        ap.create("topk", d_in=16, dict_size=64)
    with pytest.raises(ValueError, match="d_sae must be a whole number"):
        ap.create("topk", d_in=16, d_sae=64.5)
    with pytest.raises(ValueError, match="k must be a whole number, got '4'"):
        ap.create("topk", d_in=16, d_sae=64, k="4")


def test_dir_shows_the_public_names_and_no_others() -> None:
    shown = [name for name in dir(ap) if not name.startswith("__")]
    assert shown == [
        "Batch", "Latents", "SAE", "SAES", "TrainConfig", "Trainer", "ablate", "create", "evaluate", "examples_of",
        "export", "load", "push_to_hub", "splice", "steer", "testing", "to_jumprelu", "to_sae_bench", "to_sae_lens",
        "write_delphi_cache",
    ]  # fmt: skip
    assert all(getattr(ap, name) is not None for name in shown)

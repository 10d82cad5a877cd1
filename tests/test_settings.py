"""Settings are plain numbers, wherever they come from; names of other libraries get a hint."""

from __future__ import annotations

import json
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import apportion as ap
from apportion.architectures.frozen import FrozenConfig
from apportion.objectives.end_to_end import EndToEndConfig
from apportion.objectives.mutual import MutualConfig
from apportion.settings import meanings
from apportion.synthetic.world import GroundTruthConfig

X = torch.randn(2000, 16, generator=torch.Generator().manual_seed(0))
name_of = attrgetter("__name__")


@pytest.mark.parametrize("number", [np.int64, np.int32, np.uint8, torch.tensor, np.float64, float], ids=name_of)
def test_whole_numbers_of_every_kind(number: Any) -> None:
    sae = ap.create("topk", d_in=number(16), d_sae=number(64), k=number(4), seed=number(0))
    assert (sae.d_in, sae.d_sae, sae.k, sae.config.seed) == (16, 64, 4, 0)
    settings = sae.settings()
    assert all(type(settings[name]) is int for name in ("d_in", "d_sae", "k", "seed"))
    config = ap.TrainConfig(batch_tokens=number(200), total_tokens=number(200), seed=number(1))
    assert (config.batch_tokens, config.total_tokens) == (200, 200) and type(config.batch_tokens) is int


@pytest.mark.parametrize("number", [np.float32, np.float64, torch.tensor], ids=name_of)
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
        ({"dtype": "float23"}, "dtype cannot be 'float23'; did you mean float32 or float64?"),
        ({"dtype": None}, "dtype cannot be None; known are: float32, float64"),
        ({"screen": "int4"}, "screen cannot be 'int4'; did you mean int8?"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        ap.TrainConfig(**settings)


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (EndToEndConfig, {"loss": "mse"}, "loss cannot be 'mse'; known are: kl, ce"),
        (MutualConfig, {"matching": "min"}, "matching cannot be 'min'; known are: max, one_to_one"),
        (MutualConfig, {"redraw": ["idle"]}, r"redraw cannot be \['idle'\]"),
        (partial(GroundTruthConfig, d_in=4, num_features=8, num_roots=0), {"layout": "rows"}, "did you mean row"),
        (partial(FrozenConfig, d_in=4, d_sae=8), {"frozen": "decoders"}, "did you mean decoder"),
    ],
)
def test_words_are_one_of_the_choices(config: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**settings)


def test_the_meaning_of_a_setting_is_the_docstring_under_it() -> None:
    found = meanings(FrozenConfig)
    assert found["min_cosine"] == "soft_decoder: the least cosine of a decoder row with its start."
    assert found["d_sae"] == "Number of latents.", "of a class that it extends"
    names: dict[str, Any] = {}
    exec("from dataclasses import dataclass\n@dataclass\nclass Nowhere:\n    k: int = 3\n    'Many.'", names)
    assert meanings(names["Nowhere"]) == {}, "a class without a file"


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
        "export", "fit_together", "load", "push_to_hub", "splice", "steer", "testing", "to_jumprelu", "to_sae_bench",
        "to_sae_lens", "write_delphi_cache",
    ]  # fmt: skip
    assert all(getattr(ap, name) is not None for name in shown)

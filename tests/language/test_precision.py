"""Which precision a language model is loaded in."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import make
from torch import nn

from apportion.language import LiveSource, load_model, precision
from apportion.language.collect import collect
from apportion.language.model import width_at

IDS = torch.arange(40).view(5, 8) % 30 + 3


def timed(monkeypatch: pytest.MonkeyPatch, **times: float) -> list[str]:
    """Passes take as long as is said of each precision; returns which were timed, in order."""
    seen: list[str] = []

    def seconds(model: nn.Module, tokens: int, passes: int = 3) -> float:
        seen.append(precision.dtype_of(model))
        return times[seen[-1]]

    monkeypatch.setattr(precision, "seconds", seconds)
    return seen


@pytest.mark.parametrize(("half", "full", "chosen"), [(1, 2, "bfloat16"), (1, 1, "bfloat16"), (2, 1.9, "float32")])
def test_what_is_not_slower_is_taken(
    half: float,
    full: float,
    chosen: str,
    tiny_model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, logger="apportion")
    seen = timed(monkeypatch, bfloat16=half, float32=full)
    model, _ = load_model(tiny_model_dir, "auto")
    assert seen == ["bfloat16", "bfloat16", "float32"] and precision.dtype_of(model) == chosen
    plain, _ = load_model(tiny_model_dir, chosen)
    for (name, x), (_, y) in zip(model.named_buffers(), plain.named_buffers(), strict=True):
        assert x.dtype == y.dtype and torch.equal(x, y), name
    assert torch.equal(model(IDS).logits, plain(IDS).logits)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    said = [record.getMessage() for record in caplog.records if "a pass over" in record.getMessage()]
    assert len(said) == 1 and f"{half:.3g} s in bfloat16" in said[0] and said[0].endswith(f"runs in {chosen}")


def test_what_was_chosen_is_recorded(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    timed(monkeypatch, bfloat16=1, float32=2)
    model, tokenizer = load_model(tiny_model_dir, "auto")
    manifest = collect(model, tokenizer, "model.layers.1", IDS, tokens=40, context_tokens=8, out=tmp_path / "acts")
    assert manifest["model_dtype"] == "bfloat16"
    about = LiveSource(model, tokenizer, "model.layers.1", IDS, held_out_share=0.5).describe()
    assert about.lm.model_dtype == about.dtype == "bfloat16"


def test_passes_are_really_timed(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = load_model(tiny_model_dir)
    passes: list[tuple[int, ...]] = []
    model.register_forward_pre_hook(lambda m, args, kw: passes.append(tuple(kw["input_ids"].shape)), with_kwargs=True)
    assert precision.seconds(model, 130, passes=2) > 0
    assert passes == [(2, 64)] * 3, "contexts as long as the model has positions, at most 64"
    monkeypatch.setattr(precision, "ALL_S", 0.0)
    assert precision.seconds(model, 16) > 0 and passes[3:] == [(1, 16)], "one that takes long is not tried again"
    monkeypatch.setattr(precision, "ALL_S", 60.0)
    tokens = precision.tokens_to_time(model)
    assert precision.FEWEST_TOKENS <= tokens <= precision.MOST_TOKENS and passes[4:] == [(1, 16)] * 2
    assert precision.dtype_of(load_model(tiny_model_dir, "auto")[0]) in ("bfloat16", "float32")


@pytest.mark.parametrize(("took", "tokens"), [(0.001, 512), (0.05, 80), (9.0, 16)])
def test_large_models_are_timed_on_few_tokens(took: float, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, float32=took)
    assert precision.tokens_to_time(nn.Linear(1, 1)) == tokens


def test_a_model_that_takes_other_things_runs_in_float32(caplog: pytest.LogCaptureFixture) -> None:
    class Images(nn.Linear):
        def forward(self, pixel_values: torch.Tensor) -> Any:
            raise ValueError("no pixels")

    caplog.set_level(logging.INFO, logger="apportion")
    model = precision.not_slower(lambda dtype: Images(2, 2).to(getattr(torch, dtype)), on_gpu=False)
    assert precision.dtype_of(model) == "float32" and "could not be timed" in caplog.text


def test_a_checkpoint_that_cannot_be_loaded_is_said_as_ever(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="no language model could be loaded from"):
        load_model(tmp_path, "auto")
    with pytest.raises(ValueError, match="dtype 'int8' is not supported"):
        load_model(tmp_path, "int8")


@pytest.mark.parametrize("has", [True, False])
def test_a_gpu_takes_bfloat16_where_it_has_it(has: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: has or including_emulation)
    assert precision.not_slower(str, on_gpu=True) == ("bfloat16" if has else "float32")


@pytest.fixture
def quantised(tmp_path: Path) -> Path:
    """A Llama of BitNet's form: weights of two bits, four in a byte, and a scale each, saved in bfloat16."""
    pytest.importorskip("accelerate")
    from transformers.integrations.bitnet import pack_weights

    folder = tmp_path / "model"
    make("llama").save_pretrained(folder)
    tensors: dict[str, torch.Tensor] = {}
    for name, w in load_file(folder / "model.safetensors").items():
        tensors[name] = w.bfloat16()
        if name.endswith("proj.weight"):
            scale = w.abs().mean()
            tensors[name] = pack_weights((w / scale).round().clamp(-1, 1)).contiguous()
            tensors[f"{name}_scale"] = (1 / scale).bfloat16()[None]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config |= {"quantization_config": {"quant_method": "bitnet", "modules_to_not_convert": ["lm_head"]}}
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16", "torch_dtype": "bfloat16"}))
    return folder


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # transformers uses it for BitNet
@pytest.mark.parametrize(
    ("asked", "runs_in"), [(None, "bfloat16"), ("auto", "bfloat16"), ("float32", "float32"), ("float16", "float16")]
)
def test_a_quantised_checkpoint_is_loaded_as_it_was_saved(
    asked: str | None, runs_in: str, quantised: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "seconds", lambda *args: pytest.fail("nothing is there to choose"))
    model, _ = load_model(quantised, asked, device="cpu")
    assert precision.is_quantised(model.config)
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "BitLinear"
    assert precision.dtype_of(model) == runs_in and width_at(model, "model.layers.1") == 32


def test_the_precision_of_quantised_weights_is_that_of_what_is_not() -> None:
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2, dtype=torch.bfloat16)])
    model[0].weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.uint8), requires_grad=False)
    model[0].bias = nn.Parameter(torch.zeros(2, dtype=torch.float8_e4m3fn), requires_grad=False)
    assert precision.dtype_of(model) == "bfloat16"

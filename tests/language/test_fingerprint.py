"""A model is recognised by what it computes, whatever its settings are called and however it is loaded."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import make

from apportion.about import ModelRecord, TokenizerRecord
from apportion.cli.arguments import check_same_model
from apportion.language import load_model
from apportion.language.fingerprint import model_fingerprint, tokenizer_fingerprint
from apportion.same_model import model_difference

EMBEDDED_DIGEST = "0e92027a42a49f7b"
EMBEDDED_PROBE = [-0.453401, 0.054643, -0.247265]


def record(model: Any) -> ModelRecord:
    """As it comes back from a file."""
    return ModelRecord.from_json(json.loads(json.dumps(model_fingerprint(model).to_json())))


@pytest.fixture(scope="module")
def model() -> Any:
    return make("llama")


@pytest.fixture(scope="module")
def known(model: Any) -> dict[str, Any]:
    return record(model)


def rebuilt(model: Any, **changes: Any) -> Any:
    """The same weights under another configuration."""
    config = copy.deepcopy(model.config)
    for name, value in changes.items():
        setattr(config, name, value)
    other = type(model)(config)
    other.load_state_dict(model.state_dict())
    return other.eval()


SAME: dict[str, Any] = {
    "itself": lambda m: m,
    "in training": lambda m: copy.deepcopy(m).train(),
    "without a cache": lambda m: rebuilt(m, use_cache=False),
    "other special tokens": lambda m: rebuilt(m, pad_token_id=5, eos_token_id=[0, 7], bos_token_id=3),
    "other attention": lambda m: rebuilt(m, _attn_implementation="eager"),
    "another name": lambda m: rebuilt(m, name_or_path="elsewhere"),
    "more positions than it was trained on": lambda m: rebuilt(m, max_position_embeddings=4096),
    "float64": lambda m: copy.deepcopy(m).double(),
    "bfloat16": lambda m: copy.deepcopy(m).bfloat16(),
    "other names of settings": lambda m: _renamed(m),
    "other names of parameters": lambda m: _reshaped(m),
}


def _renamed(model: Any) -> Any:
    other = copy.deepcopy(model)
    other.config.to_dict = lambda: {"rope_theta": 10000.0, "torchscript": False, "pruned_heads": {}}
    return other


def _reshaped(model: Any) -> Any:
    """As a version that stores two matrices in one: other parameters, and the same function."""
    other = copy.deepcopy(model)
    other.extra = torch.nn.Parameter(torch.zeros(3, 4))
    return other


@pytest.mark.parametrize("kind", SAME)
def test_the_same_model_is_recognised(model: Any, known: ModelRecord, kind: str) -> None:
    found = record(SAME[kind](model))
    assert model_difference(known, found) is None and model_difference(found, known) is None


def _tuned(model: Any, share: float, dtype: torch.dtype = torch.float32) -> Any:
    other = copy.deepcopy(model)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(share * p.std() * torch.randn(p.shape, generator=g) if p.std() > 0 else 0)
    return other.to(dtype)


OTHER: dict[str, tuple[Any, str]] = {
    "fine-tuned a little": (lambda m: _tuned(m, 0.02), "other weights"),
    "fine-tuned, in bfloat16": (lambda m: _tuned(m, 0.2, torch.bfloat16), "other weights"),
    "other heads": (
        lambda m: rebuilt(m, num_attention_heads=8, num_key_value_heads=4, head_dim=4), "the same weights in another"
    ),
    "another activation": (lambda m: rebuilt(m, hidden_act="relu"), "the same weights in another"),
    "another family": (lambda m: make("gpt2"), "other weights"),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHER)
def test_another_model_is_told_apart_and_how(model: Any, known: ModelRecord, kind: str) -> None:
    made, reason = OTHER[kind]
    found = record(made(model))
    assert reason in (model_difference(known, found) or "") and reason in (model_difference(found, known) or "")


def test_sizes_are_named() -> None:
    wide, narrow = ModelRecord(hidden_size=64), ModelRecord(hidden_size=32)
    assert model_difference(narrow, wide) == "another hidden_size (32 and 64)"
    assert model_difference(ModelRecord(num_layers=3), ModelRecord(num_layers=2)) == "another num_layers (3 and 2)"


def test_records_that_do_not_tell() -> None:
    """Of other libraries, and of before there were digests of weights."""
    now = ModelRecord(name_or_path="a", hidden_size=8, num_layers=2, weights_sha256="x", probe=(1.0,))
    for said in ({}, {"name_or_path": "b"}, {"config_sha256": "y", "hidden_size": 8, "num_layers": 2}):
        before = ModelRecord.from_json(said)
        assert model_difference(before, now) is None and model_difference(now, before) is None
    assert model_difference(now, replace(now, probe=None)) is None
    assert model_difference(now, replace(now, probe=None, weights_sha256="z")) == "other weights"


def test_models_that_take_no_tokens_have_no_probe() -> None:
    class Seeing(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(3, 4)

        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            return self.layer(pixel_values)

    found = model_fingerprint(Seeing())
    assert found.probe is None and found.name_or_path == "Seeing" and len(found.weights_sha256 or "") == 64


def test_what_has_no_parameters_or_no_name() -> None:
    found = model_fingerprint(torch.nn.Identity())
    assert (found.name_or_path, found.dtype, found.probe) == ("Identity", None, None)
    for tokenizer in (None, object()):
        assert tokenizer_fingerprint(tokenizer) == TokenizerRecord(name_or_path="", special_ids=())


def test_short_contexts(tmp_path: Path) -> None:
    small = rebuilt(make("gpt2"))
    small.config.n_positions = 4
    small.transformer.wpe = torch.nn.Embedding(4, 32)
    assert model_fingerprint(small).probe is not None


def test_a_fingerprint_leaves_the_model_as_it_was(model: Any) -> None:
    other = copy.deepcopy(model).train()
    state = torch.get_rng_state()
    model_fingerprint(other)
    assert all(m.training for m in other.modules()) and torch.equal(torch.get_rng_state(), state)


def test_the_embedded_model_is_the_same_everywhere() -> None:
    """Recorded once under transformers 4.57 and 5.24: equal to the sixth digit."""
    found = record(load_model("embedded")[0])
    assert (found.weights_sha256 or "").startswith(EMBEDDED_DIGEST)
    assert (found.probe or ())[:3] == pytest.approx(EMBEDDED_PROBE, abs=1e-3)
    assert (found.hidden_size, found.dtype) == (192, "float32")


def test_records_are_compared_wherever_they_lie(model: Any, known: ModelRecord) -> None:
    """By scripts that were written against dicts, too."""
    check_same_model({"model": known}, {"model": model_fingerprint(model)}, "it")
    with pytest.raises(ValueError, match="it belongs to another model"):
        check_same_model({"model": known}, replace(known, hidden_size=5), "it")


class Packed(torch.Tensor):
    """As torchao has them: what they hold is seen by `dequantize`, and they cannot be laid out anew."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.Tensor.flatten:
            raise NotImplementedError("aten.view")
        if function is torch.Tensor.dequantize:
            return args[0].as_subclass(torch.Tensor) / 2
        return super().__torch_function__(function, types, args, kwargs or {})


def test_quantised_weights_are_told_by_what_they_stand_for(model: Any) -> None:
    plain, packed = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        plain.lm_head.weight.div_(2)
    packed.lm_head.weight = torch.nn.Parameter(packed.lm_head.weight.detach().as_subclass(Packed), requires_grad=False)
    digests = [model_fingerprint(one).weights_sha256 for one in (plain, packed, model)]
    assert digests[0] == digests[1] != digests[2]

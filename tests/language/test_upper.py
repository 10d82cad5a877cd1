"""The upper layers alone do what the whole model does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from apportion.language import load_model
from apportion.language.hookpoints import capture, hooked
from apportion.language.upper import UpperLayers, stack_below

IDS = torch.tensor([[1, 5, 9, 7, 3, 2, 2, 8], [1, 4, 4, 8, 6, 0, 3, 3]])


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> Any:
    return load_model(tiny_model_dir)[0]


def at(model: Any, *names: str) -> dict[str, Tensor]:
    return capture(model, names, IDS)


@torch.no_grad()
@pytest.mark.parametrize(
    ("hookpoint", "skipped"),
    [
        ("model.layers.0", 1),
        ("model.layers.1", 2),
        ("model.layers.1:in", 1),
        ("model.layers.1.mlp", 0),
        ("model.norm", 0),
    ],
)
def test_the_layers_below_are_passed_over_where_that_changes_nothing(model, hookpoint, skipped):
    upper = UpperLayers(model, hookpoint)
    assert len(upper.skipped) == skipped and upper.later == ()
    assert torch.equal(upper(IDS, at(model, hookpoint)[hookpoint]).logits, model(IDS).logits)
    x = torch.randn(2, 8, 32)
    with hooked(model, {hookpoint: lambda h: x}):
        expected = model(IDS).logits
    assert torch.equal(upper(IDS, x).logits, expected)
    assert not any("forward" in m.__dict__ for m in model.modules())


@torch.no_grad()
def test_a_model_that_hands_more_than_the_stream_from_layer_to_layer_runs_as_a_whole(model):
    """Layer 1 adds what the MLP of layer 0 made, past the hookpoint between them."""
    x = at(model, "model.layers.0")["model.layers.0"]
    made: list[Tensor] = []
    handles = [
        model.model.layers[0].mlp.register_forward_hook(lambda m, args, out: made.append(out)),
        model.model.layers[1].register_forward_hook(lambda m, args, out: out + made[-1] if len(made[-1]) else out),
    ]
    try:
        upper = UpperLayers(model, "model.layers.0")
        assert not upper.skipped
        assert torch.equal(upper(IDS, x).logits, model(IDS).logits)
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def test_layers_that_return_tuples(model, monkeypatch):
    layer = model.model.layers[0]
    original = layer.forward
    monkeypatch.setattr(layer, "forward", lambda *args, **kwargs: (original(*args, **kwargs),))
    monkeypatch.setattr(
        model.model.layers[1], "forward", lambda h, *args, _f=model.model.layers[1].forward, **kw: _f(h[0], *args, **kw)
    )
    upper = UpperLayers(model, "model.layers.0")
    assert [in_tuple for _, in_tuple in upper.skipped] == [True]
    patched = layer.forward
    assert torch.equal(upper(IDS, at(model, "model.layers.0")["model.layers.0"]).logits, model(IDS).logits)
    assert layer.forward is patched, "an instance's own forward comes back"


def test_later_activations_and_gradients(model):
    x = at(model, "model.layers.0")["model.layers.0"].requires_grad_()
    upper = UpperLayers(model, "model.layers.0", None)
    assert upper.later == ("model.layers.1", "model.layers.2")
    assert UpperLayers(model, "model.layers.1:in", None).later == ("model.layers.1", "model.layers.2")
    above = upper(IDS, x)
    for name, h in at(model, *upper.later).items():
        assert torch.equal(above.later[name], h)
    above.later["model.layers.2"][:, -1].sum().backward()
    assert x.grad[:, 0].any() and all(p.grad is None for p in model.parameters())


def test_an_error_leaves_no_traces(model):
    upper = UpperLayers(model, "model.layers.0")
    with pytest.raises(RuntimeError):
        upper(IDS, torch.zeros(2, 3, 32))
    assert not any("forward" in m.__dict__ or m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("hookpoint", "later", "message"),
    [
        ("model.layers.*", (), "3 modules"),
        ("model.layers.1", ("model.layers.0",), "does not come after"),
        ("model.layers.1", ("model.layers.1",), "does not come after"),
        ("model.layers.1.mlp", None, "name the later hookpoints"),
        ("model.layer.1", (), "no module"),
    ],
)
def test_hookpoints_that_cannot_be(model, hookpoint, later, message):
    with pytest.raises(ValueError, match=message):
        UpperLayers(model, hookpoint, later)


def test_what_a_layer_returns_beside_the_stream_is_no_stream() -> None:
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList(torch.nn.Identity() for _ in range(3))})
    assert len(stack_below(model, "layers.1")) == 2 and len(stack_below(model, "layers.1:in")) == 1
    assert stack_below(model, "layers.1:out[1]") == stack_below(model, "layers.1:in[1]") == []

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from apportion.language.hookpoints import capture, expand, hooked, middle_layer
from apportion.language.model import load_model
from apportion.rows.hookpoint import Hookpoint

IDS = torch.tensor([[1, 5, 9, 7, 3], [1, 4, 4, 8, 6]])


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> Any:
    return load_model(tiny_model_dir)[0]


def num_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_outputs_equal_the_models_own_hidden_states(model: Any) -> None:
    states = model(IDS, output_hidden_states=True).hidden_states
    seen = capture(model, ["model.layers.1", "model.layers.0:out", "model.layers.2:in"], IDS)
    assert list(seen) == ["model.layers.1", "model.layers.0", "model.layers.2:in"]
    assert torch.equal(seen["model.layers.0"], states[1])
    assert torch.equal(seen["model.layers.1"], states[2])
    assert torch.equal(seen["model.layers.2:in"], states[2])


def test_hidden_states_given_by_keyword_are_found(model: Any) -> None:
    layer = model.model.layers[1]
    seen = capture(model, ["model.layers.1.self_attn:in", "model.layers.0"], IDS)
    assert torch.equal(seen["model.layers.1.self_attn:in"], layer.input_layernorm(seen["model.layers.0"]))


@pytest.mark.parametrize(("stop", "ran"), [(True, []), (False, ["layer 2", "head"])])
def test_early_stop_skips_what_lies_above(model: Any, stop: bool, ran: list[str]) -> None:
    calls: list[str] = []
    handles = [
        model.model.layers[2].register_forward_hook(lambda *_: calls.append("layer 2")),
        model.lm_head.register_forward_hook(lambda *_: calls.append("head")),
    ]
    capture(model, ["model.layers.1", "model.layers.0.mlp"], IDS, stop=stop)
    for handle in handles:
        handle.remove()
    assert calls == ran


def test_hooks_are_gone_after_an_error_and_after_an_early_stop(model: Any) -> None:
    before = num_hooks(model)
    capture(model, ["model.layers.0"], IDS)
    with pytest.raises(IndexError):
        capture(model, ["model.layers.0"], torch.tensor([[10**6]]))
    with pytest.raises(ValueError, match="no module"), hooked(model, {"model.layers.0": lambda x: x, "no.such": id}):
        pass
    assert num_hooks(model) == before


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, str]:
        return x + 1, "extra"


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pair, self.unused = Pair(), nn.Identity()

    def forward(self, x: Tensor) -> Any:
        return self.pair(x)


def test_tuples_are_read_and_written_in_their_first_element() -> None:
    chain, x = Chain(), torch.zeros(2, 3)
    assert torch.equal(capture(chain, ["pair"], x)["pair"], x + 1)
    with hooked(chain, {"pair": lambda t: t * 5, "pair:in": lambda t: t + 2}):
        tensor, extra = chain(x)
    assert torch.equal(tensor, torch.full((2, 3), 15.0))
    assert extra == "extra"


class Router(nn.Module):
    """What it chose, and how; given both by position and by name."""

    def forward(self, x: Tensor, weights: Tensor | None = None, scale: float = 1.0) -> tuple[Tensor, Tensor, list[str]]:
        assert weights is not None
        return x * weights * scale, weights + 1, ["extra"]


class Routed(nn.Module):
    def __init__(self, named: bool = False) -> None:
        super().__init__()
        self.router, self.named = Router(), named

    def forward(self, x: Tensor) -> Any:
        return self.router(x, weights=x + 10, scale=2.0) if self.named else self.router(x, x + 10, 2.0)


@pytest.mark.parametrize("named", [False, True])
def test_elements_of_tuples_and_arguments_are_read_and_written(named: bool) -> None:
    model, x = Routed(named), torch.ones(2, 3)
    places = ["router", "router:out[1]", "router:in", "router:in[1]"]
    seen = capture(model, ["router:out[0]", "router:out[01]", "router:in[0]", "router:in[1]"], x)
    assert list(seen) == places
    for place, value in zip(places, (22.0, 12.0, 1.0, 11.0), strict=True):
        assert torch.equal(seen[place], torch.full((2, 3), value)), place
    with hooked(model, {"router:out[1]": lambda t: t * 0, "router:in[1]": lambda t: t - 10}):
        first, second, extra = model(x)
    assert torch.equal(first, torch.full((2, 3), 2.0)) and not second.any() and extra == ["extra"]


def test_the_input_is_what_is_called_hidden_states() -> None:
    class Attention(nn.Module):
        def forward(self, mask: Tensor | None = None, hidden_states: Tensor | None = None) -> Any:
            return hidden_states

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = Attention()

        def forward(self, x: Tensor) -> Any:
            return self.attention(mask=torch.zeros(2), hidden_states=x)

    assert torch.equal(capture(Layer(), ["attention:in"], torch.ones(2, 3))["attention:in"], torch.ones(2, 3))


@pytest.mark.parametrize(
    ("hookpoint", "said"),
    [
        ("router:out[3]", r"returns 3 things, so router:out\[2\] is the last"),
        ("router:out[2]", "carries no tensor but list"),
        ("router:in[2]", "carries no tensor but float: the module was given 1 by position, weights=, scale="),
        ("router:in[7]", "no tensor but NoneType"),
    ],
)
def test_elements_that_are_not_there(hookpoint: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        capture(Routed(named=True), [hookpoint], torch.ones(2, 3))


def test_a_tensor_has_no_elements() -> None:
    with pytest.raises(ValueError, match="returns no tuple but a tensor; write '0'"):
        capture(nn.Sequential(nn.Identity()), ["0:out[1]"], torch.ones(2, 3))


def test_globs_of_paths_with_elements(model: Any) -> None:
    """Brackets are a glob in the path, a number behind it."""
    assert expand(model, "model.layers.[12].mlp:out[1]") == ["model.layers.1.mlp:out[1]", "model.layers.2.mlp:out[1]"]
    assert expand(model, ["model.layers.*.mlp:out[0]"]) == [f"model.layers.{i}.mlp" for i in range(3)]


def test_captured_values_survive_work_in_place() -> None:
    chain = nn.Sequential(nn.Identity(), nn.ReLU(inplace=True))
    x = torch.tensor([-1.0, 2.0])
    assert torch.equal(capture(chain, ["0", "1"], x)["0"], torch.tensor([-1.0, 2.0]))


def test_a_module_that_never_runs_is_named() -> None:
    with pytest.raises(ValueError, match="never ran 'unused'"):
        capture(Chain(), ["unused"], torch.zeros(1))


def test_globs_follow_the_model_and_do_not_cross_dots(model: Any) -> None:
    assert expand(model, "model.layers.*") == ["model.layers.0", "model.layers.1", "model.layers.2"]
    assert expand(model, ["model.layers.[12].mlp:in", "model.layers.1.mlp:in"]) == [
        "model.layers.1.mlp:in",
        "model.layers.2.mlp:in",
    ]


@pytest.mark.parametrize("wrong", ["model.layer.1", "model.layers.1.mpl:in", "model.layer.*"])
def test_unknown_names_suggest_the_nearest(model: Any, wrong: str) -> None:
    with pytest.raises(ValueError, match=r"nearest are .*'model\.layers\."):
        expand(model, wrong)


@pytest.mark.parametrize(
    "wrong", ["model.layers.1:output", ":in", "", "a:out[x]", "a:out[-1]", "a:out[]", "a[1]:out[1", "a:b:in", "a:[1]"]
)
def test_malformed_hookpoints_are_refused(wrong: str) -> None:
    with pytest.raises(ValueError, match="not a hookpoint"):
        Hookpoint.parse(wrong)


def test_the_middle_layer() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=4, n_embd=8, n_head=2, vocab_size=11, n_positions=8))
    assert middle_layer(gpt2) == "transformer.h.1"
    assert middle_layer(nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(1, 1) for _ in range(5))})) == "layers.2"
    with pytest.raises(ValueError, match="give a hookpoint"):
        middle_layer(nn.Linear(1, 1))

"""What a forward pass says about its tokens, with masks, caches and position ids of every kind."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import make
from torch import Tensor, nn

from apportion.language.hookpoints import capture, expand, hooked
from apportion.language.model import run_contexts
from apportion.language.passes import Tokens, askable, tokens_given, watched

IDS = torch.arange(10, 15)[None].repeat(2, 1)


def firsts(tokens: Tokens) -> list[list[int]]:
    """The attended tokens at position 0."""
    first = tokens.positions == 0
    return (first if tokens.attended is None else first & tokens.attended).int().tolist()


def attended(tokens: Tokens) -> list[list[int]] | None:
    return None if tokens.attended is None else tokens.attended.int().tolist()


def given(**arguments: Any) -> Tokens:
    found = tokens_given(arguments)
    assert found is not None
    return found


def test_without_anything_the_first_token_is_the_first() -> None:
    tokens = given(input_ids=IDS)
    assert firsts(tokens) == [[1, 0, 0, 0, 0]] * 2 and tokens.attended is None
    assert tokens.ids is not None and torch.equal(tokens.ids, IDS)
    assert tokens_given({"pixel_values": torch.zeros(1, 3, 4, 4)}) is None


def test_padding_on_either_side() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    tokens = given(input_ids=IDS, attention_mask=mask)
    assert firsts(tokens) == [[0, 0, 1, 0, 0], [1, 0, 0, 0, 0]]
    assert attended(tokens) == mask.tolist()
    stated = (mask.cumsum(1) - 1).clamp_min(0)
    assert firsts(given(input_ids=IDS, attention_mask=mask, position_ids=stated)) == firsts(tokens)
    assert firsts(given(input_ids=IDS, attention_mask=mask, position_ids=torch.arange(5)[None])) == firsts(tokens)
    assert given(input_ids=IDS, attention_mask=torch.ones_like(IDS)).attended is None


def causal(mask: Tensor) -> Tensor:
    """[batch, 1, length, length] from a mask of padding, True where allowed."""
    n = mask.shape[1]
    return (torch.ones(n, n).tril().bool() & mask.bool()[:, None, :])[:, None]


@pytest.mark.parametrize("kind", ["bool", "int", "added", "open", "mapping"])
def test_masks_of_four_dimensions(kind: str) -> None:
    """As models hand them inward, or users make them; rows of padding may be left open."""
    padding = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    mask: Any = causal(padding)
    if kind == "open":
        mask[0, 0, :2] = True
    elif kind == "added":
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float16).min)
    elif kind == "int":
        mask = mask.long()
    elif kind == "mapping":
        mask = {"sliding_attention": mask & ~causal(padding).roll(2, -1), "full_attention": mask}
    tokens = given(input_ids=IDS, attention_mask=mask)
    assert firsts(tokens) == [[0, 0, 1, 0, 0], [1, 0, 0, 0, 0]]
    assert attended(tokens) == padding.tolist()


def test_documents_packed_into_one_row() -> None:
    blocks = torch.block_diag(torch.ones(2, 2).tril(), torch.ones(3, 3).tril()).bool()[None, None].expand(2, 1, 5, 5)
    by_mask = given(input_ids=IDS, attention_mask=blocks)
    by_positions = given(input_ids=IDS, position_ids=torch.tensor([[0, 1, 0, 1, 2]]))
    both = given(input_ids=IDS, position_ids=torch.tensor([[0, 1, 0, 1, 2]]), attention_mask=torch.ones_like(IDS))
    for tokens in (by_mask, by_positions, both):
        assert firsts(tokens) == [[1, 0, 1, 0, 0]] * 2 and tokens.attended is None


def test_a_mask_that_hides_nothing_from_an_encoder() -> None:
    both_ways = torch.ones(2, 1, 5, 5, dtype=torch.bool)
    tokens = given(input_ids=IDS, attention_mask=both_ways)
    assert firsts(tokens) == [[1, 0, 0, 0, 0]] * 2 and tokens.attended is None
    both_ways[1, :, :, 3:] = False
    tokens = given(input_ids=IDS, attention_mask=both_ways)
    assert firsts(tokens) == [[1, 0, 0, 0, 0]] * 2 and attended(tokens) == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]


class Counted:
    def __init__(self, length: Any) -> None:
        self.length = length

    def get_seq_length(self) -> Any:
        return self.length


class Recurrent:
    def __init__(self, before: bool) -> None:
        self.layers = [SimpleNamespace(has_previous_state={0: before})]

    def get_seq_length(self) -> int:
        raise ValueError("no length")


LATER = {
    "cache": {"cache": Counted(3)},
    "past_key_values": {"past_key_values": Counted(torch.tensor(3))},
    "recurrent": {"cache": Recurrent(True)},
    "of tuples": {"past_key_values": ((torch.zeros(2, 4, 3, 8),) * 2,)},
    "cache_position": {"cache_position": torch.tensor([3]), "cache_params": Counted(0)},
    "position_ids": {"position_ids": torch.tensor([[3]])},
    "of rotary parts": {"position_ids": torch.tensor([[[3]], [[0]], [[0]]])},
    "mask of all": {"attention_mask": torch.ones(2, 4), "cache": Counted(3)},
    "mask of the new": {"attention_mask": torch.ones(2, 1), "cache": Counted(3)},
    "fixed cache": {"attention_mask": torch.tensor([True] * 4 + [False] * 6)[None, None, None], "cache": Counted(3)},
}


@pytest.mark.parametrize("arguments", LATER.values(), ids=list(LATER))
def test_a_token_behind_a_cache_is_not_the_first(arguments: dict[str, Any]) -> None:
    tokens = given(input_ids=IDS[:, :1], **arguments)
    assert firsts(tokens) == [[0], [0]] and tokens.attended is None


@pytest.mark.parametrize("cache", [Counted(0), Recurrent(False), (), None], ids=["counted", "recurrent", "tuple", "no"])
def test_an_empty_cache(cache: Any) -> None:
    assert firsts(given(input_ids=IDS, cache=cache)) == [[1, 0, 0, 0, 0]] * 2


def test_the_first_attended_token_may_come_behind_a_cache_of_padding() -> None:
    mask = torch.tensor([[0, 0, 0, 1], [0, 1, 1, 1]])
    assert firsts(given(input_ids=IDS[:, :1], attention_mask=mask, cache=Counted(3))) == [[1], [0]]


# In models


@torch.no_grad()
def test_the_innermost_module_that_takes_tokens_is_asked() -> None:
    model = make("llama")
    assert askable(model, "model.layers.1") == [model, model.model]
    assert askable(model, "lm_head:in") == [model]
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    with watched(model, "model.layers.1") as watch:
        model.model(inputs_embeds=model.model.embed_tokens(IDS), attention_mask=mask)
        assert watch.tokens is not None and watch.tokens.ids is None and attended(watch.tokens) == mask.tolist()
        model(input_ids=IDS)
        assert watch.tokens.ids is not None and watch.tokens.attended is None
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_rows_in_other_shapes() -> None:
    with watched(nn.Identity(), "x") as watch:
        assert watch.at(torch.zeros(2, 5, 3)) is None, "no pass has said anything"
        watch.tokens = given(input_ids=IDS, attention_mask=torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]))
        flat = watch.at(torch.zeros(10, 3))
        assert flat is not None and flat.positions.tolist() == watch.tokens.positions.flatten().tolist()
        last = watch.at(torch.zeros(2, 1, 3))
        assert last is not None and last.positions.tolist() == [[3], [4]]
        with pytest.raises(ValueError, match=r"shape \(3, 3\).* 2 x 5 tokens"):
            watch.at(torch.zeros(3, 3))


class Looped(nn.Module):
    """One layer, run several times."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.layer(x)))


def test_a_module_that_runs_several_times_is_no_hookpoint() -> None:
    model, x = Looped(), torch.randn(3, 4)
    for change in (torch.zeros_like, lambda t: None):
        with pytest.raises(ValueError, match="'layer' several times"), hooked(model, {"layer": change}):
            model(x)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with hooked(model, {"head": torch.zeros_like}):
        model(x), model(x)
    with hooked(model, {"layer": torch.zeros_like}):
        model.layer(x), model.layer(x)  # outside of a pass of the model


def test_after_a_pass_that_failed_counting_begins_anew() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    with hooked(model, {"0": torch.zeros_like}):
        for _ in range(2):
            with pytest.raises(RuntimeError):
                model(torch.zeros(3, 5))
        model(torch.zeros(3, 4))


@pytest.mark.slow
@torch.no_grad()
def test_compiled_models_are_hooked_as_if_they_were_not() -> None:
    model = make("llama")
    clean = capture(model, ["model.layers.1"], input_ids=IDS)["model.layers.1"]
    logits = model(input_ids=IDS).logits
    ways = (torch.compile(model, backend="eager"), _with_compiled_layers(), _compiled_in_place(), _compiled_forward())
    for compiled in ways:
        assert torch.allclose(compiled(input_ids=IDS).logits, logits, atol=1e-5)
        assert expand(compiled, "model.layers.*") == [f"model.layers.{i}" for i in range(3)]
        seen = capture(compiled, ["model.layers.1"], input_ids=IDS)["model.layers.1"]
        assert torch.allclose(seen, clean, atol=1e-5)
        with hooked(compiled, {"model.layers.1": torch.zeros_like}):
            assert not torch.allclose(compiled(input_ids=IDS).logits, logits, atol=1e-2)
        assert torch.allclose(compiled(input_ids=IDS).logits, logits, atol=1e-5)


def _with_compiled_layers() -> Any:
    model = make("llama")
    for i, layer in enumerate(model.model.layers):
        model.model.layers[i] = torch.compile(layer, backend="eager")
    return model


def _compiled_in_place() -> Any:
    model = make("llama")
    model.compile(backend="eager")
    return model


def _compiled_forward() -> Any:
    model = make("llama")
    model.forward = torch.compile(model.forward, backend="eager")
    return model


@torch.no_grad()
def test_a_compiled_function_around_a_model_is_hooked_too() -> None:
    """Nothing in the model tells that it has been compiled, and what was compiled before has no hooks in it."""
    model = make("llama")
    logits = torch.compile(lambda ids: model(input_ids=ids).logits, backend="eager")
    clean = logits(IDS)
    with hooked(model, {"model.layers.1": torch.zeros_like}):
        changed = logits(IDS)
    assert not torch.allclose(changed, clean, atol=1e-2) and torch.allclose(logits(IDS), clean, atol=1e-5)


@torch.no_grad()
def test_nothing_is_compiled_with_hooks_in_it() -> None:
    model = make("llama")
    clean = model(input_ids=IDS).logits
    graphs: list[Any] = []
    with hooked(model, {"model.layers.1": torch.zeros_like}):
        compiled = torch.compile(model, backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
        assert not torch.allclose(compiled(input_ids=IDS).logits, clean, atol=1e-2)
        assert not graphs
    assert torch.allclose(compiled(input_ids=IDS).logits, clean, atol=1e-5) and graphs


def test_threads_have_their_own_passes() -> None:
    """Two threads in one model at the same time, in step with each other, with texts of different padding."""
    model, together = _Slow(threading.Barrier(2, timeout=20)), "layer"
    masks, found = [[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]], [None, None]
    with watched(model, together) as watch:

        def look(x: Tensor) -> None:
            tokens = watch.at(x)
            assert tokens is not None
            found[masks.index(x[0, :, 0].int().tolist())] = firsts(tokens)

        with hooked(model, {together: look}), ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda mask: model(IDS[:1], torch.tensor([mask])), masks))
    assert found == [[[1, 0, 0, 0, 0]], [[0, 0, 1, 0, 0]]]


class _Slow(nn.Module):
    """Waits for another thread between its beginning and its layer, and within it."""

    def __init__(self, barrier: threading.Barrier) -> None:
        super().__init__()
        self.layer, self.barrier = nn.Identity(), barrier

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        self.barrier.wait()
        x = self.layer(attention_mask[..., None].float())
        self.barrier.wait()
        return x


def test_rows_may_have_the_tokens_first() -> None:
    class TokensFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1, 1)

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.layer(input_ids.T[..., None].float())

    model = TokensFirst()
    with watched(model, "layer") as watch:
        x = model(IDS)
    tokens = watch.at(x)
    assert tokens is not None and tokens.ids is not None and torch.equal(tokens.ids, IDS.T)
    assert torch.equal(tokens.positions, torch.arange(5)[:, None].expand(5, 2))
    ids = torch.arange(10).reshape(2, 5)
    with torch.no_grad():
        model.layer.weight.fill_(1), model.layer.bias.fill_(0)
    assert torch.equal(run_contexts(model, ["layer"], ids)["layer"].flatten(), torch.arange(10.0))

"""Interventions while a model generates: for every family the same tokens and logits with and without a cache, in a
batch that is padded on the left and alone; and equal to those of a loop over whole texts with a hook made here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, VOCAB, WIDTH, make
from torch import Tensor, nn

import apportion as ap
from apportion.latents import Latents
from apportion.rows import TokenFilter

PROMPTS = [[5, 7, 9, 11, 4, 8, 33], [17, 3, 60], [41, 12, 8, 90, 2]]
"""Token 3 is special here, and left out by the filter."""
NEW_TOKENS = 5
FILTER = TokenFilter(norm_outlier=0.0, special_ids=(3,)).to_dict()


@cache
def model_of(name: str) -> Any:
    return make(name)


def randomised(sae: Any) -> Any:
    """Weights that change what the model says, and codes without jumps, so that rounding stays rounding."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        sae.W_enc.copy_(torch.randn(sae.W_enc.shape, generator=g) / WIDTH**0.5)
        sae.W_dec.copy_(torch.randn(sae.W_dec.shape, generator=g) / WIDTH**0.5)
        sae.b_dec.copy_(0.1 * torch.randn(sae.b_dec.shape, generator=g))
    sae.info = {"source": {"filter": FILTER}}
    return sae.eval()


def reconstructing(place: str) -> Any:
    return randomised(ap.create("relu", d_in=WIDTH, d_sae=64, k=8, seed=0, hookpoint=place, input_norm="none"))


def predicting(name: str) -> tuple[Any, str, str]:
    """A transcoder of the block's MLP, and where it reads and writes."""
    family = FAMILIES[name]
    read, write = f"{family.block}.{family.mlp[0]}:in", f"{family.block}.{family.mlp[1]}"
    settings = {"hookpoint": read, "target_hookpoint": write, "input_norm": "none", "allocation": "topk"}
    sae = randomised(ap.create("transcoder", d_in=WIDTH, d_out=WIDTH, d_sae=64, k=64, seed=0, **settings))
    filters = [{"hookpoint": place, "filter": FILTER} for place in (read, write)]
    sae.info = {"source": {"sites": filters}}
    return sae, read, write


def halve(latents: Latents) -> Latents:
    return latents.map(lambda v: v / 2)


# What we do, and the same done by hand on a whole text without padding


def ours(kind: str, name: str, model: Any) -> AbstractContextManager[Any]:
    place = FAMILIES[name].block
    if kind == "transcoder":
        sae, _, write = predicting(name)
        return ap.splice(model, {write: sae})
    sae = reconstructing(place)
    made: dict[str, Callable[[], AbstractContextManager[Any]]] = {
        "splice": lambda: ap.splice(model, {place: sae}),
        "edit": lambda: ap.splice(model, {place: sae}, edit=halve, keep_error=True),
        "steer": lambda: ap.steer(model, sae, latent=5, add=3.0),
        "ablate": lambda: ap.ablate(model, sae, latent=7),
    }
    return made[kind]()


def taking_part(ids: Tensor) -> Tensor:
    """By the filter: not the first token, and not token 3."""
    keep = ids != 3
    keep[:, 0] = False
    return keep


def code(sae: Any, x: Tensor) -> Tensor:
    return torch.relu((x - sae.b_dec if sae.config.subtract_b_dec else x) @ sae.W_enc.T + sae.b_enc)


@contextmanager
def by_hand(kind: str, name: str, model: Any, ids: Tensor) -> Iterator[None]:
    modules = dict(model.named_modules())
    sae, seen = reconstructing(FAMILIES[name].block), {}

    def change(y: Tensor) -> Tensor:
        shape, y = y.shape, y.reshape(*ids.shape, -1)
        keep = taking_part(ids)[..., None]
        z = code(sae, y)
        x_hat = z @ sae.W_dec + sae.b_dec
        if kind == "transcoder":
            own, x = predicting(name)[0], seen["x"].reshape(*ids.shape, -1)
            new = torch.where(keep, code(own, x) @ own.W_dec + own.b_dec, y)
        elif kind == "splice":
            new = torch.where(keep, x_hat, y)
        elif kind == "edit":
            new = torch.where(keep, y - z @ sae.W_dec / 2, y)
        elif kind == "steer":
            new = y + 3 * sae.W_dec[5] / sae.W_dec[5].norm()
        else:
            new = y - z[..., 7:8] * sae.W_dec[7]
        return new.reshape(shape)

    def after(module: nn.Module, args: Any, result: Any) -> Any:
        return (change(result[0]), *result[1:]) if isinstance(result, tuple) else change(result)

    handles = []
    if kind == "transcoder":
        _, read, write = predicting(name)
        target = modules[write]
        handles.append(
            modules[read.removesuffix(":in")].register_forward_pre_hook(lambda m, args: seen.update(x=args[0]))
        )
    else:
        target = modules[FAMILIES[name].block]
    handles.append(target.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def expected(kind: str, name: str, model: Any, prompt: list[int]) -> tuple[list[int], Tensor]:
    """The greedy tokens after one prompt, and their logits."""
    ids, logits = torch.tensor([prompt]), []
    for _ in range(NEW_TOKENS):
        with by_hand(kind, name, model, ids):
            logits.append(model(input_ids=ids, use_cache=False).logits[0, -1])
        ids = torch.cat([ids, logits[-1].argmax()[None, None]], dim=1)
    return ids[0, len(prompt) :].tolist(), torch.stack(logits)


@torch.no_grad()
def generated(model: Any, prompts: list[list[int]], **settings: Any) -> tuple[list[list[int]], Tensor]:
    """The tokens after each prompt, [prompts, steps], and their logits; shorter prompts are padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, output_logits=True,
        return_dict_in_generate=True, **({"do_sample": False} | settings),
    )  # fmt: skip
    return out.sequences[:, longest:].tolist(), torch.stack(out.logits, dim=1)


@pytest.mark.few(10)
@pytest.mark.parametrize("kind", ["splice", "edit", "transcoder", "steer", "ablate"])
@pytest.mark.parametrize("name", FAMILIES)
def test_generation_under_an_intervention_is_that_of_whole_texts(name: str, kind: str) -> None:
    model = model_of(name)
    wanted = [expected(kind, name, model, prompt) for prompt in PROMPTS]
    plain = generated(model, PROMPTS)[1]
    for use_cache in (True, False):
        with ours(kind, name, model):
            tokens, logits = generated(model, PROMPTS, use_cache=use_cache)
            alone = [generated(model, [prompt], use_cache=use_cache) for prompt in PROMPTS]
        for one, (their_tokens, their_logits), (own_tokens, own_logits) in zip(
            range(len(PROMPTS)), wanted, alone, strict=True
        ):
            assert tokens[one] == their_tokens == own_tokens[0]
            assert torch.allclose(logits[one], their_logits, atol=1e-4)
            assert torch.allclose(own_logits[0], their_logits, atol=1e-4)
        assert not torch.allclose(logits, plain, atol=1e-2), "an intervention that does something"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert max(map(max, tokens)) < VOCAB


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": True},
        {"num_beams": 3, "output_logits": False},
        {"num_beams": 2, "do_sample": True, "output_logits": False},
        {"cache_implementation": "static"},
        {"cache_implementation": "dynamic"},
        {"renormalize_logits": True, "repetition_penalty": 1.3},
    ],
    ids=str,
)
def test_every_way_to_generate_is_the_same_without_a_cache(settings: dict[str, Any]) -> None:
    model = model_of("llama")
    settings = {"output_logits": True} | settings
    found = []
    for more in (settings, {n: v for n, v in settings.items() if n != "cache_implementation"} | {"use_cache": False}):
        torch.manual_seed(3)
        found.append(continued(model, **more))
    assert found[0] == found[1]
    torch.manual_seed(3)
    assert found[0] != continued(model, spliced=False, **settings)


@torch.no_grad()
def continued(model: Any, spliced: bool = True, **settings: Any) -> list[list[int]]:
    ids = torch.tensor([[0] * (7 - len(p)) + p for p in PROMPTS])
    with ours("splice", "llama", model) if spliced else nullcontext():
        out = model.generate(ids, attention_mask=(ids != 0).long(), max_new_tokens=NEW_TOKENS,
                             return_dict_in_generate=True, **settings)  # fmt: skip
    return out.sequences[:, 7:].tolist()


@pytest.mark.parametrize("assistant", ["prompt lookup", "a model"])
@torch.no_grad()
def test_assisted_decoding_proposes_and_the_spliced_model_decides(assistant: str) -> None:
    """Candidates come several at a time, and the cache is cut back where one is refused."""
    model = model_of("llama")
    ids = torch.tensor([[5, 7, 9, 11, 5, 7, 9, 11, 5, 7]])
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False, "eos_token_id": 1}
    helper = {"prompt_lookup_num_tokens": 3} if assistant == "prompt lookup" else {"assistant_model": make("llama")}
    with ours("splice", "llama", model):
        plain = model.generate(ids, **settings)
        assisted = model.generate(ids, **settings, **helper)
    assert assisted.tolist() == plain.tolist()


@torch.no_grad()
def test_a_text_that_is_continued_from_its_cache() -> None:
    """Chat: the cache of a first call goes on in a second one, outside or inside of the block."""
    model, name = model_of("llama"), "llama"
    ids = torch.tensor([PROMPTS[0]])
    with ours("splice", name, model):
        first = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False,
                               return_dict_in_generate=True)  # fmt: skip
        longer = torch.cat([first.sequences, torch.tensor([PROMPTS[2]])], dim=1)
        kept = getattr(first, "cache", None) or first.past_key_values
        argument = "cache" if getattr(first, "cache", None) is not None else "past_key_values"
        second = model.generate(longer, attention_mask=torch.ones_like(longer), max_new_tokens=3, do_sample=False,
                                **{argument: kept})  # fmt: skip
        whole = model.generate(longer, attention_mask=torch.ones_like(longer), max_new_tokens=3, do_sample=False)
    assert second.tolist() == whole.tolist()

"""TransformerLens names against what transformers models really compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from apportion.about import About
from apportion.interop.hook_names import (
    LAYERS,
    STREAM,
    WITHIN,
    family_of,
    from_hookpoint,
    hub_name,
    module_of,
    origin,
    to_hookpoint,
)
from apportion.language.hookpoints import capture

TINY: dict[str, dict[str, Any]] = {
    "gpt2": {"n_layer": 2, "n_head": 2, "n_embd": 16},
    "gpt_neox": {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 24},
}
LLAMA_LIKE = {
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "hidden_size": 16,
    "intermediate_size": 24,
}
IDS = torch.tensor([[3, 1, 4, 1, 5]])


@pytest.fixture(params=LAYERS)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(family: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, vocab_size=32, **TINY.get(family, LLAMA_LIKE))
    return AutoModelForCausalLM.from_config(config).eval()


def test_every_name_goes_there_and_back(family: str) -> None:
    for name in [*STREAM, *WITHIN[family]]:
        assert from_hookpoint(to_hookpoint(f"blocks.7.{name}", family), family) == f"blocks.7.{name}"


def test_every_name_is_an_activation_of_the_model(family: str, model: Any) -> None:
    points = [to_hookpoint(f"blocks.1.{name}", family) for name in [*STREAM, *WITHIN[family]]]
    with torch.no_grad():
        seen = capture(model, points, IDS)
    assert set(seen) == set(points)


def test_the_parts_of_a_block_add_up(family: str, model: Any) -> None:
    """resid_post = resid_pre + attn_out + mlp_out, and resid_mid lies between the two."""
    names = ["hook_resid_pre", "hook_attn_out", "hook_mlp_out", "hook_resid_post"]
    names += ["hook_resid_mid"] if "hook_resid_mid" in WITHIN[family] else []
    points = {name: to_hookpoint(f"blocks.0.{name}", family) for name in names}
    with torch.no_grad():
        seen = capture(model, list(points.values()), IDS)
    x = {name: seen[point] for name, point in points.items()}
    total = x["hook_resid_pre"] + x["hook_attn_out"] + x["hook_mlp_out"]
    assert torch.allclose(total, x["hook_resid_post"], atol=1e-5)
    if "hook_resid_mid" in x:
        assert torch.allclose(x["hook_resid_pre"] + x["hook_attn_out"], x["hook_resid_mid"], atol=1e-5)


@pytest.mark.parametrize("name", ["blocks.0.ln1.hook_normalized", "hook_embed", "blocks.x.hook_resid_pre"])
def test_names_without_a_module_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="known are blocks"):
        to_hookpoint(name, "gpt2")


def test_unknown_families_and_places_are_refused() -> None:
    with pytest.raises(ValueError, match="Names of 'mamba' models are not known"):
        to_hookpoint("blocks.0.hook_resid_pre", "mamba")
    with pytest.raises(ValueError, match="no name for 'model"):
        from_hookpoint("model.layers.1.self_attn.q_proj", "llama")


@pytest.mark.parametrize(
    ("name", "family", "on_the_hub"),
    [
        ("gpt2-small", "gpt2", "openai-community/gpt2"),
        ("gpt2-xl", "gpt2", "openai-community/gpt2-xl"),
        ("openai-community/gpt2", "gpt2", "openai-community/gpt2"),
        ("pythia-70m-deduped", "gpt_neox", "EleutherAI/pythia-70m-deduped"),
        ("EleutherAI/pythia-160m", "gpt_neox", "EleutherAI/pythia-160m"),
        ("gemma-2b-it", "gemma", "google/gemma-2b-it"),
        ("gemma-2-2b", "gemma2", "google/gemma-2-2b"),
        ("google/gemma-2-9b-it", "gemma2", "google/gemma-2-9b-it"),
        ("google/gemma-3-1b-pt", "gemma3_text", "google/gemma-3-1b-pt"),
        ("google/gemma-3-4b-pt", None, "google/gemma-3-4b-pt"),
        ("meta-llama/Llama-3.1-8B-Instruct", "llama", "meta-llama/Llama-3.1-8B-Instruct"),
        ("deepseek-ai/DeepSeek-R1-Distill-Llama-8B", "llama", "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"),
        ("mistralai/Mistral-7B-v0.1", "mistral", "mistralai/Mistral-7B-v0.1"),
        ("Qwen/Qwen2.5-7B", "qwen2", "Qwen/Qwen2.5-7B"),
        ("Qwen/Qwen3-1.7B", "qwen3", "Qwen/Qwen3-1.7B"),
        ("tiny-stories-1L-21M", None, "tiny-stories-1L-21M"),
    ],
)
def test_models_by_name(name: str, family: str | None, on_the_hub: str) -> None:
    assert family_of(name) == family and (family is None or family in LAYERS)
    assert hub_name(name) == on_the_hub


def test_where_a_checkpoint_says_it_comes_from() -> None:
    source = {"model": {"name_or_path": "google/gemma-2-2b"}, "hook_name": "blocks.12.hook_resid_post"}
    for (model, hook), hookpoint, said in [
        (("gemma-2-2b", "blocks.12.hook_resid_post"), "model.layers.12", source),
        (("gemma-2-2b", "unembed"), None, source | {"hook_name": "unembed"}),
        ((None, "blocks.12.hook_resid_post"), None, {"hook_name": "blocks.12.hook_resid_post"}),
        ((["gpt2"], 3), None, {}),
    ]:
        assert origin(model, hook) == (hookpoint, About.from_json(said))


def test_modules_put_out_what_hookpoints_mean(family: str, model: Any) -> None:
    """SAELens's AutoModelForCausalLM hooks outputs of modules only."""
    found = 0
    for name in [*STREAM, *WITHIN[family]]:
        hookpoint = to_hookpoint(f"blocks.1.{name}", family)
        module = module_of(hookpoint, family)
        if module is not None:
            with torch.no_grad():
                seen = capture(model, [hookpoint, module], IDS)
            assert torch.equal(seen[hookpoint], seen[module]), name
            found += 1
    assert found >= 5
    assert module_of(f"{LAYERS[family]}.0:in", family) is None, "embeddings are scaled, or summed, by no module"


def test_places_that_no_module_puts_out() -> None:
    assert module_of("transformer.h.1.attn.c_proj:in", "gpt2") is None
    assert module_of("encoder.4:in", None) is None and module_of("encoder.4", None) == "encoder.4"
    assert module_of("model.layers.2.mlp:in", "gpt2") is None, "of another family"
    assert module_of("model.layers.2.mlp:out[1]", "llama") is None, "beside the first"
    with pytest.raises(ValueError, match="no name for"):
        from_hookpoint("model.layers.2.mlp:out[1]", "llama")


def test_what_goes_into_an_mlp_has_one_name(family: str, model: Any) -> None:
    """Of circuit-tracer, SAELens and TransformerBridge; HookedTransformer has another for what comes out."""
    into = to_hookpoint("blocks.1.mlp.hook_in", family)
    assert into == f"{LAYERS[family]}.1.mlp:in" and from_hookpoint(into, family) == "blocks.1.mlp.hook_in"
    out = to_hookpoint("blocks.1.mlp.hook_out", family)
    with torch.no_grad():
        seen = capture(model, [into, out], IDS)
        mlp = model.get_submodule(out)
        assert torch.allclose(mlp(seen[into]), seen[out], atol=1e-6)


def test_the_stream_before_an_mlp(family: str) -> None:
    wanted = "hook_resid_mid" if "hook_resid_mid" in WITHIN[family] else "hook_resid_pre"
    assert to_hookpoint("blocks.1.hook_mlp_in", family) == to_hookpoint(f"blocks.1.{wanted}", family)


@pytest.mark.parametrize("name", ["model.layers.3", "transformer.h.3.mlp", "gpt_neox.layers.11.attention.dense"])
def test_names_of_modules_are_hookpoints_already(name: str) -> None:
    assert origin("a/model", name) == (name, About.from_json({"model": {"name_or_path": "a/model"}, "hook_name": name}))

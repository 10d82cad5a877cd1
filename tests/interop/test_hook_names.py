"""What files of other libraries say of models and places. What places are: tests/language/test_places.py."""

from __future__ import annotations

import pytest

from apportion.about import About
from apportion.interop.hook_names import family_of, hub_name, origin
from apportion.language.hook_names import LAYERS


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


@pytest.mark.parametrize("name", ["model.layers.3", "transformer.h.3.mlp", "gpt_neox.layers.11.attention.dense"])
def test_names_of_modules_are_hookpoints_already(name: str) -> None:
    assert origin("a/model", name) == (name, About.from_json({"model": {"name_or_path": "a/model"}, "hook_name": name}))

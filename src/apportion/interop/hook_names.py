"""What files of other libraries say of the model and of the place in it: names on the Hub, families, TransformerLens
hooks, and what TransformerLens does to weights before it runs them. The names of places: language/hook_names.py."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import replace
from typing import Any

from apportion.about import About, Language, ModelRecord
from apportion.language.hook_names import LAYERS, to_hookpoint

WRITE = (
    *("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_mlp_in"),
    *("hook_attn_out", "hook_mlp_out", "mlp.hook_out"),
)
"""Names of what is written to the residual stream, and of the stream."""
PROCESSED = {"fold_ln": ("mlp.hook_in", "attn.hook_in"), "fold_value_biases": ("attn.hook_z",)}
"""What else TransformerLens can fold into weights, and the places where activations are then others."""
LAYER_NORM = ("gpt2", "gpt_neox")
"""Families that read the stream by LayerNorms, which see nothing of a token's mean over the width."""

FAMILIES = {
    r"gpt2": "gpt2",
    r"pythia|gpt-neox": "gpt_neox",
    r"gemma-2-": "gemma2",
    r"gemma-3-(270m|1b)": "gemma3_text",
    r"gemma-(2b|7b)|gemma-1\.1-": "gemma",
    r"qwen3-[\d.]+b": "qwen3",
    r"qwen2|qwen-?2\.5|distill-qwen": "qwen2",
    r"mistral-7b|mistral-nemo": "mistral",
    r"llama|smollm2?-": "llama",
}
"""What names of models of each family contain; larger Gemma 3 models are built otherwise, with a part that sees."""

CLASSES = {
    "GPT2LMHeadModel": "gpt2",
    "GPTNeoXForCausalLM": "gpt_neox",
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "GemmaForCausalLM": "gemma",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3_text",
}
"""Classes of transformers models, which our own caches name beside the model."""

OWNERS = {"gpt2": "openai-community", "pythia": "EleutherAI", "gemma": "google"}
"""On the Hub, of models that TransformerLens names without one."""


def family_of(model_name: str) -> str | None:
    """The family of a model by its name on the Hub or in TransformerLens; None if it does not tell."""
    return next((family for part, family in FAMILIES.items() if re.search(part, model_name.lower())), None)


def family_of_model(model: ModelRecord) -> str | None:
    """The family of a model that a cache or a file describes: by its class, or else by its name."""
    return CLASSES.get(model.class_name or "") or family_of(model.name_or_path or "")


def hub_name(model_name: str) -> str:
    """The name on the Hub of what TransformerLens calls gpt2-small, say; unchanged if it is not known."""
    owner = OWNERS.get(model_name.split("-")[0])
    return model_name if owner is None else f"{owner}/{model_name.removesuffix('-small')}"


def about_model(name: str) -> About:
    """Of rows of which only the model's name is known."""
    return About(language=Language(model=ModelRecord(name_or_path=name)))


def origin(model_name: object, hook_name: object) -> tuple[str | None, About]:
    """From what a file says of its model and TransformerLens hook: the hookpoint, if known, and what is so known."""
    source, hookpoint, family = About(), None, ""
    if isinstance(model_name, str) and model_name:
        source, family = about_model(hub_name(model_name)), family_of(model_name) or ""
    if isinstance(hook_name, str) and hook_name:
        source = replace(source, language=replace(source.lm, hook_name=hook_name))
        with suppress(ValueError):
            hookpoint = hook_name if _is_module(hook_name) else to_hookpoint(hook_name, family)
    return hookpoint, source


def _is_module(name: str) -> bool:
    """True for the path of a module in a block, as SAELens names the hooks of models of transformers."""
    return re.match(rf"({'|'.join(map(re.escape, sorted(set(LAYERS.values()))))})\.\d+(\.|$)", name) is not None


def is_centred(hook_name: object, model_name: object) -> bool | None:
    """Does centring what is written to the residual stream centre what is there? None: the model is not known.

    TransformerLens takes the mean over the width from every weight that writes to the stream, which LayerNorms do not
    notice; models with RMSNorm it leaves as they are.
    """
    within = re.fullmatch(r"blocks\.\d+\.(.+)", str(hook_name))
    if within is None or within[1] not in WRITE:
        return False
    family = family_of(str(model_name))
    return None if family is None else family in LAYER_NORM


def is_processed(hook_name: object, settings: dict[str, Any]) -> bool:
    """Does TransformerLens, with these settings of its from_pretrained, have other activations there than the model?"""
    within = re.fullmatch(r"blocks\.\d+\.(.+)", str(hook_name))
    return within is not None and any(settings.get(name) and within[1] in places for name, places in PROCESSED.items())

"""TransformerLens names of activations, as module paths of transformers models, and back.

Checkpoints of other libraries say "blocks.8.hook_resid_pre"; our hookpoints are module paths with a side. What is what
depends on the family of the model (`config.model_type`). Where TransformerLens names something that no module of the
transformers model takes or returns, there is no entry. `ln*.hook_normalized` lies before the weights of the norm, which
no module here returns, so it has no entry either. `mlp.hook_in` is what SAELens and circuit-tracer add to
HookedTransformer, and what TransformerBridge has.

TransformerLens's names also serve for its TransformerBridge, which runs any model of transformers. Where SAELens runs
one by AutoModelForCausalLM, it names hooks by modules whose *output* is meant: `module_of` gives that name, also where
our hookpoint is the input of the module after it.
"""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import replace
from typing import Any

from apportion.about import About, Language, ModelRecord

LLAMAS, GEMMAS_2 = ("llama", "mistral", "qwen2", "qwen3", "gemma"), ("gemma2", "gemma3_text")
"""Families whose blocks have modules of the same names."""
LAYERS = {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers", **dict.fromkeys(LLAMAS + GEMMAS_2, "model.layers")}
"""Where the blocks of each family lie."""

_LLAMA = {
    "hook_attn_out": "self_attn",
    "attn.hook_z": "self_attn.o_proj:in",
    "hook_resid_mid": "post_attention_layernorm:in",
    "hook_mlp_out": "mlp",
    "mlp.hook_in": "mlp:in",
    "mlp.hook_post": "mlp.down_proj:in",
}
_GEMMA2 = _LLAMA | {
    "hook_attn_out": "post_attention_layernorm",
    "hook_resid_mid": "pre_feedforward_layernorm:in",
    "hook_mlp_out": "post_feedforward_layernorm",
}
WITHIN = {
    "gpt2": {
        "hook_attn_out": "attn",
        "attn.hook_z": "attn.c_proj:in",
        "hook_resid_mid": "ln_2:in",
        "hook_mlp_out": "mlp",
        "mlp.hook_in": "mlp:in",
        "mlp.hook_pre": "mlp.c_fc",
        "mlp.hook_post": "mlp.act",
    },
    "gpt_neox": {  # attention and MLP read the same stream: there is no hook_resid_mid
        "hook_attn_out": "attention",
        "attn.hook_z": "attention.dense:in",
        "hook_mlp_out": "mlp",
        "mlp.hook_in": "mlp:in",
        "mlp.hook_pre": "mlp.dense_h_to_4h",
        "mlp.hook_post": "mlp.act",
    },
    **dict.fromkeys(LLAMAS, _LLAMA),
    **dict.fromkeys(GEMMAS_2, _GEMMA2),
}
"""Within a block: TransformerLens name -> module and side."""

STREAM = {"hook_resid_pre": ":in", "hook_resid_post": ""}
"""The block itself: what it is given, and what it returns."""
ONLY_READ = {"mlp.hook_out": "mlp"}
"""Names of circuit-tracer and TransformerBridge, for what HookedTransformer has another name for, or none."""
BEFORE = {
    "gpt2": {"mlp": "ln_2", "attn": "ln_1"},
    "gpt_neox": {"mlp": "post_attention_layernorm", "attention": "input_layernorm"},
    **{family: {"mlp": "pre_feedforward_layernorm", "self_attn": "input_layernorm"} for family in GEMMAS_2},
}
_BEFORE = {"mlp": "post_attention_layernorm", "self_attn": "input_layernorm"}
"""Within a block, by family or else as in Llama: the module whose output another one is given."""
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


def to_hookpoint(name: str, model_type: str) -> str:
    """The hookpoint of a TransformerLens name such as "blocks.8.hook_resid_pre" in a model of this family.

    Raises ValueError for an unknown family, or a name that no module stands for.
    """
    _check(model_type)
    found = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    if found:
        layer, within = f"{LAYERS[model_type]}.{found[1]}", found[2]
        places = ONLY_READ | WITHIN[model_type]
        if within == "hook_mlp_in":  # a copy of the stream
            within = "hook_resid_mid" if "hook_resid_mid" in places else "hook_resid_pre"
        if within in STREAM:
            return layer + STREAM[within]
        if within in places:
            return f"{layer}.{places[within]}"
    known = ", ".join([*STREAM, *WITHIN[model_type]])
    raise ValueError(f"{name!r} has no module in a {model_type} model; known are blocks.N. followed by: {known}.")


def from_hookpoint(hookpoint: str, model_type: str) -> str:
    """The TransformerLens name of a hookpoint. Raises ValueError if there is none."""
    _check(model_type)
    found = re.fullmatch(re.escape(LAYERS[model_type]) + r"\.(\d+)(?:\.([^:]+))?(?::(in|out))?", hookpoint)
    if found:
        layer, module, side = found[1], found[2], ":in" if found[3] == "in" else ""
        within = STREAM if module is None else WITHIN[model_type]
        for name, place in within.items():
            if place == (module or "") + side:
                return f"blocks.{layer}.{name}"
    raise ValueError(f"TransformerLens has no name for {hookpoint!r} in a {model_type} model.")


def module_of(hookpoint: str, model_type: str | None) -> str | None:
    """The module whose output is what a hookpoint means; None if there is none, or if it is not known."""
    path, _, side = hookpoint.partition(":")
    if side in ("", "out"):
        return path
    if side != "in":  # one of several things
        return None
    if model_type not in LAYERS:
        return None
    found = re.fullmatch(re.escape(LAYERS[model_type]) + r"\.(\d+)(?:\.(\w+))?", path)
    if found is None:
        return None
    layer, module = int(found[1]), found[2]
    if module is None:
        return f"{LAYERS[model_type]}.{layer - 1}" if layer else None
    before = BEFORE.get(model_type, _BEFORE).get(module)
    return before and f"{LAYERS[model_type]}.{layer}.{before}"


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


def _check(model_type: str) -> None:
    if model_type not in LAYERS:
        raise ValueError(f"Names of {model_type!r} models are not known; known are: {', '.join(LAYERS)}.")

"""Names of places in a model that other libraries use, as our hookpoints, and back.

    blocks.8.hook_resid_post, blocks.8.attn.hook_z, hook_embed     TransformerLens
    resid_post.8, z.8, mlp_act.8, embeddings                       interp-engine

What is what depends on the family of the model (`config.model_type`). Where a name means something that no module of
the transformers model takes or returns, there is no entry. `ln*.hook_normalized` lies before the weights of the norm,
which no module here returns, so it has no entry either. `mlp.hook_in` is what SAELens and circuit-tracer add to
HookedTransformer, and what TransformerBridge has.

`hook_attn_out` and `hook_mlp_out` are what is added to the residual stream, which Gemma and OLMo norm first;
`attn.hook_out` and `mlp.hook_out` are what the modules return. So are `attn_out_post`, `mlp_out_post` and `attn_out`,
`mlp_out` of interp-engine. BERT norms behind each sum: its `hook_resid_post` is what that norm is given, as in
HookedEncoder.

TransformerLens's names also serve for its TransformerBridge, which runs any model of transformers. Where SAELens runs
one by AutoModelForCausalLM, it names hooks by modules whose *output* is meant: `module_of` gives that name, also where
our hookpoint is the input of the module after it.
"""

from __future__ import annotations

import re

LLAMAS = ("llama", "mistral", "ministral", "qwen2", "qwen3", "gemma", "smollm3", "olmo")
TOWERS = ("qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text")
"""The parts of vision-language models that read text."""
EXPERTS = ("olmoe", "qwen2_moe", "qwen3_moe")
GEMMAS_2 = ("gemma2", "gemma3_text")
OLMOS_2 = ("olmo2", "olmo3")
BERTS = ("bert", "roberta", "xlm-roberta")
"""Families whose blocks have modules of the same names."""
LAYERS = {
    "gpt2": "transformer.h",
    "gpt_neox": "gpt_neox.layers",
    "gpt_neo": "transformer.h",
    "gptj": "transformer.h",
    "opt": "model.decoder.layers",
    "bert": "bert.encoder.layer",
    "roberta": "roberta.encoder.layer",
    "xlm-roberta": "roberta.encoder.layer",
    **dict.fromkeys(("phi", "phi3", *LLAMAS, *EXPERTS, *GEMMAS_2, *OLMOS_2), "model.layers"),
    **dict.fromkeys(TOWERS, "model.language_model.layers"),
}
"""Where the blocks of each family lie in a model with a head."""

_ATTENTION = {"hook_attn_out": "self_attn", "attn.hook_z": "self_attn.o_proj:in"}
_MLP = {"hook_mlp_out": "mlp", "mlp.hook_in": "mlp:in"}
_LLAMA = {
    **_ATTENTION,
    "hook_resid_mid": "post_attention_layernorm:in",
    **_MLP,
    "mlp.hook_pre": "mlp.gate_proj",
    "mlp.hook_pre_linear": "mlp.up_proj",
    "mlp.hook_post": "mlp.down_proj:in",
}
_EXPERTS = {**_ATTENTION, "hook_resid_mid": "post_attention_layernorm:in", **_MLP}
_OLMO2 = _LLAMA | {
    "hook_attn_out": "post_attention_layernorm",
    "hook_resid_mid": "mlp:in",
    "hook_mlp_out": "post_feedforward_layernorm",
}
_GEMMA2 = _LLAMA | {
    "hook_attn_out": "post_attention_layernorm",
    "hook_resid_mid": "pre_feedforward_layernorm:in",
    "hook_mlp_out": "post_feedforward_layernorm",
}
_BERT = {
    "hook_attn_out": "attention.output.dense",
    "attn.hook_z": "attention.output.dense:in",
    "hook_resid_mid": "attention.output.LayerNorm:in",
    "hook_mlp_out": "output.dense",
    "mlp.hook_in": "intermediate:in",
    "mlp.hook_pre": "intermediate.dense",
    "mlp.hook_post": "output.dense:in",
    "hook_resid_post": "output.LayerNorm:in",
    "hook_normalized_resid_post": "",
}
WITHIN = {
    "gpt2": {
        "hook_attn_out": "attn",
        "attn.hook_z": "attn.c_proj:in",
        "hook_resid_mid": "ln_2:in",
        **_MLP,
        "mlp.hook_pre": "mlp.c_fc",
        "mlp.hook_post": "mlp.act",
    },
    "gpt_neox": {  # attention and MLP read the same stream: there is no hook_resid_mid
        "hook_attn_out": "attention",
        "attn.hook_z": "attention.dense:in",
        **_MLP,
        "mlp.hook_pre": "mlp.dense_h_to_4h",
        "mlp.hook_post": "mlp.act",
    },
    "gpt_neo": {
        "hook_attn_out": "attn",
        "attn.hook_z": "attn.attention.out_proj:in",
        "hook_resid_mid": "ln_2:in",
        **_MLP,
        "mlp.hook_pre": "mlp.c_fc",
        "mlp.hook_post": "mlp.c_proj:in",
    },
    "gptj": {  # as in gpt_neox
        "hook_attn_out": "attn",
        "attn.hook_z": "attn.out_proj:in",
        **_MLP,
        "mlp.hook_pre": "mlp.fc_in",
        "mlp.hook_post": "mlp.fc_out:in",
    },
    "phi": {  # as in gpt_neox
        "hook_attn_out": "self_attn",
        "attn.hook_z": "self_attn.dense:in",
        **_MLP,
        "mlp.hook_pre": "mlp.fc1",
        "mlp.hook_post": "mlp.fc2:in",
    },
    "phi3": _EXPERTS | {"mlp.hook_post": "mlp.down_proj:in"},  # hook_pre and hook_pre_linear come out of one module
    "opt": {
        "hook_attn_out": "self_attn",
        "attn.hook_z": "self_attn.out_proj:in",
        "hook_resid_mid": "final_layer_norm:in",
        "hook_mlp_out": "fc2",
        "mlp.hook_in": "fc1:in",
        "mlp.hook_pre": "fc1",
        "mlp.hook_post": "fc2:in",
    },
    **dict.fromkeys(BERTS, _BERT),
    **dict.fromkeys((*LLAMAS, *TOWERS), _LLAMA),
    **dict.fromkeys(EXPERTS, _EXPERTS),
    **dict.fromkeys(GEMMAS_2, _GEMMA2),
    **dict.fromkeys(OLMOS_2, _OLMO2),
}
"""Within a block: TransformerLens name -> module and side."""

STREAM = {"hook_resid_pre": ":in", "hook_resid_post": ""}
"""The block itself: what it is given, and what it returns."""
_MODULES = {"attn.hook_in": "self_attn:in", "attn.hook_out": "self_attn", "mlp.hook_out": "mlp"}
_GPTS = _MODULES | {"attn.hook_in": "attn:in", "attn.hook_out": "attn"}
_BERT_MODULES = {
    "attn.hook_in": "attention:in",
    "attn.hook_out": "attention.output.dense",
    "mlp.hook_out": "output.dense",
}
ONLY_READ = {
    **dict.fromkeys(WITHIN, _MODULES),
    **dict.fromkeys(("gpt2", "gpt_neo", "gptj"), _GPTS),
    "gpt_neox": _MODULES | {"attn.hook_in": "attention:in", "attn.hook_out": "attention"},
    "opt": _MODULES | {"mlp.hook_out": "fc2"},
    **dict.fromkeys(BERTS, _BERT_MODULES),
}
"""Names of circuit-tracer and TransformerBridge, for what HookedTransformer has another name for, or none."""
_NORMS = {"mlp": "post_attention_layernorm", "self_attn": "input_layernorm"}
BEFORE = {
    "gpt2": {"mlp": "ln_2", "attn": "ln_1"},
    "gpt_neox": {"mlp": "post_attention_layernorm", "attention": "input_layernorm"},
    **dict.fromkeys(GEMMAS_2, _NORMS | {"mlp": "pre_feedforward_layernorm"}),
    **dict.fromkeys((*LLAMAS, *TOWERS, *EXPERTS, "phi3"), _NORMS),
}
"""Within a block, by family: the module whose output another one is given."""

POINTS = {
    "resid_pre": "hook_resid_pre",
    "attn_in": "attn.hook_in",
    "z": "attn.hook_z",
    "attn_out": "attn.hook_out",
    "attn_out_post": "hook_attn_out",
    "resid_mid": "hook_resid_mid",
    "mlp_in": "mlp.hook_in",
    "mlp_pre": "mlp.hook_pre",
    "mlp_pre_linear": "mlp.hook_pre_linear",
    "mlp_act": "mlp.hook_post",
    "mlp_out": "mlp.hook_out",
    "mlp_out_post": "hook_mlp_out",
    "resid_post": "hook_resid_post",
}
"""interp-engine's name of a place in a block -> TransformerLens's."""
EMBEDDINGS = ("hook_embed", "embeddings")
"""What the two call the embedded tokens."""
SCALED = ("gemma", *GEMMAS_2)
"""Families that scale the embedded tokens, inside the module or behind it as the version of transformers has it."""


def in_block(name: str) -> tuple[str, str] | None:
    """The number of the block, or a glob of them, and TransformerLens's name within; None for what is no such name."""
    if found := re.fullmatch(r"blocks\.([^.]+)\.((?:\w+\.)*hook_\w+)", name):
        return found[1], found[2]
    point, _, layer = name.partition(".")
    return (layer, POINTS[point]) if point in POINTS and re.fullmatch(r"[^.]+", layer) else None


def is_foreign(name: str) -> bool:
    """Is it written like a name of another library?"""
    return name in EMBEDDINGS or in_block(name) is not None


def to_hookpoint(name: str, model_type: str, layers: str | None = None) -> str:
    """The hookpoint of a name such as "blocks.8.hook_resid_pre" or "resid_pre.8" in a model of this family.

    `layers` is where its blocks lie, if that is known better; then a family need not be known for the names of the
    stream. Raises ValueError for an unknown family, or a name that no module stands for.
    """
    if layers is None:
        _check(model_type)
        layers = LAYERS[model_type]
    places = STREAM | ONLY_READ.get(model_type, {}) | WITHIN.get(model_type, {})
    if found := in_block(name):
        layer, within = f"{layers}.{found[0]}", found[1]
        if within == "hook_mlp_in":  # a copy of the stream
            within = "hook_resid_mid" if "hook_resid_mid" in places else "hook_resid_pre"
        if within in places:
            place = places[within]
            return layer + place if place[:1] in ("", ":") else f"{layer}.{place}"
    raise ValueError(_unknown(name, model_type, places))


def _unknown(name: str, model_type: str, places: dict[str, str]) -> str:
    said = f"{name!r} has no module in a {model_type} model"
    found = in_block(name)
    if found and found[1] == "hook_resid_mid" and model_type in WITHIN:
        return (
            f"{said}, whose attention and MLP read the same stream: use blocks.{found[0]}.hook_resid_pre (before both) "
            "or hook_resid_post (behind both)"
        )
    if model_type not in WITHIN:
        said += f"; within blocks names are known for {', '.join(WITHIN)}. Give the path of a module. Here"
    return f"{said}; known are blocks.N. followed by: {', '.join(places)}."


def reaches_all(name: str, model_type: str) -> bool:
    """Does all that reads what the name means get it from the module of its hookpoint?

    Between attention and MLP a norm is given the stream, and the sum behind the MLP has it past the norm: what is
    changed there reaches the MLP alone. In BERT the norm is all that reads it.
    """
    return (in_block(name) or ("", ""))[1] not in ("hook_resid_mid", "hook_mlp_in") or model_type in BERTS


def from_hookpoint(hookpoint: str, model_type: str) -> str:
    """The TransformerLens name of a hookpoint. Raises ValueError if there is none."""
    _check(model_type)
    found = re.fullmatch(re.escape(LAYERS[model_type]) + r"\.(\d+)(?:\.([^:]+))?(?::(in|out))?", hookpoint)
    if found:
        layer, module, side = found[1], found[2], ":in" if found[3] == "in" else ""
        for name, place in (STREAM | WITHIN[model_type]).items():
            if place == (module or "") + side:
                return f"blocks.{layer}.{name}"
    raise ValueError(f"TransformerLens has no name for {hookpoint!r} in a {model_type} model.")


def module_of(hookpoint: str, model_type: str | None) -> str | None:
    """The module whose output is what a hookpoint means; None if there is none, or if it is not known."""
    path, _, side = hookpoint.partition(":")
    if side in ("", "out"):
        return path
    if side != "in" or model_type not in LAYERS:  # one of several things, or unknown
        return None
    found = re.fullmatch(re.escape(LAYERS[model_type]) + r"\.(\d+)(?:\.(\w+))?", path)
    if found is None:
        return None
    layer, module = int(found[1]), found[2]
    if module is None:
        return f"{LAYERS[model_type]}.{layer - 1}" if layer else None
    before = BEFORE.get(model_type, {}).get(module)
    return before and f"{LAYERS[model_type]}.{layer}.{before}"


def _check(model_type: str) -> None:
    if model_type not in LAYERS:
        raise ValueError(f"Names of {model_type!r} models are not known; known are: {', '.join(LAYERS)}.")

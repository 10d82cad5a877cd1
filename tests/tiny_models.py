"""Tiny random models of many families, made offline: the settings in which a model differs from a Llama matter here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

VOCAB, WIDTH, LAYERS = 97, 32, 3
DENSE = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "max_position_embeddings": 64}
GATED = DENSE | {"intermediate_size": 48, "num_key_value_heads": 2}


@dataclass(frozen=True)
class Family:
    """A model type with settings, and what its block and the MLP within are called."""

    model_type: str
    settings: dict[str, Any] = field(default_factory=dict)
    block: str = "model.layers.1"
    mlp: tuple[str, str] = ("mlp", "mlp")
    """Modules of the block whose input and whose output are those of its MLP."""
    gain: float = 6
    """What matrices are multiplied by: far from an init at which blocks hardly matter."""


FAMILIES = {
    "llama": Family("llama", GATED),
    "gpt2": Family("gpt2", {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4, "n_positions": 64}, "transformer.h.1"),
    "gpt_neox": Family("gpt_neox", DENSE | {"intermediate_size": 48}, "gpt_neox.layers.1"),
    "gemma3": Family(
        "gemma3_text",
        GATED | {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8,
                 "layer_types": ["sliding_attention"] * 2 + ["full_attention"]},
    ),
    "qwen3": Family("qwen3", GATED | {"head_dim": 8}),
    "phi": Family("phi", DENSE | {"intermediate_size": 48}),
    "mistral": Family("mistral", GATED | {"sliding_window": 5}),
    "olmoe": Family("olmoe", GATED | {"num_experts": 4, "num_experts_per_tok": 2}),
    "mamba": Family(
        "mamba", {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "state_size": 8, "time_step_rank": 4},
        "backbone.layers.1", ("mixer", "mixer"), gain=3,
    ),
    "hybrid": Family(
        "falcon_h1",
        GATED | {"head_dim": 8, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8,
                 "mamba_n_groups": 1, "mamba_chunk_size": 8},
        mlp=("feed_forward", "feed_forward"),
    ),
    "opt": Family(
        "opt", DENSE | {"ffn_dim": 48, "word_embed_proj_dim": WIDTH}, "model.decoder.layers.1", ("fc1", "fc2")
    ),
    "bloom": Family("bloom", {"hidden_size": WIDTH, "n_layer": LAYERS, "n_head": 4}, "transformer.h.1"),
    "falcon": Family(
        "falcon", DENSE | {"alibi": False, "new_decoder_architecture": False, "multi_query": True}, "transformer.h.1"
    ),
    "mpt": Family(
        "mpt", {"d_model": WIDTH, "n_layers": LAYERS, "n_heads": 4, "max_seq_len": 64, "expansion_ratio": 2},
        "transformer.blocks.1", ("ffn.up_proj", "ffn.down_proj"),
    ),
}  # fmt: skip


def make(name: str) -> Any:
    """A random causal language model of that family, in eval mode; its token 0 is padding and 1 ends a text."""
    from transformers import AutoConfig, AutoModelForCausalLM

    family = FAMILIES[name]
    tokens = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family.model_type, **tokens, **family.settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(family.gain)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model.eval().requires_grad_(False)

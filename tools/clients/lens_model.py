"""The model of make.py in TransformerLens, as SAELens and SAEDashboard take it: weights as they are, nothing folded."""

from __future__ import annotations

from pathlib import Path

import torch
from sae_lens import HookedSAETransformer
from transformer_lens import HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import convert_llama_weights
from transformers import AutoModelForCausalLM, AutoTokenizer


def lens_model(folder: Path) -> HookedSAETransformer:
    """A Llama from its folder; AssertionError unless its logits are those of transformers."""
    theirs = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False).float().eval()
    about = theirs.config
    cfg = HookedTransformerConfig(
        d_model=about.hidden_size,
        d_head=about.hidden_size // about.num_attention_heads,
        n_heads=about.num_attention_heads,
        d_mlp=about.intermediate_size,
        n_layers=about.num_hidden_layers,
        n_ctx=about.max_position_embeddings,
        eps=about.rms_norm_eps,
        d_vocab=about.vocab_size,
        act_fn=about.hidden_act,
        normalization_type="RMS",
        positional_embedding_type="rotary",
        rotary_adjacent_pairs=False,
        rotary_dim=about.hidden_size // about.num_attention_heads,
        final_rms=True,
        gated_mlp=True,
        tokenizer_prepends_bos=False,
        device="cpu",
    )
    model = HookedSAETransformer(cfg, tokenizer=AutoTokenizer.from_pretrained(folder, trust_remote_code=False)).eval()
    state = convert_llama_weights(theirs, cfg)
    plain = {"fold_ln": False, "center_writing_weights": False, "center_unembed": False, "fold_value_biases": False}
    model.load_and_process_state_dict(state, **plain)
    ids = torch.arange(24)[None] * 7 % about.vocab_size
    with torch.inference_mode():
        difference = (model(ids) - theirs(ids).logits).abs().max()
    assert difference < 1e-3, f"logits differ by {difference}"
    return model

"""A language model: loaded, recognised again, and run over contexts.

model, tokenizer = load_model("HuggingFaceTB/SmolLM2-135M")
run_contexts(model, ["model.layers.15"], ids)       {"model.layers.15": [rows, d_in]}
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from apportion import embedded
from apportion.activations.filter import row_norms
from apportion.activations.hookpoints import capture
from apportion.activations.store import torch_dtype
from apportion.activations.tokens import special_ids


def load_model(name_or_folder: str | Path, dtype: str = "float32") -> tuple[Any, Any]:
    """A causal language model in eval mode and its tokenizer: a local folder, a Hugging Face Hub id, or "embedded".

    "embedded" is the small model inside this package. It keeps that name, so a manifest means the same everywhere.
    """
    wanted = torch_dtype(dtype)
    from transformers import AutoModelForCausalLM, AutoTokenizer  # heavy

    name = str(name_or_folder)
    where = str(embedded.present(embedded.MODEL)) if name_or_folder == "embedded" else name
    try:
        with _quiet_transformers():
            model = AutoModelForCausalLM.from_pretrained(where, dtype=wanted)
            tokenizer = AutoTokenizer.from_pretrained(where)
    except (OSError, ValueError, ImportError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"no language model could be loaded from {name!r}: give a folder with config.json, weights and "
            f'tokenizer, a Hub id that is reachable from here, or "embedded" ({reason})'
        ) from error
    model.config.name_or_path = model.name_or_path = tokenizer.name_or_path = name
    return model.eval().requires_grad_(False), tokenizer


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bars and no chatter while a model is loaded."""
    from transformers.utils import logging as hf_logging

    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


def model_fingerprint(model: Any) -> dict[str, Any]:
    """Which model this was: its name, its size and a hash of its configuration without what varies by machine."""
    config = model.config
    values = {k: v for k, v in config.to_dict().items() if k not in ("_name_or_path", "transformers_version", "dtype")}
    digest = hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()
    return {
        "name_or_path": str(getattr(config, "_name_or_path", "") or type(model).__name__),
        "class": type(model).__name__,
        "hidden_size": getattr(config, "hidden_size", None),
        "num_layers": getattr(config, "num_hidden_layers", None),
        "config_sha256": digest,
    }


def tokenizer_fingerprint(tokenizer: Any) -> dict[str, Any]:
    """Which tokenizer this was; without a name and a size where there was none."""
    return {
        "name_or_path": str(getattr(tokenizer, "name_or_path", "")),
        "vocab_size": len(tokenizer) if hasattr(tokenizer, "__len__") else None,
        "special_ids": list(special_ids(tokenizer)),
    }


def run_contexts(
    model: nn.Module, hookpoints: list[str], ids: Int[Tensor, "n context_tokens"]
) -> dict[str, Float[Tensor, "rows d_in"]]:
    """The activations of a few contexts at each hookpoint, one row per token, in the model's dtype."""
    device = next(model.parameters()).device
    with torch.inference_mode():
        seen = capture(model, hookpoints, input_ids=ids.long().to(device), use_cache=False)
    for name, x in seen.items():
        if x.ndim not in (2, 3) or x.shape[:-1].numel() != ids.numel():
            raise ValueError(
                f"hookpoint {name!r} has shape {tuple(x.shape)} for {tuple(ids.shape)} tokens: choose a "
                "module with one vector per token"
            )
    return {name: x.reshape(-1, x.shape[-1]) for name, x in seen.items()}


def width_at(model: nn.Module, hookpoint: str) -> int:
    """The width of the activations at a hookpoint, found by a pass over two tokens."""
    return run_contexts(model, [hookpoint], torch.zeros(1, 2, dtype=torch.int64))[hookpoint].shape[1]


def check_context_tokens(model: Any, context_tokens: int) -> None:
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and context_tokens > longest:
        raise ValueError(
            f"context_tokens={context_tokens} is more than the {longest} positions of the model: use at most {longest}"
        )


def check_finite(
    hookpoint: str,
    x: Float[Tensor, "rows d_in"],
    ids: Int[Tensor, "n context_tokens"],
    context_ids: Sequence[int],
    tokenizer: Any,
) -> None:
    """ValueError naming the first token whose activations are not finite numbers."""
    bad = ~torch.isfinite(row_norms(x))
    if not bad.any():
        return
    context, position = divmod(int(bad.nonzero()[0]), ids.shape[1])
    token = int(ids[context, position])
    token = token if tokenizer is None else tokenizer.decode([token])
    raise ValueError(
        f"activations at {hookpoint!r} are not finite (NaN or infinity) at token {token!r}, context "
        f"{context_ids[context]}, position {position}: load the model in float32 or bfloat16, store in "
        "bfloat16 or float32, or check the model's weights"
    )

"""Collect: text -> language model -> activations in a cache on disk.

    model, tokenizer = load_model("HuggingFaceTB/SmolLM2-135M")
    collect(model, tokenizer, "model.layers.15", "corpus.txt", tokens=1_000_000, out="acts")

The model runs in inference mode on packed contexts and stops after the last hookpoint, so the upper layers and the
language-model head cost nothing. Everything that can be wrong with the request is checked before the work starts (a
two-token pass finds the widths); an interrupted or failed collection leaves nothing behind.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from apportion import embedded
from apportion.activations.filter import TokenFilter, row_norms
from apportion.activations.hookpoints import capture, expand
from apportion.activations.progress import progress_bar
from apportion.activations.store import torch_dtype
from apportion.activations.text import TextSource
from apportion.activations.tokens import contexts as packed_contexts
from apportion.activations.tokens import num_contexts_for
from apportion.activations.writer import StoreWriter, check_free_disk, refuse_existing

log = logging.getLogger(__name__)


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
    return {
        "name_or_path": str(getattr(tokenizer, "name_or_path", "")),
        "vocab_size": len(tokenizer),
        "special_ids": sorted(tokenizer.all_special_ids),
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
    token = tokenizer.decode([int(ids[context, position])])
    raise ValueError(
        f"activations at {hookpoint!r} are not finite (NaN or infinity) at token {token!r}, context "
        f"{context_ids[context]}, position {position}: load the model in float32 or bfloat16, store in "
        "bfloat16 or float32, or check the model's weights"
    )


def batched_contexts(
    blocks: Iterable[np.ndarray], batch_contexts: int, limit: int
) -> Iterator[Int[Tensor, "n context_tokens"]]:
    """The first `limit` contexts, regrouped into batches."""
    rest: np.ndarray | None = None
    for block in blocks:
        rest = block if rest is None else np.concatenate([rest, block])
        while len(rest) >= min(batch_contexts, limit) > 0:
            take = min(batch_contexts, limit)
            yield torch.from_numpy(rest[:take].copy())
            rest, limit = rest[take:], limit - take
        if limit <= 0:
            return
    if rest is not None and len(rest):
        yield torch.from_numpy(rest[:limit].copy())


def collect(
    model: Any,
    tokenizer: Any,
    hookpoints: str | Iterable[str],
    text: TextSource | str | Path | Iterable[str],
    *,
    tokens: int,
    out: str | Path,
    context_tokens: int = 256,
    batch_contexts: int = 16,
    dtype: str = "bfloat16",
    bos: str = "auto",
    token_filter: TokenFilter | None = None,
) -> dict[str, Any]:
    """Write the activations of the first `tokens` tokens of `text` (in whole contexts) to the cache `out`.

    Returns the manifest. A text that ends early is collected as far as it goes, which the manifest and the log say.
    """
    out, text = Path(out), TextSource.of(text)
    refuse_existing(out)
    store_dtype = torch_dtype(dtype)
    check_context_tokens(model, context_tokens)
    if batch_contexts < 1:
        raise ValueError(f"batch_contexts={batch_contexts} must be at least 1")
    names = expand(model, hookpoints)
    limit = num_contexts_for(tokens, context_tokens)
    batches = batched_contexts(packed_contexts(tokenizer, text, context_tokens, bos), batch_contexts, limit)
    first = next(batches)  # an empty or too short text fails here
    widths = {name: x.shape[1] for name, x in run_contexts(model, names, first[:2, :2]).items()}
    most_tokens = min(limit * context_tokens, text.num_bytes() or limit * context_tokens)
    check_free_disk(out, most_tokens * (sum(widths.values()) * store_dtype.itemsize + len(names) + 12))

    token_filter, special_ids = token_filter or TokenFilter(), tuple(tokenizer.all_special_ids)
    started = perf_counter()
    with StoreWriter(out, widths, dtype=dtype, token_filter=token_filter, special_ids=special_ids) as writer:
        num_contexts = _fill(writer, model, tokenizer, chain([first], batches), limit * context_tokens)
        if num_contexts < limit:
            log.warning("the text ended after %d of the %d tokens asked for", num_contexts * context_tokens, tokens)
        seconds = perf_counter() - started
        return writer.finish(
            {
                "model": model_fingerprint(model),
                "model_dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
                "tokenizer": tokenizer_fingerprint(tokenizer),
                "text": text.describe(),
                "bos": bos,
                "context_tokens": context_tokens,
                "contexts": num_contexts,
                "tokens_asked": tokens,
                "text_ended_early": num_contexts < limit,
                "seconds": round(seconds, 1),
                "tokens_per_s": round(num_contexts * context_tokens / seconds, 1),
            }
        )


def _fill(
    writer: StoreWriter, model: Any, tokenizer: Any, batches: Iterable[Int[Tensor, "n context_tokens"]], total: int
) -> int:
    """Run every batch of contexts through the model and write its rows; returns the number of contexts."""
    num_contexts = 0
    with progress_bar("collecting", total) as show:
        for ids in batches:
            acts = {name: x.to(writer.dtype) for name, x in run_contexts(model, list(writer.stats), ids).items()}
            for name, x in acts.items():
                check_finite(name, x, ids, range(num_contexts, num_contexts + len(ids)), tokenizer)
            positions = torch.arange(ids.shape[1]).repeat(len(ids))
            context_ids = torch.arange(num_contexts, num_contexts + len(ids)).repeat_interleave(ids.shape[1])
            writer.add(acts, ids.flatten(), positions, context_ids)
            num_contexts += len(ids)
            show(num_contexts * ids.shape[1])
    return num_contexts

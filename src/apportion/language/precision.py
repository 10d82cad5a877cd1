"""In which precision a language model runs.

    float32, bfloat16, float16      as asked for
    auto                            bfloat16 where it is not slower than float32 on this machine, else float32
    a quantised checkpoint          as transformers loads it, unless one of the three was asked for

Whether bfloat16 is faster depends on the processor: many multiply it through float32. So the model is loaded in both, a
pass over the same tokens is timed in each, and the model that stays is one that was loaded in its precision, as it
would have been without "auto". GPUs are not timed: bfloat16 is taken where they have it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
from torch import nn

from apportion.language.passes import inputs_for, text_config

logger = logging.getLogger(__name__)

FEWEST_TOKENS, MOST_TOKENS = 16, 512
"""Of a pass that is timed."""
PASS_S = 0.25
"""About how long such a pass may take, but for models that need more for the fewest tokens."""
PASSES = 3
"""Fewer where they take longer than this together:"""
ALL_S = 0.6


def dtype_of(model: nn.Module) -> str:
    """The precision a model runs in: that of its first parameter that is no whole number, as quantised ones are."""
    dtypes = [p.dtype for p in model.parameters()]
    found = next((dtype for dtype in dtypes if dtype.is_floating_point and dtype.itemsize > 1), dtypes[0])
    return str(found).removeprefix("torch.")


def is_quantised(config: Any) -> bool:
    """Does the configuration of a checkpoint, or that of one of its towers, say how its weights are quantised?"""
    towers = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", ()))]
    return any(getattr(tower, "quantization_config", None) is not None for tower in towers)


def not_slower(load: Callable[[str], Any], on_gpu: bool) -> Any:
    """What `load` makes of "bfloat16" or of "float32", whichever is to be taken."""
    if on_gpu and torch.cuda.is_available():
        dtype = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
        logger.info("the model runs in %s, which this GPU has", dtype)
        return load(dtype)
    model = load("bfloat16")
    try:
        tokens = tokens_to_time(model)
        half = seconds(model, tokens)
        model = None  # both at once may not fit into memory
        model = load("float32")
        full = seconds(model, tokens)
    except (RuntimeError, TypeError, ValueError) as error:
        if model is None:
            raise
        logger.info("the model runs in float32: it could not be timed (%s)", " ".join(str(error).split())[:200])
        return load("float32")
    dtype = "bfloat16" if half <= full else "float32"
    said = "a pass over %d tokens takes %.3g s in bfloat16 and %.3g s in float32: the model runs in %s"
    logger.info(said, tokens, half, full, dtype)
    if dtype == "float32":
        return model
    model = None
    return load("bfloat16")


def tokens_to_time(model: nn.Module) -> int:
    """How many tokens a pass takes about `PASS_S` for, by a pass over the fewest."""
    took = seconds(model, FEWEST_TOKENS, passes=1)
    return max(FEWEST_TOKENS, min(MOST_TOKENS, int(FEWEST_TOKENS * PASS_S / max(took, 1e-9))))


@torch.inference_mode()
def seconds(model: nn.Module, tokens: int, passes: int = PASSES) -> float:
    """The fastest of some passes over about that many tokens; the first counts only if it takes too long for more."""
    positions = getattr(text_config(model), "max_position_embeddings", None) or 64
    length = max(1, min(64, tokens, positions if positions > 0 else 64))
    inputs = inputs_for(model, torch.zeros(max(1, tokens // length), length, dtype=torch.int64))
    took = []
    for _ in range(1 + passes):
        started = perf_counter()
        result = model(**inputs)
        next(iter(result.values())).flatten()[-1].item()  # so that it is done
        took.append(perf_counter() - started)
        if sum(took) > ALL_S:
            break
    return min(took[1:] or took)

"""A language model: loaded, recognised again, and run over contexts.

model, tokenizer = load_model("HuggingFaceTB/SmolLM2-135M")
run_contexts(model, ["model.layers.15"], ids)       {"model.layers.15": [rows, d_in]}
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from apportion import embedded
from apportion.answers import out_of_memory
from apportion.disk import check_may_open
from apportion.extras import need
from apportion.language.document_layout import Layout, are_rows, ids_of, labels_of, positions_of
from apportion.language.effect import OTHER_INPUTS, takes_more
from apportion.language.feeding import inputs_apart, way_for
from apportion.language.hookpoints import capture, place_in
from apportion.language.passes import by_context, inputs_for, modules_of, parameters_of, text_config
from apportion.language.precision import is_quantised, not_slower
from apportion.rows.filter import row_norms
from apportion.rows.hookpoint import Hookpoint
from apportion.rows.layout import torch_dtype
from apportion.torch_state import in_eval_mode, usual
from apportion.trust import expanded, refuse_mistyped

logger = logging.getLogger(__name__)

TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
"""Files that a folder with a tokenizer has, one of them at least."""
PROXIES = ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY")
"""Where one is set, it knows names that this machine does not."""
AUTO = "auto"
"""Of dtypes: bfloat16 where it is not slower."""
ASKED = "trust_remote_code"
"""What transformers tells to pass where a checkpoint has code of its own, in every version."""


@usual()
def load_model(
    name_or_folder: str | Path,
    dtype: str | None = None,
    *,
    device: str | None = None,
    device_map: str | None = None,
    attn_implementation: str | None = None,
    auto_class: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """A transformers model in eval mode and its tokenizer: a local folder, a Hugging Face Hub id, or "embedded".

    "embedded" is the small model inside this package. It keeps that name, so a manifest means the same everywhere.

    `dtype` is float32 unless another one is given; of a quantised checkpoint it is the one that was saved. "auto" takes
    bfloat16 where that is not slower than float32 on this machine, which is tried (precision.py).

    The auto class is the one of the checkpoint's own architecture (AutoModelForCausalLM, AutoModelForSeq2SeqLM,
    AutoModel for an encoder, ...) unless `auto_class` names another. The tokenizer is None where there is none: token
    ids can be given in place of text. ValueError for what cannot be loaded, and for weights that the checkpoint does
    not have: they would be random.

    A checkpoint may bring code of its own. It is run only with `trust_remote_code`, and nobody is asked on the way; and
    weights in pickles are read as numbers only (transformers does so by itself).
    """
    if dtype not in (None, AUTO):
        torch_dtype(dtype)
    need("A language model", "transformers", *([] if device_map is None else ["accelerate"]))
    name, where = _place(name_or_folder)
    import transformers  # heavy

    of: dict[str, Any] = {"local_files_only": True} if _only_cached(where) else {}
    of["trust_remote_code"] = trust_remote_code
    with _said_of(name, where, trust_remote_code):
        config = transformers.AutoConfig.from_pretrained(where, **of)
        if attn_implementation is None and not trust_remote_code and _fetches_kernels(config):
            raise _brings_code(name)
        kind = _auto_class(transformers, config, auto_class)
    quantised = is_quantised(config)
    if quantised and device not in (None, "cpu") and device_map is None:
        need("A quantised model", "accelerate")
        device_map = device  # many of them cannot be moved once they are loaded
    asked = {"device_map": device_map, "attn_implementation": attn_implementation}
    of |= {option: value for option, value in asked.items() if value is not None}

    def loaded(dtype: str) -> Any:
        saved_or = AUTO if dtype == AUTO else torch_dtype(dtype)  # "auto" of transformers: as it was saved
        with _said_of(name, where, trust_remote_code):
            model, loading = kind.from_pretrained(where, **of, dtype=saved_or, output_loading_info=True)
        _check_complete(model, sorted(loading["missing_keys"]), name)
        if device is not None and device_map is None:
            model.to(device)
        return model.eval().requires_grad_(False)

    if dtype == AUTO and not quantised:
        model = not_slower(loaded, on_gpu=device_map is not None or str(device).startswith("cuda"))
    else:
        model = loaded(dtype or (AUTO if quantised else "float32"))
    tokenizer = _tokenizer(transformers, name, where, trust_remote_code)
    if tokenizer is None:
        logger.warning("%s has no tokenizer: give token ids in place of text", name)
    else:
        tokenizer.name_or_path = name
    model.config.name_or_path = model.name_or_path = name
    return model, tokenizer


@contextmanager
def _said_of(name: str, where: str, trust_remote_code: bool) -> Iterator[None]:
    """Transformers without its chatter, and what it raises as one sentence."""
    try:
        with _quiet_transformers():
            yield
    except BringsCode:
        raise
    except Exception as error:  # a damaged folder lets transformers raise anything
        if ASKED in str(error) and not trust_remote_code:
            raise _brings_code(name) from None
        _check_may_open(where)
        if out_of_memory(error):
            raise
        raise ValueError(
            f"no language model could be loaded from {name!r}: give a folder with config.json, weights and "
            f'tokenizer, a Hub id that is reachable from here, or "embedded" ({_reason(error)})'
        ) from error


def load_tokenizer(name_or_folder: str | Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer alone of what `load_model` loads; None if there is none."""
    need("A tokenizer", "transformers")
    name, where = _place(name_or_folder)
    import transformers  # heavy

    return _tokenizer(transformers, name, where, trust_remote_code)


def _place(name_or_folder: str | Path) -> tuple[str, str]:
    """What a model is called, and what transformers is to load. ValueError for a path at which there is nothing."""
    name = str(expanded(name_or_folder)) if str(name_or_folder).startswith("~") else str(name_or_folder)
    if name == "embedded":
        return name, str(embedded.present(embedded.MODEL))
    if not Path(name).exists():
        refuse_mistyped(name, "a model's id on the Hub")
        if name.count("/") > 1:
            raise ValueError(f"{name!r} does not exist, and a model's id on the Hub has one slash at most.")
    return name, name


def _only_cached(where: str) -> bool:
    """Whether a model of the Hub can only come from the cache: the Hub's name leads nowhere, and to ask for each file
    several times takes half a minute."""
    if Path(where).exists() or any(os.environ.get(proxy) for proxy in (*PROXIES, *map(str.lower, PROXIES))):
        return False
    try:
        socket.getaddrinfo(urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co").hostname, None)
    except OSError:
        return True
    return False


class BringsCode(ValueError):
    """A checkpoint wants code of its own to be run, and the caller did not say that it may."""


def _brings_code(name: str) -> BringsCode:
    return BringsCode(
        f"{name!r} brings code of its own, which could do anything on this machine. If you trust whoever wrote it, say "
        "so: trust_remote_code=True (--trust-remote-code)"
    )


def _fetches_kernels(config: Any) -> bool:
    """Does the configuration, or one of its towers', take its attention from a repository, which is code to be run?"""
    towers = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", ()))]
    return any("/" in str(getattr(tower, "_attn_implementation", "")) for tower in towers)


def _tokenizer(transformers: Any, name: str, where: str, trust_remote_code: bool) -> Any:
    """The tokenizer of a checkpoint; None if it has none (some versions then make one without a vocabulary)."""
    try:
        with _quiet_transformers():
            of = {"local_files_only": True} if _only_cached(where) else {}
            tokenizer = transformers.AutoTokenizer.from_pretrained(where, **of, trust_remote_code=trust_remote_code)
        words = set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids)
    except Exception as error:  # see above; and where there is none, transformers raises many kinds too
        if ASKED in str(error) and not trust_remote_code:
            raise _brings_code(name) from None
        _check_may_open(where)
        if any((Path(where) / name).is_file() for name in TOKENIZERS):
            logger.warning("the tokenizer in %s cannot be loaded (%s)", where, _reason(error))
        logger.debug("no tokenizer in %s: %s", where, error)
        return None
    return tokenizer if len(words - set(getattr(tokenizer, "added_tokens_decoder", ()))) > 1 else None


def _check_may_open(where: str) -> None:
    """OSError for a file in the folder of a model that may not be read."""
    for file in Path(where).iterdir() if Path(where).is_dir() else ():
        check_may_open(file)


def _reason(error: Exception) -> str:
    """The first line, or what kind of error it is if it says little."""
    first = next(iter(str(error).strip().splitlines()), "")
    return first if len(first.split()) > 1 else f"{type(error).__name__} {first}".strip()


AUTO_CLASSES = (
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoModelForSeq2SeqLM",
    "AutoModelForMaskedLM",
    "AutoModel",
)
"""In this order a checkpoint's architecture is looked for; one that none of them has is loaded without its head."""


def _auto_class(transformers: Any, config: Any, wanted: str | None) -> Any:
    """The auto class that makes what the checkpoint was saved as."""
    if wanted is not None:
        if not wanted.startswith("AutoModel") or not hasattr(transformers, wanted):
            raise ValueError(f"auto_class={wanted!r} is no auto class of transformers: use AutoModel, for example")
        return getattr(transformers, wanted)
    saved_as = set(getattr(config, "architectures", None) or ())
    for name in AUTO_CLASSES:
        kind = getattr(transformers, name)
        if type(config) not in kind._model_mapping:
            continue
        made = kind._model_mapping[type(config)]
        made = made if isinstance(made, tuple | list) else (made,)
        if not saved_as or saved_as & {one.__name__ for one in made}:
            return kind
    return transformers.AutoModel


def _check_complete(model: Any, missing: list[str], name: str) -> None:
    """ValueError for weights that the checkpoint does not have; those of a pooler, which texts do not use, are said."""
    poolers = [key for key in missing if "pooler" in key]
    if others := [key for key in missing if key not in poolers]:
        raise ValueError(
            f"{name!r} has no weights for {', '.join(others[:4])}{' ...' if len(others) > 4 else ''} of "
            f"{type(model).__name__}, which would be random: load what it has with auto_class='AutoModel' "
            "(--auto-class AutoModel)"
        )
    if poolers:
        logger.warning("%s has no weights for %s: do not use hookpoints there", name, ", ".join(poolers))


def predicts_next(model: Any) -> bool:
    """True for a causal language model, whose outputs at a token are predictions of the next one."""
    config = getattr(model, "config", None)
    return bool(getattr(model, "can_generate", bool)()) and not getattr(config, "is_encoder_decoder", False)


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


def _check_encoder(model: Any, hookpoints: list[str]) -> None:
    """ValueError for a hookpoint behind the encoder of a model that has a decoder as well."""
    if "decoder_input_ids" not in parameters_of(model) or not hasattr(model, "get_encoder"):
        return
    encoder = next((name for name, m in modules_of(model).items() if m is model.get_encoder()), None)
    for hookpoint in hookpoints:
        if encoder is not None and not f"{Hookpoint.parse(hookpoint).path}.".startswith(f"{encoder}."):
            raise ValueError(
                f"{hookpoint!r} is not in the encoder of {type(model).__name__}, and its decoder runs on pairs of "
                f"texts: choose a hookpoint in {encoder!r}, or give activations of your own (ArraySource)"
            )


def run_contexts(
    model: nn.Module,
    hookpoints: list[str],
    contexts: Int[Tensor, "n *columns context_tokens"],
    whole: bool = False,
    layout: Layout | None = None,
) -> dict[str, Float[Tensor, "rows d_in"]]:
    """The activations of a few contexts at each hookpoint, one row per token, in the model's dtype and eval mode; by
    canonical name. Contexts may have more than their ids (document_layout.py), and their `layout`.

    The pass ends at the last hookpoint, unless it is to be `whole`: then ValueError for a hookpoint that the model runs
    several times. So the first pass of a long work is a whole one, over a few tokens.
    """
    hookpoints = [str(place_in(model, name)) for name in hookpoints]
    _check_encoder(model, hookpoints)
    ids = ids_of(contexts)
    with torch.inference_mode(), in_eval_mode(model):
        try:
            seen = capture(model, hookpoints, stop=not whole, **inputs_in(model, hookpoints, contexts, layout))
        except (AttributeError, TypeError, ValueError) as error:
            if not takes_more(model) or not (whole and _wants_more(error)):
                raise
            raise ValueError(
                f"{type(model).__name__} does not run on tokens alone ({_reason(error)}): load the part of it that "
                "reads text, such as transformers.CLIPTextModel of CLIP, and give that"
            ) from error
    for name, x in seen.items():
        if x.ndim not in (2, 3) or x.shape[:-1].numel() != ids.numel():
            raise ValueError(
                f"hookpoint {name!r} has shape {tuple(x.shape)} for {tuple(ids.shape)} tokens: choose a "
                "module with one vector per token"
            )
        if not x.is_floating_point():
            raise ValueError(
                f"hookpoint {name!r} carries whole numbers ({x.dtype}), such as ids of tokens or experts, and no "
                "activations: choose another module, or another element of what it returns"
            )
    if contexts.ndim == 2:
        return {name: by_context(x, ids.shape).flatten(0, 1) for name, x in seen.items()}
    rows = are_rows(contexts)
    return {name: by_context(x, ids.shape)[rows.to(x.device)] for name, x in seen.items()}


def inputs_in(
    model: nn.Module, hookpoints: list[str], contexts: Int[Tensor, "n *columns context_tokens"], layout: Layout | None
) -> dict[str, Any]:
    """The arguments of a pass over contexts of this layout, so that rows at the hookpoints are right."""
    ids = ids_of(contexts)
    if layout is None or not layout.within:
        return inputs_for(model, ids)

    def run(inputs: dict[str, Any]) -> list[Tensor]:
        seen = capture(model, hookpoints, stop=True, **inputs)
        return [by_context(seen[name], inputs["input_ids"].shape) for name in hookpoints]

    way = way_for(model, tuple(hookpoints), layout.padded, ids.shape[1], run)
    return inputs_apart(model, ids, positions_of(contexts), way)


def _wants_more(error: Exception) -> bool:
    """Was it raised because a model was given no images or sound? Some say so, others stumble over what is missing."""
    return not isinstance(error, ValueError) or any(name in str(error) for name in OTHER_INPUTS)


def width_at(model: nn.Module, hookpoint: str) -> int:
    """The width of the activations at a hookpoint, found by a pass over two tokens."""
    name = str(place_in(model, hookpoint))
    return run_contexts(model, [name], torch.zeros(1, 2, dtype=torch.int64), whole=True)[name].shape[1]


def check_context_tokens(model: Any, context_tokens: int) -> None:
    """ValueError for contexts longer than the model's positions; some models have no limit (none, 0 or -1)."""
    longest = getattr(text_config(model), "max_position_embeddings", None)
    if isinstance(longest, int) and 0 < longest < context_tokens:
        raise ValueError(
            f"context_tokens={context_tokens} is more than the {longest} positions of the model: use at most {longest}"
        )


def check_finite(
    hookpoint: str,
    x: Float[Tensor, "rows d_in"],
    contexts: Int[Tensor, "n *columns context_tokens"],
    context_ids: Sequence[int],
    tokenizer: Any,
) -> None:
    """ValueError naming the first token whose activations are not finite numbers."""
    bad = ~torch.isfinite(row_norms(x))
    if not bad.any():
        return
    token, position, context = labels_of(contexts)[:, int(bad.nonzero()[0])].tolist()
    token = token if tokenizer is None else tokenizer.decode([token])
    raise ValueError(
        f"activations at {hookpoint!r} are not finite (NaN or infinity) at token {token!r}, context "
        f"{context_ids[context]}, position {position}: load the model in float32 or bfloat16, store in "
        "bfloat16 or float32, or check the model's weights"
    )

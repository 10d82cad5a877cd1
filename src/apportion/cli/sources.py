"""The rows that runs train on: of a cache or a file, or of a language model that makes them as they are asked for."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apportion.cli.arguments import Documents, Filter, Text, window_rows
from apportion.extras import need
from apportion.trust import expanded, refuse_mistyped
from apportion.urls import is_there

if TYPE_CHECKING:
    from apportion.cli.train import TrainBase

OF_PASSES = (
    "source", "held_out_share", "order_seed", "tokens", "context_tokens", "corpus", "documents", "filter",
    "loading",
    "training_objective",
)  # fmt: skip
OF_A_STREAM = ("hookpoint", "target_hookpoint", "batch_tokens", "buffer_tokens", "window")


class Sources:
    """Those of several runs: runs on the same rows share one, and what several need of a model is made once."""

    def __init__(self, most_held: float = math.inf) -> None:
        """`most_held`: bytes of activations that are held for the others when one has the model run."""
        self.most_held = most_held
        self._made: dict[str, Any] = {}
        self._models: dict[str, tuple[Any, Any]] = {}
        self._captured: dict[str, Any] = {}

    def of(self, train: TrainBase) -> Any:
        """The rows to train on, held ready. ValueError for what is no place of rows, or does not fit the run."""
        train.source = str(expanded(train.source)) if train.source.startswith("~") else train.source
        train.copies.choose()
        if (stream := stream_of(train)) not in self._made:
            self._made[stream] = _of_rows(train) if is_of_rows(train) else self._of_model(train)
        return self._made[stream]

    def model(self, train: TrainBase) -> tuple[Any, Any]:
        """The language model of a run, and its tokenizer."""
        need("Training on a model", "transformers", *train.corpus.packages)
        if (key := repr((train.source, train.loading))) not in self._models:
            self._models[key] = train.loading.load_again(train.source, train.model_dtype_before())
        return self._models[key]

    def _of_model(self, train: TrainBase) -> Any:
        from apportion.architectures import SAES
        from apportion.language import ContextSource, LiveSource
        from apportion.language.hookpoints import expand

        kind, target = SAES[train.sae].architecture.row_kind, getattr(train, "target_hookpoint", None)
        if kind not in ("one", "pair"):
            raise ValueError(f"{train.sae} takes several hookpoints: make a cache of them first (apportion collect).")
        if train.hookpoint is None or train.tokens is None:
            raise ValueError("To train on a model give --hookpoint and --tokens (and --text or --dataset).")
        if kind == "pair" and target is None:
            raise ValueError(
                f"{train.sae} needs --hookpoint (what it reads) and --target-hookpoint (what it predicts)."
            )
        text = train.corpus.source(train.source)
        model, tokenizer = self.model(train)
        expand(model, train.hookpoint)
        captured = self._passes(train, model, tokenizer, text)
        return (ContextSource if train.whole_contexts else LiveSource)(
            model,
            tokenizer,
            train.hookpoint,
            captured.contexts,
            buffer_tokens=train.buffer_tokens,
            token_filter=train.filter.token_filter(),
            held_out_share=train.held_out_share,
            seed=train.order_seed,
            text=text.describe(),
            target_hookpoint=target,
            captured=captured,
            layout=captured.layout,
        )

    def _passes(self, train: TrainBase, model: Any, tokenizer: Any, text: Any) -> Any:
        """The passes of the model over the contexts of the text."""
        from apportion.language import read_contexts
        from apportion.language.captured import Captured

        if (key := passes_of(train)) not in self._captured:
            assert train.tokens is not None
            wanted = int(train.tokens / max(1 - train.held_out_share, 1e-9) * 1.05) + train.context_tokens
            layout = train.documents.layout()
            contexts = read_contexts(tokenizer, text, tokens=wanted, context_tokens=train.context_tokens, layout=layout)
            self._captured[key] = Captured(model, tokenizer, contexts, self.most_held, layout)
        return self._captured[key]


def is_of_rows(train: TrainBase) -> bool:
    """Is it a cache or a file? False for a model; ValueError for what is neither."""
    from apportion.rows.opening import holds_array, holds_rows

    place = Path(train.source)
    if not is_there(train.source) and train.source != "embedded":
        refuse_mistyped(train.source, "a model's id on the Hub")
        if train.source.count("/") != 1 or holds_array(train.source):
            raise ValueError(f"There is no cache, file of rows or model at {train.source!r}.")
    if holds_rows(train.source):
        return True
    if place.is_dir() and not (place / "config.json").exists():
        raise ValueError(f"{train.source} is neither a cache (no manifest.json) nor a model (no config.json).")
    return False


def _of_rows(train: TrainBase) -> Any:
    from apportion.architectures import SAES
    from apportion.rows import CacheSource
    from apportion.rows.opening import holds_array, open_rows
    from apportion.rows.windows import InParts

    if train.whole_contexts:
        raise ValueError(f"{train.training_objective} runs the language model: give a model, not a cache.")
    usual = {f.name: f.default for f in dataclasses.fields(train)} | {
        "corpus": Text(),
        "filter": Filter(),
        "documents": Documents(),
    }
    of_text = ("corpus", "filter", "documents", "context_tokens", "buffer_tokens")
    if any(getattr(train, name) != usual[name] for name in of_text):
        raise ValueError(f"{train.source} holds rows: their text, contexts and filter were chosen before.")
    if holds_array(train.source) and train.hookpoint is not None:
        raise ValueError(f"{train.source} holds rows of no hookpoint: leave --hookpoint out.")
    kind, target = SAES[train.sae].architecture.row_kind, getattr(train, "target_hookpoint", None)
    store = open_rows(train.source, kind, train.hookpoint, target, train.sae)
    if isinstance(window := window_rows(train.window), int) and isinstance(store, InParts):
        window = max(1, round(window * len(store.part_rows) / store.rows))
    return CacheSource(store, train.held_out_share, train.order_seed, window)


def goes_with(train: TrainBase) -> str:
    """In words; runs for which this is equal read together: one stream of rows, or the passes of a model."""
    return stream_of(train) if is_of_rows(train) else passes_of(train)


def stream_of(train: TrainBase) -> str:
    """Runs for which this is equal take the same batches."""
    from apportion.architectures import SAES

    said = _said(train, OF_PASSES + OF_A_STREAM)
    return f"{said}, {SAES[train.sae].architecture.row_kind})"


def passes_of(train: TrainBase) -> str:
    """Runs for which this is equal read the same contexts of a model, at whatever hookpoint."""
    return f"{_said(train, OF_PASSES)})"


def _said(train: TrainBase, names: tuple[str, ...]) -> str:
    usual = {f.name: f.default_factory() for f in dataclasses.fields(train) if callable(f.default_factory)}
    values = {name: getattr(train, name, None) for name in names}
    values = {name: value for name, value in values.items() if value is not None and value != usual.get(name)}
    return f"{values.pop('source')} (" + ", ".join(f"{name} {_in_words(value)}" for name, value in values.items())


def _in_words(value: Any) -> str:
    """Of a group of options those that are not as usual."""
    if not dataclasses.is_dataclass(value):
        return str(value)
    options = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if getattr(value, f.name) != f.default}
    return " ".join(f"{name} {option}" for name, option in options.items())

"""Evaluation inside the language model: what it loses when reconstructions replace its activations.

    clean      the model as it is                 zero, mean     the activations replaced by zero, or by their mean
    spliced    the activations replaced by the SAE's reconstruction
    delta_ce   spliced - clean, in nats per predicted token
    recovered  (ablated - spliced) / (ablated - clean), against each of the two ablations

A transcoder is measured where it predicts: its target is what is replaced, by what it makes of its own hookpoint.
Rows that the token filter leaves out stay untouched everywhere, in the ablations too. The rows seen on the way are
measured like those of a cache. Cross-entropy is over all predictions within a context. Padding takes no part in
anything. A model that does not predict the next token (an encoder, say) has no cross-entropy: then rows are all that is
measured.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from apportion.architectures import SAE
from apportion.evals.evaluator import Evaluator, Found, Subject, add_evaluator, found_in
from apportion.evals.figures import FIGURES
from apportion.evals.measure import Measurement
from apportion.evals.rows import Anew
from apportion.language.document_layout import PAD, Layout, are_rows, ids_of, labels_of, positions_of
from apportion.language.effect import check_read
from apportion.language.hookpoints import capture, hooked, place_in
from apportion.language.model import inputs_in, predicts_next, run_contexts
from apportion.language.passes import by_context, parameters_of
from apportion.metrics import recovered
from apportion.progress import progress_bar
from apportion.rows.filter import TokenFilter
from apportion.rows.sites import PairStore
from apportion.rows.store import ActivationStore
from apportion.torch_state import in_eval_mode, usual

logger = logging.getLogger(__name__)


@dataclass
class CrossEntropies:
    """Mean cross-entropy, in nats per predicted token, of each variant of the model."""

    sums: dict[str, float] = field(default_factory=dict)
    predictions: dict[str, int] = field(default_factory=dict)

    def add(self, variant: str, losses: Float[Tensor, "n pos"]) -> None:
        """`losses` are NaN where there is no prediction."""
        known = losses[~losses.isnan()]
        self.sums[variant] = self.sums.get(variant, 0.0) + known.double().sum().item()
        self.predictions[variant] = self.predictions.get(variant, 0) + known.numel()

    def mean(self, variant: str) -> float:
        return self.sums[variant] / self.predictions[variant]

    def of(self, sae: str) -> dict[str, float]:
        """Everything about one SAE; empty if the model has no cross-entropy."""
        if "clean" not in self.sums:
            return {}
        clean, spliced, zero, mean = (self.mean(v) for v in ("clean", f"sae:{sae}", "zero", "mean"))
        return {
            "ce_clean": clean,
            "ce_spliced": spliced,
            "delta_ce": spliced - clean,
            "ce_zero_ablation": zero,
            "ce_mean_ablation": mean,
            "recovered_zero": recovered(spliced, clean, zero),
            "recovered_mean": recovered(spliced, clean, mean),
            "predictions": self.predictions["clean"],
        }


@usual()
@torch.inference_mode()
def evaluate_model(
    saes: Mapping[str, SAE],
    model: Any,
    contexts: Int[Tensor, "n *columns context_tokens"],
    token_filter: TokenFilter,
    *,
    hookpoint: str,
    target: tuple[str, TokenFilter] | None = None,
    attention_mask: Bool[Tensor, "n context_tokens"] | None = None,
    layout: Layout | None = None,
    batch_contexts: int = 4,
    progress: bool = True,
) -> tuple[dict[str, Measurement], CrossEntropies]:
    """Measure SAEs of one hookpoint on `contexts`; clean and ablated passes are shared by all of them.

    For transcoders `target` is the hookpoint they predict and its token filter; rows have to pass both filters.
    `attention_mask` is False for padding; None: there is none, or `layout` says how documents lie in the contexts
    (`read_contexts`): then padding and tokens of other roles take no part, and no token is predicted from another
    document. The model is run in eval mode. ValueError for a
    hookpoint that nothing in the model reads.
    """
    filters = _filters(model, (hookpoint, token_filter), target)
    hookpoint, replaced = next(iter(filters)), next(reversed(filters))
    check_read(model, replaced)
    predicts = predicts_next(model)
    if not predicts:
        logger.warning("%s does not predict the next token: there is no cross-entropy", type(model).__name__)
    measurements = {name: Measurement(sae) for name, sae in saes.items()}
    entropies = CrossEntropies()
    sums: list[Float[Tensor, " d"]] = []
    batches = [*_given(model, list(filters), contexts, attention_mask, layout, batch_contexts)]
    masks: list[Bool[Tensor, "n context_tokens"]] = []
    done, passes = 0, ids_of(contexts).numel() * (len(saes) + 3 if predicts else 1)
    with progress_bar("evaluating", passes, show=progress) as show, in_eval_mode(model):
        for given in batches:
            seen, losses = _clean(model, given, list(filters), predicts)
            x, y = seen[hookpoint], seen[replaced]
            attended, mask = given.attended.to(x.device), (given.attended & given.rows).to(x.device)
            for name, one in filters.items():
                mask &= one.mask(seen[name], given.ids.to(x.device), given.positions.to(x.device))
            masks.append(mask)
            sums.append(y[mask].double().sum(0))
            difficulty = None
            if losses is not None:
                entropies.add("clean", losses)
                difficulty = F.pad(losses, (0, 1), value=torch.nan)[attended]
            for name, measurement in measurements.items():
                y_hat = torch.zeros_like(y)
                y_hat[attended] = measurement.add(
                    x[attended], mask[attended], difficulty, None if target is None else y[attended]
                ).to(y)
                if predicts:
                    entropies.add(f"sae:{name}", _replaced(model, given, replaced, mask, y_hat))
            done += given.ids.numel() * (len(saes) + 1 if predicts else 1)
            show(done)
        mean = _mean_row(sums, masks)
        for given, mask in zip(batches if predicts else (), masks if predicts else (), strict=True):
            for name, vector in (("zero", torch.zeros_like(mean)), ("mean", mean)):
                entropies.add(name, _replaced(model, given, replaced, mask, vector))
            done += 2 * given.ids.numel()
            show(done)
    return measurements, entropies


def evaluate_cache_in_model(
    saes: Mapping[str, SAE],
    store: ActivationStore | PairStore,
    rows: Int[Tensor, " n"],
    model: Any,
    tokens: int | None = None,
    *,
    progress: bool = True,
) -> tuple[dict[str, Measurement], CrossEntropies]:
    """`evaluate_model` on the whole contexts among `rows` of a cache that this model made; on `tokens` of them."""
    target = None
    if isinstance(store, PairStore):
        store, other = store.stores
        target = (other.hookpoint, other.filter)
    contexts = contexts_of(store, rows)
    contexts = contexts if tokens is None else contexts[: max(1, tokens // contexts.shape[-1])]
    layout = Layout.from_json(store.describe().lm.layout)
    place = {"hookpoint": store.hookpoint, "target": target, "layout": layout}
    return evaluate_model(saes, model, contexts, store.filter, **place, progress=progress)


def contexts_of(store: ActivationStore, rows: Int[Tensor, " n"]) -> Int[Tensor, "contexts *columns context_tokens"]:
    """The whole contexts among `rows`, as token ids, or with more where their layout is not as usual."""
    layout, length = Layout.from_json(store.describe().lm.layout), store.context_tokens
    if layout.roles:
        raise ValueError(
            f"{str(store.folder)!r} has only the words of {', '.join(layout.roles)}, and the model takes whole "
            "contexts: evaluate on text"
        )
    if not layout.is_usual:
        return _laid_out(store, rows, length)
    whole = torch.bincount(store.contexts[rows])[store.contexts[rows]] == length
    return store.tokens[rows[whole]].reshape(-1, length)


def _laid_out(store: ActivationStore, rows: Tensor, length: int) -> Int[Tensor, "contexts 3 context_tokens"]:
    """Filled up on the right, on whatever side they were."""
    numbers = store.contexts[rows]
    whole = torch.bincount(numbers)[numbers] == torch.bincount(store.contexts)[numbers]
    rows = rows[whole]
    starts = store.contexts[rows].diff(prepend=torch.tensor([-1])) != 0
    context = starts.cumsum(0) - 1
    place = torch.arange(len(rows)) - starts.nonzero().squeeze(1)[context]
    found = torch.zeros(int(starts.sum()), 3, length, dtype=torch.int32)
    found[:, 1] = PAD
    for column, values in enumerate((store.tokens[rows], store.positions[rows], torch.ones_like(store.tokens[rows]))):
        found[context, column, place] = values.int()
    return found


@final
@add_evaluator
class InModel(Evaluator):
    """On the whole contexts among the rows of a cache."""

    name = "language_model"
    needs = frozenset({"rows", "model"})

    def cost(self, subject: Subject) -> str:
        return f"{len(subject.indices):,} tokens, four times through the language model"

    def run(self, subject: Subject) -> Iterator[Found]:
        if not isinstance(subject.store, ActivationStore | PairStore):
            raise ValueError(f"The evaluator {self.name} needs the cache of a language model, with its tokens.")
        found, entropies = evaluate_cache_in_model(
            {"sae": subject.sae}, subject.store, subject.indices, subject.model, progress=subject.progress
        )
        result: dict[str, Any] = found["sae"].result() | entropies.of("sae")
        figures = [FIGURES[key] for key in (*entropies.of("sae"), "l0_difficulty_correlation") if key in FIGURES]
        yield from found_in(result, figures, result["tokens"], result["mode"])


@torch.inference_mode()
def recalibrate_in_model(
    sae: SAE,
    model: Any,
    contexts: Int[Tensor, "n *columns context_tokens"],
    token_filter: TokenFilter,
    *,
    hookpoint: str,
    target: tuple[str, TokenFilter] | None = None,
    layout: Layout | None = None,
    batch_contexts: int = 4,
) -> float:
    """Set the thresholds of an SAE anew, on rows of `contexts` that pass the filters; returns the L0 there.

    Arguments as in `evaluate_model`.
    """
    filters = _filters(model, (hookpoint, token_filter), target)
    return sae.calibrate(rows_in_model(model, contexts, filters, layout=layout, batch_contexts=batch_contexts))


def rows_in_model(
    model: Any,
    contexts: Int[Tensor, "n *columns context_tokens"],
    filters: Mapping[str, TokenFilter],
    *,
    layout: Layout | None = None,
    batch_contexts: int = 4,
) -> Anew:
    """Chunks of the rows of `contexts` at the first of some hookpoints that pass the filters of all; the model makes
    them each time they are read."""
    hookpoint = next(iter(filters))

    def rows() -> Iterator[Tensor]:
        for ids in contexts.split(batch_contexts):
            seen = run_contexts(model, list(filters), ids, layout=layout)
            x = seen[hookpoint].float()
            tokens, positions, _ = labels_of(ids).to(x.device)
            kept = [one.mask(seen[name], tokens, positions) for name, one in filters.items()]
            yield x[torch.stack(kept).all(0)]

    return Anew(rows)


def _filters(model: Any, *places: tuple[str, TokenFilter] | None) -> dict[str, TokenFilter]:
    """The token filter of each hookpoint, by canonical name."""
    return {str(place_in(model, place[0])): place[1] for place in places if place is not None}


def _mean_row(sums: list[Float[Tensor, " d"]], masks: list[Bool[Tensor, "n context_tokens"]]) -> Float[Tensor, " d"]:
    """From the sum of the rows of each mask."""
    rows = sum(int(mask.sum()) for mask in masks)
    if not rows:
        raise ValueError("Nothing to evaluate: no row passed the token filter. Give more text.")
    return (sum(sums, torch.zeros(())) / rows).float()


@dataclass
class Given:
    """A few contexts, all of [n, context_tokens], and what the model is given."""

    ids: Int[Tensor, "n pos"]
    attended: Bool[Tensor, "n pos"]
    """False for padding."""
    positions: Int[Tensor, "n pos"]
    rows: Bool[Tensor, "n pos"]
    """Which take part."""
    inputs: dict[str, Any]
    known: Bool[Tensor, "n pos_minus_1"] | None
    """Where the next token is one to predict; None: everywhere."""


def _given(
    model: Any, hookpoints: list[str], contexts: Tensor, mask: Tensor | None, layout: Layout | None, size: int
) -> Iterator[Given]:
    if layout is not None and not layout.is_usual:
        for part in contexts.split(size):
            positions = positions_of(part)
            known = positions[:, 1:] == positions[:, :-1] + 1
            known &= positions[:, :-1] >= 0
            inputs = inputs_in(model, hookpoints, part, layout)
            yield Given(ids_of(part), positions >= 0, positions.clamp_min(0), are_rows(part), inputs, known)
        return
    kept = torch.ones_like(contexts, dtype=torch.bool) if mask is None else mask.bool()
    for ids, attended in zip(contexts.split(size), kept.split(size), strict=True):
        inputs, known = _inputs(model, ids, attended), None
        if "attention_mask" in inputs:
            known = attended[:, :-1] & attended[:, 1:]
        positions = (attended.cumsum(1) - 1).clamp_min(0)
        yield Given(ids, attended, positions, torch.ones_like(attended), inputs, known)


def _clean(
    model: Any, given: Given, hookpoints: list[str], predicts: bool
) -> tuple[dict[str, Float[Tensor, "n pos d"]], Float[Tensor, "n pos_minus_1"] | None]:
    """Activations at the hookpoints and losses of the untouched model."""
    seen: dict[str, Tensor] = {}

    def look(hookpoint: str, x: Tensor) -> None:
        seen[hookpoint] = x.float().clone()

    if not predicts:
        found = capture(model, hookpoints, stop=True, **given.inputs)
        return {name: by_context(x.float(), given.ids.shape) for name, x in found.items()}, None
    with hooked(model, {name: partial(look, name) for name in hookpoints}):
        losses = _losses(model, given.inputs, given.known)
    return {name: by_context(x, given.ids.shape) for name, x in seen.items()}, losses


def _replaced(model: Any, given: Given, hookpoint: str, mask: Tensor, new: Tensor) -> Float[Tensor, "n pos_minus_1"]:
    """Losses with the rows of `mask` replaced by those of `new` (or by one vector)."""

    def replace(x: Tensor) -> Tensor:
        rows = torch.where(mask[..., None], new.to(x), by_context(x, mask.shape))
        return rows.reshape(x.shape) if x.ndim != 3 or x.shape[:2] == mask.shape else rows.transpose(0, 1)

    with hooked(model, {hookpoint: replace}):
        return _losses(model, given.inputs, given.known)


def token_losses(
    model: Any, ids: Int[Tensor, "n pos"], attended: Bool[Tensor, "n pos"] | None = None
) -> Float[Tensor, "n pos_minus_1"]:
    """Cross-entropy in nats of each next token; NaN where it or the token before is padding."""
    inputs = _inputs(model, ids, attended)
    padded = "attention_mask" in inputs and attended is not None
    return _losses(model, inputs, attended[:, :-1] & attended[:, 1:] if padded and attended is not None else None)


def _losses(model: Any, inputs: dict[str, Any], known: Tensor | None) -> Float[Tensor, "n pos_minus_1"]:
    logits = model(**inputs | {"use_cache": False}).logits
    pairs = zip(logits, inputs["input_ids"], strict=True)
    losses = torch.stack([F.cross_entropy(one[:-1].float(), target[1:], reduction="none") for one, target in pairs])
    return losses if known is None else losses.masked_fill(~known.to(losses.device), torch.nan)


def _inputs(model: Any, ids: Tensor, attended: Tensor | None) -> dict[str, Tensor]:
    """What the model is given: with padding also where it is, and positions that do not count it."""
    device = next(model.parameters()).device
    inputs = {"input_ids": ids.long().to(device)}
    if attended is not None and not bool(attended.all()):
        inputs["attention_mask"] = attended.long().to(device)
        if "position_ids" in parameters_of(model):
            inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
    return inputs

"""What experiments of many runs share: runs done only once, evaluation at equal L0, delta-CE, spread over seeds."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, cast

import torch
from torch import Tensor

from apportion.about import TextRecord
from apportion.architectures import SAE
from apportion.evals import evaluate_model, evaluate_rows
from apportion.language import load_model, read_contexts
from apportion.rows import ActivationStore, Source
from apportion.rows.batch import RowStore
from apportion.rows.sites import Aligned
from apportion.training import TrainConfig, Trainer
from apportion.training.run import read_log, read_run
from apportion.training.same import check_same

logger = logging.getLogger("apportion.runs")


def fitted(folder: Path, sae: SAE, config: TrainConfig, source: Source) -> tuple[SAE, float]:
    """Train, go on training, or read what is finished; and the seconds of training.

    Raises ValueError if the folder holds a run with other settings.
    """
    trainer = Trainer(sae, config)
    return trainer.fit(source, folder, resume=True), trainer.seconds


def same_run(folder: Path, sae: SAE, config: TrainConfig, source: Source) -> None:
    """ValueError if the run in this folder was made with other settings or on other rows."""
    trainer = Trainer(sae, config)
    check_same(folder, read_run(folder), trainer.describe(source), trainer.defaults())


def as_now(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Recorded settings, in which the text is described as this version does it."""
    text = recorded.get("text")
    return {**recorded, "text": text and TextRecord.from_json(text, "text").to_json()}


def seconds_of(folder: Path) -> float:
    """Training time of a finished run; 0 if there was nothing to train."""
    return [{"seconds": 0.0}, *read_log(folder)][-1]["seconds"]


def best_rate(name: str, fvu: Mapping[float, float]) -> float:
    """The learning rate with the lowest FVU; says so if it lies at the edge of a grid."""
    best = min(fvu, key=lambda lr: fvu[lr])
    if len(fvu) > 1 and best in (min(fvu), max(fvu)):
        logger.warning("%s: the best learning rate %g lies at the edge of the grid", name, best)
    return best


def check_same_place(train: RowStore, evaluation: RowStore) -> None:
    """ValueError if two caches are not of the same model and hookpoint."""
    a, b = train.describe(), evaluation.describe()
    for key, same in (("model", a.lm.model == b.lm.model), ("hookpoint", a.hookpoint == b.hookpoint)):
        if not same:
            raise ValueError(f"{train.folder} and {evaluation.folder} differ in {key}. Use caches of one hookpoint.")


def halves(store: RowStore) -> tuple[Tensor, Tensor]:
    """The rows of every other context, to calibrate, and those of the contexts in between, to evaluate."""
    odd = store.groups % 2 == 1
    return (~odd).nonzero().squeeze(1), odd.nonzero().squeeze(1)


def recalibrate(sae: SAE, store: RowStore, rows: Tensor) -> None:
    """Calibrate on these rows of a cache, as far as they take part."""
    kept = rows[store.mask[rows]]
    order = torch.randperm(len(kept), generator=torch.Generator().manual_seed(0))
    sae.calibrate(store.batch(kept[part]).x for part in order.split(4096))


def at_equal_l0(sae: SAE, store: RowStore) -> dict[str, Any]:
    """Figures on the evaluation half: calibrated on the other half (which remains), and under "as_fitted" before that.

    Other text has another difficulty, and methods are to be compared at equal L0.
    """
    calibrate, evaluate = halves(store)
    as_fitted = evaluate_rows({"sae": sae}, store, evaluate, progress=False)["sae"].result()
    recalibrate(sae, store, calibrate)
    return {"as_fitted": as_fitted, **evaluate_rows({"sae": sae}, store, evaluate, progress=False)["sae"].result()}


def in_language_model(
    saes: Mapping[str, SAE], store: RowStore, model_name: str, text: Path, ce_tokens: int
) -> dict[str, dict[str, Any]]:
    """delta-CE and what belongs to it, on contexts of the evaluation half; clean and ablated passes are shared.

    The SAEs, all of one hookpoint or transcoders between the same two, are calibrated on the other half.
    """
    language, calibrate = store.describe().lm, halves(store)[0]
    model, tokenizer = load_model(model_name)
    assert language.context_tokens and language.bos, "the cache of a language model says so"
    cut = {"context_tokens": language.context_tokens, "bos": language.bos}
    contexts = read_contexts(tokenizer, text, tokens=2 * ce_tokens, **cut)[1::2]
    for sae in saes.values():
        recalibrate(sae, store, calibrate)
    x, *target = store.stores if isinstance(store, Aligned) else [cast(ActivationStore, store)]
    measurements, entropies = evaluate_model(
        saes,
        model,
        contexts,
        x.filter,
        hookpoint=x.hookpoint,
        target=(target[0].hookpoint, target[0].filter) if target else None,
    )
    correlation = "l0_difficulty_correlation"
    return {name: entropies.of(name) | {correlation: measurements[name].result()[correlation]} for name in saes}


def spread(runs: list[dict[str, Any]], key: str, style: str) -> str:
    """Mean and standard deviation over seeds."""
    values = [r[key] for r in runs if r.get(key) is not None]
    if not values:
        return "-"
    deviation = f" ± {format(stdev(values), style)}" if len(values) > 1 else ""
    return format(mean(values), style) + deviation


def least(runs: list[dict[str, Any]], key: str, style: str) -> str:
    """The least of all seeds: of seconds on a machine that also did other things."""
    return format(min(r[key] for r in runs), style)


def markdown(titles: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table in markdown."""
    rows = [titles, ["---"] * len(titles), *lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def between(file: Path, name: str, text: str) -> str:
    """The content of a markdown file with `text` between its marks <!-- name --> and <!-- /name -->."""
    content = file.read_text(encoding="utf-8") if file.exists() else ""
    before, opened, rest = content.partition(f"<!-- {name} -->\n")
    _, closed, after = rest.partition(f"<!-- /{name} -->\n")
    if not opened or not closed:
        raise ValueError(f"{file} has no lines <!-- {name} --> and <!-- /{name} --> to put the table between.")
    return before + opened + text + closed + after

"""What is minimised, and on what: end-to-end against local training, one SAE for all layers, SAEs side by side.

    python -m apportion.recipes.objectives --out results/objectives

Three tables on one model, by default the one inside the package on its own stories, everything in eval mode:

    mutual       two SAEs side by side with and without the penalty of objectives/mutual.py: how alike they become
    objectives   one SAE, the first of the pair without a penalty, trained further on the same tokens with each of
                 local, e2e and e2e_ds (objectives/end_to_end.py): delta-CE and FVU at the same L0, on contexts that
                 were neither trained nor calibrated on. Each objective takes the learning rate with the lowest
                 delta-CE on the contexts for calibration
    layers       one SAE trained on every layer (MLSAE): FVU at each, and how far latents spread over layers

What is finished lies in --out and is not done again when the command is given a second time. Everything at its default
took half an hour on a busy machine with two CPU cores, 13 minutes of it training.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from apportion.architectures import SAE, create, load
from apportion.disk import read_json, write_json, write_text
from apportion.embedded import stories
from apportion.evals import FIGURES, Figure, evaluate_model, evaluate_rows, held_out_rows
from apportion.evals.layers import evaluate_layers
from apportion.evals.similarity import similarity, within_similarity
from apportion.language import ContextSource, TextSource, load_model, read_contexts
from apportion.language.collect import collect, is_collected
from apportion.language.hookpoints import expand, middle_layer
from apportion.language.model import width_at
from apportion.objectives import EndToEnd, MutualConfig, MutualFeatureRegularisation
from apportion.objectives.end_to_end import PRESETS
from apportion.recipes.command import main
from apportion.recipes.experiment import as_now, markdown
from apportion.rows import CacheSource
from apportion.rows.order import held_out_groups, split_held_out
from apportion.rows.sites import LayersStore, SitesStore, open_stores
from apportion.rows.store import ActivationStore
from apportion.training import TrainConfig, Trainer

logger = logging.getLogger("apportion.recipes.objectives")

HELD_OUT = 0.1
ALIKE = (
    Figure("weight", "lambda", "g", "weight of the penalty"),
    Figure("mmcs_ab", "MMCS a to b", ".4f", "mean cosine of latents of a with the nearest of b"),
    Figure("mmcs_ba", "b to a", ".4f", "the other way"),
    Figure("one_to_one", "one-to-one", ".4f", "mean cosine of the best matching"),
    Figure("within", "within each", ".4f", "mean cosine with the nearest other latent of the same SAE"),
)


@dataclass(frozen=True, kw_only=True)
class Objectives:
    """Compare objectives on one language model."""

    out: Path
    """Where runs and tables go."""
    model: str = "embedded"
    """A transformers model: a local folder or a Hub id; embedded is the small story model inside the package."""
    text: TextSource | None = None
    """Text to run the model on; default: stories that the embedded model wrote."""
    hookpoint: str | None = None
    """Where to put the SAE; default: the output of the middle layer."""
    sae: str = "topk"
    """Which SAE, except on all layers."""
    k: int = 16
    d_sae: int | None = None
    """Number of latents; default: eight times the width of the activations."""
    tokens: int = 500_000
    """Tokens to train on; the layers of one token count as one here."""
    lr: float = 5e-3
    further_tokens: int = 200_000
    """Tokens for each of the objectives, behind those."""
    further_lrs: tuple[float, ...] = (1e-3, 3e-3)
    """Learning rates that each objective chooses from."""
    ce_tokens: int = 24_576
    """Held-out tokens for delta-CE."""
    mutual_weights: tuple[float, ...] = (0.0, 0.1, 1.0)
    """Weights of the penalty; the first has to be 0."""
    context_tokens: int = 256
    batch_tokens: int = 1024
    seed: int = 0

    def run(self) -> None:
        if self.mutual_weights[0] != 0:
            raise ValueError(f"The first of mutual_weights has to be 0, got {self.mutual_weights}.")
        results = {"mutual": self.mutual(), "objectives": self.objectives()}
        results |= {"layers": self.once("mlsae", self.on_all_layers)}
        write_json(self.out / "results.json", {"settings": self.settings(), **results})
        text = self.tables(results)
        write_text(self.out / "table.md", text)
        sys.stdout.write(text)

    def settings(self) -> dict[str, Any]:
        """What the figures of a run depend on besides what its name says."""
        left_out = ("out", "text", "further_lrs", "mutual_weights")
        mine = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in left_out}
        return json.loads(json.dumps(mine | {"text": self.text and self.text.describe().to_json()}))

    # The model, its text and its activations

    @cached_property
    def lm(self) -> tuple[Any, Any]:
        return load_model(self.model)

    @cached_property
    def place(self) -> str:
        return expand(self.lm[0], self.hookpoint or middle_layer(self.lm[0]))[0]

    @cached_property
    def source(self) -> ContextSource:
        """Enough contexts to train on `tokens` once."""
        wanted = int(self.tokens / (1 - HELD_OUT)) + 20 * self.context_tokens
        contexts = read_contexts(self.lm[1], self.text or stories(), tokens=wanted, context_tokens=self.context_tokens)
        return ContextSource(*self.lm, self.place, contexts, held_out_share=HELD_OUT, seed=self.seed)

    @cached_property
    def acts(self) -> Path:
        """A cache of the same contexts at every layer."""
        folder = self.out / "acts"
        if not is_collected(folder):
            layers, tokens = self.place.rpartition(".")[0] + ".*", self.source.contexts.numel()
            text = self.text or stories()
            collect(*self.lm, layers, text, tokens=tokens, out=folder, context_tokens=self.context_tokens)
        return folder

    def new(self, name: str, seed: int) -> SAE:
        d_in = width_at(self.lm[0], self.place)
        return create(name, d_in=d_in, d_sae=self.d_sae or 8 * d_in, k=self.k, hookpoint=self.place, seed=seed)

    def config(self, lr: float, tokens: int) -> TrainConfig:
        return TrainConfig(lr=lr, batch_tokens=self.batch_tokens, total_tokens=tokens, seed=self.seed)

    def once(self, name: str, make: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        """The figures of a run in the folder `name`, from disk if they are there."""
        folder, record = self.out / "runs" / name, self.out / "runs" / f"{name}.json"
        if record.exists():
            found = read_json(record)
            if as_now(found["settings"]) != self.settings():
                raise ValueError(f"{record} was made with other settings. Choose another --out, or remove it.")
            return found
        figures = make(folder) | {"settings": self.settings()}
        write_json(record, figures)
        logger.info("%s: %s", name, {k: round(v, 4) for k, v in figures.items() if isinstance(v, float)})
        return figures

    # The three tables

    def objectives(self) -> list[dict[str, Any]]:
        start = self.once("start", lambda folder: {"objective": "start", **self.in_model(load(self.start))})
        best = []
        for preset in PRESETS:
            runs = [self.once(f"{preset}-lr{lr:g}", partial(self.further, preset, lr)) for lr in self.further_lrs]
            best.append(min(runs, key=lambda r: r["chosen_by"]["delta_ce"]))
        return [start, *best]

    @property
    def start(self) -> Path:
        """The SAE that all objectives start from."""
        return self.out / "runs" / "mutual-0" / "sae-0"

    def further(self, preset: str, lr: float, folder: Path) -> dict[str, Any]:
        """One objective at one learning rate, on contexts in a new order."""
        config = self.config(lr, self.further_tokens)
        trainer = Trainer(load(self.start), config, EndToEnd(self.lm[0], self.place, preset))
        self.source.load_state_dict(self.source.state_dict() | {"epoch": 1, "row": 0})
        sae = trainer.fit(self.source, folder, resume=True)  # pyright: ignore[reportArgumentType]
        return {"objective": preset, "lr": lr, "seconds": trainer.seconds, **self.in_model(sae)}

    def in_model(self, sae: SAE) -> dict[str, Any]:
        """Figures on contexts for evaluation, and under "chosen_by" on those for calibration."""
        halves = split_held_out(held_out_groups(len(self.source.contexts), HELD_OUT))
        found = []
        for which in halves:
            contexts = self.source.contexts[which][: self.ce_tokens // self.context_tokens]
            measured, entropies = evaluate_model(
                {"sae": sae}, self.lm[0], contexts, self.source.filter, hookpoint=self.place, progress=False
            )
            result = measured["sae"].result()
            found.append({key: result[key] for key in ("fvu", "l0", "dead", "tokens")} | entropies.of("sae"))
        return {**found[1], "chosen_by": found[0]}

    def on_all_layers(self, folder: Path) -> dict[str, Any]:
        stores = open_stores(self.acts)
        trainer = Trainer(self.new("mlsae", self.seed), self.config(self.lr, len(stores) * self.tokens))
        sae = trainer.fit(CacheSource(LayersStore(stores), HELD_OUT, self.seed), folder, resume=True)
        together = SitesStore(stores)
        found = evaluate_layers(sae, together, held_out_rows(together, HELD_OUT), progress=False)
        return {
            "seconds": trainer.seconds,
            **{key: {name: one.result()[key] for name, one in found.layers.items()} for key in ("fvu", "l0")},
            "dead": found.pooled.result()["dead"],
            "variances": found.statistics.result(),
        }

    def mutual(self) -> list[dict[str, Any]]:
        return [self.once(f"mutual-{w:g}", partial(self.side_by_side, w)) for w in self.mutual_weights]

    def side_by_side(self, weight: float, folder: Path) -> dict[str, Any]:
        store = ActivationStore(self.acts, self.place)
        objective = MutualFeatureRegularisation(MutualConfig(weight=weight))
        pair = [self.new(self.sae, self.seed + i) for i in range(2)]
        trainer = Trainer(pair, self.config(self.lr, self.tokens), objective)
        trainer.fit(CacheSource(store, HELD_OUT, self.seed), folder, resume=True)
        saes = {str(i): sae for i, sae in enumerate(trainer.saes)}
        measured = evaluate_rows(saes, store, held_out_rows(store, HELD_OUT), progress=False)
        return {
            "weight": weight,
            "seconds": trainer.seconds,
            **similarity(saes["0"], saes["1"]),
            "within": [within_similarity(sae) for sae in saes.values()],
            **{key: [m.result()[key] for m in measured.values()] for key in ("fvu", "l0", "dead")},
        }

    def tables(self, results: dict[str, Any]) -> str:
        """All three in markdown."""
        in_model = [FIGURES[key] for key in ("delta_ce", "recovered_mean", "fvu", "l0", "dead")]
        one = [[r["objective"], f"{r.get('lr', self.lr):g}", *shown(r, in_model)] for r in results["objectives"]]
        at_layer = [FIGURES["fvu"], FIGURES["l0"]]
        found = results["layers"]
        two = [[layer, *shown({f.key: found[f.key][layer] for f in at_layer}, at_layer)] for layer in found["fvu"]]
        variances = found["variances"]["mass"]["activity"]
        var = "Var(L) {var:.3f}, E Var(L|j) {var_latent:.3f}, E Var(L|j,t) {var_pair:.3f}".format(**variances)
        of_pair = [*ALIKE, FIGURES["fvu"], FIGURES["dead"]]
        return "\n".join(
            [
                markdown([figure.title for figure in of_pair], [shown(r, of_pair) for r in results["mutual"]]),
                markdown(["objective", "lr", *(figure.title for figure in in_model)], one),
                markdown(["layer", *(figure.title for figure in at_layer)], two),
                f"{var}, over layers numbered from 0\n",
            ]
        )


def shown(result: dict[str, Any], figures: Sequence[Figure]) -> list[str]:
    """These figures as they are written; of a pair of SAEs both."""
    values = {f: result[f.key] if isinstance(result[f.key], list) else [result[f.key]] for f in figures}
    return [" / ".join(figure.written(v).removeprefix("+") for v in values[figure]) for figure in figures]


if __name__ == "__main__":
    sys.exit(main(Objectives, "objectives", __doc__))

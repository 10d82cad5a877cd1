"""`apportion eval`: how well trained SAEs do, on a cache or inside the language model."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from apportion.cli.arguments import (
    Copies,
    Count,
    Model,
    Place,
    Text,
    best_device,
    check_followed,
    check_same_model,
    model_to_follow,
)
from apportion.extras import need
from apportion.urls import is_there


@dataclass(kw_only=True)
class Eval:
    """Evaluate trained SAEs in eval mode, on a cache or inside the language model; several side by side."""

    run_folders: Annotated[Positional[tuple[str, ...]], arg(name="runs")]
    """Run folders or saved SAEs, one or several to compare."""
    model: str | None = None
    """The language model for cross-entropy; default: the one the SAE was trained on. Used together with --text, or
    with an evaluator that runs it."""
    other_model: bool = False
    """Take another model than the SAE was trained on, such as the chat model made from its base model: the figures then
    say how well the SAE does there."""
    corpus: Annotated[Text, arg(name="")] = field(default_factory=Text)
    acts: Place | None = None
    """A cache (a folder or a URL), or a .npy file of rows, to evaluate on; of the one that an SAE was trained on its
    held-out part. Default without text: that one."""
    hookpoint: str | None = None
    """For an SAE of several layers: evaluate it at this one only. Inside the model that is the only way."""
    tokens: Count = 100_000
    """How many tokens to evaluate."""
    on: str | None = None
    """What else to find out: names of evaluators, separated by commas, such as geometry."""
    recalibrate: bool = False
    """Set thresholds anew on every other context, so that L0 is k on this text, and evaluate on the rest."""
    context_tokens: Count | None = None
    """Length of contexts; default: as in training."""
    json: Path | None = None
    """Write the result to this file; of several SAEs under "runs"."""
    plots: Path | None = None
    """Draw density.png, l0.png and difficulty.png into this folder."""
    loading: Annotated[Model, arg(name="")] = field(default_factory=Model)
    copies: Annotated[Copies, arg(name="")] = field(default_factory=Copies)

    def run(self) -> None:
        from apportion.disk import check_may_write, write_json
        from apportion.evals.evaluator import EVALS, Subject, evaluators, known
        from apportion.evals.plots import save_plots
        from apportion.evals.table import print_table
        from apportion.interop.load import load

        self.copies.choose()
        if not self.run_folders:
            raise ValueError("Name at least one run folder.")
        in_model = self.corpus != Text()
        if self.json is not None and (self.json.is_dir() or not self.json.parent.is_dir()):
            raise ValueError(f"--json {self.json} is not a file in an existing folder.")
        for file in filter(None, (self.json, self.plots and self.plots / "density.png")):
            check_may_write(file)
        known(self._evals)
        if in_model and self.acts is not None:
            raise ValueError("Give either --acts (a cache) or --text / --dataset (inside the model), not both.")
        takes_model = in_model or any("model" in EVALS[name].needs for name in self._evals)
        if self.model is not None and not takes_model:
            raise ValueError("--model is used together with --text or --dataset: on which text shall it run?")
        packages = ["transformers", *self.corpus.packages] if takes_model else []
        need("This evaluation", *packages, *([] if self.plots is None else ["matplotlib"]))
        device = best_device(self.loading.device)
        saes = {folder: load(folder).to(device) for folder in self.run_folders}
        if len(saes) < len(self.run_folders):
            raise ValueError("The same run is named twice. Name each once.")
        for run, sae in saes.items():
            self._check_hookpoint(sae)
            folder = None if in_model else self._folder(sae, run)
            if self._evals:
                store = None if folder is None else self._store(folder, sae)
                evaluators(self._evals, Subject(sae, store, model=True if takes_model else None))
        loaded = self._load(saes) if takes_model else (None, None, "")
        if loaded[0] is not None and self.hookpoint is not None:
            from apportion.language.hookpoints import place_in

            self.hookpoint = str(place_in(loaded[0], self.hookpoint))
        results, table, measurements = {}, {}, {}
        for name, sae in saes.items():
            measurement, figures, others = (
                self._in_model(sae, *loaded) if in_model else self._on_rows(sae, loaded[0], name)
            )
            figures |= {"hookpoint": self.hookpoint or sae.hookpoint, "recalibrated": self.recalibrate}
            if sae.needs_target:
                figures |= {"target_hookpoint": sae.target_hookpoint}
            results[name], measurements[name if len(saes) > 1 else sae.name] = figures, measurement
            table |= {**others, name: figures}
        if self.json is not None:
            write_json(self.json, next(iter(results.values())) if len(results) == 1 else {"runs": results})
        if self.plots is not None:
            save_plots(measurements, self.plots)
        print_table(table)

    def _check_hookpoint(self, sae: Any) -> None:
        several = sae.row_kind == "layers"
        if self.hookpoint is not None and not several:
            raise ValueError(
                f"--hookpoint is for an SAE of several layers, and {sae.name} has its own: {sae.hookpoint}."
            )
        if self.corpus == Text():
            return
        if sae.row_kind == "sites":
            raise ValueError(
                f"{sae.name} reads several hookpoints at once: evaluate it on a cache (--acts), not --text."
            )
        if several and self.hookpoint is None:
            raise ValueError(f"Inside the model {sae.name} is evaluated at one of its layers: give --hookpoint.")

    @property
    def _evals(self) -> list[str]:
        return [name.strip() for name in (self.on or "").split(",") if name.strip()]

    def _with_others(self, found: dict[str, Any], sae: Any, store: Any, rows: Any, model: Any) -> dict[str, Any]:
        """These figures, and what the evaluators of --on find."""
        from apportion.evals.evaluator import Subject, evaluators, with_found

        subject = Subject(sae, store, rows, model, progress=True)
        return with_found(found, evaluators(self._evals, subject), subject)

    # On rows of a cache

    def _on_rows(self, sae: Any, model: Any, run: str) -> tuple[Any, dict[str, Any], dict[str, Any]]:
        """Measurement, figures, and rows of the table besides: one for each layer or site."""
        from apportion.evals import evaluate_layers, evaluate_rows
        from apportion.evals.rows import halves, recalibrate, unseen_rows
        from apportion.rows import SitesStore

        folder = self._folder(sae, run)
        store = self._store(folder, sae)
        if self.acts is not None:
            check_same_model(sae.source.lm.model, store.describe().lm.model, str(self.acts), self.other_model)
        rows, what = unseen_rows(store, sae, str(folder))
        rows = rows[: self.tokens * (2 if self.recalibrate else 1)]
        if self.recalibrate:
            calibrate, rows = halves(store, rows)
            recalibrate(sae, store, calibrate)
        if sae.row_kind == "layers" and isinstance(store, SitesStore):
            found = evaluate_layers(sae, store, rows)
            layers = {hookpoint: one.result() for hookpoint, one in found.layers.items()}
            figures = found.pooled.result() | {"layers": layers, "layer_statistics": found.statistics.result()}
            return found.pooled, self._with_others(figures | {"rows": what}, sae, store, rows, model), layers
        measurement = evaluate_rows({sae.name: sae}, store, rows)[sae.name]
        figures = self._with_others(measurement.result() | {"rows": what}, sae, store, rows, model)
        names = (store.hookpoint or "").split(",") if store.hookpoint else []
        each = enumerate(zip_longest(figures.get("fvu_sites", []), names[: len(figures.get("fvu_sites", []))]))
        sites = {
            f"site {i}" + f", {name}" * (name is not None): {**figures, "fvu": fvu, "fvu_unfiltered": None}
            for i, (fvu, name) in each
        }
        return measurement, figures, sites

    def _folder(self, sae: Any, run: str) -> str:
        """The cache to evaluate an SAE on; ValueError if it is not there."""
        if self.acts is not None and not is_there(self.acts):
            raise ValueError(f"There is no cache at --acts {self.acts}.")
        folder = self.acts or sae.source.folder
        if self.acts is None:
            check_followed(run, sae.source)
        if folder is None or not is_there(folder):
            raise ValueError(
                f"The cache that {sae.name} was trained on is not there ({folder}). "
                "Give --acts CACHE, or --text FILE to evaluate inside the model."
            )
        return folder

    def _store(self, folder: str, sae: Any) -> Any:
        """What to evaluate on; for an SAE of all layers its layers side by side, because that is how they are read."""
        from apportion.rows import ActivationStore, LayersStore
        from apportion.rows.opening import joined, rows_for

        if self.hookpoint is not None:
            return ActivationStore(folder, self.hookpoint)
        store: Any = rows_for(sae, self.acts)
        return joined("sites", store.stores) if isinstance(store, LayersStore) else store

    # Inside the language model

    def _load(self, saes: dict[str, Any]) -> tuple[Any, Any, str]:
        """The model that all SAEs belong to, its tokenizer and name."""
        from apportion.language.fingerprint import model_fingerprint

        names = {sae.source.lm.model.name_or_path for sae in saes.values()}
        if self.model is None and (len(names) > 1 or None in names):
            raise ValueError(
                "This SAE does not say which model and hookpoint it belongs to. Give --model."
                if None in names
                else f"The SAEs belong to different models ({', '.join(map(str, names))}): evaluate them one by one."
            )
        if any(sae.hookpoint is None for sae in saes.values()):
            raise ValueError("This SAE does not say which model and hookpoint it belongs to. Give --model.")
        if self.corpus != Text():
            self.corpus.source()  # mistakes show before the model is loaded
        name = self.model or model_to_follow(names.pop(), saes)
        dtypes = {sae.source.lm.model_dtype for sae in saes.values()}
        model, tokenizer = self.loading.load(name, dtypes.pop() if len(dtypes) == 1 else None)
        found = model_fingerprint(model)
        for sae in saes.values():
            check_same_model(sae.source.lm.model, found, name, self.other_model)
        return model, tokenizer, name

    def _in_model(self, sae: Any, model: Any, tokenizer: Any, name: str) -> tuple[Any, dict[str, Any], dict[str, Any]]:
        from apportion.evals import evaluate_model
        from apportion.evals.language_model import recalibrate_in_model
        from apportion.evals.rows import same_text
        from apportion.language import read_contexts
        from apportion.language.document_layout import Layout
        from apportion.language.model import check_context_tokens, width_at
        from apportion.rows import TokenFilter
        from apportion.rows.filter import trained_filter

        trained_on, hookpoint, target = sae.source, self.hookpoint or sae.hookpoint, sae.target_hookpoint
        if (width := width_at(model, hookpoint)) != sae.d_in:
            raise ValueError(
                f"{name} has width {width} at {hookpoint}, and the SAE takes {sae.d_in}. Use its own model."
            )
        filters = [trained_filter(trained_on, h) or TokenFilter(norm_outlier=0.0) for h in (hookpoint, target)]
        context_tokens = self.context_tokens or trained_on.lm.context_tokens or 256
        check_context_tokens(model, context_tokens)
        bos, text = trained_on.lm.bos or "auto", self.corpus.source()
        wanted = self.tokens * (2 if self.recalibrate else 1)
        given: dict[str, Any] = {"layout": Layout.from_json(trained_on.lm.layout)}
        contexts = read_contexts(tokenizer, text, tokens=wanted, context_tokens=context_tokens, bos=bos, **given)
        pair = None if target is None else (target, filters[1])
        if self.recalibrate:
            if len(contexts) < 2:
                raise ValueError("--recalibrate needs two contexts of text or more: give more --tokens, or more text.")
            recalibrate_in_model(sae, model, contexts[::2], filters[0], hookpoint=hookpoint, target=pair, **given)
            contexts = contexts[1::2]
        found, entropies = evaluate_model(
            {sae.name: sae}, model, contexts, filters[0], hookpoint=hookpoint, target=pair, **given
        )
        measurement = found[sae.name]
        seen = ", which the SAE was trained on" if same_text(trained_on.lm.text, text.describe()) else ""
        where = {"rows": f"text {text.describe().in_words()}{seen}", "model": name}
        figures = measurement.result() | entropies.of(sae.name) | where
        return measurement, self._with_others(figures, sae, None, None, model), {}

"""`apportion eval`: how well a trained SAE does, on a cache or inside the language model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from apportion.cli.arguments import Count, Text, best_device, check_same_model
from apportion.cli.rows import kind_of, open_rows


@dataclass(kw_only=True)
class Eval:
    """Evaluate a trained SAE in eval mode, on a cache or inside the language model."""

    run_folder: Annotated[Positional[Path], arg(name="run")]
    """A run folder or a saved SAE."""
    model: str | None = None
    """The language model for cross-entropy; default: the one the SAE was trained on. Used together with --text."""
    corpus: Annotated[Text, arg(name="")] = field(default_factory=Text)
    acts: Path | None = None
    """A cache to evaluate on, instead of text. Default without text: held-out rows of the training cache."""
    hookpoint: str | None = None
    """For an SAE of several layers: evaluate it at this one only. Inside the model that is the only way."""
    tokens: Count = 100_000
    """How many tokens to evaluate."""
    context_tokens: int | None = None
    """Length of contexts; default: as in training."""
    json: Path | None = None
    """Write the result to this file."""
    plots: Path | None = None
    """Draw density.png, l0.png and difficulty.png into this folder."""
    device: str = "auto"
    """cpu, cuda, ...; auto takes a GPU if there is one."""

    def run(self) -> None:
        from apportion.disk import write_json
        from apportion.evals.plots import check_plots, save_plots
        from apportion.evals.table import print_table
        from apportion.interop.load import load

        in_model = self.corpus != Text()
        if self.json is not None and (self.json.is_dir() or not self.json.parent.is_dir()):
            raise ValueError(f"--json {self.json} is not a file in an existing folder.")
        if in_model and self.acts is not None:
            raise ValueError("Give either --acts (a cache) or --text / --dataset (inside the model), not both.")
        if self.model is not None and not in_model:
            raise ValueError("--model is used together with --text or --dataset: on which text shall it run?")
        if self.plots is not None:
            check_plots()
        sae = load(self.run_folder).to(best_device(self.device))
        name = sae.name
        self._check_hookpoint(sae)
        if in_model:
            measurements, ce = self._in_model(name, sae)
            result, others = measurements[name].result() | ce.of(name), {}
        else:
            measurements, result, others = self._on_rows(name, sae)
        result |= {"hookpoint": self.hookpoint or sae.hookpoint}
        if sae.needs_target:
            result |= {"target_hookpoint": sae.target_hookpoint}
        if self.json is not None:
            write_json(self.json, result)
        if self.plots is not None:
            save_plots(measurements, self.plots)
        print_table({**others, str(self.run_folder): result})

    def _check_hookpoint(self, sae: Any) -> None:
        several = kind_of(sae.name) == "layers"
        if self.hookpoint is not None and not several:
            raise ValueError(
                f"--hookpoint is for an SAE of several layers, and {sae.name} has its own: {sae.hookpoint}."
            )
        if self.corpus == Text():
            return
        if kind_of(sae.name) == "sites":
            raise ValueError(
                f"{sae.name} reads several hookpoints at once: evaluate it on a cache (--acts), not --text."
            )
        if several and self.hookpoint is None:
            raise ValueError(f"Inside the model {sae.name} is evaluated at one of its layers: give --hookpoint.")

    def _on_rows(self, name: str, sae: Any) -> tuple[Any, dict[str, Any], dict[str, Any]]:
        """Measurements, figures, and rows of the table besides: one for each layer or site."""
        from apportion.evals import evaluate_layers, evaluate_rows, held_out_rows

        trained_on = sae.info.get("source", {})
        folder = self.acts or trained_on.get("folder")
        if folder is None or not Path(folder).exists():
            raise ValueError(
                f"The cache that {self.run_folder} was trained on is not there ({folder}). "
                "Give --acts CACHE, or --text FILE to evaluate inside the model."
            )
        store = self._store(folder, sae)
        if self.acts is not None:
            check_same_model(trained_on, store.describe(), str(self.acts))
        rows = None if self.acts is not None else held_out_rows(store, trained_on["held_out_share"])
        if kind_of(name) == "layers" and self.hookpoint is None:
            found = evaluate_layers(sae, store, rows, max_tokens=self.tokens)
            layers = {hookpoint: one.result() for hookpoint, one in found.layers.items()}
            figures = found.pooled.result() | {"layers": layers, "layer_statistics": found.statistics.result()}
            return {name: found.pooled}, figures, layers
        measurements = evaluate_rows({name: sae}, store, rows, max_tokens=self.tokens)
        figures = measurements[name].result()
        each = enumerate(zip(store.hookpoint.split(","), figures.get("fvu_sites", []), strict=False))
        sites = {f"site {i}, {name}": {**figures, "fvu": fvu, "fvu_unfiltered": None} for i, (name, fvu) in each}
        return measurements, figures, sites

    def _store(self, folder: str | Path, sae: Any) -> Any:
        """What to evaluate on; for an SAE of all layers its layers side by side, because that is how they are read."""
        from apportion.activations import ActivationStore
        from apportion.activations.sites import SitesStore

        folders = sae.info.get("source", {}).get("folders")
        if folders is not None and self.acts is None:
            return SitesStore([ActivationStore(f, h) for f, h in zip(folders, sae.hookpoint.split(","), strict=True)])
        if self.hookpoint is not None:
            return ActivationStore(folder, self.hookpoint)
        store = open_rows(folder, sae.name, sae.hookpoint, getattr(sae, "target_hookpoint", None))
        return SitesStore(store.stores) if kind_of(sae.name) == "layers" else store

    def _in_model(self, name: str, sae: Any) -> Any:
        from apportion.activations import TokenFilter, load_model, read_contexts
        from apportion.activations.filter import trained_filter
        from apportion.activations.model import check_context_tokens, model_fingerprint
        from apportion.evals import evaluate_model

        trained_on = sae.info.get("source", {})
        model_name = self.model or trained_on.get("model", {}).get("name_or_path")
        if model_name is None or sae.hookpoint is None:
            raise ValueError("This SAE does not say which model and hookpoint it belongs to. Give --model.")
        text = self.corpus.source()
        model, tokenizer = load_model(model_name)
        check_same_model(trained_on, {"model": model_fingerprint(model)}, model_name)
        model.to(best_device(self.device))
        hookpoint, target = self.hookpoint or sae.hookpoint, getattr(sae, "target_hookpoint", None)
        filters = [trained_filter(trained_on, h) or TokenFilter(norm_outlier=0.0) for h in (hookpoint, target)]
        context_tokens = self.context_tokens or trained_on.get("context_tokens", 256)
        check_context_tokens(model, context_tokens)
        bos = trained_on.get("bos", "auto")
        contexts = read_contexts(tokenizer, text, tokens=self.tokens, context_tokens=context_tokens, bos=bos)
        pair = None if target is None else (target, filters[1])
        return evaluate_model({name: sae}, model, contexts, filters[0], hookpoint=hookpoint, target=pair)

"""`apportion eval`: how well a trained SAE does, on a cache or inside the language model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from apportion.cli.arguments import Count, Text, best_device, check_same_model


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
        from apportion.architectures import load
        from apportion.architectures.files import write_json
        from apportion.evals.plots import check_plots, save_plots
        from apportion.evals.table import print_table

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
        measurements, ce = self._in_model(name, sae) if in_model else (self._on_rows(name, sae), None)
        result = measurements[name].result() | {"hookpoint": sae.hookpoint} | (ce.of(name) if ce else {})
        if self.json is not None:
            write_json(self.json, result)
        if self.plots is not None:
            save_plots(measurements, self.plots)
        print_table({str(self.run_folder): result})

    def _on_rows(self, name: str, sae: Any) -> Any:
        from apportion.activations import ActivationStore
        from apportion.evals import evaluate_rows, held_out_rows

        trained_on = sae.info.get("source", {})
        if self.acts is not None:
            store = ActivationStore(self.acts, sae.hookpoint)
            check_same_model(trained_on, store.describe(), str(self.acts))
            return evaluate_rows({name: sae}, store, max_tokens=self.tokens)
        folder = trained_on.get("folder")
        if folder is None or not Path(folder).exists():
            raise ValueError(
                f"The cache that {self.run_folder} was trained on is not there ({folder}). "
                "Give --acts CACHE, or --text FILE to evaluate inside the model."
            )
        store = ActivationStore(folder, sae.hookpoint)
        return evaluate_rows(
            {name: sae}, store, held_out_rows(store, trained_on["held_out_share"]), max_tokens=self.tokens
        )

    def _in_model(self, name: str, sae: Any) -> Any:
        from apportion.activations import TokenFilter, load_model, read_contexts
        from apportion.activations.collect import check_context_tokens, model_fingerprint
        from apportion.evals import evaluate_model

        trained_on = sae.info.get("source", {})
        model_name = self.model or trained_on.get("model", {}).get("name_or_path")
        if model_name is None or sae.hookpoint is None:
            raise ValueError("This SAE does not say which model and hookpoint it belongs to. Give --model.")
        text = self.corpus.source()
        model, tokenizer = load_model(model_name)
        check_same_model(trained_on, {"model": model_fingerprint(model)}, model_name)
        model.to(best_device(self.device))
        token_filter = TokenFilter.from_dict(trained_on.get("filter", {"norm_outlier": 0.0}))
        context_tokens = self.context_tokens or trained_on.get("context_tokens", 256)
        check_context_tokens(model, context_tokens)
        bos = trained_on.get("bos", "auto")
        contexts = read_contexts(tokenizer, text, tokens=self.tokens, context_tokens=context_tokens, bos=bos)
        return evaluate_model({name: sae}, model, contexts, token_filter, hookpoint=sae.hookpoint)

"""apportion report: figures and a page about one or several trained SAEs of the same hookpoints."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from apportion.about import About
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
    say,
)
from apportion.extras import need
from apportion.trust import expanded
from apportion.urls import is_there

if TYPE_CHECKING:
    from apportion.architectures import SAE


@dataclass(kw_only=True)
class Report:
    """Write report.html, a page to look at, and report.json about trained SAEs of the same hookpoints."""

    run_folders: Annotated[Positional[tuple[str, ...]], arg(name="runs")]
    """Run folders or saved SAEs, one or several to compare."""
    out: Path | None = None
    """The folder for report.html and report.json; default: the first run's."""
    acts: Place | None = None
    """A cache (a folder or a URL) to evaluate on. Default without text: held-out rows of the cache that the SAE was
    trained on."""
    corpus: Annotated[Text, arg(name="")] = field(default_factory=Text)
    tokens: Count = 100_000
    """How many tokens to evaluate."""
    ce_tokens: int = 16_384
    """Tokens on which the language model is run with each SAE spliced in; 0 leaves that out."""
    model: str | None = None
    """The language model; default: the one that the cache was made with."""
    other_model: bool = False
    """Take another model than the SAEs were trained on, such as the chat model made from their base model."""
    loading: Annotated[Model, arg(name="")] = field(default_factory=Model)
    copies: Annotated[Copies, arg(name="")] = field(default_factory=Copies)

    def run(self) -> None:
        from apportion.disk import check_may_write
        from apportion.evals.report import make_report
        from apportion.interop.load import load
        from apportion.language.fingerprint import model_fingerprint

        self.copies.choose()
        if not self.run_folders:
            raise ValueError("Name at least one run folder.")
        device = best_device(self.loading.device)
        saes = self._named([load(folder).to(device) for folder in self.run_folders])
        check_may_write((out := self._claimed()) / "report.json")
        trained_on = self._trained_on(list(saes.values()))
        name = self.model or trained_on.lm.model.name_or_path
        packages = [] if name is None else ["transformers", *self.corpus.packages]
        need("This report", *packages, "matplotlib", "jinja2")
        if name is not None and self.model is None:
            model_to_follow(name, self.run_folders)
        text = None if self.corpus == Text() else self.corpus.source()
        cache = self._cache(trained_on, text)
        model = tokenizer = None
        if name is not None:
            model, tokenizer = self.loading.load(name, trained_on.lm.model_dtype)
            check_same_model(trained_on.lm.model, model_fingerprint(model), name, self.other_model)
        elif cache is None:
            raise ValueError("The SAE does not say which model it belongs to. Give --model.")
        with TemporaryDirectory() as temporary:
            if cache is None:
                cache = self._collect(trained_on, text, model, tokenizer, Path(temporary) / "acts")
            store, rows = self._rows(cache, saes)
            report = make_report(saes, store, rows, model, tokenizer, ce_tokens=self.ce_tokens)
        out.mkdir(parents=True, exist_ok=True)
        report.write(out / "report.html", out / "report.json")
        say(f"{out / 'report.html'}")

    def _claimed(self) -> Path:
        """Where the report goes; ValueError for a folder that holds the report of something else."""
        runs = [expanded(folder) for folder in self.run_folders]
        if self.out is None and not runs[0].is_dir():
            raise ValueError(f"{runs[0]} is no folder here, into which the report could go. Give --out.")
        out = self.out or runs[0]
        if out.is_file():
            raise ValueError(f"--out {out} is a file. Give a folder.")
        if out in runs or not out.is_dir() or not any(out.iterdir()):
            return out
        if not (out / "report.json").is_file():
            raise ValueError(f"{out} exists and holds something else than a report. Choose another --out.")
        return out

    def _named(self, saes: list[Any]) -> dict[str, Any]:
        """A name for each SAE: what it is if that tells them apart, else its folder."""
        kinds = [sae.name for sae in saes]
        names = kinds if len(set(kinds)) == len(kinds) else list(self.run_folders)
        if len(set(names)) < len(names):
            raise ValueError("The same run is named twice. Name each once.")
        return dict(zip(names, saes, strict=True))

    def _trained_on(self, saes: list[SAE]) -> About:
        """What the SAEs were trained on; one model and one hookpoint, which is that of the SAEs."""
        first, *others = saes
        for sae in saes:
            if sae.row_kind != first.row_kind:
                raise ValueError(f"{first.name} and {sae.name} take different rows. Make a report for each.")
        trained_on = first.source
        for other in others:
            if (other.hookpoint, other.target_hookpoint) != (first.hookpoint, first.target_hookpoint):
                raise ValueError(
                    f"The SAEs belong to different hookpoints ({first.hookpoint}, {other.hookpoint}). "
                    "Make a report for each."
                )
            check_same_model(trained_on.lm.model, other.source.lm.model, "One of the SAEs")
        return replace(trained_on, hookpoint=first.hookpoint, target_hookpoint=first.target_hookpoint)

    def _cache(self, trained_on: About, text: Any) -> str | None:
        """The cache to evaluate on; None if one is to be collected from the text."""
        if text is not None:
            if self.acts is not None:
                raise ValueError("Give either --acts (a cache) or --text / --dataset, not both.")
            if trained_on.hookpoint is None:
                raise ValueError("The SAE does not say which hookpoint it belongs to. Give --acts CACHE.")
            return None
        if self.acts is not None and not is_there(self.acts):
            raise ValueError(f"There is no cache at --acts {self.acts}.")
        folder = self.acts or trained_on.folder
        if self.acts is None:
            check_followed(self.run_folders[0], trained_on)
        if folder is None or not is_there(folder):
            raise ValueError(
                f"The cache that the SAE was trained on is not there ({folder}). Give --acts CACHE or --text FILE."
            )
        return folder

    def _collect(self, trained_on: About, text: Any, model: Any, tokenizer: Any, out: Path) -> str:
        """Activations on the text, in a cache that lives as long as this command."""
        from apportion.language.collect import collect
        from apportion.language.document_layout import Layout
        from apportion.rows.filter import trained_filter

        collect(
            model,
            tokenizer,
            [*(trained_on.hookpoint or "").split(","), *filter(None, [trained_on.target_hookpoint])],
            text,
            tokens=self.tokens,
            out=out,
            context_tokens=trained_on.lm.context_tokens or 256,
            bos=trained_on.lm.bos or "auto",
            token_filter=trained_filter(trained_on),
            layout=Layout.from_json(trained_on.lm.layout),
        )
        return str(out)

    def _rows(self, cache: str, saes: dict[str, Any]) -> tuple[Any, Any]:
        """The cache, opened, and the rows to evaluate on: whole contexts that none of the SAEs was trained on."""
        import torch

        from apportion.evals.rows import unseen_rows
        from apportion.rows import LayersStore
        from apportion.rows.opening import rows_for

        first = next(iter(saes.values()))
        store: Any = rows_for(first, None if self.acts is None and self.corpus == Text() else cache)
        check_same_model(first.source.lm.model, store.describe().lm.model, str(cache), self.other_model)
        unseen = torch.ones(store.rows, dtype=torch.bool)
        for sae in saes.values():
            mine = torch.zeros_like(unseen)
            mine[unseen_rows(store, sae, str(cache))[0]] = True
            unseen &= mine
        rows = unseen.nonzero().squeeze(1)
        if not len(rows):
            raise ValueError(f"Every row of {cache} was used to train one of the SAEs. Give --text or --acts.")
        length = store.describe().lm.context_tokens or 1
        if isinstance(store, LayersStore):  # a token is a row at each of them
            length *= len(store.stores)
        return store, rows[: max(1, self.tokens // length) * length]

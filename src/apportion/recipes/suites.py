"""Claims of Llama Scope (arXiv 2410.20526) on a suite: its TopK SAEs as JumpReLU SAEs, whose features do not depend on
each other, and at contexts longer than those of training.

    apportion suite MODEL --hookpoints 'model.layers.*' --sites residual,attention,mlp --sae topk --out suite/ ...
    python -m apportion.recipes.suites --suite suite/ --text valid.txt --out results/suites

Each run of the suite is measured inside its model on the same text in contexts of each length, as it is and as
`to_jumprelu` makes it: one threshold, calibrated on contexts of the first length that are not measured. Transcoders are
measured as they are. What is finished is kept, and not done again.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any

from torch import Tensor

from apportion.architectures import SAE, load, to_jumprelu
from apportion.disk import read_record, write_json
from apportion.evals import FIGURES
from apportion.evals.language_model import evaluate_model, rows_in_model
from apportion.evals.rows import Anew
from apportion.language import load_model, read_contexts
from apportion.language.model import check_context_tokens
from apportion.recipes.command import listed, main
from apportion.recipes.experiment import Record, markdown, publish
from apportion.rows import TokenFilter
from apportion.rows.filter import trained_filter
from apportion.training.together import INDEX

KINDS = {"as_trained": "as trained", "jumprelu": "JumpReLU"}
MEASURED = ("l0", "fvu", "delta_ce")


@dataclass(frozen=True, kw_only=True)
class Suites:
    """Measure a suite as it was trained and as JumpReLU SAEs, at several lengths of contexts."""

    suite: Path
    """The folder of a suite."""
    text: Path
    """To measure on; not that of training."""
    out: Path
    """Where results go, and the JumpReLU SAEs (out/jumprelu)."""
    model: str | None = None
    """The language model, if it is not where it was."""
    lengths: listed(int, "N,N,..") = (256, 1024)  # pyright: ignore[reportInvalidTypeForm]
    """Tokens of contexts; the first is that of training."""
    tokens: int = 16_384
    """Measured at each length."""
    calibration_tokens: int = 65_536
    """Of other text, for the thresholds of JumpReLU."""
    docs: Path | None = None
    """A markdown file that gets the table between <!-- suites --> and <!-- /suites -->."""

    def run(self) -> None:
        runs = read_record(self.suite / INDEX, runs=dict)["runs"]
        good = {name: run for name, run in runs.items() if not {"error", "unfinished"} & run.keys()}
        if not good:
            raise ValueError(f"{self.suite} has no finished run: train the suite first.")
        (self.out / "runs").mkdir(parents=True, exist_ok=True)
        found = [self._measured(name, run) for name, run in good.items()]
        text = self.table(found)
        publish(self, text, {"runs": found}, mark="suites")
        sys.stdout.write(text)

    def _measured(self, name: str, run: Record) -> Record:
        file, settings = self.out / "runs" / f"{name}.json", self._settings
        if file.is_file() and (found := read_record(file, figures=dict)).get("settings") == settings:
            return found
        sae, figures = load(self.suite / name), dict[str, Any]()
        saes: dict[str, SAE] = {"as_trained": sae}
        if not sae.needs_target:
            saes["jumprelu"] = to_jumprelu(sae, self._rows(sae))
            saes["jumprelu"].save(self.out / "jumprelu" / name)
        for length in self.lengths:
            contexts, place = self._contexts(sae, length), _place(sae)
            measured, entropies = evaluate_model(saes, self._model[0], contexts, **place, progress=False)
            figures[str(length)] = {
                kind: {name: figure for name, figure in (one.result() | entropies.of(kind)).items() if name in MEASURED}
                for kind, one in measured.items()
            }
        line = {"name": name, "site": run["site"], "layer": run["layer"], "k": sae.k, "figures": figures}
        line["settings"] = settings
        write_json(file, line)
        return line

    @property
    def _settings(self) -> dict[str, Any]:
        """What the figures depend on."""
        names = ("suite", "text", "model", "lengths", "tokens", "calibration_tokens")
        return json.loads(json.dumps({name: getattr(self, name) for name in names}, default=str))

    @cached_property
    def _model(self) -> tuple[Any, Any]:
        first = load(self.suite / next(iter(read_record(self.suite / INDEX, runs=dict)["runs"])))
        if (name := self.model or first.source.lm.model.name_or_path) is None:
            raise ValueError(f"{self.suite} does not say what model it is of. Give --model.")
        return load_model(name)

    def _contexts(self, sae: SAE, length: int) -> Tensor:
        """The text that is measured, in contexts of this length."""
        check_context_tokens(self._model[0], length)
        return self._read(sae, length, self.tokens)

    def _read(self, sae: SAE, length: int, tokens: int) -> Tensor:
        bos = sae.source.lm.bos or "auto"
        return read_contexts(self._model[1], self.text, tokens=tokens, context_tokens=length, bos=bos)

    def _rows(self, sae: SAE) -> Anew:
        """Rows of the text behind what is measured."""
        length, place = self.lengths[0], _place(sae)
        first = -(-self.tokens // length) + 1
        contexts = self._read(sae, length, self.tokens + length + self.calibration_tokens)[first:]
        if not len(contexts):
            raise ValueError(f"{self.text} has no text beyond --tokens {self.tokens} to calibrate on: give more text.")
        return rows_in_model(self._model[0], contexts, {place["hookpoint"]: place["token_filter"]})

    def table(self, runs: list[Record]) -> str:
        """A line for every site and kind: means over layers, and the worst of them."""
        lengths = [str(length) for length in self.lengths]
        titles = ["site", "SAE", *(f"{FIGURES[one].title}, {length}" for one in MEASURED for length in lengths)]
        lines = []
        for site in dict.fromkeys(run["site"] for run in runs):
            of_site = [run for run in runs if run["site"] == site]
            for kind, shown in KINDS.items():
                found = [run["figures"] for run in of_site if kind in run["figures"][lengths[0]]]
                if found:
                    lines.append([site, shown, *(
                        FIGURES[one].written(mean(figures[length][kind][one] for figures in found))
                        for one in MEASURED for length in lengths
                    )])  # fmt: skip
        about = (
            f"{len(runs)} SAEs, k {runs[0]['k']}; means over layers; {self.tokens:,} tokens at each length of contexts"
        )
        return f"{about}.\n\n{markdown(titles, lines)}"


def _place(sae: SAE) -> dict[str, Any]:
    """Where an SAE is measured, and what takes part."""
    none, target = TokenFilter(norm_outlier=0.0), sae.target_hookpoint
    of_target = trained_filter(sae.source, target) or none if target is not None else none
    return {
        "hookpoint": sae.hookpoint,
        "token_filter": trained_filter(sae.source, sae.hookpoint) or none,
        "target": None if target is None else (target, of_target),
    }


if __name__ == "__main__":
    sys.exit(main(Suites, "suites", __doc__))

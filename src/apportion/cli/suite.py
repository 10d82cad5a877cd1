"""`apportion suite`: an SAE at every layer and site of a model, all from one pass of it, or of a cache.

    apportion suite MODEL --hookpoints 'model.layers.*' --sites residual,mlp --text T --tokens 10M --k 32 --out runs/

It is a sweep (sweep.py) over hookpoints, and over values with commas besides: each run lies in a folder of its own, as
`apportion train` writes it. Sites are those of Llama Scope (language/layer_sites.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import arg

from apportion.cli import options
from apportion.cli.sources import Sources, is_of_rows
from apportion.cli.sweep import HELD_SHARE, Sweep, folder_of, variants
from apportion.cli.train import TrainBase, chosen_sae, given_value, train_command
from apportion.memory import free_bytes
from apportion.trust import expanded

DOC = "Train SAEs at every layer and site of a model or a cache, all from one pass; values with commas are tried each."
OWN = ("hookpoints", "sites")
PLOT = "suite.png"


@dataclass
class Suite:
    """Train SAEs at every layer and site; `words` are those of the train command but for its hookpoint."""

    words: list[str]
    hookpoints: str
    sites: tuple[str, ...]
    parse: Callable[[list[str]], Any]

    def run(self) -> int | None:
        from apportion.language.layer_sites import check_sites

        check_sites(self.sites)
        found = {name: (words, self._train(words)) for name, words in variants(self.words, least=0).items()}
        for _, train in found.values():
            if train.resume or train.requeue:  # what is there is looked at run by run
                train = dataclasses.replace(train, resume=False, requeue=True)
            train.check()
        first = next(iter(found.values()))[1]
        out, again = folder_of(first)
        sources = Sources(most_held=HELD_SHARE * free_bytes())
        runs, about = dict[str, TrainBase](), dict[str, dict[str, Any]]()
        for place in self._places(first, sources):
            for variant, (words, _) in found.items():
                name = "-".join(filter(None, (place.name, variant)))
                train = self._train(words, place)
                runs[name] = dataclasses.replace(train, source=first.source, out=out / name, **again)
                about[name] = {"layer": place.number, "site": place.site, "hookpoint": place.hookpoint}
                about[name] |= {"variant": variant} if variant else {}
        code = Sweep(runs, out, sources, about).run()
        draw(out)
        return code

    def _train(self, words: list[str], place: Any = None) -> Any:
        """The train command of a run; without a place only to look at its settings."""
        more: list[str] = []
        if place is not None:
            more = [f"--hookpoint={place.hookpoint}"]
            if place.target is not None:
                more += [*self._transcoder(words), f"--target-hookpoint={place.target}"]
        return self.parse(["train", *words, *more])

    def _transcoder(self, words: list[str]) -> list[str]:
        """What makes a run that of a transcoder with the same rule."""
        known, sae = options.table()["saes"], given_value(words, "sae") or TrainBase.sae
        if "transcoder" in sae:
            return []
        if known[sae]["architecture"] != known["topk"]["architecture"]:
            raise ValueError(
                f"There is no transcoder of {sae}: leave transcoder out of --sites, or use --sae topk or mutual_choice."
            )
        return ["--sae=transcoder", f"--allocation={known[sae]['rule']}"]

    def _places(self, train: TrainBase, sources: Sources) -> list[Any]:
        from apportion.language.layer_sites import places_in_cache, places_in_model
        from apportion.rows.manifest import read_manifest
        from apportion.rows.opening import holds_array

        train.source = str(expanded(train.source)) if train.source.startswith("~") else train.source
        train.copies.choose()
        patterns = [part.strip() for part in self.hookpoints.split(",") if part.strip()]
        if is_of_rows(train):
            if holds_array(train.source):
                raise ValueError(f"{train.source} holds rows of no hookpoint: a suite needs a cache or a model.")
            names = list(read_manifest(train.source)["hookpoints"])
            found = [place for one in patterns for place in places_in_cache(names, one, self.sites)]
        else:
            train.corpus.source(train.source)
            model = sources.model(train)[0]
            found = [place for one in patterns for place in places_in_model(model, one, self.sites)]
        return list(dict.fromkeys(found))


def draw(out: Path) -> None:
    """FVU by layer, as a picture beside the index, where pictures can be drawn."""
    from apportion.disk import read_record
    from apportion.evals.plots import can_plot, layers_chart, save_chart
    from apportion.training.together import INDEX

    runs = read_record(out / INDEX, runs=dict)["runs"]
    lines: dict[str, dict[int, float]] = {}
    for run in runs.values():
        if isinstance(run.get("layer"), int) and isinstance(run.get("fvu"), float):
            line = " ".join(filter(None, (run["site"], run.get("variant"))))
            lines.setdefault(line, {})[run["layer"]] = run["fvu"]
    if can_plot() and any(len(line) > 1 for line in lines.values()):
        save_chart(layers_chart(lines), out / PLOT)


def suite_command(argv: list[str]) -> type:
    """What --help shows."""
    name, allocation, objective = chosen_sae([word.split(",")[0] for word in argv])
    extra: list[Any] = [
        ("hookpoints", Annotated[str, arg(help="Which layers: a glob such as 'model.layers.*', several with commas.")]),
        (
            "sites",
            Annotated[str, arg(help="residual, attention, mlp, transcoder; several with commas.")],
            field(default="residual"),
        ),
    ]
    base = train_command(name, allocation, objective)
    return dataclasses.make_dataclass("Suite", extra, bases=(base,), kw_only=True, namespace={"__doc__": DOC})


def suite_of(argv: list[str], parse: Callable[[list[str]], Any]) -> Suite:
    """The suite that these words, behind "suite", ask for; `parse` reads those of a train command."""
    words, own = list[str](), dict[str, str]()
    i = 0
    while i < len(argv):
        flag, equals, value = argv[i].partition("=")
        if (name := flag.removeprefix("--")) in OWN and flag.startswith("--"):
            if not equals:
                i += 1
                value = argv[i] if i < len(argv) else ""
            own[name] = value
        else:
            words.append(argv[i])
        i += 1
    if not own.get("hookpoints"):
        raise ValueError("A suite needs --hookpoints, the layers to train at, such as 'model.layers.*'.")
    sites = tuple(part.strip() for part in own.get("sites", "residual").split(",") if part.strip())
    if any(given_value(words, name) for name in ("hookpoint", "target-hookpoint")):
        raise ValueError("A suite has --hookpoints and --sites; --hookpoint and --target-hookpoint are of train.")
    return Suite(words, own["hookpoints"], sites, parse)

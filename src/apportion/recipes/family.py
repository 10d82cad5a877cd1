"""Every SAE and every baseline at one budget: on rows with known features, and on a cache of activations.

    python -m apportion.recipes.family --out results/family --acts acts/train --eval-acts acts/valid \\
        --model MODEL --docs docs/family.md

Two tables, mean and standard deviation over seeds, everything in eval mode. On ground truth: FVU, L0, dead latents and
recovery (synthetic/ground_truth.py, evals/recovery.py). On the cache: FVU, L0, dead latents, delta-CE and seconds;
thresholds are calibrated on every other context of the evaluation cache, figures are over the rest (parts.py). All get
the same k, the same number of latents and the same tokens, and choose from the learning rates in --lrs (experiment.py).

What is finished is written to disk at once and not done again when the command is given a second time; Ctrl-C saves the
run it interrupts. Without --acts only the first table is made.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar

from tyro.conf import arg

from apportion.architectures import SAE, SAES, create
from apportion.architectures.base import RowKind
from apportion.recipes.command import assigned, listed, main
from apportion.recipes.experiment import SECONDS, Experiment, between, check_known, over_seeds, publish, run_all, table
from apportion.recipes.parts import CachePart, Part, TruthPart, kind_here

L0_TOLERANCE = 1.1
"""Where L0 is reached rather than given, a rate with which it came out larger than so many times k does not count, or
all would choose such a rate."""
BASIC = ("fvu", "l0", "dead")
RECOVERY = ("l0_correlation", "mcc", "f1", "cosine_of_features", "cosine_of_latents", "uniqueness")
FIGURES_OF = {"truth": (*BASIC, *RECOVERY), "cache": (*BASIC, "delta_ce", SECONDS)}
"""What the table of a part shows."""


UNEVEN = "uniform budgets cost FVU (docs/experiments.md), and which latent gets which budget is to be measured first"
OWN: dict[str, dict[str, Any]] = {"feature_choice": {"budgets": "zipf", "switch_at": 0.3}}
"""Where an SAE does not go by its defaults."""


@dataclass(frozen=True, kw_only=True)
class Caches(CachePart):
    """With the rows that transcoders and crosscoders take."""

    pair: listed(str, "A,B") = ()  # pyright: ignore[reportInvalidTypeForm]
    """For transcoders: two hookpoints of one cache, what they read and what they predict."""
    sites: listed(str, "A,B") = ()  # pyright: ignore[reportInvalidTypeForm]
    """For crosscoders: two hookpoints of one cache, which they take together."""

    @property
    def hookpoints(self) -> dict[RowKind, tuple[str | None, ...]]:
        return {**super().hookpoints, "pair": self.pair, "sites": self.sites}

    def check_rows(self) -> None:
        for name, two in (("pair", self.pair), ("sites", self.sites)):
            if two and len(set(two)) != 2:
                raise ValueError(f"--{name} takes two different hookpoints, separated by a comma; got {','.join(two)}.")
        super().check_rows()


@dataclass(frozen=True, kw_only=True)
class Family:
    """Compare all SAEs and baselines at one budget."""

    out: Path
    """Where runs and tables go."""
    saes: listed(str, "A,B,..") = tuple(SAES)  # pyright: ignore[reportInvalidTypeForm]
    """Which SAEs."""
    seeds: listed(int, "0,1,..") = (0, 1, 2)  # pyright: ignore[reportInvalidTypeForm]
    """Seeds of initial weights and data order."""
    lrs: listed(float, "LR,LR,..") = (3e-3,)  # pyright: ignore[reportInvalidTypeForm]
    """Learning rates that every SAE may choose from."""
    lr_of: listed(str, "SAE=LR,..") = ()  # pyright: ignore[reportInvalidTypeForm]
    """Learning rates of SAEs that are not to choose, such as relu=1e-2."""
    parts: listed(str, "A,B") = ("truth", "cache")  # pyright: ignore[reportInvalidTypeForm]
    """Which tables; without --acts only the first."""
    docs: Path | None = None
    """A markdown file that gets the tables, between <!-- truth --> and <!-- /truth -->, <!-- cache --> and so on."""
    truth: TruthPart = field(default_factory=TruthPart)
    cache: Annotated[Caches, arg(name="")] = field(default_factory=Caches)

    figures: ClassVar[dict[str, tuple[str, ...]]] = FIGURES_OF

    def run(self) -> None:
        run_all(*self.experiments())

    def experiments(self) -> list[Experiment]:
        """One for each table. ValueError for what cannot work."""
        check_known(self.saes, SAES, "SAE")
        rates = self.rates()
        known, found = {"truth": self.truth, "cache": self.cache}, []
        check_known(self.parts, known, "table")
        for name in self.parts if self.cache.acts or "truth" not in self.parts else ("truth",):
            part = known[name]
            part.check_rows()
            if self.docs is not None:
                between(self.docs, name, "")
            options = {"lrs": self.lrs, "seeds": self.seeds, "write": self.write, "limit": L0_TOLERANCE * part.k}
            arms = self.arms(part)
            given = {arm: rates[arm.split()[0]] for arm in arms if arm.split()[0] in rates}
            found.append(Experiment(out=self.out / name, part=part, arms=arms, given=given, word=in_one, **options))
        return found

    def rates(self) -> dict[str, float]:
        """Of SAEs that are not to choose. ValueError for what is no SAE of the comparison, or no rate."""
        given = dict(map(assigned, self.lr_of))
        check_known(given, self.saes, "SAE in --saes")
        for name, lr in given.items():
            if isinstance(lr, bool) or not isinstance(lr, int | float):
                raise ValueError(f"--lr-of takes a number for {name}, such as {name}=1e-2; got {lr!r}.")
        return given

    def arms(self, part: Part) -> dict[str, Callable[[int], SAE]]:
        return {sae: partial(new_sae, part, sae) for sae in self.saes if why_left_out(part, sae) is None}

    def write(self, experiment: Experiment) -> None:
        """Table and results of a part, as far as it has come."""
        part, name = experiment.part, experiment.out.name
        head = f"{part.describe()}. k {part.k}, {part.d_sae} latents, {experiment.setting()}."
        shown = table("SAE", experiment.done, over_seeds(*self.figures[name]), "`{}`".format)
        said = "".join(f"* {note}\n" for sae in self.saes for note in notes(part, sae))
        text = f"{head}\n\n{shown}\n{said}"
        publish(self, text, {"runs": experiment.done}, f"{name}.json", f"{name}.md", name)


def in_one(arm: str) -> str:
    """An arm's name as part of a file's."""
    return arm.replace(" ", "-")


def notes(part: Part, name: str) -> Iterator[str]:
    """What is different about this SAE, or why it is left out."""
    if why := why_left_out(part, name):
        yield f"Not in this table: `{name}`, which {why}."
        return
    if name in OWN:
        settings = ", ".join(f"{key} = {value}" for key, value in OWN[name].items())
        yield f"`{name}` with {settings}: {UNEVEN}."
    sae = new_sae(part, name, seed=0)
    if isinstance(part, Caches) and (kind := kind_here(sae)) != "one":
        first, second = part.hookpoints[kind]
        both = f"takes {first} and {second}; FVU is over both, ΔCE is of one place and not measured."
        one = f"reads {first} and predicts {second}, which FVU and ΔCE are about."
        yield f"`{name}` {one if kind == 'pair' else both}"
    if sae.row_kind == "layers":
        yield f"`{name}`, made for all layers together, sees one here."
    if num_latents := SAES[name].architecture.d_sae_for(part.d_in):
        yield f"`{name}` has {num_latents} latents."


def why_left_out(part: Part, name: str) -> str | None:
    """Caches need to be told which hookpoints transcoders and crosscoders take."""
    kind = SAES[name].architecture.row_kind
    if not isinstance(part, Caches) or part.hookpoints.get(kind, True):
        return None
    return {"sites": "takes two hookpoints at once (--sites)", "pair": "predicts another hookpoint (--pair)"}[kind]


def new_sae(part: Part, name: str, seed: int, **settings: Any) -> SAE:
    """An untrained SAE as this comparison wants it."""
    d_sae = SAES[name].architecture.d_sae_for(part.d_in) or part.d_sae
    return create(name, d_in=part.d_in, d_sae=d_sae, k=part.k, seed=seed, **OWN.get(name, {}) | settings)


if __name__ == "__main__":
    sys.exit(main(Family, "family", __doc__))

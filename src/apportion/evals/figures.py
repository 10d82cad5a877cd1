"""The table of figures: what everything that is measured is called, how it is written, and what it means.

A figure that is here, or of a measure or evaluator that was added (measure.py, evaluator.py), has the same title,
digits and definition in the terminal, in reports, on model cards and in the tables of experiments.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Figure:
    key: str
    """Its name in what an evaluation writes."""
    title: str
    format: str
    definition: str
    better: Literal["lower", "higher"] | None = None
    """Which of two values speaks for an SAE, if one does."""
    column: str | None = ""
    """Its title in tables with little room, if another one; None: not in such tables."""

    @property
    def heading(self) -> str:
        return self.column or self.title

    def written(self, value: object, missing: str = "-") -> str:
        """The value with its digits; `missing` for what is not known."""
        return format(value, self.format) if is_number(value) else missing


FIGURES: dict[str, Figure] = {}


def add_figures(*figures: Figure) -> None:
    """Put figures into the table. ValueError for one that is there already and means something else."""
    for figure in figures:
        if FIGURES.setdefault(figure.key, figure) != figure:
            raise ValueError(
                f"There is a figure {figure.key!r} already ({FIGURES[figure.key].title}). Choose another key."
            )


def columns_of(results: Iterable[Mapping[str, Any]]) -> list[Figure]:
    """The figures that a table of these results shows, those that any of them has, in the order of FIGURES."""
    known = {key for result in results for key, value in result.items() if is_number(value)}
    return [figure for figure in FIGURES.values() if figure.key in known and figure.column is not None]


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


OF_CE = "in nats per predicted token"
add_figures(
    Figure("k", "k", "g", "the budget: active latents per token that were asked for"),
    Figure("fvu", "FVU", ".4f", "fraction of variance unexplained: sum ‖error‖² / sum ‖x - mean x‖²", "lower"),
    Figure("fvu_unfiltered", "FVU, all tokens", ".4f", "FVU with the tokens that are filtered out", "lower", "unfilt."),
    Figure("l0", "L0", ".2f", "mean number of active latents per token"),
    Figure("dead", "dead", ".2%", "share of latents that were active on none of these tokens", "lower"),
    Figure("ce_clean", "CE", ".4f", f"cross-entropy of the language model as it is, {OF_CE}", column=None),
    Figure("ce_spliced", "CE, spliced", ".4f", "with reconstructions in place of the activations", "lower", None),
    Figure("delta_ce", "ΔCE", "+.4f", f"CE, spliced - CE: what the model loses, {OF_CE}", "lower"),
    Figure("recovered_zero", "recovered (zero)", ".4f", "share of the loss by zeros avoided", "higher", "rec.0"),
    Figure("recovered_mean", "recovered (mean)", ".4f", "share of the loss by the mean avoided", "higher", "rec.µ"),
    Figure("l0_difficulty_correlation", "r(L0, CE)", ".2f", "of a token's L0 with the CE there", column="r(L0,CE)"),
    Figure(
        "l0_distance_correlation", "r(L0, distance)", ".2f", "of its L0 with its distance from the mean", column=None
    ),
)

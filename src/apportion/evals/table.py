"""The table that an evaluation prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from apportion.evals.figures import columns_of
from apportion.trust import shown

PLAIN = ("k", "fvu", "l0")
"""Figures that everybody knows who reads the table."""
OFF_BUDGET = 0.05
"""An L0 that is further from k than this share is pointed out: figures at different L0 do not compare."""


def print_table(results: Mapping[str, Mapping[str, Any]], console: Console | None = None) -> None:
    """One row per SAE, of the figures that the results have. Says over how many tokens, and what was filtered."""
    columns = columns_of(results.values())
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("SAE", overflow="fold")
    for figure in columns:
        table.add_column(figure.heading, justify="right")
    results = {shown(name, keep=""): result for name, result in results.items()}
    for name, result in results.items():
        table.add_row(Text(name), *(figure.written(result.get(figure.key)) for figure in columns))
    modes = {result["mode"] for result in results.values()}
    mode = modes.pop() if len(modes) == 1 else "eval mode"
    console = console or Console()
    console.print(table)
    for name, result in results.items():
        if (budget := off_budget(result)) is not None:
            console.print(Text(f"{name}: {budget}", style="bold yellow"))
    for said in dict.fromkeys(_evaluated_on(result, mode) for result in results.values()):
        names = [name for name, result in results.items() if _evaluated_on(result, mode) == said]
        line = said if len(names) == len(results) else f"{', '.join(names)}: {said}"
        console.print(Text(line, style="dim"))
    said = "; ".join(f"{figure.heading}: {figure.definition}" for figure in columns if figure.key not in PLAIN)
    console.print(Text(f"{said}.", style="dim"))


def _evaluated_on(result: Mapping[str, Any], mode: str) -> str:
    left_out = f"{result['filtered_share']:.2%} of tokens filtered out"
    return f"{result['tokens']:,} tokens ({shown(result.get('rows', 'held-out'))}), {mode}; {left_out}."


def off_budget(result: Mapping[str, Any]) -> str | None:
    """A sentence if the SAE takes clearly more or fewer latents here than its budget says; None if not."""
    k, l0 = result.get("k"), result.get("l0")
    if not k or l0 is None or abs(l0 / k - 1) <= OFF_BUDGET:
        return None
    remedy = "--recalibrate sets the thresholds on half of the tokens and evaluates on the other half."
    if result.get("recalibrated"):
        remedy = "give more --tokens, so that the half they are set on is like the other."
    said = f"L0 is {l0:.2f} here, and k is {k:g}: the thresholds were calibrated on other text."
    return f"{said} Figures at another L0 do not compare; {remedy}"

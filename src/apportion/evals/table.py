"""The table that an evaluation prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("fvu", "FVU", ".4f"),
    ("fvu_unfiltered", "unfiltered", ".4f"),
    ("l0", "L0", ".2f"),
    ("dead", "dead", ".2%"),
    ("delta_ce", "delta CE", "+.4f"),
    ("recovered_zero", "recovered (zero)", ".4f"),
    ("recovered_mean", "recovered (mean)", ".4f"),
    ("l0_difficulty_correlation", "r(L0, difficulty)", ".2f"),
)


def print_table(results: Mapping[str, Mapping[str, Any]], console: Console | None = None) -> None:
    """One row per SAE; columns that no result has are left out. Says over how many tokens, and what was filtered."""
    first = next(iter(results.values()))
    shown = [c for c in COLUMNS if any(c[0] in r for r in results.values())]
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("SAE")
    for _, title, _ in shown:
        table.add_column(title, justify="right")
    for name, result in results.items():
        cells = ((result.get(key), style) for key, _, style in shown)
        table.add_row(name, *("-" if value is None else format(value, style) for value, style in cells))
    console = console or Console()
    console.print(table)
    console.print(
        f"{first['tokens']:,} held-out tokens, {first['mode']}; {first['filtered_share']:.2%} of tokens filtered out. "
        f"Dead: never active on these tokens.",
        style="dim",
        highlight=False,
    )

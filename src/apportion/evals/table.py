"""The table that an evaluation prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("fvu", "FVU", ".4f"),
    ("fvu_unfiltered", "unfilt.", ".4f"),
    ("l0", "L0", ".2f"),
    ("dead", "dead", ".2%"),
    ("delta_ce", "ΔCE", "+.4f"),
    ("recovered_zero", "rec.0", ".4f"),
    ("recovered_mean", "rec.µ", ".4f"),
    ("l0_difficulty_correlation", "r(L0,CE)", ".2f"),
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
    modes = {result["mode"] for result in results.values()}
    mode = modes.pop() if len(modes) == 1 else "eval mode"
    console = console or Console()
    console.print(table)
    console.print(
        f"{first['tokens']:,} held-out tokens, {mode}; {first['filtered_share']:.2%} of tokens filtered out. "
        "Dead: never active on these tokens. unfilt.: FVU over all tokens. ΔCE: loss that splicing adds, in nats; "
        "rec.0, rec.µ: share of it recovered against zero and mean ablation.",
        style="dim",
        highlight=False,
    )

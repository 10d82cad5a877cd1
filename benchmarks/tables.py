"""The table that a case prints."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

COLUMNS = (
    "step ms",
    "quartiles",
    "tokens/s",
    "/ product",
    "peak MB",
    "over 16 B/p",
    "missed",
    "FVU before",
    "after",
)
BUSY = 0.9
"""Share of its threads' time below which the product is said to have been disturbed."""


def print_case(result: dict[str, Any]) -> None:
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 140)
    shape = ", ".join(f"{key} {result[key]}" for key in ("d_in", "d_sae", "k", "batch"))
    title = f"{result['case']}: {shape}; {result['steps']} steps after {result['warmup']}"
    table = Table(title=title, title_justify="left", box=None, header_style="bold", pad_edge=False)
    table.add_column("")
    for column in COLUMNS:
        table.add_column(column, justify="right")
    for subject in result["subjects"]:
        table.add_row(subject["label"], *_cells(subject))
    console.print(table)
    if result["unit_cpu_share"] < BUSY:
        share = f"{result['unit_cpu_share']:.0%}"
        console.print(f"The machine was busy: the product had {share} of its threads' time.", style="bold red")
    for pair, times in result["comparisons"].items():
        console.print(f"{times:6.2f}  {pair}", highlight=False)
    for skipped in result["skipped"]:
        console.print(f"not run: {skipped['label']}: {skipped['reason']}", style="dim", highlight=False)
    console.print()


def _cells(subject: dict[str, Any]) -> list[str]:
    low, high = (f"{1000 * value:.0f}" for value in subject["quartiles_s"])
    low_ratio, high_ratio = subject["ratio_quartiles"]
    missed = subject["missed"]
    trained = subject["mode"] == "train" and subject["library"] != "torch"
    return [
        f"{1000 * subject['median_s']:.1f}",
        f"{low}-{high}",
        f"{subject['tokens_per_s']:,.0f}",
        f"{subject['ratio']:.2f} ({low_ratio:.2f}-{high_ratio:.2f})",
        f"{subject['peak_bytes'] / 1e6:.0f}" if trained else "",
        f"{subject['peak_beyond_16_bytes_a_parameter'] / 1e6:.0f}" if trained else "",
        f"{missed['missed']} of {missed['matches']}" if missed else "",
        *("" if value is None else f"{value:.3f}" for value in (subject["fvu_before"], subject["fvu_after"])),
    ]

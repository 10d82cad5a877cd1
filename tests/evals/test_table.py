"""The table that an evaluation prints, and the sentence about SAEs that are off their budget."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from apportion.evals.table import off_budget, print_table


@pytest.mark.parametrize(
    ("k", "l0", "said"),
    [
        (32, 32.0, False), (32, 33.5, False), (32, 33.7, True), (32, 30.5, False), (32, 30.3, True), (2.5, 2.0, True),
        (None, 40.0, False), (0, 40.0, False), (32, None, False), (None, None, False), (32, 0.0, True),
    ],
)  # fmt: skip
def test_an_l0_more_than_a_twentieth_off_is_said(k: float | None, l0: float | None, said: bool) -> None:
    sentence = off_budget({"k": k, "l0": l0})
    assert (sentence is not None) is said
    if sentence is not None:
        assert sentence.startswith(f"L0 is {l0:.2f} here, and k is {k:g}") and "--recalibrate" in sentence


def printed(**results: dict[str, Any]) -> str:
    about = {"tokens": 1234, "mode": "eval mode", "filtered_share": 0.125}
    out = io.StringIO()
    print_table({name: about | result for name, result in results.items()}, Console(file=out, width=200))
    return out.getvalue()


def test_columns_that_no_result_has_are_left_out_and_gaps_are_marked() -> None:
    text = printed(a={"k": 4, "fvu": 0.25, "l0": 4.0}, b={"k": None, "fvu": 0.5, "l0": 7.0, "dead": 0.125})
    head, a, b = (line.split() for line in text.splitlines()[:3])
    assert head == ["SAE", "k", "FVU", "L0", "dead"]
    assert a == ["a", "4", "0.2500", "4.00", "-"] and b == ["b", "-", "0.5000", "7.00", "12.50%"]
    assert "1,234 tokens (held-out), eval mode; 12.50% of tokens filtered out" in text and "L0 is" not in text


def test_each_sae_that_is_off_its_budget_is_named() -> None:
    text = printed(a={"k": 4, "l0": 5.0}, b={"k": 4, "l0": 4.1})
    assert "a: L0 is 5.00 here, and k is 4" in text and "b: L0" not in text
    assert "(text x), train mode" in printed(a={"l0": 1.0, "rows": "text x", "mode": "train mode"})

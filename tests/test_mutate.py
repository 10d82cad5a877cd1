"""The script that puts faults in: which ones, the same for the same seed, in a copy, and what counts as noticed."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import mutate
from draw_faults import draw, faults, put_in

SOURCE = '''"""About 1 < 2."""

import math


def f(a: int, b: int = 1, *, c: bool = True) -> int:
    """Twice 2."""
    assert a < 5
    if a < b and c:
        raise ValueError(f"{a + 1} is wrong: 3")
    # umlauts such as ä and ö count once
    return max("ä".count("ä") * a, b) - len([n for n in range(3) if n])
'''


def made(line: int) -> set[str]:
    """What the line of the source may become."""
    return {put_in(SOURCE, fault).splitlines()[line - 1].strip() for fault in faults(SOURCE, {line})}


def test_faults_are_other_programs_on_the_lines_asked_for() -> None:
    found = faults(SOURCE, set(range(1, 20)))
    assert {fault.line for fault in found} == {6, 9, 10, 12}, "no docstring, annotation, import, assertion or message"
    for fault in found:
        text = put_in(SOURCE, fault)
        assert ast.dump(ast.parse(text)) != ast.dump(ast.parse(SOURCE))
        assert text.splitlines()[: fault.line - 1] == SOURCE.splitlines()[: fault.line - 1]


def test_what_a_tired_author_might_have_written() -> None:
    assert made(6) == {
        "def f(a: int, b: int = 2, *, c: bool = True) -> int:",
        "def f(a: int, b: int = 0, *, c: bool = True) -> int:",
        "def f(a: int, b: int = 1, *, c: bool = False) -> int:",
    }
    assert made(9) == {
        "if (a <= b) and c:", "if (a < b or c):", "if (a < b):", "if (not (a < b and c)):",
    }  # fmt: skip
    assert made(10) == {"pass"}
    assert 'return min("ä".count("ä") * a, b) - len([n for n in range(3) if n])'.replace('"', "'") in {
        line.replace('"', "'") for line in made(12)
    }
    assert {line.partition(" - ")[2] for line in made(12)} >= {
        "len([n for n in range(4) if n])", "len([n for n in range(3) if (not n)])",
    }  # fmt: skip


def test_drawing_is_the_same_for_the_same_seed() -> None:
    files = {"b.py": (SOURCE, {6, 9}), "a.py": (SOURCE, {1, 4, 10, 12})}
    turned = dict(reversed(files.items()))
    assert draw(files, 3, 1) == draw(turned, 3, 1) and len(draw(files, 3, 1)) == 3
    assert len({tuple(draw(files, 3, seed)) for seed in range(20)}) > 5
    every = draw(files, 100, 1)
    assert sorted((path, fault.line) for path, fault in every) == [("a.py", 10), ("a.py", 12), ("b.py", 6), ("b.py", 9)]


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with one function, and its test."""
    root = tmp_path / "checkout"
    (root / "src" / "apportion").mkdir(parents=True), (root / "tests").mkdir()
    (root / "src" / "apportion" / "__init__.py").touch()
    (root / "src" / "apportion" / "counting.py").write_text(
        "def count(n):\n    found = 0\n    while found < n:\n        found += 1\n    return max(found, 0)\n"
    )
    (root / "tests" / "test_counting.py").write_text(
        "from apportion.counting import count\n\n\ndef test_count():\n    assert count(3) == 3\n"
    )
    monkeypatch.setattr(mutate, "ROOT", root)
    monkeypatch.setattr(mutate, "TESTS", {"": ["tests/test_other.py"], "counting": ["tests/test_counting.py"]})
    return root


def listed(checkout: Path, *faults: tuple[str, str]) -> list[dict[str, Any]]:
    file = checkout.parent / "faults.json"
    file.write_text(json.dumps([{"file": "src/apportion/counting.py", "old": a, "new": b} for a, b in faults]))
    return mutate.listed(file)


@pytest.mark.slow
def test_noticed_survived_timed_out_and_gone_on_with(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {f: f.read_bytes() for f in checkout.rglob("*") if f.is_file()}
    out = checkout.parent / "out.jsonl"
    found = listed(checkout, ("found < n", "found <= n"), ("found, 0", "found, 1"), ("found += 1", "pass"))
    assert mutate.try_all(found[1:2], out, seconds=60) == 1 and mutate.try_all(found[2:], out, seconds=2) == 0
    results = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(r["outcome"], r["line"]) for r in results] == [("survived", 5), ("noticed", 4)]
    assert results[1]["by"] == "timed out"
    assert mutate.try_all(found, out, seconds=60) == 1
    (last,) = [json.loads(line) for line in out.read_text().splitlines()[2:]]
    assert (last["outcome"], last["line"], last["by"]) == ("noticed", 3, "tests/test_counting.py::test_count")
    assert "2 of 3 noticed, 1 survived" in capsys.readouterr().out
    assert {f: f.read_bytes() for f in checkout.rglob("*") if f.is_file()} == before


@pytest.mark.slow
def test_what_says_nothing_is_refused(checkout: Path) -> None:
    for old, times in (("found", 4), ("nowhere", 0)):
        with pytest.raises(SystemExit, match=f"{times} times, not once: '{old}'"):
            listed(checkout, (old, "new"))
    (checkout / "tests" / "test_counting.py").write_text("def test_count():\n    assert False\n")
    with pytest.raises(SystemExit, match="does not pass without a fault either"):
        mutate.try_all(listed(checkout, ("found < n", "found <= n")), checkout.parent / "out.jsonl", seconds=60)

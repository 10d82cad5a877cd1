"""The documentation pages are what the docstrings say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from apportion.architectures import SAES
from apportion.cli import parse
from apportion.recipes.sae_pages import SECTIONS, Described, Pages, pages, plain, write

DOCS = Path(__file__).parents[1] / "docs" / "saes"
PAGES = pages()


def test_the_committed_pages_are_those_of_the_docstrings() -> None:
    committed = {file.name: file.read_text(encoding="utf-8") for file in DOCS.iterdir()}
    assert committed.keys() == PAGES.keys()
    changed = [name for name, text in PAGES.items() if committed[name] != text]
    assert not changed, "run python -m apportion.recipes.sae_pages"


@pytest.mark.parametrize("name", SAES)
def test_every_page_is_complete(name: str) -> None:
    text = PAGES[f"{name}.md"]
    for title in (*SECTIONS, "The architecture", "The rule of allocation", "Settings"):
        assert f"\n## {title}\n\n" in text, f"{title}: see the docstring of apportion.recipes.sae_pages"
    for setting in SAES[name].settings():
        (line,) = [line for line in text.splitlines() if line.startswith(f"| `{setting}` |")]
        assert len(line.split("|")[-2].strip()) > 5, f"{setting} has no docstring"
    for target in re.findall(r"\]\((?!https:)([^)]+)", text):
        assert (DOCS / target).exists(), target
    parse(re.findall(r"^    apportion (.*)", text, flags=re.MULTILINE)[0].split())
    assert f"[`{name}`]({name}.md)" in PAGES["README.md"]


def test_sections_are_taken_out_of_docstrings(monkeypatch: pytest.MonkeyPatch) -> None:
    doc = """Title, arXiv 2401.00001.

    When is when.
        z = f(x) * 2

    When to use `a`: on Mondays
    only.

    When to use it: seldom.

    Cost of `b`: one coin.
    """
    module = __import__("apportion.architectures.plain", fromlist=["Plain"])
    monkeypatch.setattr(module, "__doc__", doc)
    found = Described.module_of(module.Plain)
    assert found.section("When to use it", "a") == "On Mondays\nonly."
    assert found.section("When to use it", "b") == "Seldom."
    assert found.section("Cost", "b") == "One coin." and found.section("Cost", "a") is None
    assert found.body.startswith(
        "Title, [arXiv 2401.00001](https://arxiv.org/abs/2401.00001).\n\nWhen is when.\n\n    z = f"
    )
    assert found.link == "[architectures/plain.py](../../src/apportion/architectures/plain.py)"


def test_text_has_no_accidental_markup() -> None:
    assert plain("a <b> x~ `<c>` *d*") == r"a \<b> x\~ `<c>` *d*"


def test_pages_of_saes_that_are_no_more_are_removed(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "old.md").write_text("gone")
    Pages(out=tmp_path).run()
    assert {file.name for file in tmp_path.iterdir()} == PAGES.keys()

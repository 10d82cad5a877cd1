"""The documentation pages are what the docstrings say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from sae_pages import SECTIONS, Described, Pages, pages, plain, write

from apportion.architectures import SAES
from apportion.cli import parse

DOCS = Path(__file__).parents[1] / "docs" / "saes"
PAGES = pages()


def test_the_committed_pages_are_those_of_the_docstrings() -> None:
    committed = {file.name: file.read_text(encoding="utf-8") for file in DOCS.iterdir()}
    assert committed.keys() == PAGES.keys()
    changed = [name for name, text in PAGES.items() if committed[name] != text]
    assert not changed, "run python tools/sae_pages.py"


@pytest.mark.parametrize("name", SAES)
def test_every_page_is_complete(name: str) -> None:
    text = PAGES[f"{name}.md"]
    for title in (*SECTIONS, "The architecture", "The rule of allocation", "Settings"):
        assert f"\n## {title}\n\n" in text, f"{title}: see the docstring of sae_pages"
    for setting in SAES[name].settings():
        (line,) = [line for line in text.splitlines() if line.startswith(f"| `{setting}` |")]
        assert len(line.split("|")[-2].strip()) > 5, f"{setting} has no docstring"
    for target in re.findall(r"\]\((?!https:)([^)]+)", text):
        assert (DOCS / target).exists(), target
    parse(re.findall(r"^    apportion (.*)", text, flags=re.MULTILINE)[0].split())
    assert f"[`{name}`]({name}.md)" in PAGES["README.md"]


PAPERS = {
    "topk": "2406.04093", "mutual_choice": "2411.02124", "feature_choice": "2411.02124", "multi_topk": "2406.04093",
    "matryoshka": "2503.17547", "transcoder": "2501.18823", "skip_transcoder": "2501.18823", "crosscoder": "Anthropic",
    "mlsae": "2409.04185", "switch": "2410.08201", "relu": "Anthropic", "gated": "2404.16014", "jumprelu": "2407.14435",
    "frozen_decoder": "2602.14111", "soft_frozen_decoder": "2602.14111", "frozen_encoder": "2602.14111",
}  # fmt: skip
"""Where each SAE is from, unless it is a baseline without a paper; one that is not here yet has any paper."""


@pytest.mark.parametrize("name", SAES)
def test_every_page_has_an_equation_and_its_source(name: str) -> None:
    architecture, rule = PAGES[f"{name}.md"].split("\n## The architecture\n")[1].split("\n## The rule of allocation\n")
    for part in (architecture, rule.split("\n## Settings\n")[0]):
        assert re.search(r"^    \S.* (=|<-) \S", part, flags=re.MULTILINE), "an indented equation"
    if not SAES[name].summary.startswith("baseline: nothing is trained"):
        source = PAPERS.get(name, "20")
        said = f"https://arxiv.org/abs/{source}" if source[0].isdigit() else source
        assert said in architecture + rule, "the paper, or whoever published it"


def test_the_page_of_mlsae_says_how_rows_are_prepared_and_what_is_ours() -> None:
    text = " ".join(PAGES["mlsae.md"].split())
    for part in (
        "(x - mean_d x) / (std_d x + 1e-5)",
        "one batch",
        "encoder bias",
        "dead windows count rows",
        "cache of several",
    ):
        assert part in text, part


def test_pages_of_transcoders_lead_to_what_a_cross_layer_one_would_take() -> None:
    for name in ("transcoder", "skip_transcoder"):
        assert "[crosscoder](crosscoder.md)" in PAGES[f"{name}.md"]
    assert "cross-layer transcoder" in PAGES["crosscoder.md"] and "model_diff(sae" in PAGES["crosscoder.md"]


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


def test_files_that_are_no_page_are_named_and_stay(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path)
    assert not caplog.text
    (tmp_path / "old.md").write_text("mine")
    Pages(out=tmp_path).run()
    assert {file.name for file in tmp_path.iterdir()} == {"old.md", *PAGES}
    assert str(tmp_path / "old.md") in caplog.text and "topk.md" not in caplog.text

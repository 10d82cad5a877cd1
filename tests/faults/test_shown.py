"""Names that steer a terminal, that are markup, formulas or HTML: shown as they are, and nothing fails of them."""

from __future__ import annotations

import io
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from test_caches import D_IN, A, write_cache
from trials import trials

import apportion as ap
from apportion.cli import main
from apportion.cli.arguments import Harmless
from apportion.evals.table import print_table
from apportion.interop.card import model_card
from apportion.progress import progress_bar
from apportion.trust import shown

NAMES = [
    *("[/x]", "[red]x", "[/]", "[link=file:///etc]x[/link]", "[bold", "x]", "\\[/x]", ":skull:"),
    *("\x1b[31mred", "\x1b]0;title\x07", "\x9b31m", "a\rb", "a\x08b", "\x7f"),
    *("x\u202ey", "a\u2028b", "zero\u200bwidth"),
    *("$\\frac$", "$x", "a$b$c", "<script>alert(1)</script>", "--><b>", "{{ 1 }}", "{x}", "%s", "a\nb"),
]
STEERING = [chr(i) for i in [*range(9), *range(11, 32), *range(127, 160)]] + ["\u202e", "\u2028", "\u200b", "\udc80"]


def harmless(text: str) -> bool:
    return not set(STEERING) & set(text)


@pytest.mark.fault("markup and escapes")
@pytest.mark.parametrize("character", trials(STEERING, short=8))
def test_what_steers_is_shown_as_an_escape(character: str) -> None:
    assert harmless(shown(f"a{character}b")) and shown(f"a{character}b") != "ab"
    assert shown("ä 漢 🙂 [x] <b> \\ \n\t") == "ä 漢 🙂 [x] <b> \\ \n\t" and shown("a\nb", keep="") == "a\\nb"


RESULT: dict[str, Any] = {"k": 4.0, "fvu": 0.5, "l0": 8.0, "dead": 0.1, "mode": "eval mode", "tokens": 100}
RESULT |= {"filtered_share": 0.1, "rows": "rows of \x1b[31m[/acts]"}


@pytest.mark.fault("markup and escapes")
@pytest.mark.parametrize("name", trials(NAMES))
def test_the_table_shows_any_name(name: str) -> None:
    console = Console(file=io.StringIO(), width=300, force_terminal=False)
    print_table({name: RESULT, "other": RESULT | {"rows": name}}, console)
    said = console.file.getvalue()
    assert harmless(said) and said.count(shown(name, keep="")) >= 2 and "[/acts]" in said


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    write_cache(folder / "acts", contexts=60)
    sae = ap.create("topk", d_in=D_IN, d_sae=128, k=4, seed=0, hookpoint=A)
    sae.fit_input(torch.randn(100, D_IN, generator=torch.Generator().manual_seed(0)))
    sae.save(folder / "sae")
    return folder


@pytest.mark.fault("markup and escapes")
@pytest.mark.parametrize("name", trials([n for n in NAMES if "/" not in n] + ["[/x]"], short=3))
def test_a_run_of_any_name_is_evaluated_and_drawn(
    name: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for run in (name, "other"):
        shutil.copytree(made / "sae", run)
    words = ["eval", name, "other", "--acts", str(made / "acts"), "--json", "figures.json"]
    assert main([*words, "--plots", "plots", "--tokens", "240"]) == 0
    assert harmless(capsys.readouterr().out)
    assert set(json.loads(Path("figures.json").read_text())["runs"]) == {name, "other"}
    assert Path("plots/l0.png").stat().st_size > 1000


@pytest.mark.fault("markup and escapes")
@pytest.mark.parametrize("name", trials(["<script>alert(1)<", "{{ 1 }}", "--><b>", "[/x]", "$\\frac$"], short=2))
def test_the_page_shows_any_name(
    name: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for run in (name, "other"):
        shutil.copytree(made / "sae", run)
    assert main(["report", name, "other", "--acts", str(made / "acts"), "--out", "out", "--tokens", "240"]) == 0
    page = Path("out/report.html").read_text()
    assert "<script>alert" not in page and "--><b>" not in page
    assert harmless(capsys.readouterr().out)


@pytest.mark.fault("markup and escapes")
@pytest.mark.parametrize("name", trials([n for n in NAMES if "\x1b" in n or "\x9b" in n or "\r" in n]))
def test_names_in_files_reach_the_terminal_as_escapes(
    name: str, tmp_path: Path, made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = {"W_enc": torch.eye(4), "W_dec": torch.eye(4), "b_enc": torch.zeros(4), "b_dec": torch.zeros(4)}
    (tmp_path / "lens").mkdir()
    save_file(weights | {name: torch.ones(1)}, tmp_path / "lens" / "sae_weights.safetensors")
    (tmp_path / "lens" / "cfg.json").write_text(json.dumps({"architecture": "topk", "k": 2, "d_in": 4, "d_sae": 4}))
    assert main(["info", str(tmp_path / "lens")]) == 2
    said = capsys.readouterr().err
    assert harmless(said) and shown(" ".join(name.split())) in said and said.count("\n") == 1
    sae = ap.load(made / "sae")
    sae.info |= {"source": {"hookpoint": name, "model": {"name_or_path": name}}, "format": name}
    sae.save(tmp_path / "ours")
    for words in (["info"], ["eval"], ["report", "--text", __file__]):
        main([words[0], str(tmp_path / "ours"), *words[1:]])
        both = capsys.readouterr()
        assert harmless(both.out) and harmless(both.err)


@pytest.mark.fault("markup and escapes")
@pytest.mark.parametrize("name", trials(NAMES))
def test_logs_show_any_name(name: str) -> None:
    record = logging.LogRecord("apportion", logging.WARNING, "", 0, "%s is odd", (name,), None)
    assert Harmless("%(message)s").format(record) == f"{shown(name)} is odd"


@pytest.mark.fault("markup and escapes")
@pytest.mark.parametrize("name", trials(["[/x]", "[/]", "[red]x"]))
def test_progress_shows_any_name(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with progress_bar(name, 10) as update:
        update(5, watched=name)
    assert name in capsys.readouterr().err


@pytest.mark.fault("markup and escapes")
@pytest.mark.parametrize("name", trials(["a|b", "a\n# b", "`x`", "<script>", "\x1b[31m"]))
def test_a_model_card_stays_a_card(name: str, made: Path) -> None:
    sae = ap.load(made / "sae")
    source = {"hookpoint": name, "model": {"name_or_path": name}, "text": {"where": name}}
    sae.info |= {"source": source, "format": name}
    card = model_card(sae, "org/name", "", {}, [], None, None)
    body = card.split("---", 2)[2]
    assert "\n# b" not in body and "<script>" not in body and harmless(body)
    rows = [line for line in body.splitlines() if line.startswith("| text")]
    assert len(rows) == 1 and rows[0].replace("\\|", "").count("|") == 3

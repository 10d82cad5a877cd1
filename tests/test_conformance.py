"""Every SAE of the table passes every check, and so does what is added with one file and one line."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path

import pytest
from sae_pages import Described, page, pages

import apportion as ap
from apportion.allocation import RULES, Rule
from apportion.architectures import SAES, NamedSAE, rule_choices
from apportion.architectures.plain import Plain
from apportion.cli import main
from apportion.cli.train import train_command
from apportion.interop.export import writable
from apportion.language import load_model
from apportion.language.collect import collect
from apportion.testing import CHECKS, Subject, check_sae
from apportion.testing.files import exported


@cache
def subject(name: str) -> Subject:
    return Subject(partial(ap.create, name))


FIRST = ("mutual_choice", "feature_choice", "jumprelu", "crosscoder")
"""The others are slow."""


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in FIRST else pytest.mark.slow) for n in SAES])
def test_conformance(name: str, check: str) -> None:
    CHECKS[check](subject(name))


OF_SETTINGS = [
    "independent_of_the_batch", "selection_equals_reference", "training_pass_is_encode", "gradients_of_losses",
    "gradient_to_the_input", "folding", "saved_is_loaded", "exported_is_loaded",
]  # fmt: skip
"""What settings could spoil."""


@pytest.mark.few(8)
@pytest.mark.parametrize("rule", [name for name in rule_choices() if "k" in RULES[name].Config.__dataclass_fields__])
@pytest.mark.parametrize("name", [name for name, entry in SAES.items() if entry.any_rule])
def test_any_rule_goes_with_the_architectures_that_take_one(name: str, rule: str) -> None:
    check_sae(
        partial(ap.create, name, allocation=rule), only=[*OF_SETTINGS, "budget_in_training", "calibration_hits_k"]
    )


SETTINGS = {
    "decoder norms": {"affinity": "code_times_decoder_norm"},
    "no b_dec": {"subtract_b_dec": False},
    "raw": {"input_norm": "none"},
    "token norm": {"input_norm": "token_norm"},
    "aux_zipf": {"aux": "aux_zipf"},
}

REFUSED = {
    ("jumprelu", "decoder norms"): 'affinity must be "code"',
    ("transcoder", "no b_dec"): "no setting 'subtract_b_dec'",
    ("skip_transcoder", "no b_dec"): "no setting 'subtract_b_dec'",
    ("relu", "aux_zipf"): "no setting 'aux'",
    ("gated", "aux_zipf"): "no setting 'aux'",
    ("pca", "aux_zipf"): "no setting 'aux'",
    ("neurons", "aux_zipf"): "no setting 'aux'",
}
"""What these SAEs cannot be told, and what they say."""


@pytest.mark.few(16)
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("name", SAES)
def test_conformance_with_other_settings(name: str, settings: str) -> None:
    factory = partial(ap.create, name, **SETTINGS[settings])
    if (name, settings) in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[name, settings]):
            factory(d_in=16, d_sae=32, k=4)
        return
    check_sae(factory, only=OF_SETTINGS)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("jumprelu", {"objective": "l0"}),
        ("jumprelu", {"objective": "l0_target"}),
        ("jumprelu", {"coefficient": 0.01, "aux": "aux_k"}),
        ("relu", {"p_end": 0.2}),
        ("relu", {"coefficient": 0.01}),
        ("switch", {"aux": "aux_k", "num_experts": 4}),
        ("transcoder", {"d_out": 5}),
        ("crosscoder", {"num_sites": 3}),
    ],
    ids=str,
)
def test_gradients_under_settings_of_its_own(name: str, settings: dict[str, object]) -> None:
    check_sae(partial(ap.create, name, **settings), only=["gradients_of_losses", "gradients_of_rules"])


def test_objectives_of_jumprelu() -> None:
    for objective in ("l0_target", "l0"):
        check_sae(partial(ap.create, "jumprelu", objective=objective), only=["training_helps", "folding"])


@pytest.mark.parametrize("name", SAES)
def test_which_saes_no_other_library_holds(name: str) -> None:
    held = [format for format in writable() if exported(subject(name).ready(), format) is not None]
    assert held == ["apportion"] if name in ("crosscoder", "switch") else len(held) > 1


# One file and one line

TOY = '''
"""The k strongest latents of each token, of those that come up to a share of its strongest.

    S_bj = 1[A_bj > share * max A_b]

When to use it: for tokens with few strong latents.

Cost: that of TopK.
"""

from dataclasses import dataclass

import torch

from apportion.allocation.base import Rule, Settled
from apportion.allocation.reference import token_choice
from apportion.ranking import rank_within


@dataclass(frozen=True, kw_only=True)
class NearBestConfig:
    k: int = 32
    """Latents kept per token, at most."""
    share: float = 0.5
    """Of the strongest affinity, which the others must exceed."""


class NearBest(Rule):
    Config = NearBestConfig
    batch_coupled = False

    @property
    def row_limit(self):
        return self.config.k

    def budget(self, tokens):
        return None

    def settle(self, candidates, budget, group):
        best = candidates.affinity.new_zeros(candidates.tokens)
        best = best.scatter_reduce(0, candidates.rows, candidates.affinity, "amax")
        rank = rank_within(candidates.rows, candidates.affinity, candidates.tokens)
        return Settled((rank < self.config.k) & (candidates.affinity > self.config.share * best[candidates.rows]))

    def reference(self, affinity):
        near = affinity > self.config.share * affinity.amax(1, keepdim=True)
        return token_choice(affinity, self.config.k) & near
'''


@pytest.fixture
def rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Rule]]:
    """The toy rule, with its line in RULES."""
    (tmp_path / "near_best.py").write_text(TOY)
    monkeypatch.syspath_prepend(tmp_path)
    from near_best import NearBest  # type: ignore[import-not-found]

    monkeypatch.setitem(RULES, "near_best", NearBest)
    yield NearBest
    sys.modules.pop("near_best")


@pytest.fixture
def acts(tiny_model_dir: Path, tmp_path: Path) -> str:
    """A cache of 640 tokens."""
    text = ["the cat sat on the mat and looked at the dog by the old house and the sea was calm " * 40]
    folder = tmp_path / "acts"
    collect(*load_model(tiny_model_dir), "model.layers.1", text, out=folder, tokens=640, context_tokens=8)
    return str(folder)


def trained_and_measured(acts: str, options: list[str]) -> None:
    """`train` and `eval` take the rule, what comes out has it, and formats that do not know it say what to do."""
    run, figures, elsewhere = (str(Path(acts).parent / name) for name in ("run", "figures.json", "elsewhere"))
    sizes = ["--k", "3", "--d-sae", "64", "--batch-tokens", "64"]
    assert main(["train", acts, *options, "--share", "0.6", *sizes, "--out", run]) == 0
    sae = ap.load(run)
    assert sae.settings()["share"] == 0.6 and type(sae.allocation) is RULES["near_best"]
    assert main(["eval", run, "--json", figures]) == 0
    measured = json.loads(Path(figures).read_text())
    assert 1 <= measured["l0"] <= 3 and 0 < measured["fvu"] < 1
    with pytest.raises(ValueError, match=r"holds the rule NearBest; .*sae\.save"):
        ap.export(sae, elsewhere, "sae_lens")


def shown_by_help(options: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit):
        main(["train", *options, "--help"])
    return " ".join(capsys.readouterr().out.split())


def test_a_rule_is_one_file_and_one_line(rule: type[Rule], acts: str, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("matryoshka", "transcoder", "switch"):
        check_sae(partial(ap.create, name, allocation="near_best"), only=OF_SETTINGS)

    with pytest.raises(ValueError, match="share"):
        ap.create("matryoshka", allocation="near_best", d_in=8, d_sae=24, k=3, shard=0.6)
    with pytest.raises(ValueError, match="near_best"):
        ap.create("matryoshka", allocation="near_bets", d_in=8, d_sae=24, k=3)
    options = ["--sae", "matryoshka", "--allocation", "near_best"]
    shown = shown_by_help(options, capsys)
    assert "--share" in shown and "which the others must exceed" in shown
    assert train_command("matryoshka", "near_best").share == 0.5
    trained_and_measured(acts, options)

    assert "near_best" in pages()["matryoshka.md"]
    assert Described.module_of(rule).section("Cost", "matryoshka") == "That of TopK."


def test_a_named_sae_with_it_is_another_line(
    rule: type[Rule], acts: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(SAES, "near_best", NamedSAE(Plain, rule, "near ties of the strongest"))
    assert ap.create("near_best", d_in=8, d_sae=24, k=3, share=0.6).settings()["share"] == 0.6
    check_sae(partial(ap.create, "near_best"))

    with pytest.raises(ValueError, match="share"):
        ap.create("near_best", d_in=8, d_sae=24, k=3, shard=0.6)
    shown = shown_by_help(["--sae", "near_best"], capsys)
    assert "--share" in shown and "which the others must exceed" in shown
    assert train_command("near_best").share == 0.5
    trained_and_measured(acts, ["--sae", "near_best"])

    text = page("near_best", SAES["near_best"])
    assert "# `near_best`\n\nNear ties of the strongest." in text
    assert "S_bj = 1[A_bj > share * max A_b]" in text and "## Cost\n\nThat of TopK." in text
    assert "| `share` | `0.5` | Of the strongest affinity, which the others must exceed. |" in text
    assert "`near_best.py`" in text and "(near_best.md)" in pages()["README.md"]

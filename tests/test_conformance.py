"""Every SAE of the table passes every check, and so does what is added with one file and one line."""

from __future__ import annotations

import json
import sys
from functools import cache, partial
from pathlib import Path

import pytest

import apportion as ap
from apportion.activations import load_model
from apportion.activations.collect import collect
from apportion.allocation import RULES
from apportion.architectures import SAES, NamedSAE, rule_choices
from apportion.architectures.plain import Plain
from apportion.cli import main
from apportion.cli.train import train_command
from apportion.testing import CHECKS, Subject, check_sae


@cache
def subject(name: str) -> Subject:
    return Subject(partial(ap.create, name))


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", SAES)
def test_conformance(name: str, check: str) -> None:
    CHECKS[check](subject(name))


OF_SETTINGS = [
    "independent_of_the_batch", "selection_equals_reference", "training_pass_is_encode", "gradients_of_losses",
    "gradient_to_the_input", "folding", "saved_is_loaded",
]  # fmt: skip
"""What settings could spoil."""


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


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=list(SETTINGS))
@pytest.mark.parametrize("name", SAES)
def test_conformance_with_other_settings(name: str, settings: dict[str, object]) -> None:
    factory = partial(ap.create, name, **settings)
    try:
        factory(d_in=16, d_sae=32, k=4)
    except ValueError:
        pytest.skip("not a setting of this SAE")
    check_sae(factory, only=OF_SETTINGS)


def test_objectives_of_jumprelu() -> None:
    for objective in ("l0_target", "tanh"):
        factory = partial(ap.create, "jumprelu", objective=objective)
        check_sae(factory, only=["gradients_of_losses", "gradients_of_rules", "training_helps", "folding"])


# One file and one line

TOY = '''
"""The k strongest latents of each token, of those that come up to a share of its strongest."""

from dataclasses import dataclass

import torch

from apportion.allocation.base import Rule, Settled
from apportion.allocation.token_choice import rank_within


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

    def bounds(self, warm):
        return None

    def settle(self, candidates, budget):
        best = candidates.affinity.new_zeros(candidates.tokens)
        best = best.scatter_reduce(0, candidates.rows, candidates.affinity, "amax")
        rank = rank_within(candidates.rows, candidates.affinity, candidates.tokens)
        return Settled((rank < self.config.k) & (candidates.affinity > self.config.share * best[candidates.rows]))
'''


@pytest.fixture
def near_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "near_best.py").write_text(TOY)
    monkeypatch.syspath_prepend(tmp_path)
    from near_best import NearBest  # type: ignore[import-not-found]

    monkeypatch.setitem(RULES, "near_best", NearBest)
    monkeypatch.setitem(SAES, "near_best", NamedSAE(Plain, NearBest, "near ties of the strongest"))
    yield
    sys.modules.pop("near_best")


def test_one_file_and_one_line_are_enough(
    near_best: None, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sae = ap.create("near_best", d_in=8, d_sae=24, k=3, share=0.6)
    assert sae.settings()["share"] == 0.6
    check_sae(partial(ap.create, "near_best"))
    check_sae(partial(ap.create, "matryoshka", allocation="near_best"), only=OF_SETTINGS)

    with pytest.raises(ValueError, match="share"):
        ap.create("near_best", d_in=8, d_sae=24, k=3, shard=0.6)
    with pytest.raises(SystemExit):
        main(["train", "--sae", "near_best", "--help"])
    shown = capsys.readouterr().out
    assert "--share" in shown and "which the others must exceed" in " ".join(shown.split())
    assert train_command("near_best").share == 0.5

    acts, run, figures = (str(tmp_path / name) for name in ("acts", "run", "figures.json"))
    text = ["the cat sat on the mat and looked at the dog by the old house and the sea was calm " * 40]
    collect(*load_model(tiny_model_dir), "model.layers.1", text, out=acts, tokens=640, context_tokens=8)
    sizes = ["--k", "3", "--d-sae", "64", "--batch-tokens", "64"]
    assert main(["train", acts, "--sae", "near_best", "--share", "0.6", *sizes, "--out", run]) == 0
    assert ap.load(run).settings()["share"] == 0.6
    assert main(["eval", run, "--json", figures]) == 0
    measured = json.loads(Path(figures).read_text())
    assert 1 <= measured["l0"] <= 3 and 0 < measured["fvu"] < 1

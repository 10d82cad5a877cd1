"""`allocation=`: architectures that work with any rule."""

from __future__ import annotations

import pytest
import torch

import apportion as ap
from apportion.allocation import RULES
from apportion.architectures import rule_choices

FREE = [name for name, entry in ap.SAES.items() if entry.any_rule]
BUDGETED = ["topk", "mutual_choice", "feature_choice"]
SETTINGS = {"d_in": 8, "d_sae": 48, "k": 3, "seed": 0}


def new(name: str, **settings: object) -> ap.SAE:
    chosen = SETTINGS | settings
    if ap.SAES[name].architecture.d_sae_for(8):
        chosen.pop("d_sae")
    if "k" not in ap.SAES[name].settings(chosen.get("allocation")):
        chosen.pop("k")
    return ap.create(name, **chosen)


def test_some_architectures_are_free_and_choices_include_all_budgets():
    assert "matryoshka" in FREE and set(BUDGETED) < set(rule_choices()) < set(RULES)
    assert "learned_threshold" not in rule_choices(), "it learns only in a JumpReLU"


@pytest.mark.parametrize("allocation", rule_choices())
@pytest.mark.parametrize("name", FREE)
def test_any_rule(name, allocation, tmp_path):
    sae = new(name, allocation=allocation)
    assert type(sae.allocation) is RULES[allocation]
    assert sae.settings().keys() == ap.SAES[name].settings(allocation).keys()
    assert sae.settings()["allocation"] == allocation
    x = torch.randn(600, *sae.row_shape, generator=torch.Generator().manual_seed(0))
    sae.fit_input(x, x)
    if any(p.requires_grad for p in sae.parameters()):
        before = {key: p.clone() for key, p in sae.named_parameters()}
        batch = ap.Batch(x[:60], target=x[:60] if "transcoder" in name else None)
        assert bool(ap.Trainer(sae, ap.TrainConfig(batch_tokens=60)).step(batch)["loss"].isfinite())
        assert any(not torch.equal(before[key], p) for key, p in sae.named_parameters())
    sae.calibrate(x)
    sae.save(tmp_path)
    loaded = ap.load(tmp_path)
    assert loaded.settings() == sae.settings() and type(loaded.allocation) is type(sae.allocation)
    a, b = sae.eval().encode(x), loaded.encode(x)
    assert torch.equal(a.values, b.values) and torch.equal(a.indices, b.indices)


@pytest.mark.parametrize("name", FREE)
def test_default_and_settings_follow_the_rule(name):
    default = next(n for n, rule in RULES.items() if rule is ap.SAES[name].rule)
    assert new(name).settings()["allocation"] == default
    assert new(name, allocation=None).settings()["allocation"] == default
    assert "budgets" in ap.SAES[name].settings("feature_choice")
    assert not {"budgets", "k_start"} & ap.SAES[name].settings("threshold").keys()
    sae = new(name, allocation="feature_choice", budgets="zipf", zipf_beta=2.0)
    assert sae.settings()["zipf_beta"] == 2.0
    with pytest.raises(ValueError, match="allocation='topk' has no setting 'budgets'"):
        new(name, allocation="topk", budgets="zipf")


@pytest.mark.parametrize(
    ("name", "allocation", "words"),
    [
        ("matryoshka", "mutual", "did you mean mutual_choice"),
        ("matryoshka", "learned_threshold", "no allocation 'learned_threshold'"),
        ("matryoshka", 3, "known are: topk"),
        ("topk", "mutual_choice", "always topk. SAEs with a choice: .*matryoshka"),
        ("topk", "nonsense", "always topk"),
    ],
)
def test_allocations_that_cannot_be(name, allocation, words):
    with pytest.raises(ValueError, match=words):
        ap.create(name, **SETTINGS, allocation=allocation)


def test_saes_with_a_rule_of_their_own_do_not_mention_it():
    for name in set(ap.SAES) - set(FREE):
        assert "allocation" not in ap.SAES[name].settings(), name
    assert "allocation" not in ap.create("topk", **SETTINGS).settings()

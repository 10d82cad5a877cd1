"""`allocation=`: architectures that work with any rule, and rules that are not for training."""

from __future__ import annotations

import json

import pytest
import torch

import apportion as ap
from apportion.allocation import RULES
from apportion.architectures import rebuild, rule_choices
from apportion.training.learner import Learner

FREE = [name for name, entry in ap.SAES.items() if entry.any_rule]
BUDGETED = ["topk", "mutual_choice", "feature_choice"]
SETTINGS = {"d_in": 8, "d_sae": 48, "k": 3, "seed": 0}


def new(name: str, **settings: object) -> ap.SAE:
    chosen = SETTINGS | settings
    if ap.SAES[name].architecture.d_sae_for(8):
        chosen.pop("d_sae")
    return ap.create(name, **chosen)


def test_some_architectures_are_free_and_choices_include_all_budgets():
    assert "matryoshka" in FREE and set(BUDGETED) <= set(rule_choices()) < set(RULES)
    assert not {"threshold", "learned_threshold"} & set(rule_choices())


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
    assert "k_start" not in ap.SAES[name].settings("feature_choice")
    sae = new(name, allocation="feature_choice", budgets="zipf", zipf_beta=2.0)
    assert sae.settings()["zipf_beta"] == 2.0
    with pytest.raises(ValueError, match="allocation='topk' has no setting 'budgets'"):
        new(name, allocation="topk", budgets="zipf")


@pytest.mark.parametrize(
    ("name", "allocation", "words"),
    [
        ("matryoshka", "mutual", "did you mean mutual_choice"),
        ("matryoshka", "learned_threshold", "only the SAE jumprelu gives"),
        ("transcoder", "threshold", "nothing would make codes sparse .* choose from: topk, mutual_choice, feature"),
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


# Rules that are not for training


@pytest.mark.parametrize("per_latent", [False, True])
def test_an_sae_that_was_found_with_thresholds_is_an_sae_like_any_other(per_latent, tmp_path):
    """It is saved and loaded, and a fine-tuning that redraws latents can build it anew; `create` refuses it."""
    sae = rebuild("transcoder", d_in=8, d_sae=48, allocation="threshold", per_latent=per_latent, seed=0)
    sae.allocation.threshold.add_(0.3)
    assert sae.k is None and sae.settings()["allocation"] == "threshold"
    assert "theta" not in sae.settings() and ("per_latent" in sae.settings()) == per_latent
    sae.save(tmp_path)
    loaded = ap.load(tmp_path)
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    assert loaded.settings() == sae.settings()
    assert torch.equal(loaded.encode(x).dense(), sae.encode(x).dense()) and loaded.encode(x).nnz
    before = loaded.W_enc.detach().clone()
    Learner(loaded, ap.TrainConfig()).redraw(torch.tensor([5]), seed=1)
    assert (loaded.W_enc != before).any(1).nonzero().tolist() == [[5]]
    with pytest.raises(ValueError, match="'threshold' cannot be chosen"):
        ap.create("transcoder", **sae.settings())


@pytest.mark.parametrize("name", ["relu", "gated"])
def test_where_the_rule_is_fixed_it_has_no_settings(name, tmp_path):
    assert not {"theta", "per_latent"} & ap.SAES[name].settings().keys()
    sae = ap.create(name, **SETTINGS)
    assert sae.settings().keys() == ap.SAES[name].settings().keys()
    for setting in ({"theta": 0.0}, {"theta": -1.0}, {"per_latent": True}):
        with pytest.raises(ValueError, match=f"{name} has no setting '{next(iter(setting))}'"):
            ap.create(name, **SETTINGS, **setting)
    # Files in which these were settings are read as what they are.
    sae.allocation.threshold.fill_(0.7)
    sae.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for older in ({}, {"theta": 0.7, "per_latent": False}):
        config["settings"] |= older
        (tmp_path / "config.json").write_text(json.dumps(config))
        x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0)) * 20
        loaded = ap.load(tmp_path)
        assert torch.equal(loaded.encode(x).dense(), sae.encode(x).dense()) and loaded.encode(x).nnz
        assert set(loaded.settings()) - set(sae.settings()) == ({"theta"} if older else set())

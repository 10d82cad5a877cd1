"""Ours into Parts and back: what every SAE with a way out computes, and a clear error where there is none."""

from __future__ import annotations

import pytest
import torch
from naive import CLOSE, D_IN, D_SAE, K, differs, inputs, rand

import apportion as ap
from apportion.architectures import rebuild
from apportion.architectures.affine import Affine
from apportion.interop.assemble import assemble, take_apart
from apportion.interop.parts import Parts

TRAINED_ON = rand(400, D_IN, seed=50, scale=3) + torch.linspace(-4, 9, D_IN)


def trained(name: str, dtype: torch.dtype = torch.float64, **settings: object) -> ap.SAE:
    """Random weights as of a trained one, decoder rows of any norm, fitted and calibrated."""
    if "d_out" in settings or "transcoder" in name:
        settings = {"d_out": 4} | settings
    sae = rebuild(name, d_in=D_IN, d_sae=D_SAE, k=K, seed=0, **settings).to(dtype)
    assert isinstance(sae, Affine)
    with torch.no_grad():
        for i, p in enumerate(sae.parameters()):
            p.add_(rand(*p.shape, seed=i, scale=0.3))
        if name == "jumprelu":
            sae.allocation.log_threshold.copy_(rand(D_SAE, seed=70, scale=0.5) - 1)
    target = (TRAINED_ON[:, :4] * 3 - 1).to(dtype) if sae.needs_target else None
    sae.fit_input(TRAINED_ON.to(dtype), target)
    sae.calibrate(TRAINED_ON.to(dtype))
    return sae.train()


PLAIN = ["topk", "mutual_choice", "feature_choice", "multi_topk", "relu", "jumprelu", "gated"]
ANY_RULE = ["matryoshka", "mlsae", "transcoder", "skip_transcoder", "frozen_decoder", "frozen_encoder"]
RULES = ["topk", "mutual_choice", "feature_choice"]
ROUTES = [
    *((name, {}) for name in [*PLAIN, "switch"]),
    *((name, {"allocation": rule}) for name in ANY_RULE for rule in RULES if name != "skip_transcoder"),
    *(("skip_transcoder", {"allocation": rule}) for rule in RULES),
    ("relu", {"theta": 0.4}),
    ("relu", {"theta": -0.4}),
    ("gated", {"theta": 0.3}),
    ("gated", {"subtract_b_dec": False}),
    ("switch", {"subtract_b_dec": False, "num_experts": 5}),
    ("topk", {"input_norm": "token_norm", "subtract_b_dec": False}),
    ("transcoder", {"input_norm": "token_standardise"}),
    ("transcoder", {"input_norm": "none"}),
]
KINDS = {"topk": "topk", "mutual_choice": "jumprelu", "feature_choice": "jumprelu", "multi_topk": "topk"}


@pytest.mark.parametrize(("name", "settings"), ROUTES, ids=str)
@pytest.mark.parametrize("affinity", ["code", "code_times_decoder_norm"])
def test_there_and_back(name, settings, affinity):
    if name == "jumprelu" and affinity != "code":
        return
    sae = trained(name, **settings, affinity=affinity)
    before = {key: t.clone() for key, t in sae.state_dict().items()}
    x = TRAINED_ON[:30].double()
    parts = take_apart(sae)
    again = assemble(parts)
    assert sae.training and not again.training
    assert all(torch.equal(t.nan_to_num(9), before[key].nan_to_num(9)) for key, t in sae.state_dict().items())
    assert parts.kind == KINDS.get(settings.get("allocation", name), parts.kind)

    folded = (sae if sae.input.kind.startswith("token") else sae.folded()).eval()
    wanted = folded.encode(x).dense()
    if affinity != "code" and parts.kind in ("topk", "switch"):
        wanted = wanted * sae.decoder_norms() * (sae.scale / sae.output.scale if sae.needs_target else 1)
    found = again.encode(x)
    assert bool((wanted > 0).any()) and bool((wanted == 0).any())
    assert differs(found.dense(), wanted) < 1e-9
    assert differs(again.decode(found, x), sae.eval()(x)) < 1e-9
    assert again.dtype == torch.float64 and again.hookpoint == sae.hookpoint
    assert again.info == sae.info and again.info is not sae.info


def test_a_fixed_basis():
    sae = ap.create("pca", d_in=D_IN, k=K)
    sae.fit_input(TRAINED_ON)
    again = assemble(take_apart(sae))
    assert differs(again(TRAINED_ON), sae.eval()(TRAINED_ON)) < CLOSE


@pytest.mark.parametrize("name", ["topk", "mutual_choice", "relu"])
def test_a_decoder_row_of_zeros(name):
    """By code times norm it never competes, whatever its code is."""
    sae = trained(name, affinity="code_times_decoder_norm")
    with torch.no_grad():
        sae.W_dec[3] = 0
        sae.b_enc[3] = 100
    sae.calibrate(TRAINED_ON.double())
    parts = take_apart(sae)
    assert all(bool(t.isfinite().all()) for t in (parts.W_enc, parts.W_dec, parts.b_enc))
    again, x = assemble(parts), TRAINED_ON.double()
    assert not again.encode(x).dense()[:, 3].any()
    assert differs(again(x), sae.eval()(x)) < 1e-9


def test_hookpoints_and_info_come_along():
    sae = ap.create("transcoder", d_in=4, d_sae=8, d_out=3, k=2, hookpoint="a:in", target_hookpoint="a")
    sae.info["note"] = {"deep": [1]}
    parts = take_apart(sae)
    assert (parts.hookpoint, parts.target_hookpoint, parts.info) == ("a:in", "a", sae.info)
    again = assemble(parts)
    assert (again.hookpoint, again.target_hookpoint) == ("a:in", "a")
    again.info["note"]["deep"].append(2)
    assert sae.info["note"] == {"deep": [1]}


@pytest.mark.parametrize("name", ["mutual_choice", "feature_choice", "matryoshka"])
def test_thresholds_are_needed(name):
    sae = ap.create(name, d_in=D_IN, d_sae=D_SAE, k=K)
    with pytest.raises(ValueError, match="calibrate"):
        take_apart(sae)


NO_WAY = {
    "several sites": ("crosscoder", {}, "No other library's format holds a crosscoder; save it in ours"),
    "experts by threshold": ("switch", {"allocation": "mutual_choice"}, "Switch SAEs .* topk only"),
    "skip of normalised tokens": ("skip_transcoder", {"input_norm": "token_norm"}, "skip .* normalised tokens"),
}


@pytest.mark.parametrize(("name", "settings", "message"), NO_WAY.values(), ids=list(NO_WAY))
def test_no_way_out(name, settings, message):
    sae = ap.create(name, d_in=D_IN, d_sae=D_SAE, k=K, **settings)
    if sae.allocation.batch_coupled:
        sae.calibrate(TRAINED_ON)
    with pytest.raises(ValueError, match=message):
        take_apart(sae)


def parts_of(kind: str, **more: object) -> Parts:
    sizes = {"W_enc": (D_SAE, D_IN), "W_dec": (D_SAE, D_IN), "b_enc": (D_SAE,), "b_dec": (D_IN,)}
    tensors = {name: rand(*shape, seed=i) for i, (name, shape) in enumerate(sizes.items())}
    return Parts(**tensors | {"kind": kind, "subtract_b_dec": True, "k": K} | more)


def test_weights_are_taken_over_rather_than_copied():
    parts = parts_of("topk")
    sae = assemble(parts)
    assert sae.W_enc.data_ptr() == parts.W_enc.data_ptr() and sae.W_dec.data_ptr() == parts.W_dec.data_ptr()
    assert sae.W_enc.requires_grad


def test_one_double_makes_all_double():
    sae = assemble(parts_of("jumprelu", b_dec=rand(D_IN, seed=4).double(), threshold=rand(D_SAE, seed=5).abs()))
    assert {t.dtype for t in sae.state_dict().values()} == {torch.float64}


def test_thresholds_that_cut_nothing():
    """Negative ones and zero are the relu."""
    x, parts = inputs(), parts_of("jumprelu", threshold=torch.zeros(D_SAE))
    parts.threshold[::2] = -1
    z = ((x - parts.b_dec) @ parts.W_enc.T + parts.b_enc).relu()
    assert differs(assemble(parts).encode(x).dense(), z) < CLOSE


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        ("gated", {"transcoder": True}, "transcoder of kind gated has no counterpart"),
        ("topk", {"W_skip": torch.ones(D_IN, D_IN)}, "Only transcoders have a skip"),
        ("batch_topk", {"k": None}, "k = None"),
        ("batch_topk", {"k": True}, "k = True"),
        ("topk", {"k": 1.5}, "whole number"),
        ("topk", {"W_dec": torch.ones(D_SAE, D_IN + 1)}, r"W_dec has shape \[20, 7\], \[20, 6\] is needed"),
    ],
)
def test_parts_that_do_not_fit(kind, more, message):
    with pytest.raises(ValueError, match=message):
        assemble(parts_of(kind, **more))

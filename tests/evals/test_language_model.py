"""Evaluation inside the model: what must come out for SAEs whose effect is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import apportion as ap
from apportion.activations import TokenFilter, load_model
from apportion.activations.hookpoints import capture
from apportion.evals import evaluate_model
from apportion.evals.language_model import token_losses

PLACE = "model.layers.1"
FILTER = TokenFilter(norm_outlier=0, special_ids=(2,))


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> Any:
    return load_model(tiny_model_dir)[0]


@pytest.fixture(scope="module")
def contexts(model: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, model.config.vocab_size, (7, 20), generator=generator)


def perfect(d: int = 32) -> ap.SAE:
    """W = [I; -I]: reconstructs anything."""
    sae = ap.create("topk", d_in=d, d_sae=2 * d, k=2 * d, input_norm="none").eval()
    with torch.no_grad():
        sae.W_enc.copy_(torch.cat([torch.eye(d), -torch.eye(d)]))
        sae.W_dec.copy_(sae.W_enc)
    return sae


def constant(value: torch.Tensor) -> ap.SAE:
    """Never fires: reconstructs `value` for every token."""
    sae = ap.create("topk", d_in=32, d_sae=64, k=2, input_norm="none").eval()
    with torch.no_grad():
        sae.b_enc.fill_(-1e6)
        sae.b_dec.copy_(value)
    return sae


@torch.no_grad()
def test_known_saes(model: Any, contexts: torch.Tensor) -> None:
    x = capture(model, [PLACE], input_ids=contexts)[PLACE]
    mask = FILTER.mask(x, contexts, torch.arange(20).expand_as(contexts))
    mean = x[mask].mean(0)
    saes = {"perfect": perfect(), "mean": constant(mean), "zero": constant(torch.zeros(32))}
    measured, ce = evaluate_model(saes, model, contexts, FILTER, hookpoint=PLACE, batch_contexts=3, progress=False)

    results = {name: measured[name].result() | ce.of(name) for name in saes}
    assert results["perfect"]["fvu"] == pytest.approx(0, abs=1e-10)
    assert results["perfect"]["delta_ce"] == pytest.approx(0, abs=1e-5)
    assert results["perfect"]["recovered_zero"] == pytest.approx(1, abs=1e-4)
    assert results["mean"]["fvu"] == pytest.approx(1, abs=1e-5)
    assert results["mean"]["recovered_mean"] == pytest.approx(0, abs=1e-3)
    assert results["mean"]["l0"] == 0 and results["mean"]["dead"] == 1
    assert results["zero"]["recovered_zero"] == pytest.approx(0, abs=1e-3)
    clean = token_losses(model, contexts).mean().item()
    assert all(r["ce_clean"] == pytest.approx(clean, abs=1e-5) for r in results.values())
    assert results["mean"]["tokens"] == int(mask.sum()) and results["mean"]["predictions"] == 7 * 19
    assert results["mean"]["filtered_share"] == pytest.approx(1 - mask.double().mean().item())


@torch.no_grad()
def test_filtered_rows_stay_untouched(model: Any, contexts: torch.Tensor) -> None:
    """With a filter that lets nothing but one row pass, splicing changes nothing before that row."""
    only = contexts.clone()
    only[:, :] = 2
    only[:, 10] = 5
    measured, ce = evaluate_model(
        {"zero": constant(torch.zeros(32))}, model, only, FILTER, hookpoint=PLACE, progress=False
    )
    result = measured["zero"].result() if measured["zero"].activations.tokens > 1 else None
    assert result is not None and result["tokens"] == len(only)
    x = capture(model, [PLACE], input_ids=only)[PLACE]
    seen = {}

    def zero_one_row(module: Any, args: Any, output: Any) -> Any:
        changed = output.clone()
        changed[:, 10] = 0
        seen["x"] = output
        return changed

    handle = model.model.layers[1].register_forward_hook(zero_one_row)
    by_hand = token_losses(model, only).mean().item()
    handle.remove()
    assert torch.allclose(seen["x"], x)
    assert ce.of("zero")["ce_spliced"] == pytest.approx(by_hand, abs=1e-6)


@torch.no_grad()
def test_difficulty_is_the_loss_of_the_prediction_made_at_the_token(model: Any, contexts: torch.Tensor) -> None:
    measured, _ = evaluate_model({"perfect": perfect()}, model, contexts[:2], FILTER, hookpoint=PLACE, progress=False)
    difficulty = measured["perfect"].difficulty()
    logits = model(input_ids=contexts[:2]).logits
    by_hand = F.cross_entropy(logits[0, 3], contexts[0, 4])
    position_3 = int(FILTER.mask(torch.zeros(3, 32), contexts[0, 1:4], torch.arange(1, 4)).sum()) - 1
    assert difficulty[position_3].item() == pytest.approx(by_hand.item(), abs=1e-5)
    assert int(difficulty.isnan().sum()) == 2, "the last token of each context predicts nothing"


def test_nothing_to_evaluate_is_said(model: Any) -> None:
    with pytest.raises(ValueError, match="no row passed"):
        evaluate_model({"p": perfect()}, model, torch.full((2, 8), 2), FILTER, hookpoint=PLACE, progress=False)

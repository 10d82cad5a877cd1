"""Evaluation inside the model: what must come out for SAEs whose effect is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import apportion as ap
from apportion.evals import evaluate_model
from apportion.evals.language_model import token_losses
from apportion.evals.measures import Difficulty
from apportion.language import load_model
from apportion.language.hookpoints import capture
from apportion.rows import TokenFilter

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
    difficulty = measured["perfect"].of(Difficulty).values()
    logits = model(input_ids=contexts[:2]).logits
    by_hand = F.cross_entropy(logits[0, 3], contexts[0, 4])
    position_3 = int(FILTER.mask(torch.zeros(3, 32), contexts[0, 1:4], torch.arange(1, 4)).sum()) - 1
    assert difficulty[position_3].item() == pytest.approx(by_hand.item(), abs=1e-5)
    assert int(difficulty.isnan().sum()) == 2, "the last token of each context predicts nothing"


def test_nothing_to_evaluate_is_said(model: Any) -> None:
    with pytest.raises(ValueError, match="no row passed"):
        evaluate_model({"p": perfect()}, model, torch.full((2, 8), 2), FILTER, hookpoint=PLACE, progress=False)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padded_contexts_are_measured_as_if_they_stood_alone(model: Any, contexts: torch.Tensor, side: str) -> None:
    """Padding takes part in nothing: not in figures, cross-entropy, ablations, and it may hold what it likes."""
    lengths = [20, 13, 20, 7, 5, 11, 19]
    sae = ap.create("topk", d_in=32, d_sae=64, k=5, seed=0, input_norm="none").eval()
    padded, mask = torch.zeros_like(contexts), torch.zeros_like(contexts, dtype=torch.bool)
    for i, n in enumerate(lengths):
        place = slice(20 - n, 20) if side == "left" else slice(0, n)
        padded[i, place], mask[i, place] = contexts[i, :n], True
    token_filter = TokenFilter(norm_outlier=0, special_ids=(5,))
    found, ce = evaluate_model(
        {"sae": sae}, model, padded, token_filter, hookpoint=PLACE, attention_mask=mask, progress=False
    )
    together = found["sae"].result() | ce.of("sae")
    x, y, sums, count = [], [], {"clean": 0.0, "spliced": 0.0}, 0
    for i, n in enumerate(lengths):
        ids = contexts[i : i + 1, :n]
        h = capture(model, [PLACE], input_ids=ids)[PLACE]
        kept = token_filter.mask(h, ids, torch.arange(n)[None])
        x.append(h[kept]), y.append(sae(h[kept]))
        sums["clean"] += token_losses(model, ids).sum().item()
        with ap.splice(model, {PLACE: lambda t, kept=kept: torch.where(kept[..., None], sae(t), t)}):
            sums["spliced"] += token_losses(model, ids).sum().item()
        count += n - 1
    x, y = torch.cat(x).double(), torch.cat(y).double()
    assert together["fvu"] == pytest.approx(((x - y) ** 2).sum().item() / ((x - x.mean(0)) ** 2).sum().item(), rel=1e-4)
    assert together["tokens"] == len(x) and together["predictions"] == count
    assert together["ce_clean"] == pytest.approx(sums["clean"] / count, rel=1e-5)
    assert together["ce_spliced"] == pytest.approx(sums["spliced"] / count, rel=1e-4)


@torch.no_grad()
def test_rows_that_take_no_part_may_hold_anything(model: Any, contexts: torch.Tensor) -> None:
    """Position 0 overflows in some models: it is left out, and stops nothing."""
    handle = model.model.layers[1].register_forward_hook(
        lambda m, args, x: torch.cat([x[:, :1] * torch.inf, x[:, 1:]], dim=1)
    )
    try:
        found, _ = evaluate_model({"p": perfect()}, model, contexts, FILTER, hookpoint=PLACE, progress=False)
    finally:
        handle.remove()
    result = found["p"].result()
    assert result["fvu"] == pytest.approx(0, abs=1e-10) and result["fvu_unfiltered"] == pytest.approx(0, abs=1e-10)
    assert found["p"].rows == contexts.numel() and result["tokens"] == int((contexts[:, 1:] != 2).sum())


def test_a_model_in_training_is_measured_without_dropout_and_stays_in_training(contexts: torch.Tensor) -> None:
    from tiny_models import make

    other = make("gpt2").train()
    ids = contexts % 90
    settings = {"hookpoint": "transformer.h.1", "progress": False}
    one, two = (evaluate_model({"p": perfect()}, other, ids, FILTER, **settings)[1].of("p") for _ in range(2))
    assert one == two and all(m.training for m in other.modules())


def test_a_place_that_nothing_reads_is_not_measured(contexts: torch.Tensor) -> None:
    class Unread(torch.nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.inner, self.config, self.side = model, model.config, torch.nn.Linear(32, 32)

        def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> Any:
            self.side(torch.zeros(*input_ids.shape, 32))
            return self.inner(input_ids=input_ids, use_cache=use_cache)

    from tiny_models import make

    with pytest.raises(ValueError, match="nothing in the model reads"):
        evaluate_model({"p": perfect()}, Unread(make("llama")), contexts % 90, FILTER, hookpoint="side", progress=False)

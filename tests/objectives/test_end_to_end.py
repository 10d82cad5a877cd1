"""Objectives through the frozen language model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import apportion as ap
from apportion.allocation import StepContext
from apportion.language import ContextSource, load_model, read_contexts
from apportion.language.hookpoints import capture, hooked
from apportion.objectives import EndToEnd, EndToEndConfig
from apportion.objectives.end_to_end import PRESETS
from apportion.rows import Batch, TokenFilter
from apportion.training import local_reconstruction
from apportion.training.objective import TrainingContext

TEXT = ["the cat sat on the mat and looked at the dog by the old house and the sea was calm " * 60]
CONTEXT, POINT, BATCH = 8, "model.layers.0", 48
LATER = ("model.layers.1", "model.layers.2")


@pytest.fixture(scope="module")
def lm(tiny_model_dir: Path) -> tuple[Any, Any]:
    return load_model(tiny_model_dir)


@pytest.fixture(scope="module")
def lm64(tiny_model_dir: Path) -> Any:
    return load_model(tiny_model_dir)[0].double()


def source(lm: tuple[Any, Any], **settings: Any) -> ContextSource:
    contexts = read_contexts(lm[1], TEXT, tokens=800, context_tokens=CONTEXT)
    return ContextSource(*lm, POINT, contexts, token_filter=TokenFilter(norm_outlier=1.3), **settings)


def batch(lm: tuple[Any, Any]) -> Batch:
    found = next(source(lm).batches(BATCH))
    assert found.mask is not None and int((~found.mask.view(-1, CONTEXT)[:, 1:]).sum()) > 0, "some outliers, too"
    return found


def new(name: str = "topk", **settings: Any) -> ap.SAE:
    return ap.create(name, **{"d_in": 32, "d_sae": 48, "k": 4, "seed": 0, "aux": "none", **settings})


def context() -> TrainingContext:
    return TrainingContext((StepContext(),))


def naive_loss(sae: Any, model: Any, b: Batch, config: EndToEndConfig) -> Tensor:
    """Whole passes with plain hooks; dense codes on the matches that the rule chose."""
    assert b.tokens is not None and b.mask is not None
    ids, mask = b.tokens.view(-1, CONTEXT).long(), b.mask.view(-1, CONTEXT)
    x = (b.x[b.mask] - sae.mean) * sae.scale
    chosen = sae.encode_scaled(x, sae.selection()).dense().detach() != 0
    z = ((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc) * chosen
    y_hat = z @ sae.W_dec + sae.b_dec
    x_hat = y_hat / sae.scale + sae.mean

    def splice(h: Tensor) -> Tensor:
        new = h.clone()
        new[mask] = x_hat
        return new

    kept: dict[str, Tensor] = {}
    looks = {name: (lambda h, name=name: kept.__setitem__(name, h)) for name in LATER}
    with hooked(model, {POINT: splice, **looks}):
        logits = model(ids).logits
    clean = capture(model, LATER, ids)
    with torch.no_grad():
        p = model(ids).logits.softmax(-1)
    loss = config.local_weight * (y_hat - x).square().mean()
    if config.loss == "kl":
        loss = loss + config.output_weight * (p * (p.log() - logits.softmax(-1).log())).sum(-1).mean()
    else:
        q = logits.softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None]).log()
        loss = loss - config.output_weight * q.mean()
    errors = [((kept[n] - clean[n])[mask] * sae.scale).square().mean() for n in LATER]
    return loss + config.downstream_weight * (errors[0] + errors[1]) / 2


CONFIGS = {
    "kl": EndToEndConfig(),
    "ce": EndToEndConfig(loss="ce", output_weight=0.3),
    "kl and downstream": EndToEndConfig(output_weight=0.5, downstream_weight=2.0),
    "ce and downstream": EndToEndConfig(loss="ce", downstream_weight=2.0),
    "downstream": EndToEndConfig(output_weight=0.0, downstream_weight=1.0),
    "everything": EndToEndConfig(downstream_weight=0.7, local_weight=0.4),
    "local": EndToEndConfig(output_weight=0.0, local_weight=1.0),
}


@pytest.mark.parametrize("name", ["topk", "mutual_choice"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
def test_values_and_gradients_are_those_of_whole_passes(lm, lm64, name, config):
    b = batch(lm)
    b.x = b.x.double()
    results = []
    for naive in (False, True):
        sae = new(name).double()
        sae.fit_input(b.rows().x)
        if naive:
            loss = naive_loss(sae, lm64, b, config)
        else:
            terms = EndToEnd(lm64, POINT, config)([sae], b, context())
            loss = torch.stack(list(terms.values())).sum()
        loss.backward()
        results.append((loss.item(), {n: p.grad for n, p in sae.named_parameters()}))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    for key, expected in results[1][1].items():
        assert (results[0][1][key] - expected).abs().max() <= 2e-5 * expected.abs().max(), key
    assert all(p.grad is None for p in lm64.parameters())


def test_kl_is_clean_against_spliced_and_not_the_other_way_round(lm):
    """With the SAE far off the two directions differ much."""
    b, sae = batch(lm), new()
    sae.fit_input(b.rows().x)
    seen: list[Tensor] = []
    objective = EndToEnd(lm[0], POINT)
    upper = objective.upper

    class Spy:
        later, hookpoint = upper.later, upper.hookpoint

        def __call__(self, ids, x):
            above = upper(ids, x)
            seen.append(above.logits.detach())
            return above

    objective.upper = Spy()  # type: ignore[assignment]
    kl = objective([sae], b, context())["kl"].item()
    p, q = (logits.double().softmax(-1) for logits in seen)
    forward, backward = (p * (p / q).log()).sum(-1).mean().item(), (q * (q / p).log()).sum(-1).mean().item()
    assert kl == pytest.approx(forward, rel=1e-4) and abs(forward - backward) > 1e-3 * forward


def test_rows_left_out_stay_and_take_no_part(lm):
    """What stands in them does not reach the SAE, and the model keeps them."""
    b, sae = batch(lm), new("mutual_choice")
    sae.fit_input(b.rows().x)
    given: list[Tensor] = []
    objective = EndToEnd(lm[0], POINT, EndToEndConfig(downstream_weight=1.0))
    run = objective.upper._run
    objective.upper._run = lambda ids, changes: given.append(changes[POINT](torch.zeros(()))) or run(ids, changes)
    seen = context()
    objective([sae], b, seen)
    clean, spliced = (x.flatten(0, 1) for x in given)
    assert torch.equal(clean, b.x) and torch.equal(spliced[~b.mask], b.x[~b.mask])
    latents = seen.seen[0][0]
    assert latents.tokens == int(b.mask.sum())
    assert torch.allclose(spliced[b.mask], sae.decode(latents), atol=1e-4)


def test_downstream_errors_are_in_units_of_the_scaled_input_and_only_over_rows_that_take_part(lm):
    b, sae = batch(lm), new(input_norm="dataset")
    sae.fit_input(b.rows().x)
    terms = EndToEnd(lm[0], POINT, EndToEndConfig(downstream_weight=1.0, later=LATER[:1]))([sae], b, context())
    ids = b.tokens.view(-1, CONTEXT)
    x = b.x.clone()
    x[b.mask] = sae(b.rows().x).detach()
    with hooked(lm[0], {POINT: lambda h: x.view_as(h)}):
        spliced = capture(lm[0], LATER[:1], ids)[LATER[0]]
    error = (spliced - capture(lm[0], LATER[:1], ids)[LATER[0]]).flatten(0, 1)[b.mask] * sae.scale
    assert terms["downstream"].item() == pytest.approx(error.square().mean().item(), rel=1e-4)


def test_a_perfect_reconstruction_costs_nothing(lm):
    sae = new(d_sae=64, k=64, input_norm="none")
    with torch.no_grad():
        sae.W_dec.copy_(torch.cat([torch.eye(32), -torch.eye(32)]))
        sae.W_enc.copy_(sae.W_dec)
    terms = EndToEnd(lm[0], POINT, EndToEndConfig(downstream_weight=1.0, local_weight=1.0))([sae], batch(lm), context())
    assert terms.keys() == {"kl", "downstream", "reconstruction"}
    assert max(t.item() for t in terms.values()) < 1e-9


def test_the_preset_local_is_plain_reconstruction(lm):
    b, sae = batch(lm), new()
    sae.fit_input(b.rows().x)
    terms = EndToEnd(lm[0], POINT, "local")([sae], b, context())
    plain = local_reconstruction([sae], b.rows(), context())
    assert terms.keys() == plain.keys() == {"reconstruction"}
    assert terms["reconstruction"].item() == plain["reconstruction"].item()


@pytest.mark.few(2)
@pytest.mark.parametrize("name", ["topk", "mutual_choice", *sorted({"relu", "gated", "jumprelu"} & ap.SAES.keys())])
@pytest.mark.parametrize("preset", PRESETS)
def test_whole_runs(lm, name, preset, tmp_path):
    """They resume exactly, leave the model alone and calibrate on filtered rows."""
    before = {key: t.clone() for key, t in lm[0].state_dict().items()}

    def trainer() -> ap.Trainer:
        sae = ap.create(name, d_in=32, d_sae=48, k=4, seed=0)
        config = ap.TrainConfig(batch_tokens=BATCH, total_tokens=10 * BATCH, checkpoint_every_tokens=4 * BATCH,
                                dead_window_tokens=2 * BATCH, log_every_steps=1)  # fmt: skip
        return ap.Trainer(sae, config, EndToEnd(lm[0], POINT, preset))

    class Crashing(ContextSource):
        def batches(self, batch_tokens):
            for i, b in enumerate(super().batches(batch_tokens)):
                if i == 6:
                    raise ZeroDivisionError
                yield b

    crashing = source(lm)
    crashing.__class__ = Crashing
    sae = trainer().fit(source(lm), tmp_path / "whole", progress=False)
    with pytest.raises(ZeroDivisionError):
        trainer().fit(crashing, tmp_path / "run", progress=False)
    again = trainer().fit(source(lm), tmp_path / "run", resume=True, progress=False)
    for key, t in sae.state_dict().items():
        assert torch.equal(t.nan_to_num(7), again.state_dict()[key].nan_to_num(7)), key
    assert sae.info["training"]["tokens"] == 10 * BATCH and sae.info["training"]["objective"]["hookpoint"] == POINT
    assert ap.load(tmp_path / "run").hookpoint == POINT
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["tokens"] for line in lines] == [BATCH * i for i in range(1, 11)]
    assert {"local": "reconstruction", "e2e": "kl", "e2e_ds": "downstream"}[preset] in lines[-1]
    assert all(torch.equal(t, before[key]) for key, t in lm[0].state_dict().items())
    with pytest.raises(ValueError, match="objective"):
        t = trainer()
        t.objective = EndToEnd(lm[0], POINT, EndToEndConfig(output_weight=0.123))
        t.fit(source(lm), tmp_path / "run", resume=True)


@pytest.mark.slow
def test_training_end_to_end_changes_the_model_less_at_the_same_l0(lm):
    kl, fvu = {}, {}
    for preset in ("local", "e2e"):
        config = ap.TrainConfig(batch_tokens=BATCH, total_tokens=150 * BATCH, lr=1e-2)
        contexts = source(lm)
        sae = ap.Trainer(new(k=1), config, EndToEnd(lm[0], POINT, preset)).fit(contexts, progress=False)
        all_of_them = next(contexts.batches(contexts.num_rows))
        with torch.no_grad():
            kl[preset] = EndToEnd(lm[0], POINT)([sae], all_of_them, context())["kl"].item()
        rows = all_of_them.rows().x
        fvu[preset] = ap.training.objective.batch_fvu(rows, sae(rows)).item()
    assert kl["e2e"] < 0.9 * kl["local"] and fvu["e2e"] > fvu["local"], (kl, fvu)


def test_several_saes_share_the_clean_pass(lm):
    b, saes = batch(lm), [new(seed=0), new(seed=1)]
    for sae in saes:
        sae.fit_input(b.rows().x)
    objective = EndToEnd(lm[0], POINT)
    both = objective(saes, b, TrainingContext((StepContext(), StepContext())))["kl"]
    alone = [objective([sae], b, context())["kl"] for sae in saes]
    assert both.item() == pytest.approx(sum(t.item() for t in alone), rel=1e-5)


def test_settings_that_cannot_work(lm, tiny_model_dir):
    with pytest.raises(ValueError, match="loss cannot be 'mse'; known are: kl, ce"):
        EndToEndConfig(loss="mse")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one of them must be positive"):
        EndToEndConfig(output_weight=0.0)
    with pytest.raises(ValueError, match="local, e2e, e2e_ds"):
        EndToEnd(lm[0], POINT, "e2e+ds")
    with pytest.raises(ValueError, match="no layer above"):
        EndToEnd(lm[0], "model.layers.2", "e2e_ds")
    from transformers import AutoModelForCausalLM

    with pytest.raises(ValueError, match="frozen model"):
        EndToEnd(AutoModelForCausalLM.from_pretrained(tiny_model_dir), POINT)


def test_rows_without_their_contexts_are_refused(lm):
    b = batch(lm)
    objective = EndToEnd(lm[0], POINT)
    for wrong in (torch.randn(20, 32), Batch(b.x[:-1], tokens=b.tokens[:-1], positions=b.positions[:-1]), b.rows()):
        with pytest.raises(ValueError, match="whole contexts"):
            ap.Trainer(new(), ap.TrainConfig(), objective).step(wrong)


def test_a_batch_of_nothing_but_left_out_rows_is_refused(lm):
    b = batch(lm)
    b.mask = torch.zeros_like(b.mask)
    with pytest.raises(ValueError, match="all rows of this batch are masked out"):
        ap.Trainer(new(), ap.TrainConfig(), EndToEnd(lm[0], POINT)).step(b)


def test_kl_divergence_in_closed_form():
    from apportion.losses import kl_divergence

    clean, other = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 3.0]]).log_softmax(-1).requires_grad_()
    q = other.detach().exp()
    expected = (0.5 * (0.5 / q).log()).sum()
    assert kl_divergence(clean, other).item() == pytest.approx(expected.item())
    kl_divergence(clean, other).backward()
    assert torch.allclose(other.grad, q - 0.5)
    assert kl_divergence(other, other).item() == pytest.approx(0, abs=1e-9)
    half = torch.tensor([[5.0, 1.0, -2.0]]).bfloat16()
    assert kl_divergence(half, half + 1).dtype == torch.float32
    assert F.softmax(clean, -1).sum() == 1

"""Whole contexts with their mask, in an order that can be resumed."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from apportion.about import About
from apportion.language import ContextSource, LiveSource, load_model, read_contexts
from apportion.language.model import run_contexts
from apportion.rows import TokenFilter

TEXT = ["the cat sat on the mat and looked at the dog by the old house and the sea was calm " * 40]
CONTEXT, POINT = 8, "model.layers.1"


@pytest.fixture(scope="module")
def lm(tiny_model_dir: Path) -> tuple[Any, Any]:
    return load_model(tiny_model_dir)


def source(lm: tuple[Any, Any], cls: type = ContextSource, **settings: Any) -> Any:
    contexts = read_contexts(lm[1], TEXT, tokens=480, context_tokens=CONTEXT)
    defaults = {"buffer_tokens": 100, "batch_contexts": 4, "token_filter": TokenFilter(norm_outlier=1.2), "seed": 3}
    return cls(*lm, POINT, contexts, **(defaults | settings))


def test_a_batch_is_whole_contexts_in_order(lm):
    batch = next(source(lm).batches(6 * CONTEXT))
    tokens = batch.tokens.view(6, CONTEXT)
    assert torch.equal(batch.positions.view(6, CONTEXT), torch.arange(CONTEXT).expand(6, -1))
    contexts = {tuple(c.tolist()) for c in source(lm).contexts}
    assert all(tuple(c.tolist()) in contexts for c in tokens)
    assert torch.allclose(batch.x, run_contexts(lm[0], [POINT], tokens)[POINT], atol=1e-5)
    assert not batch.x.is_inference() and batch.x.dtype == torch.float32


def test_the_mask_is_that_of_the_filter(lm):
    live = source(lm)
    batch = next(live.batches(20 * CONTEXT))
    assert torch.equal(batch.mask, live.filter.mask(batch.x, batch.tokens, batch.positions))
    assert not batch.mask.view(20, CONTEXT)[:, 0].any() and 0 < int(batch.mask.sum()) < 20 * (CONTEXT - 1)
    about = live.describe()
    assert about.kind == "contexts" and about.rows_seen == 20 * CONTEXT
    assert about.filtered_share == pytest.approx(1 - batch.mask.double().mean().item())
    assert About.from_json(json.loads(json.dumps(about.to_json()))) == about


def test_an_epoch_visits_every_training_context_once(lm):
    live = source(lm)
    per_epoch = live.num_rows // CONTEXT
    seen = [b.tokens for b in islice(live.batches(CONTEXT), per_epoch)]
    expected = live.contexts[live._train]
    assert sorted(t.tolist() for t in seen) == sorted(expected.tolist())
    assert live.num_rows == expected.numel()


@pytest.mark.parametrize("stop", [1, 5, 30])
def test_resuming_is_exact(lm, stop):
    size = 2 * CONTEXT
    whole = [b.x for b in islice(source(lm).batches(size), stop + 12)]
    first = source(lm)
    for _ in islice(first.batches(size), stop):
        pass
    second = source(lm)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.filter == first.filter and second.state_dict() == first.state_dict()
    assert all(torch.equal(b.x, x) for b, x in zip(second.batches(size), whole[stop:], strict=False))
    with pytest.raises(ValueError, match="seed"):
        source(lm, seed=4).load_state_dict(first.state_dict())


def test_samples_and_held_out_rows_are_filtered_as_those_of_a_live_source(lm):
    ours, theirs = source(lm), source(lm, LiveSource)
    assert torch.equal(ours.sample(50).x, theirs.sample(50).x) and ours.sample(50).mask is None
    for a, b in zip(ours.held_out(30), theirs.held_out(30), strict=True):
        assert torch.equal(a.x, b.x) and a.mask is None


@pytest.mark.parametrize("batch_tokens", [0, 7, 12, 10**6])
def test_batches_hold_whole_contexts(lm, batch_tokens):
    with pytest.raises(ValueError, match="multiple of 8"):
        next(source(lm).batches(batch_tokens))

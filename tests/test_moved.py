"""Names that moved are still found where they were."""

from __future__ import annotations

import importlib

import pytest

import apportion as ap
from apportion import activations, language, rows, synthetic


def test_training_has_its_objectives():
    from apportion import objectives, training

    assert training.EndToEnd is objectives.EndToEnd and training.MutualConfig is objectives.MutualConfig
    with pytest.raises(AttributeError, match="no attribute 'Nobody'"):
        training.Nobody  # noqa: B018


def test_the_old_room_has_its_names():
    for room in (rows, language, synthetic):
        for name in vars(room):
            if not name.startswith("_") and hasattr(activations, name):
                assert getattr(activations, name) is getattr(room, name)
    assert ap.activations.ActivationStore is rows.ActivationStore


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("collect", ("collect", "load_model", "run_contexts", "model_fingerprint", "check_context_tokens")),
        ("filter", ("TokenFilter",)),
        ("text", ("TextSource",)),
        ("store", ("ActivationStore",)),
        ("ground_truth", ("GroundTruthSource",)),
    ],
)
def test_the_old_files_have_theirs(module, names):
    found = importlib.import_module(f"apportion.activations.{module}")
    assert all(hasattr(found, name) for name in names)

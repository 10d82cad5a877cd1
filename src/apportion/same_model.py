"""Are two recorded models the same? What counts is what they compute; language/fingerprint.py makes the records."""

from __future__ import annotations

import torch

from apportion.about import ModelRecord

FINE = ("float32", "float64")
ROUNDING = {True: 1e-3, False: 0.15}
"""How far probes of one model may lie apart where both ran in fine precision, and where not."""
NEARLY = {True: 1e-3, False: 0.02}
"""The same where the parameters are not alike, so that only the probes speak."""


def model_difference(ours: ModelRecord, theirs: ModelRecord) -> str | None:
    """In which way two recorded models are not the same; None if they are, or if the records do not tell."""
    for size in ("hidden_size", "num_layers"):
        one, other = getattr(ours, size), getattr(theirs, size)
        if one and other and one != other:
            return f"another {size} ({one} and {other})"
    same_weights = ours.weights_sha256 == theirs.weights_sha256
    if not (ours.weights_sha256 and theirs.weights_sha256):
        return None
    distance = _distance(ours.probe, theirs.probe)
    if distance is None:
        return None if same_weights else "other weights"
    fine = all(one.dtype in FINE for one in (ours, theirs))
    if same_weights:
        return None if distance <= ROUNDING[fine] else "the same weights in another architecture or configuration"
    return None if distance <= NEARLY[fine] else "other weights"


def _distance(one: tuple[float, ...] | None, other: tuple[float, ...] | None) -> float | None:
    if not one or not other or len(one) != len(other):
        return None
    return (torch.tensor(one) - torch.tensor(other)).norm().item()

"""Are two recorded models the same? What counts is what they compute; language/fingerprint.py makes the records."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

FINE = ("float32", "float64")
ROUNDING = {True: 1e-3, False: 0.15}
"""How far probes of one model may lie apart where both ran in fine precision, and where not."""
NEARLY = {True: 1e-3, False: 0.02}
"""The same where the parameters are not alike, so that only the probes speak."""


def model_difference(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str | None:
    """In which way two recorded models are not the same; None if they are, or if the records do not tell."""
    known = [key for key in ("hidden_size", "num_layers") if ours.get(key) and theirs.get(key)]
    for key in known:
        if ours[key] != theirs[key]:
            return f"another {key} ({ours[key]} and {theirs[key]})"
    same_weights = ours.get("weights_sha256") == theirs.get("weights_sha256")
    if not (ours.get("weights_sha256") and theirs.get("weights_sha256")):
        return None
    distance = _distance(ours.get("probe"), theirs.get("probe"))
    if distance is None:
        return None if same_weights else "other weights"
    fine = all(one.get("dtype") in FINE for one in (ours, theirs))
    if same_weights:
        return None if distance <= ROUNDING[fine] else "the same weights in another architecture or configuration"
    return None if distance <= NEARLY[fine] else "other weights"


def _distance(one: list[float] | None, other: list[float] | None) -> float | None:
    if not one or not other or len(one) != len(other):
        return None
    return (torch.tensor(one) - torch.tensor(other)).norm().item()

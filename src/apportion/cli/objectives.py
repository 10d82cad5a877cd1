"""What `apportion train --training-objective` can name, and the options that come with each."""

from __future__ import annotations

import dataclasses
from typing import Any

from apportion.objectives import EndToEnd, MutualConfig, MutualFeatureRegularisation
from apportion.objectives.end_to_end import PRESETS
from apportion.training import Objective, local_reconstruction

CONFIGS: dict[str, Any] = {"local": None, "e2e": PRESETS["e2e"], "e2e_ds": PRESETS["e2e_ds"], "mutual": MutualConfig()}
"""The settings of each, if it has any; their values are the defaults."""
THROUGH_MODEL = ("e2e", "e2e_ds")


def check_objective(name: str) -> None:
    if name not in CONFIGS:
        raise ValueError(f"There is no training objective {name!r}. Known are: {', '.join(CONFIGS)}.")


def objective_config(name: str, values: Any) -> Any:
    """The settings of an objective from the options that `values` has as attributes; ValueError for impossible ones."""
    config = CONFIGS[name]
    if name == "mutual" and values.num_saes < 2:
        raise ValueError(f"mutual trains SAEs side by side: --num-saes must be at least 2, got {values.num_saes}.")
    if name in THROUGH_MODEL and values.batch_tokens % values.context_tokens:
        raise ValueError(
            f"{name} trains on whole contexts: --batch-tokens must be a multiple of --context-tokens "
            f"({values.context_tokens}), got {values.batch_tokens}."
        )
    if config is None:
        return None
    return dataclasses.replace(config, **{f.name: getattr(values, f.name) for f in dataclasses.fields(config)})


def objective_for(name: str, config: Any, source: Any) -> Objective:
    if name in THROUGH_MODEL:
        return EndToEnd(source.model, source.hookpoint, config)
    return MutualFeatureRegularisation(config) if name == "mutual" else local_reconstruction

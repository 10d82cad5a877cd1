"""The table of named SAEs. A name pairs an architecture (how codes are computed) with a rule (which matches are kept).

To add one: write one file in this folder (an architecture) or in `allocation/` (a rule), add one line to `SAES`, and
one test for what is special in its paper. Creation, files, the command line and evaluation follow from the table.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from apportion.allocation import RULES, Rule
from apportion.architectures.base import SAE, SAEConfig
from apportion.architectures.files import load
from apportion.architectures.plain import Plain


@dataclass(frozen=True)
class NamedSAE:
    architecture: type[SAE]
    rule: type[Rule]
    summary: str
    """Who gets how much of the budget, in one line."""
    defaults: dict[str, Any] = field(default_factory=dict)
    """Settings whose default differs from that of the architecture or the rule."""

    def settings(self) -> dict[str, Any]:
        """Every setting with its default, in order; d_in and d_sae have none."""
        both = [*fields(self.architecture.Config), *fields(self.rule.Config)]
        return {f.name: self.defaults.get(f.name, f.default) for f in both}


SAES: dict[str, NamedSAE] = {
    "topk": NamedSAE(Plain, RULES["topk"], "every token keeps its k strongest latents"),
    "mutual_choice": NamedSAE(
        Plain,
        RULES["mutual_choice"],
        "the strongest matches win, whichever token they belong to: tokens take as many latents as they need",
        {"aux": "aux_zipf"},
    ),
    "feature_choice": NamedSAE(
        Plain,
        RULES["feature_choice"],
        "every latent keeps a fixed share of tokens, those it matches best: tokens take what they need, no latent dies",
        {"aux": "aux_zipf"},
    ),
}


def create(name: str, **settings: Any) -> SAE:
    """A new SAE in train mode, e.g. create("mutual_choice", d_in=576, d_sae=4608, k=32).

    Settings are the fields of the architecture's and the rule's Config. Raises ValueError for an unknown name or
    setting, with the nearest known one, and for values that cannot work.
    """
    if name not in SAES:
        raise ValueError(f"There is no SAE named {name!r}; {_nearest(name, SAES)}")
    entry = SAES[name]
    known = entry.settings()
    for setting in settings:
        if setting not in known:
            raise ValueError(f"{name} has no setting {setting!r}; {_nearest(setting, known)}")
    missing = [s for s in ("d_in", "d_sae") if s not in settings]
    if missing:
        raise ValueError(f"create({name!r}) needs {' and '.join(missing)}.")
    values = entry.defaults | settings
    rule_names = {f.name for f in fields(entry.rule.Config)}
    config = entry.architecture.Config(**{k: v for k, v in values.items() if k not in rule_names})
    rule_config = entry.rule.Config(**{k: v for k, v in values.items() if k in rule_names})
    for part in (config, rule_config):
        _check_choices(part)
    rule = entry.rule(rule_config, config.d_sae)
    sae = entry.architecture(config, rule)
    sae.name = name
    return sae.train()


def _check_choices(config: Any) -> None:
    """Refuse words that are none of a setting's choices, and words where a number belongs."""
    for setting, kind in get_type_hints(type(config)).items():
        value = getattr(config, setting)
        if {int, float} & {kind, *get_args(kind)} and not isinstance(value, int | float | NoneType):
            raise ValueError(f"{setting} must be a number, got {value!r}.")
        if get_origin(kind) is Literal and getattr(config, setting) not in get_args(kind):
            nearest = _nearest(str(getattr(config, setting)), get_args(kind))
            raise ValueError(f"{setting} cannot be {getattr(config, setting)!r}; {nearest}")


def _nearest(word: str, known: Any) -> str:
    close = get_close_matches(word, list(known), n=2, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"known are: {', '.join(known)}."


__all__ = ["SAES", "NamedSAE", "SAE", "SAEConfig", "create", "load"]

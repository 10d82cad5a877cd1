"""The options of `apportion train`, which belong to what it is told to train, known without importing any of it.

    {"train": [option], "architectures": {class: {"options": [option], "k": false}},
     "rules": {name: {"options": [option], "k": true, "not_to_train": why}},
     "objectives": {name: {"options": [option], "least_saes": 1}},
     "saes": {name: {"architecture": class, "rule": name, "any_rule": false, "defaults": {}}}}

    option    {"name": .., "kind": the type as it is written, "default": .., "help": ..}

torch takes seconds to import; --help and a mistyped option need none of it. So the table is in a file, options.json,
which `python tools/cli_options.py` writes (a test compares it with the code). In a process that has the SAEs loaded,
the table is made of those that are there, of somebody else's too.
"""

from __future__ import annotations

import json
import sys
import typing
from collections.abc import Iterable
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

from apportion import choices
from apportion.settings import meanings

FILE = Path(__file__).with_name("options.json")
NOT_ASKED = {"d_in", "d_out", "num_sites", "d_sae", "k", "seed", "hookpoint", "total_tokens"}
"""Settings that the train command asks for in its own words, or that follow from the activations."""
Table = dict[str, Any]


@dataclass(frozen=True)
class Option:
    name: str
    kind: Any
    """A type; as text where it is written down."""
    default: Any
    help: str


def table() -> Table:
    """Of what is loaded, or else of what the package has."""
    if "apportion.architectures" in sys.modules:
        return described()
    return json.loads(FILE.read_text(encoding="utf-8"))


def described() -> Table:
    """From the tables of SAEs, rules and objectives."""
    from apportion.allocation import RULES
    from apportion.architectures import SAES, rule_name
    from apportion.objectives import OBJECTIVES
    from apportion.training import TrainConfig

    architectures = {entry.architecture.__name__: entry.architecture for entry in SAES.values()}
    return {
        "train": options_of(TrainConfig),
        "architectures": {name: part_of(one.Config) for name, one in architectures.items()},
        "rules": {name: part_of(rule.Config) | {"not_to_train": rule.not_to_train} for name, rule in RULES.items()},
        "objectives": {
            name: {"options": options_of(one.config), "least_saes": one.objective.least_saes}
            for name, one in OBJECTIVES.items()
        },
        "saes": {
            name: {
                "architecture": entry.architecture.__name__,
                "rule": rule_name(entry.rule),
                "any_rule": entry.any_rule,
                "defaults": entry.defaults,
            }
            for name, entry in SAES.items()
        },
    }


def part_of(config: type) -> dict[str, Any]:
    """What an architecture or a rule has, and whether k is among it."""
    return {"options": options_of(config), "k": "k" in [f.name for f in fields(config)]}


def options_of(config: Any) -> list[dict[str, Any]]:
    """Of a dataclass of settings, or of one with values, which are the defaults; none of None."""
    if config is None:
        return []
    kind = config if isinstance(config, type) else type(config)
    hints, docs = get_type_hints(kind), meanings(kind)
    return [
        asdict(Option(f.name, written(hints[f.name]), getattr(config, f.name, f.default), docs.get(f.name, "")))
        for f in fields(kind)
        if f.name not in NOT_ASKED and getattr(config, f.name, f.default) is not MISSING
    ]


def written(kind: Any) -> str:
    """A type as `read` reads it."""
    return kind.__name__ if isinstance(kind, type) else str(kind)


def read(options: Iterable[dict[str, Any]], defaults: dict[str, Any]) -> list[Option]:
    """Options with their types, and with other defaults where there are some."""
    options = [*options]
    kinds = type("", (), {"__annotations__": {one["name"]: one["kind"] for one in options}})
    hints = get_type_hints(kinds, {"typing": typing})
    found = [Option(**one | {"kind": hints[one["name"]]}) for one in options]
    return [
        Option(o.name, o.kind, tuple(d) if isinstance(d := defaults.get(o.name, o.default), list) else d, o.help)
        for o in found
    ]


def check(known: Table, sae: str, allocation: str | None, objective: str) -> None:
    """ValueError for what there is not."""
    one = known["saes"][choices.sae(sae, known["saes"])]
    choices.objective(objective, known["objectives"])
    if allocation is not None:
        with_choice = [] if one["any_rule"] else [name for name, other in known["saes"].items() if other["any_rule"]]
        choices.rule(allocation, one["rule"], reasons(known), with_choice)


def reasons(known: Table) -> dict[str, str | None]:
    """Of every rule, why it is not for training, if it is not."""
    return {name: rule["not_to_train"] for name, rule in known["rules"].items()}


def parts(known: Table, sae: str, allocation: str | None) -> list[dict[str, Any]]:
    """The architecture of an SAE, and its rule if that is for training."""
    one = known["saes"][sae]
    rule = known["rules"][allocation or one["rule"]]
    return [known["architectures"][one["architecture"]], *([] if rule["not_to_train"] else [rule])]


def chosen(known: Table, sae: str, allocation: str | None, objective: str) -> list[Option]:
    """Those of training, of an SAE, of its rule, and of an objective, in this order."""
    mine = [option for part in parts(known, sae, allocation) for option in part["options"]]
    of_objective = known["objectives"][objective]["options"]
    return [*read(known["train"], {}), *read(mine, known["saes"][sae]["defaults"]), *read(of_objective, {})]

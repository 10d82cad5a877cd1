"""The options of `apportion train` as the package has them are those of the code, and ask for the same."""

from __future__ import annotations

import dataclasses
import json
from typing import get_type_hints

import pytest

from apportion.allocation import RULES
from apportion.architectures import SAES, rule_choices
from apportion.cli import options
from apportion.cli.arguments import together
from apportion.cli.train import train_command
from apportion.objectives import OBJECTIVES
from apportion.training import TrainConfig


def test_the_file_is_current():
    wanted = json.loads(json.dumps(options.described()))
    assert json.loads(options.FILE.read_text(encoding="utf-8")) == wanted, "python tools/cli_options.py"


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", SAES)
def test_the_command_is_the_same_from_the_file(name, objective, monkeypatch):
    for allocation in [None, *(rule_choices() if SAES[name].any_rule else [])]:
        live = fields_of(train_command(name, allocation, objective))
        with monkeypatch.context() as patched:
            patched.setattr(options, "table", lambda: json.loads(options.FILE.read_text(encoding="utf-8")))
            assert fields_of(train_command(name, allocation, objective)) == live
        settings = SAES[name].settings(allocation)
        for key in settings.keys() - options.NOT_ASKED - {"allocation"}:
            assert live[key][1] == settings[key], "the default that `create` has"
        for field in dataclasses.fields(TrainConfig):
            if field.name not in options.NOT_ASKED:
                assert live[field.name][:2] == (get_type_hints(TrainConfig)[field.name], field.default)


def fields_of(command: type) -> dict[str, tuple]:
    """Type, default and help of every option."""
    hints, plain = get_type_hints(command, include_extras=True), get_type_hints(command)
    found = {f.name: f.default for f in dataclasses.fields(command)}
    return {name: (plain[name], found[name], helps(hints[name])) for name in found}


def helps(hint: object) -> list[object]:
    return [one.help for one in getattr(hint, "__metadata__", ()) if hasattr(one, "help")]


def test_options_of_every_kind_that_there_is_are_written_and_read():
    for config in (TrainConfig, *(rule.Config for rule in RULES.values())):
        hints = get_type_hints(config)
        for one in options.read(options.options_of(config), {}):
            assert one.kind == hints[one.name]


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("collect m --hookpoint a b --out x --hookpoint c --hookpoint=d", "collect m --hookpoint a b c d --out x"),
        ("collect m --hookpoint=a --hookpoint b", "collect m --hookpoint=a b"),
        ("train a --text b --text c --k 16 --k=32", "train a --text b --text c --k 16 --k=32"),
        ("eval --json x a b", "eval --json x a b"),
        ("", ""),
    ],
)
def test_values_of_an_option_that_takes_several_stand_together(words, wanted):
    assert together(words.split()) == wanted.split()

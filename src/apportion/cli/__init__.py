"""The command line. Thin: each command checks its input, then calls the library.

    apportion demo
    apportion collect MODEL --hookpoint model.layers.8 --text corpus.txt --tokens 10M --out acts/
    apportion train acts/ --sae mutual_choice --k 32 --d-sae 16384 --out runs/x
    apportion sweep acts/ --sae topk,mutual_choice --k 16,32 --d-sae 16384 --out runs/
    apportion suite MODEL --hookpoints 'model.layers.*' --sites residual,mlp --text corpus.txt --tokens 10M --out suite/
    apportion eval runs/x --text heldout.txt --json out.json
    apportion report runs/x runs/y --out report/
    apportion convert runs/x sae/ --to sae_lens
    apportion info PATH
    apportion cache verify PATH

A mistake is answered with one line and exit code 2, before any long work; answers.py has the other ways to end.
"""

from __future__ import annotations

import logging
import sys
from typing import Annotated, Any, Union, cast

import tyro
from tyro.conf import subcommand

from apportion.answers import answered
from apportion.cli.arguments import OPTIONS, Harmless, together
from apportion.cli.cache import Cache
from apportion.cli.collect import Collect
from apportion.cli.convert import Convert
from apportion.cli.demo import Demo
from apportion.cli.evaluate import Eval
from apportion.cli.info import Info
from apportion.cli.report import Report
from apportion.cli.suite import suite_command, suite_of
from apportion.cli.sweep import sweep_command, sweep_of
from apportion.cli.train import chosen_sae, train_command
from apportion.memory import keep_freed
from apportion.processes import refuse_several_processes

DESCRIPTION = """Sparse autoencoders that spend their sparsity budget where it is needed.

An error is one line; with --debug, anywhere among the words, it comes with its traceback."""


def parse(argv: list[str]) -> Any:
    """The command that these words ask for, filled in; its `run` does the work."""
    for name, of in (("sweep", sweep_of), ("suite", suite_of)):
        if argv[:1] == [name] and not {"-h", "--help"} & {*argv}:
            return of(argv[1:], parse)
    commands = {
        "demo": Demo,
        "collect": Collect,
        "train": train_command(*chosen_sae(argv)),
        "sweep": sweep_command(argv),
        "suite": suite_command(argv),
        "eval": Eval,
        "report": Report,
        "convert": Convert,
        "info": Info,
        "cache": Cache,
    }
    union = Union[tuple(Annotated[c, subcommand(name)] for name, c in commands.items())]  # noqa: UP007
    return tyro.cli(cast(Any, union), args=argv, prog="apportion", description=DESCRIPTION, registry=OPTIONS)


def main(argv: list[str] | None = None) -> int:
    """Entry point of `apportion`; returns the exit code."""
    keep_freed()
    (handler := logging.StreamHandler(sys.stderr)).setFormatter(Harmless("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("apportion").setLevel(logging.INFO)
    return answered("apportion", _run, argv)


def _run(words: list[str]) -> int | None:
    refuse_several_processes()
    return parse(together(words)).run()

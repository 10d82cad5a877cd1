"""The command line. Thin: each command checks its input, then calls the library.

    apportion demo
    apportion collect MODEL --hookpoint model.layers.8 --text corpus.txt --tokens 10M --out acts/
    apportion train acts/ --sae mutual_choice --k 32 --d-sae 16384 --out runs/x
    apportion eval runs/x --text heldout.txt --json out.json
    apportion report runs/x runs/y --out report/
    apportion convert runs/x sae/ --to sae_lens
    apportion info PATH
    apportion cache verify PATH

A mistake is answered with one line and exit code 2, before any long work; Ctrl-C exits with 130.
"""

from __future__ import annotations

import logging
import signal
import sys
from typing import Annotated, Any, Union, cast

import tyro
from tyro.conf import subcommand

from apportion.cli.arguments import OPTIONS, Harmless
from apportion.cli.cache import Cache
from apportion.cli.collect import Collect
from apportion.cli.convert import Convert
from apportion.cli.demo import Demo
from apportion.cli.evaluate import Eval
from apportion.cli.info import Info
from apportion.cli.report import Report
from apportion.cli.train import chosen_sae, train_command
from apportion.processes import refuse_several_processes
from apportion.trust import shown

DESCRIPTION = "Sparse autoencoders that spend their sparsity budget where it is needed."


def parse(argv: list[str]) -> Any:
    """The command that these words ask for, filled in; its `run` does the work."""
    commands = {
        "demo": Demo,
        "collect": Collect,
        "train": train_command(*chosen_sae(argv)),
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
    argv = sys.argv[1:] if argv is None else argv
    (handler := logging.StreamHandler(sys.stderr)).setFormatter(Harmless("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("apportion").setLevel(logging.INFO)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # being told to end is like Ctrl-C: clean up
    try:
        refuse_several_processes()
        parse(argv).run()
    except BrokenPipeError:
        sys.stdout = None  # whoever read our output has gone; nothing may be written at exit
        return 1
    except ImportError as error:
        sys.stderr.write(f"apportion: {error}. Install what this needs: pip install 'apportion[all]'\n")
        return 2
    except (ValueError, OSError) as error:
        sys.stderr.write(f"apportion: {shown(' '.join(str(error).split()))}\n")
        return 2
    except KeyboardInterrupt:
        return 130
    return 0

"""Write src/apportion/cli/options.json, from which the command line has the options of `apportion train`.

    python tools/cli_options.py

A test compares the committed file with what comes out here.
"""

from __future__ import annotations

from apportion.cli.options import FILE, described
from apportion.disk import write_json

if __name__ == "__main__":
    write_json(FILE, described())

"""Commands in processes of their own, so that limits, disks and closed outputs are theirs alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from shutil import which

import pytest

import apportion as ap

SOURCE = Path(ap.__file__).parents[1]
APPORTION = [sys.executable, "-m", "apportion"]


def environment(**more: str) -> dict[str, str]:
    paths = [str(SOURCE), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": ""} | more


def shell(script: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run a script of sh, in which $A is the command line of apportion."""
    words = ["sh", "-c", f"A='{more.pop('BEFORE', '')} {' '.join(APPORTION)}'\n{script}"]
    return subprocess.run(words, capture_output=True, text=True, env=environment(**more), timeout=300, check=False)


def without_privileges(script: str) -> subprocess.CompletedProcess[str]:
    """As `shell`, for somebody who may not read every file, as root may; skips where root cannot become so."""
    if os.getuid() != 0:
        return shell(script)
    if which("setpriv") is None:
        pytest.skip("root may read everything, and there is no setpriv")
    return shell(script, BEFORE="setpriv --bounding-set=-dac_override,-dac_read_search")


def assert_one_line(said: str, *expected: str) -> None:
    """Of what went to stderr: one line that tells of the error, with all of the words, and no traceback."""
    lines = [line for line in said.splitlines() if line.startswith("apportion: ")]
    assert len(lines) == 1 and "Traceback" not in said and "Unexpected" not in said, said
    for words in expected:
        assert words in lines[0], said

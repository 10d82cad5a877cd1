"""Everything that is tried against apportion, all of it, and the table of it in docs/reliability.md.

    python tools/reliability.py [--docs docs/reliability.md]

Takes some ten minutes. Power cuts and disks that are full need root (loop devices, tmpfs).
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from apportion.disk import write_text  # noqa: E402
from apportion.recipes.experiment import between, markdown  # noqa: E402
from benchmarks.train_step import hardware  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, default=ROOT / "docs" / "reliability.md")
    options = parser.parse_args()
    between(options.docs, "trials", "")
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "trials.json"
        words = [sys.executable, "-m", "pytest", "tests/faults", "-m", "", f"--faults-json={found}"]
        status = subprocess.run(words, cwd=ROOT, check=False).returncode
        families = json.loads(found.read_text())
    lines = [
        [family, str(n["tried"]), str(n["survived"]), str(n["did not come about"] or "")]
        for family, n in sorted(families.items())
    ]
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "safetensors", "transformers"))
    head = f"{date.today()}, {hardware('cpu')}, {platform.system()}, {versions}:\n\n"
    table = markdown(["What was tried", "Trials", "Survived", "Did not come about"], lines)
    write_text(options.docs, between(options.docs, "trials", head + table))
    print(table)
    return status


if __name__ == "__main__":
    sys.exit(main())

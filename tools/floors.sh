#!/usr/bin/env bash
# The tests that tell whether the floors in pyproject.toml hold: every dependency in the oldest version that it admits.
#   tools/floors.sh [FOLDER]        the environment is made in FOLDER, or used if it is there
#   TORCH=2.13.0 tools/floors.sh    with another torch than the oldest, which brings CUDA (5 GB)
# Last run: see the end of CONTRIBUTING.md, which also says what is left out below.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
folder=${1:-$(mktemp -d)}
cd "$root"
floors=$(python3 - "${TORCH:-}" <<'PYTHON'
import sys, tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
extras = project["optional-dependencies"]
pins = dict(line.split(">=") for line in [*project["dependencies"], *extras["lm"], *extras["plots"], *extras["hub"]])
print(*(f"{name}=={sys.argv[1] if name == 'torch' and sys.argv[1] else version}" for name, version in pins.items()))
PYTHON
)
if [ ! -x "$folder/bin/python" ]; then
  python3 -m venv "$folder"
fi
"$folder/bin/pip" install --quiet $floors "pytest>=8" "pytest-xdist>=3.6" "hypothesis>=6" "beartype>=0.21" "pyparsing<3.3"
"$folder/bin/pip" install --quiet --no-deps -e "$root"
"$folder/bin/pip" check
echo "$floors"
"$folder/bin/python" -m pytest -m "" tests/architectures tests/interop tests/training tests/evals \
  tests/rows tests/language tests/synthetic tests/objectives tests/viewing tests/test_group.py tests/test_about.py \
  tests/test_cli.py tests/test_disk.py tests/test_answers.py tests/test_extras.py tests/test_torch_state.py \
  -k "not TestPush and not test_upper and not test_a_full_disk"

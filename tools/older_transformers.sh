#!/usr/bin/env bash
# The tests that touch a language model, under the older of the two transformers that are in use.
#   tools/older_transformers.sh [FOLDER]        the environment is made in FOLDER, or used if it is there
# Last run: see the end of CONTRIBUTING.md.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
folder=${1:-$(mktemp -d)}
if [ ! -x "$folder/bin/python" ]; then
  python3 -m venv "$folder"
  "$folder/bin/pip" install --quiet torch==2.13.0
  "$folder/bin/pip" install --quiet -e "$root[dev]" "transformers==4.57.*"
fi
cd "$root"
"$folder/bin/python" -c "import torch, transformers; print('torch', torch.__version__, 'transformers', transformers.__version__)"
"$folder/bin/python" -m pytest -m "" tests/rows tests/language tests/synthetic tests/evals \
  tests/objectives/test_end_to_end.py tests/test_cli.py tests/test_cli_eval.py tests/test_torch_state.py \
  tests/test_embedded.py tests/test_demo.py tests/faults/test_remote_code.py tests/faults/test_broken_models.py \
  tests/faults/test_caches.py tests/interop/test_export.py tests/interop/test_hook_names.py

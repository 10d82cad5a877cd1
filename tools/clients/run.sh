#!/usr/bin/env bash
# Exports of five SAEs in the clients' own environments, which do not hold apportion: SAELens and SAEDashboard.
#   tools/clients/run.sh [FOLDER]
# PYTHON has apportion (default: python3). SAE_LENS_PYTHON and DASHBOARD_PYTHON are environments to use as they are;
# without them two are made in FOLDER, which takes some minutes and 4 GB. Nothing else is fetched.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
folder=${1:-$(mktemp -d)}
mkdir -p "$folder"

environment() { # name, packages
  if [ ! -x "$folder/$1/bin/python" ]; then
    python3 -m venv "$folder/$1"
    "$folder/$1/bin/pip" install --quiet torch==2.13.0
    "$folder/$1/bin/pip" install --quiet torch==2.13.0 "${@:2}"
    "$folder/$1/bin/pip" uninstall --quiet --yes torchvision torchaudio # optional, and built for another torch
  fi
  echo "$folder/$1/bin/python"
}

sae_lens=${SAE_LENS_PYTHON:-$(environment sae-lens sae-lens)}
dashboard=${DASHBOARD_PYTHON:-$(environment dashboard "sae-dashboard==0.8.0" "pyarrow<22")}
rm -rf "$folder/out"
"${PYTHON:-python3}" "$here/make.py" "$folder/out"
failed=0
for check in "$sae_lens $here/check_sae_lens.py" "$dashboard $here/check_dashboard.py"; do
  env -u PYTHONPATH HF_HUB_OFFLINE=1 $check "$folder/out" || failed=1
done
exit $failed

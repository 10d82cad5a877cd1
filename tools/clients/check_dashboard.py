"""SAEDashboard on the files of make.py: it makes pages of every SAE, and its figures are apportion's.

    python tools/clients/check_dashboard.py OUT

In an environment with sae-dashboard and without apportion. SaeVisRunner, which folds decoder norms first, goes over the
first LATENTS latents; of each it says how often it is active and how strongly at most. Exit code 1 if either differs
from what apportion has by more than TOLERANCE, relative to the largest.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import warnings
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from lens_model import lens_model
from sae_dashboard.data_writing_fns import save_feature_centric_vis
from sae_dashboard.sae_vis_data import SaeVisConfig
from sae_dashboard.sae_vis_runner import SaeVisRunner
from sae_lens import SAE
from safetensors.torch import load_file

LATENTS = 32
TOLERANCE = 1e-4


def main(out: Path) -> int:
    assert find_spec("apportion") is None, "the point is to do without"
    packages = ("sae-dashboard", "sae-lens", "transformer-lens", "transformers", "safetensors", "torch")
    print("sae-dashboard", *(f"{p} {version(p)}" for p in packages))
    reference = json.loads((out / "reference.json").read_text())
    tokens, model = load_file(out / "tokens.safetensors")["tokens"], lens_model(out / "model")
    worst = 0.0
    for name, wanted in reference["saes"].items():
        sae = SAE.load_from_disk(out / name)
        hook = sae.cfg.metadata.hook_name
        config = SaeVisConfig(hook_point=hook, features=list(range(LATENTS)), minibatch_size_tokens=32)
        with contextlib.redirect_stderr(io.StringIO()):
            data = SaeVisRunner(config).run(encoder=sae, model=model, tokens=tokens)
        page = out / f"{name}.html"
        save_feature_centric_vis(data, page)
        density = largest_difference(data.feature_stats.frac_nonzero, wanted["density"][:LATENTS])
        strength = largest_difference(data.feature_stats.max, wanted["largest"][:LATENTS])
        worst = max(worst, density, strength)
        print(
            f"  {name:18s} {page.stat().st_size:,} bytes; densities differ by {density:.1e}, largest by {strength:.1e}"
        )
    print(f"largest difference {worst:.1e}")
    return int(worst > TOLERANCE)


def largest_difference(found: list[float], wanted: list[float]) -> float:
    assert len(found) == len(wanted), (len(found), len(wanted))
    return max(abs(a - b) for a, b in zip(found, wanted, strict=True)) / max(map(abs, wanted))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(main(Path(sys.argv[1])))

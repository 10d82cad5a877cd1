"""Do two commits train alike? Weights of every SAE after 50 steps, as hashes, and how far apart they are.

    python tools/same_weights.py write OUT        in the one checkout (with its src on PYTHONPATH), then in the other
    python tools/same_weights.py compare A B

Every SAE of the table with every rule it can have, with and without a group of settings that add losses, on made-up
rows of one seed: 50 steps with a schedule, then calibration. Hashes differ between processors, so both are written on
one machine. The exit code is 1 if a tensor differs by more than 1e-6 of its largest entry.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import apportion as ap
from apportion.architectures import SAES, named, rule_choices

D, LATENTS, BATCH, STEPS, TOLERANCE = 24, 192, 256, 50, 1e-6
VARIANTS: dict[str, dict[str, Any]] = {
    "topk": {"aux": "aux_zipf"}, "mutual_choice": {"aux": "aux_k"}, "matryoshka": {"aux": "aux_k"},
    "feature_choice": {"budgets": "zipf", "switch_at": 0.3}, "switch": {"aux": "aux_k", "num_experts": 4},
    "crosscoder": {"num_sites": 3}, "transcoder": {"d_out": 16}, "jumprelu": {"aux": "aux_k"},
}  # fmt: skip
"""Settings of a second run of some."""


def runs() -> Iterator[tuple[str, dict[str, Any]]]:
    for name, entry in SAES.items():
        for rule in rule_choices() if entry.any_rule else [None]:
            own = {} if rule is None else {"allocation": rule}
            yield " ".join([name, *([rule] if rule else [])]), {"name": name, **own}
            if name in VARIANTS:
                yield f"{name} {rule or ''} variant", {"name": name, **own, **VARIANTS[name]}
    for screen in (None, "bfloat16"):
        for name in ("topk", "mutual_choice", "feature_choice"):
            yield f"{name} screen {screen}", {"name": name, "screen": screen}


def trained(settings: dict[str, Any]) -> ap.SAE:
    screen = settings.pop("screen", None)
    width = {"d_sae": named(settings["name"]).architecture.d_sae_for(D) or LATENTS}
    sae = ap.create(settings.pop("name"), d_in=D, k=6, seed=0, **width, **settings)
    made = torch.Generator().manual_seed(1)
    basis = torch.randn(96, D, generator=made)

    def rows(n: int) -> torch.Tensor:
        shape = (n, *sae.row_shape[:-1])
        codes = torch.rand(*shape, 96, generator=made) * (torch.rand(*shape, 96, generator=made) < 0.08)
        return 3 * codes @ basis + 0.1 * torch.randn(*shape, D, generator=made) + 1

    def batch(n: int) -> ap.Batch:
        x = rows(n)
        target = x[:, : sae.config.d_out or D].tanh() if sae.needs_target else None  # type: ignore[attr-defined]
        return ap.Batch(x, target=target)

    config = ap.TrainConfig(total_tokens=STEPS * BATCH, batch_tokens=BATCH, dead_window_tokens=2048, screen=screen)
    if any(p.requires_grad for p in sae.parameters()):
        trainer = ap.Trainer(sae, config)
        for _ in range(STEPS):
            trainer.step(batch(BATCH))
    else:
        sae.fit_input(rows(4 * BATCH))
    sae.calibrate(rows(4 * BATCH))
    return sae.eval()


def write(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, settings in runs():
        state = {part: t.contiguous() for part, t in trained(settings).state_dict().items()}
        save_file(state, folder / f"{name.strip().replace(' ', '-')}.safetensors")


def compare(a: Path, b: Path) -> bool:
    """Prints every SAE, whether its weights are equal bit for bit, and the largest relative difference."""
    files = sorted({file.name for folder in (a, b) for file in folder.glob("*.safetensors")})
    worst = 0.0
    for file in files:
        ours, theirs = load_file(a / file), load_file(b / file)
        apart = max((_apart(ours[part], theirs[part]) for part in ours), default=0.0)
        assert ours.keys() == theirs.keys(), f"{file}: {ours.keys() ^ theirs.keys()}"
        digests = [hashlib.sha256((folder / file).read_bytes()).hexdigest()[:12] for folder in (a, b)]
        worst = max(worst, apart)
        print(f"{file.removesuffix('.safetensors'):44s} {digests[0]} {digests[1]} {'equal' if apart == 0 else apart}")
    print(f"{len(files)} SAEs, largest difference {worst:g}")
    return worst <= TOLERANCE


def _apart(a: torch.Tensor, b: torch.Tensor) -> float:
    both = torch.stack([a.double(), b.double()]).nan_to_num(nan=-1.0, posinf=-2.0)
    return ((both[0] - both[1]).abs().max() / both.abs().max().clamp_min(1e-30)).item() if a.numel() else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["write", "compare"])
    parser.add_argument("folders", nargs="+", type=Path)
    given = parser.parse_args()
    if given.what == "write":
        write(given.folders[0])
    else:
        sys.exit(0 if compare(*given.folders) else 1)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()

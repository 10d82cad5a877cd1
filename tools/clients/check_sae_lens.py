"""SAELens on the files of make.py: every SAE loads, folds and is evaluated, and scores what apportion says.

    python tools/clients/check_sae_lens.py OUT

In an environment with sae-lens and without apportion. Evaluated twice: by SAELens's own run_evals, without special
tokens, on the model in TransformerLens; and again on the model of transformers (AutoModelForCausalLM), with the names
of hooks that the other export has. Exit code 1 if a figure differs by more than TOLERANCE, relative to its size.
"""

from __future__ import annotations

import json
import sys
import warnings
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from lens_model import lens_model
from sae_lens import SAE
from sae_lens.evals import EvalConfig, run_evals
from sae_lens.load_model import load_model
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.activations_store import ActivationsStore
from safetensors.torch import load_file

TOLERANCE = 1e-4
NAMES = {
    "explained_variance": ("reconstruction_quality", "explained_variance"),
    "l0": ("sparsity", "l0"),
    "ce_with_sae": ("model_performance_preservation", "ce_loss_with_sae"),
    "ce_without_sae": ("model_performance_preservation", "ce_loss_without_sae"),
}


def main(out: Path) -> int:
    assert find_spec("apportion") is None, "the point is to do without"
    print("sae-lens", *(f"{p} {version(p)}" for p in ("sae-lens", "transformer-lens", "transformers", "torch")))
    reference = json.loads((out / "reference.json").read_text())
    ids = load_file(out / "tokens.safetensors")["tokens"]
    models = {"": lens_model(out / "model"), "_hf": load_model("AutoModelForCausalLM", str(out / "model"), "cpu")}
    worst = 0.0
    for name, wanted in reference["saes"].items():
        for suffix, model in models.items():
            sae = SAE.load_from_disk(out / f"{name}{suffix}")
            found = evaluate(sae, model, ids, reference["special_ids"])
            worst = max(worst, report(f"{name}{suffix}", wanted, found), folding(sae, ids))
    worst = max(worst, in_place(out / "transcoder", models[""], ids, reference))
    print(f"largest difference {worst:.1e}")
    return int(worst > TOLERANCE)


def evaluate(sae: Any, model: Any, ids: torch.Tensor, special: list[int]) -> dict[str, float]:
    rows, context = ids.shape
    dataset = Dataset.from_dict({"tokens": ids.tolist()})
    store = ActivationsStore.from_sae(
        model, sae, dataset=dataset, streaming=False, context_size=context, store_batch_size_prompts=rows // 2,
        device="cpu",
    )  # fmt: skip
    config = EvalConfig(
        batch_size_prompts=rows // 2,
        n_eval_reconstruction_batches=2,
        n_eval_sparsity_variance_batches=2,
        compute_ce_loss=True,
        compute_sparsity_metrics=True,
        compute_variance_metrics=True,
    )
    metrics, _ = run_evals(sae, store, model, ActivationScaler(), config, exclude_special_tokens=special)
    return {ours: metrics[group][theirs] for ours, (group, theirs) in NAMES.items()}


@torch.inference_mode()
def in_place(folder: Path, model: Any, ids: torch.Tensor, reference: dict[str, Any]) -> float:
    """A transcoder, attached by its names of hooks, which are skipped without an error where there are none."""
    transcoder, special = SAE.load_from_disk(folder), reference["special_ids"]
    with model.saes(saes=[transcoder], exclude_special_tokens=special):
        assert list(model.acts_to_saes) == [transcoder.cfg.metadata.hook_name], "it was skipped"
        losses = model(ids, return_type="loss", loss_per_token=True)
    kept = ~torch.isin(ids, torch.tensor(special))[:, :-1]
    found, wanted = losses[kept].double().mean().item(), reference["transcoder"]["ce_with_sae"]
    print(f"  {'transcoder':18s}  ce_with_sae {found:.5f} ({wanted:.5f})  differ by {abs(found - wanted):.1e}")
    return abs(found - wanted)


def report(name: str, wanted: dict[str, float], found: dict[str, float]) -> float:
    """A line of the table; the largest difference, relative where figures are above 1."""
    differences = {key: abs(found[key] - wanted[key]) / max(1.0, abs(wanted[key])) for key in NAMES}
    cells = (f"{key} {found[key]:.5f} ({wanted[key]:.5f})" for key in NAMES)
    print(f"  {name:18s}", *cells, f"differ by {max(differences.values()):.1e}", sep="  ")
    return max(differences.values())


@torch.inference_mode()
def folding(sae: Any, ids: torch.Tensor) -> float:
    """How far folding decoder norms, as every dashboard does, changes reconstructions."""
    x = torch.randn(256, sae.cfg.d_in, generator=torch.Generator().manual_seed(0)) * sae.b_dec.norm() + sae.b_dec
    before, active = sae(x), sae.encode(x) != 0
    sae.fold_W_dec_norm()
    assert torch.equal(sae.encode(x) != 0, active), "folding changed what is active"
    return ((sae(x) - before).abs().max() / before.abs().max()).item()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(main(Path(sys.argv[1])))

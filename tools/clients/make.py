"""Five SAEs and a transcoder in files for SAELens, and what they score here, for the clients' environments to compare.

    python tools/clients/make.py OUT

Needs apportion; the other scripts must not have it. The model is the one inside the package, and so are the stories:
no network is needed. OUT gets the model and its tokenizer, a folder for each SAE, tokens.safetensors (contexts that
begin with BOS) and reference.json: explained variance (1 - FVU) and L0 over all tokens but special ones, cross-entropy
of the predictions from these with the SAE in place, and per latent how often and how strongly it is active at most.
"""

from __future__ import annotations

import json
import shutil
import sys
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import apportion as ap
from apportion.embedded import MODEL, stories
from apportion.evals.language_model import token_losses
from apportion.interop.export import unit
from apportion.language import load_model, read_contexts
from apportion.language.collect import collect
from apportion.language.hookpoints import capture, hooked
from apportion.metrics import FVU
from apportion.rows import ActivationStore, CacheSource, PairStore, TokenFilter

HOOKPOINT, MLP = "model.layers.2", "model.layers.2.mlp"
CONTEXT, CONTEXTS = 64, 96
D_SAE, K = 1024, 16
NAMES = ("topk", "mutual_choice", "feature_choice", "jumprelu", "gated")


def main(out: Path) -> None:
    out.mkdir(parents=True)
    model, tokenizer = load_model("embedded")
    model.save_pretrained(out / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):  # as they are: older versions of transformers read them
        shutil.copyfile(MODEL / name, out / "model" / name)
    text = stories()
    ids = read_contexts(tokenizer, text[-300:], tokens=CONTEXT * CONTEXTS, context_tokens=CONTEXT, bos="always").long()
    save_file({"tokens": ids}, out / "tokens.safetensors")
    reference: dict[str, Any] = {"saes": {}, "special_ids": sorted(tokenizer.all_special_ids), "hookpoint": HOOKPOINT}
    with TemporaryDirectory() as folder:
        without_outliers = TokenFilter(norm_outlier=None)
        collect(
            model, tokenizer, [HOOKPOINT, f"{MLP}:in", MLP], text[:3000], tokens=200_000, out=f"{folder}/acts",
            context_tokens=CONTEXT, bos="always", token_filter=without_outliers,
        )  # fmt: skip
        into, out_of = (ActivationStore(f"{folder}/acts", h) for h in (f"{MLP}:in", MLP))
        transcoder = trained("transcoder", PairStore(into, out_of), allocation="mutual_choice")
        ap.export(transcoder, out / "transcoder", "sae_lens")
        reference["transcoder"] = {"ce_with_sae": in_place(transcoder, model, ids, reference["special_ids"])}
        print("transcoder", reference["transcoder"], flush=True)
        store = ActivationStore(f"{folder}/acts", HOOKPOINT)
        for name in NAMES:
            sae = trained(name, store)
            sae.info["source"] |= {"bos_prepended": True}
            ap.export(sae, out / name, "sae_lens")
            ap.export(sae, out / f"{name}_hf", "sae_lens", model_class_name="AutoModelForCausalLM")
            reference["saes"][name] = figures(sae, model, ids, reference["special_ids"])
            print(name, {k: v for k, v in reference["saes"][name].items() if not isinstance(v, list)}, flush=True)
    reference["versions"] = {p: version(p) for p in ("apportion", "torch", "transformers", "safetensors")}
    (out / "reference.json").write_text(json.dumps(reference))


def trained(name: str, store: ActivationStore | PairStore, **settings: Any) -> ap.SAE:
    sae = ap.create(name, d_in=store.d_in, d_sae=D_SAE, k=K, seed=0, **settings)
    tokens = 300_000
    config = ap.TrainConfig(total_tokens=tokens, batch_tokens=2048, lr=2e-3, seed=0)
    return ap.Trainer(sae, config).fit(CacheSource(store), progress=False).eval()


@torch.inference_mode()
def in_place(transcoder: ap.SAE, model: Any, ids: Tensor, special: list[int]) -> float:
    """Cross-entropy with the transcoder's output in place of the module's, but for special tokens."""
    mask = ~torch.isin(ids, torch.tensor(special))
    x = capture(model, [f"{MLP}:in"], input_ids=ids, use_cache=False)[f"{MLP}:in"]
    with hooked(model, {MLP: lambda y: torch.where(mask[..., None], transcoder(x).reshape_as(y), y)}):
        return token_losses(model, ids)[mask[:, :-1]].double().mean().item()


@torch.inference_mode()
def figures(sae: ap.SAE, model: Any, ids: Tensor, special: list[int]) -> dict[str, Any]:
    mask = ~torch.isin(ids, torch.tensor(special))
    x = capture(model, [HOOKPOINT], input_ids=ids, use_cache=False)[HOOKPOINT].reshape(-1, sae.d_in)
    latents = sae.encode(x)
    kept = mask.flatten()
    fvu = FVU()
    fvu.add(x[kept], sae.decode(latents, x)[kept])
    codes = latents.dense() * unit(sae)
    strength = codes * sae.W_dec.norm(dim=1)
    predicted = mask[:, :-1]
    replaced = sae.decode(latents, x).reshape(*ids.shape, -1)
    with hooked(model, {HOOKPOINT: lambda x: torch.where(mask[..., None], replaced, x)}):
        spliced = token_losses(model, ids)
    return {
        "explained_variance": 1 - fvu.value(),
        "l0": (codes[kept] != 0).sum(1).double().mean().item(),
        "ce_with_sae": spliced[predicted].double().mean().item(),
        "ce_without_sae": token_losses(model, ids)[predicted].double().mean().item(),
        "density": (codes != 0).double().mean(0).tolist(),
        "largest": strength.amax(0).tolist(),
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))

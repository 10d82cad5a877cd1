"""e2e_sae (Apollo): samples_{n}.pt with SAEs at one or several places of a model, and final_config.yaml beside it.

    z     = relu(W_enc x + b_enc)                           nothing is subtracted from x; raw units
    x_hat = z W_dec + b_dec                                 rows of W_dec made of unit norm when they are used

Tensors of the SAE at blocks.6.hook_resid_pre are called blocks-6-hook_resid_pre.encoder.0.weight [d_sae, d_in] and so
on; decoder.weight is [d_in, d_sae]. Of several SAEs config={"position": "blocks.6.hook_resid_pre"} says which.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.nn.functional as F

from apportion.interop.centring import warn_of_processing
from apportion.interop.hook_names import origin
from apportion.interop.parts import Parts
from apportion.interop.peek import beside, first_file, names_in, yaml_in
from apportion.interop.reading import Tensors, only_file, read_pt, tensor_dict

ENCODER = ".encoder.0.weight"


def recognises(path: Path) -> bool:
    return any(name.endswith(ENCODER) for name in names_in(first_file(path, ["samples_*.pt", "*.pt"])))


def read(path: Path, config: dict[str, Any], trust: bool) -> Parts:
    file = only_file(path, "*.pt")
    stored = tensor_dict(read_pt(file, trust), file)
    position = _position(stored, config, file)
    prefix = position.replace(".", "-") + "."
    tensors = Tensors({n.removeprefix(prefix): t for n, t in stored.items() if n.startswith(prefix)}, file)
    parts = Parts(
        kind="relu",
        W_enc=tensors.take("encoder.0.weight", "d_sae", "d_in"),
        W_dec=F.normalize(tensors.take("decoder.weight", "d_in", "d_sae").T, dim=1).contiguous(),
        b_enc=tensors.take("encoder.0.bias", "d_sae"),
        b_dec=tensors.take("decoder.bias", "d_in"),
        subtract_b_dec=False,
        info={"original": {"position": position}},
    )
    parts.dtype = tensors.finish()
    model = yaml_in(beside(file, "final_config.yaml")).get("tlens_model_name")
    parts.hookpoint, parts.source = origin(model, position)
    warn_of_processing(parts, model, position, file)
    return parts


def _position(stored: dict[str, Any], config: dict[str, Any], file: Path) -> str:
    """Which SAE of the file, in the notation of TransformerLens."""
    positions = [name.removesuffix(ENCODER).replace("-", ".") for name in stored if name.endswith(ENCODER)]
    if not positions:
        raise ValueError(f"{file} holds {', '.join(sorted(stored)) or 'no tensors'}, and no {ENCODER[1:]} of an SAE.")
    chosen = config.pop("position", positions[0] if len(positions) == 1 else None)
    if str(chosen).replace("-", ".") not in positions:
        wrong = "" if chosen is None else f", and none at {chosen!r}"
        raise ValueError(
            f"{file} has SAEs at {', '.join(positions)}{wrong}. Say which: "
            f'load(..., config={{"position": "{positions[0]}"}}).'
        )
    return str(chosen).replace("-", ".")

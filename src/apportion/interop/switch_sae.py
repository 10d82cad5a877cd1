"""switch_sae (arXiv 2410.08201): ae.pt, which holds neither k nor whether the gate is a step.

    p     = softmax(W_router (x - b_router)),   e = argmax p,   g = p_e, or 1 with `heaviside`
    z     = g relu(W_enc (x - b_dec)) on the latents of expert e, the k largest of each token
    x_hat = z W_dec + b_dec

encoder.weight is [d_sae, d_in] and so, unlike elsewhere, is decoder; router.weight is [num_experts, d_in]; the encoder
has no bias. k is given as config={"k": 64}, or lies in config.json beside the file, under "trainer" with `experts` and
`heaviside`. The library's `encode` gives all matches of expert e, and its forward pass keeps k: codes here are those k.

With heaviside the router is stored 2^64 times as large: its softmax is then 1 for one expert and 0 for the others, and
g = p_e = 1, whichever expert is the first by the least bit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from apportion.interop.hook_names import about_model, hub_name
from apportion.interop.parts import Parts
from apportion.interop.peek import beside, first_file, names_in, settings_in
from apportion.interop.reading import Tensors, only_file, read_pt, tensor_dict
from apportion.interop.writing import dict_of

TENSORS = {"encoder.weight", "router.weight", "decoder", "b_dec", "b_router"}
COLD = 2.0**64
"""What logits of the router are multiplied by for a step; a power of two, so that nothing is rounded."""


def recognises(path: Path) -> bool:
    return names_in(first_file(path, ["ae.pt", "*.pt"])) >= TENSORS


def read(path: Path, config: dict[str, Any], trust: bool) -> Parts:
    file = path / "ae.pt" if (path / "ae.pt").is_file() else only_file(path, "*.pt")
    settings = dict_of(settings_in(beside(file, "config.json")).get("trainer"))
    settings |= {name: config.pop(name) for name in ("k", "experts", "heaviside") if name in config}
    sizes = {"d_in": "activation_dim", "d_sae": "dict_size", "experts": "experts"}
    sizes = {ours: settings.get(theirs) for ours, theirs in sizes.items()}
    tensors = Tensors(tensor_dict(read_pt(file, trust), file), file, **sizes)
    weights = tensors.weights("encoder.weight", "decoder", None, "b_dec")
    router = tensors.take("router.weight", "experts", "d_in")
    parts = Parts(
        kind="switch",
        **weights,
        subtract_b_dec=True,
        k=settings.get("k"),
        router={
            "W_router": router * COLD if settings.get("heaviside") else router,
            "b_router": tensors.take("b_router", "d_in"),
        },
        info={"original": settings},
    )
    parts.dtype = tensors.finish()
    if isinstance(parts.k, int):
        parts.k = min(parts.k, len(parts.W_enc) // len(router))  # an expert has no more latents to choose among
    if isinstance(model := settings.get("lm_name"), str):
        parts.source = about_model(hub_name(model))
    return parts

"""How alike the decoders of two SAEs are: did another seed, rule or objective find the same features?

    mmcs        mean over latents of the largest cosine with any latent of the other; from a to b and from b to a
    one_to_one  mean cosine of the best one-to-one matching: a latent of the other counts once (O(d_sae^3))
    within      mean over latents of the largest cosine with another latent of the same SAE: high if features are split

Directions are those that latents have in the reconstruction of raw rows.
"""

from __future__ import annotations

import torch

from apportion.architectures import SAE
from apportion.evals.recovery import decoder_directions
from apportion.matching import nearest_rows, one_to_one, pair_cosines


@torch.no_grad()
def similarity(a: SAE, b: SAE, *, matched: bool = True) -> dict[str, float]:
    """mmcs_ab, mmcs_ba and, if `matched`, one_to_one; ValueError if their outputs differ in width."""
    of_a, of_b = decoder_directions(a), decoder_directions(b)
    if of_a.shape[1] != of_b.shape[1]:
        raise ValueError(f"These decoders are not comparable: their outputs have {of_a.shape[1]} and {of_b.shape[1]}.")
    to_b, to_a = nearest_rows(of_a, of_b)
    pairs = {"mmcs_ab": (of_a, of_b, to_b), "mmcs_ba": (of_b, of_a, to_a)}
    if matched:
        few, many = (of_a, of_b) if len(of_a) <= len(of_b) else (of_b, of_a)
        pairs["one_to_one"] = few, many, one_to_one(few, many)
    return {name: pair_cosines(*pair).mean().item() for name, pair in pairs.items()}


@torch.no_grad()
def within_similarity(sae: SAE) -> float:
    """The figure `within`."""
    W = decoder_directions(sae)
    return pair_cosines(W, W, nearest_rows(W, W, skip_same=True)[0]).mean().item()

"""Does an SAE find the true features? For sources that know them (synthetic/ground_truth.py), in eval mode.

Latents are matched one to one with features so that the summed correlation of their codes is as large as possible. With
P such pairs, P the smaller of the number of latents and the number of features that fire on the rows:

    mcc               mean over pairs of the correlation between the latent's code and the feature's
    mcc_cosine        the same with cosines between decoder rows and true directions, in a matching of their own
    precision, recall, f1     of "the latent is active" as a detector of "the feature fires"; mean over pairs
    cosine_of_features        mean over features of the cosine with the nearest decoder row
    cosine_of_latents         mean over latents of the cosine with the nearest feature
    uniqueness        number of different nearest features of the latents that are alive, over the number of these
    l0_true, l0_correlation   true number of active features per token; its correlation with the SAE's

A latent that never fires correlates with nothing: it counts 0 in mcc and f1. Low FVU and recovery are different things.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from apportion.architectures import SAE
from apportion.architectures.inputs import PER_TOKEN
from apportion.blocks import block_rows
from apportion.evals.evaluator import Evaluator, Found, Subject, add_evaluator, found_in
from apportion.evals.figures import Figure
from apportion.kernels.primitives import weighted_sums
from apportion.latents import Latents, concatenated
from apportion.matching import assign
from apportion.metrics import FVU, Activations, correlation, known, variance
from apportion.rows.batch import Batch

CHUNK = 4096


@torch.inference_mode()
def recovery(sae: SAE, batch: Batch, codes: Latents, directions: Float[Tensor, " num_features *out"]) -> dict[str, Any]:
    """FVU, L0, dead latents and everything above, on rows with their true codes; JSON-able."""
    if directions.shape[0] != codes.d_sae or len(batch.x) != codes.tokens:
        raise ValueError(
            f"recovery: {len(batch.x)} rows and {directions.shape[0]} directions do not belong to true codes of shape "
            f"{[codes.tokens, codes.d_sae]}."
        )
    found, fvu = _encoded(sae, batch)
    activations = Activations(sae.d_sae)
    activations.add(found)
    alive = activations.counts > 0
    fires = codes.counts() > 0
    correlations = correlation_matrix(found, codes)[:, fires]
    true = torch.nn.functional.normalize(directions.flatten(1).to(sae.dtype).cpu(), dim=1)
    cosines = decoder_directions(sae) @ true.T
    latents, features = matching(correlations)
    precision, recall = detection(found, codes, latents, fires.nonzero().squeeze(1)[features])
    return {
        "sae": sae.name,
        "k": sae.k,
        "d_sae": sae.d_sae,
        "tokens": len(batch.x),
        "fvu": fvu,
        "l0": activations.mean_l0(),
        "dead": activations.dead(),
        "mcc": correlations[latents, features].mean().item(),
        "mcc_cosine": cosines[matching(cosines)].mean().item(),
        "precision": precision.mean().item(),
        "recall": recall.mean().item(),
        "f1": (2 * precision * recall / (precision + recall).clamp_min(1e-12)).mean().item(),
        "cosine_of_features": cosines.max(0).values.mean().item(),
        "cosine_of_latents": cosines.max(1).values.mean().item(),
        "uniqueness": cosines[alive].argmax(1).unique().numel() / max(1, int(alive.sum())),
        "l0_true": codes.nnz / codes.tokens,
        "l0_correlation": known(correlation(found.l0().double(), codes.l0().double())),
    }


@final
@add_evaluator
class Recovery(Evaluator):
    """Of a store that knows its features (`GroundTruthSource.store`)."""

    name = "recovery"
    needs = frozenset({"rows", "labels"})
    figures = (
        Figure("mcc", "MCC", ".3f", "mean correlation of matched latents and features", "higher"),
        Figure("mcc_cosine", "MCC (cosine)", ".3f", "mean cosine of matched latents and features", "higher", None),
        Figure("precision", "precision", ".3f", "of matched latents as detectors of their features", "higher", None),
        Figure("recall", "recall", ".3f", "of matched latents as detectors of their features", "higher", None),
        Figure("f1", "F1", ".3f", "of matched latents as detectors of their features", "higher"),
        Figure("cosine_of_features", "cosine of features", ".3f", "mean, with the nearest decoder row", "higher"),
        Figure("cosine_of_latents", "cosine of latents", ".3f", "mean, with the nearest feature", "higher"),
        Figure("uniqueness", "unique", ".3f", "different nearest features of living latents, as a share", "higher"),
        Figure("l0_true", "true L0", ".2f", "features that fire on a token", column=None),
        Figure("l0_correlation", "r(L0, true)", ".2f", "of a token's L0 with the true one", "higher"),
    )

    def run(self, subject: Subject) -> Iterator[Found]:
        store, rows = subject.store, subject.indices
        result = recovery(subject.sae, store.batch(rows), store.codes[rows], store.directions)
        yield from found_in(result, self.figures, len(rows))


def _encoded(sae: SAE, batch: Batch) -> tuple[Latents, float]:
    """Codes of all rows in eval mode, on the CPU, and the FVU."""
    fvu, parts = FVU(), []
    y = batch.x if batch.target is None else batch.target
    with sae.in_eval_mode():
        for x, y_part in zip(batch.x.split(CHUNK), y.split(CHUNK), strict=True):
            latents = sae.encode(x.to(sae.device))
            fvu.add(y_part, sae.decode(latents, x.to(sae.device)))
            parts.append(latents.to("cpu"))
    return concatenated(parts), fvu.value()


def correlation_matrix(found: Latents, codes: Latents) -> Float[Tensor, "d_sae num_features"]:
    """Pearson's r between every latent and every feature over tokens; 0 where either is constant."""
    n = found.tokens
    products = torch.zeros(found.d_sae, codes.d_sae, dtype=torch.float64)
    for rows in torch.arange(n).split(block_rows(codes.d_sae, codes.values)):
        part, true = found[rows[0] : rows[-1] + 1], codes[rows[0] : rows[-1] + 1]
        order, tokens, offsets = part.by_latent()
        products += weighted_sums(tokens, offsets, part.values[order].double(), true.dense().double())
    (mean_z, sd_z), (mean_c, sd_c) = _moments(found), _moments(codes)
    covariance = products / n - torch.outer(mean_z, mean_c)
    return torch.where((sd_z[:, None] > 0) & (sd_c > 0), covariance / torch.outer(sd_z, sd_c).clamp_min(1e-300), 0.0)


def _moments(z: Latents) -> tuple[Float[Tensor, " d_sae"], Float[Tensor, " d_sae"]]:
    """Mean and standard deviation of each column."""
    values = z.values.double()
    sums = torch.zeros(2, z.d_sae, dtype=torch.float64).index_add_(1, z.indices, torch.stack([values, values.square()]))
    mean, square = sums / z.tokens
    return mean, variance(mean, square).sqrt()


def matching(score: Float[Tensor, "m n"]) -> tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"]]:
    """Rows and columns of the one-to-one assignment with the largest sum; min(m, n) pairs."""
    m, n = score.shape
    if m > n:
        columns, rows = matching(score.T)
        return rows, columns
    return torch.arange(m), torch.from_numpy(assign(-score.double().numpy()))


def detection(
    found: Latents, codes: Latents, latents: Int[Tensor, " pairs"], features: Int[Tensor, " pairs"]
) -> tuple[Float[Tensor, " pairs"], Float[Tensor, " pairs"]]:
    """Precision and recall of each latent as a detector of its feature; 0 where nothing is detected."""
    feature_of = torch.full((found.d_sae,), -1)
    feature_of[latents] = features
    of_match = feature_of[found.indices]
    true = codes.rows() * codes.d_sae + codes.indices
    hit = (of_match >= 0) & torch.isin(found.rows() * codes.d_sae + of_match, true)
    hits = torch.zeros(found.d_sae, dtype=torch.float64).index_add_(0, found.indices, hit.double())[latents]
    return hits / found.counts()[latents].clamp_min(1), hits / codes.counts()[features].clamp_min(1)


def decoder_directions(sae: SAE) -> Float[Tensor, "d_sae out"]:
    """What each latent adds to the reconstruction of raw rows, flattened and scaled to unit norm; zero if nothing."""
    device, parts = sae.device, []
    for ids in torch.arange(sae.d_sae, device=device).split(CHUNK):
        n = len(ids)
        x = sae.mean.new_zeros(n, *sae.row_shape, dtype=sae.dtype)
        one, ends = x.new_ones(n), torch.arange(n + 1, device=device)
        with_latent = sae.decode_scaled(Latents(one, ids, ends, sae.d_sae, (n,)), x)
        without = sae.decode_scaled(Latents(one[:0], ids[:0], 0 * ends, sae.d_sae, (n,)), x)
        if sae.input.kind not in PER_TOKEN:
            with_latent, without = sae.undo(with_latent, x), sae.undo(without, x)
        parts.append((with_latent - without).flatten(1).cpu())
    return torch.nn.functional.normalize(torch.cat(parts), dim=1)

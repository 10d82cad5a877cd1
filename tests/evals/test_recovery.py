"""Recovery of known features, on dictionaries whose figures are known."""

from __future__ import annotations

import itertools

import pytest
import torch

import apportion as ap
from apportion.architectures import SAES
from apportion.evals import recovery
from apportion.evals.recovery import correlation_matrix, decoder_directions, detection, matching
from apportion.latents import Latents
from apportion.rows.batch import Batch
from apportion.synthetic import GroundTruthConfig, GroundTruthSource

N = 8


def true_codes(tokens: int = 400, seed: int = 0) -> Latents:
    generator = torch.Generator().manual_seed(seed)
    fires = torch.rand(tokens, N, generator=generator) < 0.3
    return Latents.from_dense(fires * (1 + torch.rand(tokens, N, generator=generator)))


def dictionary(latents: torch.Tensor) -> ap.SAE:
    """A TopK SAE without limits whose latents are these features of the standard basis; -1 is a dead latent."""
    sae = ap.create("topk", d_in=N, d_sae=len(latents), k=len(latents), input_norm="none", aux="none")
    rows = torch.eye(N)[latents.clamp_min(0)]
    with torch.no_grad():
        sae.W_enc.copy_(torch.where(latents[:, None] < 0, -rows, rows))
        sae.W_dec.copy_(rows)
    return sae.eval()


def of(latents: list[int]) -> dict[str, float]:
    codes = true_codes()
    return recovery(dictionary(torch.tensor(latents)), Batch(codes.dense()), codes, torch.eye(N))


PERFECT = ("mcc", "mcc_cosine", "precision", "recall", "f1", "cosine_of_features", "cosine_of_latents", "uniqueness")


@pytest.mark.parametrize("latents", [[*range(N)], [3, 1, 0, 2, 7, 6, 5, 4]])
def test_a_perfect_dictionary_in_any_order(latents: list[int]) -> None:
    found = of(latents)
    for name in PERFECT:
        assert found[name] == pytest.approx(1, abs=1e-6), name
    assert found["fvu"] == pytest.approx(0, abs=1e-9) and found["dead"] == 0
    assert found["l0"] == found["l0_true"] and found["l0_correlation"] == pytest.approx(1)


def test_a_duplicated_latent_counts_once() -> None:
    found = of([0, 0, 1, 2, 3, 4, 5, 6])  # nobody is left for feature 7
    z, c = true_codes().dense().double(), true_codes()
    left_over = torch.corrcoef(z[:, [0, 7]].T)[0, 1].item()
    assert found["mcc"] == pytest.approx((7 + left_over) / N, abs=1e-6)
    assert found["mcc_cosine"] == pytest.approx(7 / 8) and found["cosine_of_features"] == pytest.approx(7 / 8)
    assert found["cosine_of_latents"] == pytest.approx(1) and found["uniqueness"] == pytest.approx(7 / 8)
    both = ((z[:, 0] > 0) & (z[:, 7] > 0)).sum().item()
    assert found["precision"] == pytest.approx((7 + both / c.counts()[0].item()) / 8)
    assert found["recall"] == pytest.approx((7 + both / c.counts()[7].item()) / 8)


def test_a_dead_latent_detects_nothing() -> None:
    found = of([0, 1, 2, 3, 4, 5, 6, -1])
    assert found["dead"] == pytest.approx(1 / 8)
    for name in ("mcc", "precision", "recall", "f1"):
        assert found[name] == pytest.approx(7 / 8, abs=1e-6), name
    assert found["cosine_of_latents"] == pytest.approx(1), "its direction is that of feature 0"
    assert found["uniqueness"] == 1, "of the latents that are alive"


def test_more_and_fewer_latents_than_features() -> None:
    more, fewer = of([*range(N), 2, 5]), of([0, 1, 2])
    assert more["mcc"] == pytest.approx(1, abs=1e-6) and more["uniqueness"] == pytest.approx(0.8)
    assert fewer["mcc"] == pytest.approx(1, abs=1e-6), "of the three pairs that there can be"
    assert fewer["cosine_of_features"] == pytest.approx(3 / 8) and fewer["l0"] < fewer["l0_true"]


def test_features_that_never_fire_are_left_out() -> None:
    z = true_codes().dense()
    z[:, 5] = 0
    codes = Latents.from_dense(z)
    found = recovery(dictionary(torch.tensor([0, 1, 2, 3, 4, 6, 7])), Batch(z), codes, torch.eye(N))
    assert found["mcc"] == pytest.approx(1, abs=1e-6) and found["f1"] == pytest.approx(1)


def test_random_directions_recover_little() -> None:
    source = GroundTruthSource(GroundTruthConfig(d_in=64, num_features=128, num_roots=0))
    batch, codes = source.truth(3000)
    sae = ap.create("topk", d_in=64, d_sae=128, k=4, seed=0).eval()
    found = recovery(sae, batch, codes, source.directions)
    assert 0.2 < found["cosine_of_features"] < 0.45 and found["mcc"] < 0.35 and found["f1"] < 0.4
    with torch.no_grad():
        sae.W_enc.copy_(source.directions)
        sae.W_dec.copy_(source.directions)
    better = recovery(sae, batch, codes, source.directions)
    assert better["mcc"] > 0.6 and better["mcc_cosine"] == pytest.approx(1)


def test_correlations_and_detection_equal_naive_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(correlation_matrix.__globals__, "block_rows", lambda width, like: 37)
    generator = torch.Generator().manual_seed(1)
    z = torch.rand(205, 7, generator=generator) * (torch.rand(205, 7, generator=generator) < 0.4)
    c = torch.rand(205, 5, generator=generator) * (torch.rand(205, 5, generator=generator) < 0.3)
    z[:, 3] = 0
    found, codes = Latents.from_dense(z), Latents.from_dense(c)
    both = torch.corrcoef(torch.cat([z, c], 1).double().T)[:7, 7:].nan_to_num(0.0)
    torch.testing.assert_close(correlation_matrix(found, codes), both, atol=1e-9, rtol=1e-9)
    latents, features = matching(both)
    best = max(sum(both[i, j].item() for j, i in enumerate(p)) for p in itertools.permutations(range(7), 5))
    assert both[latents, features].sum().item() == pytest.approx(best)
    precision, recall = detection(found, codes, latents, features)
    hits = ((z[:, latents] > 0) & (c[:, features] > 0)).sum(0).double()
    torch.testing.assert_close(precision, hits / (z[:, latents] > 0).sum(0).clamp_min(1))
    torch.testing.assert_close(recall, hits / (c[:, features] > 0).sum(0))


@pytest.mark.parametrize("name", SAES)
def test_decoder_directions_are_the_unit_decoder_rows(name: str) -> None:
    d_sae = SAES[name].architecture.d_sae_for(6) or 32
    sae = ap.create(name, d_in=6, d_sae=d_sae, k=2, seed=0)
    lead = (50, *sae.row_shape)
    target = torch.randn(50, 6) if sae.needs_target else None
    sae.fit_input(3 * torch.randn(lead) + 1, target)
    if len(sae.row_shape) > 1:
        sae.input.scale.copy_(torch.tensor([0.5, 2.0]))
    rows = sae.W_dec / (sae.scale[:, None] if len(sae.row_shape) > 1 else 1)
    with torch.no_grad():
        torch.testing.assert_close(decoder_directions(sae), torch.nn.functional.normalize(rows.flatten(1), dim=1))


def test_what_does_not_belong_together_is_refused() -> None:
    codes = true_codes()
    with pytest.raises(ValueError, match="do not belong"):
        recovery(dictionary(torch.arange(N)), Batch(codes.dense()[:-1]), codes, torch.eye(N))


def test_directions_at_two_sites_count_as_one() -> None:
    """A crosscoder whose latents are the features at both sites: its cosines are 1, not the number of sites."""
    codes = true_codes()
    directions = torch.stack([torch.eye(N), torch.eye(N).flip(0)], dim=1)
    sae = ap.create("crosscoder", d_in=N, d_sae=N, k=N, num_sites=2, input_norm="none", aux="none")
    with torch.no_grad():
        sae.W_enc.copy_(directions / 2)
        sae.W_dec.copy_(directions)
    x = torch.einsum("tf,fsd->tsd", codes.dense(), directions)
    found = recovery(sae.eval(), Batch(x), codes, directions)
    for name in PERFECT:
        assert found[name] == pytest.approx(1, abs=1e-6), name

"""Checks of the conformance suite can fail: for each there is a broken SAE that it is meant for."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import apportion as ap
from apportion.architectures.base import Pass
from apportion.architectures.jumprelu import JumpReLU
from apportion.architectures.plain import Plain
from apportion.latents import Latents
from apportion.testing import CHECKS, check_sae


class LosesLeadingDimensions(Plain):
    def encode(self, x, warm=None):
        z = super().encode(x, warm)
        return Latents(z.values, z.indices, z.offsets, z.d_sae, (z.tokens,))


class HasNegativeCodes(Plain):
    def encode_scaled_by(self, rule, x, warm=None):
        return super().encode_scaled_by(rule, x, warm).map(lambda values: values - 0.5)


class ForwardGoesItsOwnWay(Plain):
    def forward(self, x):
        return 1.01 * super().forward(x)


class ReturnsTheDtypeOfItsWeights(Plain):
    def decode(self, latents, x=None):
        return super().decode(latents, x).to(self.dtype)


class CutsWideRows(Plain):
    def _rows(self, x):
        return torch.nn.functional.pad(x, (0, self.d_in - x.shape[-1])).reshape(-1, self.d_in).to(self.dtype)


class TakesNaN(Plain):
    def _finite_rows(self, x):
        return self._rows(x).nan_to_num()


class IgnoresTargets(Plain):
    def prepare(self, x, target=None):
        return super().prepare(x)


class CountsWhatItEncodes(Plain):
    def encode_scaled_by(self, rule, x, warm=None):
        self.b_enc.data += 1e-4
        return super().encode_scaled_by(rule, x, warm)


class RemembersWhatItEncoded(Plain):
    loudest = 1.0

    def encode_scaled_by(self, rule, x, warm=None):
        self.loudest = max([self.loudest, *x.abs().amax(1).tolist()])
        return super().encode_scaled_by(rule, x / self.loudest, warm)


class StaysInEvalMode(Plain):
    def calibrate(self, xs):
        l0 = super().calibrate(xs)
        self.eval()
        return l0


class KeepsAGainOutsideOfItsState(Plain):
    gain = 1.0

    def fit_input(self, x, target=None):
        super().fit_input(x, target)
        self.gain = 1.5

    def decode_scaled(self, latents, x=None):
        return self.gain * super().decode_scaled(latents, x)


class ForgetsTheEncoderBiasInFolding(Plain):
    def fold_in(self, mean, scale):
        super().fold_in(mean, scale)
        self.b_enc.mul_(scale)


class ForgetsThresholdsInFolding(Plain):
    def fold_in(self, mean, scale):
        super().fold_in(mean, scale)
        self.allocation.rescale(scale.item())


class HasAnotherK(Plain):
    k = 7


class DropsItsWeakestMatch(Plain):
    def encode_scaled_by(self, rule, x, warm=None):
        z = super().encode_scaled_by(rule, x, warm)
        return z.where(z.values > z.values.min()) if z.nnz else z


class LooksAtTheWrongAffinity(Plain):
    def encode_scaled_by(self, rule, x, warm=None):
        found = super().encode_scaled_by(rule, x * torch.linspace(0.9, 1.1, self.d_in).to(x), warm).detach()
        values = (self.centred(x)[found.rows()] * self.W_enc[found.indices]).sum(1) + self.b_enc[found.indices]
        return found.with_values(values.relu())


class AveragesInsteadOfAdding(Plain):
    def decode_scaled(self, latents, x=None):
        counts = latents.l0().clamp_min(1).reshape(-1)
        return super().decode_scaled(latents.with_values(latents.values / counts[latents.rows()]), x)


class TrainsOnSomethingElse(Plain):
    def forward_scaled(self, x, context):
        return super().forward_scaled(x + 0.01, context)


class CentresTheBatch(Plain):
    def encode_scaled_by(self, rule, x, warm=None):
        return super().encode_scaled_by(rule, x - 0.01 * x.mean(0), warm)


class BreaksTiesByPosition(Plain):
    def encode_scaled_by(self, rule, x, warm=None):
        flip = torch.arange(self.d_sae - 1, -1, -1)
        if len(x) % 2:
            return super().encode_scaled_by(rule, x, warm)
        z = self.__class__.__base__(self.config, rule)
        z.load_state_dict({n: t[flip] if t.shape[:1] == (self.d_sae,) else t for n, t in self.state_dict().items()})
        return z.encode_scaled_by(rule, x, warm).select(flip)


class CalibratesTooHigh(Plain):
    def calibrate(self, xs):
        l0 = super().calibrate(xs)
        self.allocation.threshold.mul_(1.1)
        return l0


class HasAWrongGradient(Plain):
    def decode_scaled(self, latents, x=None):
        x_hat = super().decode_scaled(latents, x)
        return 1.01 * x_hat - 0.01 * x_hat.detach()


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return 2 * g


class HasATermWithAWrongGradient(Plain):
    def own_terms(self, x, y, made: Pass, context):
        return {"size": Doubled.apply(made.latents.values.square().sum())}


class HidesTheInput(Plain):
    def encode_scaled_by(self, rule, x, warm=None):
        return super().encode_scaled_by(rule, x.detach(), warm)


class SeesHalfOfItsWindow(JumpReLU):
    def own_terms(self, x, y, made, context):
        terms = super().own_terms(x, y, made, context)
        return {name: 0.5 * term + 0.5 * term.detach() for name, term in terms.items()}


class TrainsWithNoise(Plain):
    source = torch.Generator()

    def forward_scaled(self, x, context):
        return super().forward_scaled(x + 0.01 * torch.randn(x.shape, generator=self.source).to(x), context)


class LosesATerm(Plain):
    def reconstruction_loss(self, y, made):
        return super().reconstruction_loss(y, made) * torch.nan


class LearnsNothing(Plain):
    def reconstruction_loss(self, y, made):
        return 1e-12 * super().reconstruction_loss(y, made)

    def own_terms(self, x, y, made, context):
        return {"decay": 0.01 * self.W_enc.square().sum()}


BROKEN = {
    (LosesLeadingDimensions, "topk"): "leading_dimensions",
    (HasNegativeCodes, "topk"): "codes_are_sparse_rows",
    (ForwardGoesItsOwnWay, "topk"): "forward_is_decode_of_encode",
    (ReturnsTheDtypeOfItsWeights, "topk"): "dtypes",
    (CutsWideRows, "topk"): "wrong_width_is_refused",
    (TakesNaN, "topk"): "nan_is_refused",
    (IgnoresTargets, "topk"): "targets_are_needed_or_refused",
    (TakesNaN, "mutual_choice"): "nan_is_refused",
    (CountsWhatItEncodes, "topk"): "encode_changes_nothing",
    (RemembersWhatItEncoded, "topk"): "encode_changes_nothing",
    (StaysInEvalMode, "mutual_choice"): "calibrate_keeps_mode_and_parameters",
    (KeepsAGainOutsideOfItsState, "topk"): "saved_is_loaded",
    (ForgetsTheEncoderBiasInFolding, "topk"): "folding",
    (ForgetsThresholdsInFolding, "mutual_choice"): "folding",
    (ForgetsThresholdsInFolding, "feature_choice"): "folding",
    (HasAnotherK, "topk"): "the_setting_k",
    (DropsItsWeakestMatch, "topk"): "budget_in_training",
    (DropsItsWeakestMatch, "mutual_choice"): "budget_in_training",
    (DropsItsWeakestMatch, "feature_choice"): "budget_in_training",
    (LooksAtTheWrongAffinity, "topk"): "selection_equals_reference",
    (LooksAtTheWrongAffinity, "feature_choice"): "selection_equals_reference",
    (AveragesInsteadOfAdding, "topk"): "decode_adds_up",
    (TrainsOnSomethingElse, "topk"): "training_pass_is_encode",
    (CentresTheBatch, "topk"): "independent_of_the_batch",
    (CentresTheBatch, "mutual_choice"): "independent_of_the_batch",
    (BreaksTiesByPosition, "topk"): "independent_of_the_batch_with_ties",
    (CalibratesTooHigh, "mutual_choice"): "calibration_hits_k",
    (HasAWrongGradient, "topk"): "gradients_of_losses",
    (HasATermWithAWrongGradient, "topk"): "gradients_of_losses",
    (HidesTheInput, "topk"): "gradient_to_the_input",
    (SeesHalfOfItsWindow, "jumprelu"): "gradients_of_rules",
    (TrainsWithNoise, "topk"): "determined_by_the_seed",
    (LosesATerm, "topk"): "training_steps",
    (LearnsNothing, "topk"): "training_helps",
}


@pytest.mark.parametrize(("broken", "check"), BROKEN.items(), ids=lambda b: b if isinstance(b, str) else b[0].__name__)
def test_a_broken_sae_is_caught(broken: tuple[type, str], check: str) -> None:
    cls, name = broken

    def factory(**sizes: int) -> ap.SAE:
        sae = ap.create(name, **sizes)
        sae.__class__ = cls
        return sae

    with pytest.raises(AssertionError, match=f"1 of 1 checks failed\n{check}: "):
        check_sae(factory, only=check)


def test_needing_thresholds_cannot_be_forgotten() -> None:
    def factory(**sizes: int) -> ap.SAE:
        sae = ap.create("mutual_choice", **sizes)
        sae.allocation.threshold.fill_(0.0)
        return sae

    with pytest.raises(AssertionError, match="encode in eval mode before calibration was not refused"):
        check_sae(factory, only="eval_mode_asks_for_calibration")


def test_every_check_is_known_to_fail() -> None:
    without_a_toy = {"devices", "eval_mode_asks_for_calibration"}  # needs a GPU; has the test above
    assert set(BROKEN.values()) | without_a_toy == set(CHECKS)


def test_all_failures_are_told_together() -> None:
    def factory(**sizes: int) -> ap.SAE:
        sae = ap.create("topk", **sizes)
        sae.__class__ = ForwardGoesItsOwnWay
        return sae

    with pytest.raises(AssertionError) as told:
        check_sae(
            factory, only=["dtypes", "forward_is_decode_of_encode", "decode_adds_up", "folding", "saved_is_loaded"]
        )
    text = str(told.value)
    assert text.startswith("2 of 5 checks failed") and "saved_is_loaded: " in text
    assert "forward_is_decode_of_encode: sae(x) is not decode(encode(x), x)" in text


def test_a_crash_is_a_failure_and_a_wrong_name_a_mistake() -> None:
    def factory(**sizes: int) -> ap.SAE:
        sae = ap.create("topk", **sizes)
        sae.decode = lambda *_: 1 / 0  # type: ignore[method-assign]
        return sae

    with pytest.raises(AssertionError, match="decode_adds_up: ZeroDivisionError"):
        check_sae(factory, only="decode_adds_up")
    with pytest.raises(ValueError, match=r"no check 'fold'; the checks are: .*folding"):
        check_sae(partial(ap.create, "topk"), only="fold")


def test_checks_explain_themselves() -> None:
    assert all((check.__doc__ or "").strip() for check in CHECKS.values())

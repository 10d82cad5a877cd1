"""SAEs with one mistake each, for the check that is meant to find it."""

from __future__ import annotations

import torch

from apportion.architectures.base import Pass
from apportion.architectures.gated import Gated, GatedPass
from apportion.architectures.jumprelu import JumpReLU
from apportion.architectures.plain import Plain
from apportion.architectures.relu import ReLU
from apportion.architectures.switch import Switch
from apportion.group import ALONE
from apportion.latents import Latents


class LosesLeadingDimensions(Plain):
    def encode(self, x):
        z = super().encode(x)
        return Latents(z.values, z.indices, z.offsets, z.d_sae, (z.tokens,))


class HasNegativeCodes(Plain):
    def encode_scaled(self, x, selection):
        return super().encode_scaled(x, selection).map(lambda values: values - 0.5)


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
    def finite_rows(self, x):
        return self._rows(x).nan_to_num()


class IgnoresTargets(Plain):
    def prepare(self, x, target=None):
        return super().prepare(x)


class CountsWhatItEncodes(Plain):
    def encode_scaled(self, x, selection):
        self.b_enc.data += 1e-4
        return super().encode_scaled(x, selection)


class RemembersWhatItEncoded(Plain):
    loudest = 1.0

    def encode_scaled(self, x, selection):
        self.loudest = max([self.loudest, *x.abs().amax(1).tolist()])
        return super().encode_scaled(x / self.loudest, selection)


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


class RefusesToFold(Plain):
    def folded(self):
        raise ValueError("this does not fold")


class HasAnotherK(Plain):
    k = 7


class DropsItsWeakestMatch(Plain):
    def encode_scaled(self, x, selection):
        z = super().encode_scaled(x, selection)
        return z.where(z.values > z.values.min()) if z.nnz else z


class LooksAtTheWrongAffinity(Plain):
    def encode_scaled(self, x, selection):
        found = super().encode_scaled(x * torch.linspace(0.9, 1.1, self.d_in).to(x), selection).detach()
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
    def encode_scaled(self, x, selection):
        return super().encode_scaled(x - 0.01 * x.mean(0), selection)


class BreaksTiesByPosition(Plain):
    def encode_scaled(self, x, selection):
        flip = torch.arange(self.d_sae - 1, -1, -1)
        if len(x) % 2:
            return super().encode_scaled(x, selection)
        z = self.__class__.__base__(self.config, selection.rule)
        z.load_state_dict({n: t[flip] if t.shape[:1] == (self.d_sae,) else t for n, t in self.state_dict().items()})
        return z.encode_scaled(x, selection).select(flip)


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


class GatesDetached(Gated):
    def own_terms(self, x, y, made, context):
        detached = GatedPass(made.latents, made.y_hat, made.gates.detach())
        return super().own_terms(x, y, made, context) | {"gates": super().own_terms(x, y, detached, context)["gates"]}


class PenaltyDetached(ReLU):
    def penalty(self, latents, p):
        return super().penalty(latents.detach(), p)


class NormsDetached(ReLU):
    def penalty(self, latents, p):
        norms = self.W_dec.detach().norm(dim=1)
        return (latents.values * norms[latents.indices]).sum() / latents.tokens


class BalanceDetached(Switch):
    def own_terms(self, x, y, made, context):
        return {name: term.detach() for name, term in super().own_terms(x, y, made, context).items()}


class AuxiliaryLossReachesEverything(Plain):
    def own_terms(self, x, y, made, context):
        (name, term), *_ = super().own_terms(x, y, made, context).items()
        return {name: term + 0.01 * self.reconstruction_loss(y, made)}


class AuxiliaryLossReachesTheBias(Plain):
    def own_terms(self, x, y, made, context):
        (name, term), *_ = super().own_terms(x, y, made, context).items()
        return {name: term + 0.01 * self.b_dec.square().sum()}


class DeclaresAWrongName(Plain):
    constants = {"aux_k": ("made", "b_doc")}  # noqa: RUF012


class HidesTheInput(Plain):
    def encode_scaled(self, x, selection):
        return super().encode_scaled(x.detach(), selection)


class SeesHalfOfItsWindow(JumpReLU):
    def own_terms(self, x, y, made, context):
        terms = super().own_terms(x, y, made, context)
        return {name: 0.5 * term + 0.5 * term.detach() for name, term in terms.items()}


class TrainsWithNoise(Plain):
    source = torch.Generator()

    def forward_scaled(self, x, context):
        return super().forward_scaled(x + 0.01 * torch.randn(x.shape, generator=self.source).to(x), context)


class LosesATerm(Plain):
    def reconstruction_loss(self, y, made, group=ALONE):
        return super().reconstruction_loss(y, made, group) * torch.nan


class LearnsNothing(Plain):
    def reconstruction_loss(self, y, made, group=ALONE):
        return 1e-12 * super().reconstruction_loss(y, made, group)

    def own_terms(self, x, y, made, context):
        return {"decay": 0.01 * self.W_enc.square().sum()}


BROKEN: dict[tuple[type, str], str] = {
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
    (RefusesToFold, "topk"): "folding",
    (RefusesToFold, "mutual_choice"): "exported_is_loaded",
    (ForgetsTheEncoderBiasInFolding, "mutual_choice"): "exported_is_loaded",
    (KeepsAGainOutsideOfItsState, "mutual_choice"): "exported_is_loaded",
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
    (GatesDetached, "gated"): "gradients_of_losses",
    (PenaltyDetached, "relu"): "gradients_of_losses",
    (NormsDetached, "relu"): "gradients_of_losses",
    (BalanceDetached, "switch"): "gradients_of_losses",
    (AuxiliaryLossReachesEverything, "topk"): "gradients_of_losses",
    (AuxiliaryLossReachesTheBias, "topk"): "gradients_of_losses",
    (DeclaresAWrongName, "topk"): "gradients_of_losses",
    (HidesTheInput, "topk"): "gradient_to_the_input",
    (SeesHalfOfItsWindow, "jumprelu"): "gradients_of_rules",
    (TrainsWithNoise, "topk"): "determined_by_the_seed",
    (LosesATerm, "topk"): "training_steps",
    (LearnsNothing, "topk"): "training_helps",
}
"""(class, name in `SAES` of what it is made from): the check."""

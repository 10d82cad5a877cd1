"""The table of named SAEs. A name pairs an architecture (how codes are computed) with a rule (which matches are kept).

To add one: write one file in this folder (an architecture) or in `allocation/` (a rule), add one line to `SAES`, and
one test for what is special in its paper. Creation, files, the command line and evaluation follow from the table.

Some architectures work with any rule: they have the setting `allocation`, a name of `RULES`, and then the settings of
that rule: create("matryoshka", allocation="feature_choice", budgets="zipf", ...). Rules that say why they are
`not_to_train` cannot be chosen; the SAEs that have one for good do not show its settings.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from apportion import choices
from apportion.allocation import RULES, Rule
from apportion.architectures.base import SAE
from apportion.architectures.crosscoder import Crosscoder
from apportion.architectures.fixed_basis import FixedBasis
from apportion.architectures.frozen import Frozen
from apportion.architectures.gated import Gated
from apportion.architectures.jumprelu import JumpReLU
from apportion.architectures.matryoshka import Matryoshka
from apportion.architectures.mlsae import MLSAE
from apportion.architectures.multi_topk import MultiTopK
from apportion.architectures.plain import Plain
from apportion.architectures.relu import ReLU
from apportion.architectures.switch import Switch
from apportion.architectures.transcoder import Transcoder
from apportion.settings import check_kinds, in_records, nearest, plain_number, settle
from apportion.torch_state import usual


@dataclass(frozen=True)
class NamedSAE:
    architecture: type[SAE]
    rule: type[Rule]
    summary: str
    """Who gets how much of the budget, in one line."""
    defaults: dict[str, Any] = field(default_factory=dict)
    """Settings whose default differs from that of the architecture or the rule."""
    any_rule: bool = False
    """True if the rule is a setting, `allocation`, and `rule` only its default."""

    def rule_named(self, allocation: str | None = None, *, to_train: bool = True) -> type[Rule]:
        """The rule of that name, or the default one.

        ValueError if there is none, if this SAE has its own, or, `to_train`, if the rule is not for that.
        """
        if allocation is None:
            return self.rule
        with_choice = [] if self.any_rule else [name for name, entry in SAES.items() if entry.any_rule]
        reasons = {name: rule.not_to_train for name, rule in RULES.items()}
        return RULES[choices.rule(allocation, rule_name(self.rule), reasons, with_choice, to_train)]

    def settings(self, allocation: str | None = None, *, to_train: bool = True) -> dict[str, Any]:
        """Every setting with its default under this rule, in order; d_in and d_sae have none. Unless `to_train` with
        what its absence means in what was written before there was this setting."""
        rule = self.rule_named(allocation, to_train=to_train)
        of_architecture, of_rule = (
            {f.name: self.defaults.get(f.name, f.default if to_train else in_records(f)) for f in fields(part.Config)}
            for part in (self.architecture, rule)
        )
        chosen = {"allocation": rule_name(rule)} if self.any_rule else {}
        return of_architecture | chosen | ({} if to_train and rule.not_to_train else of_rule)


def rule_choices() -> list[str]:
    """The rules that `allocation` can name."""
    return choices.to_train({name: rule.not_to_train for name, rule in RULES.items()})


def rule_name(rule: type[Rule]) -> str:
    return next(name for name, known in RULES.items() if known is rule)


def _any_rule(architecture: type[SAE], summary: str, rule: str = "topk", **defaults: Any) -> NamedSAE:
    """An SAE whose rule is a setting."""
    return NamedSAE(architecture, RULES[rule], summary, defaults, any_rule=True)


SAES: dict[str, NamedSAE] = {
    "topk": NamedSAE(Plain, RULES["topk"], "every token keeps its k strongest latents"),
    "mutual_choice": NamedSAE(
        Plain,
        RULES["mutual_choice"],
        "the strongest matches win, whichever token they belong to: tokens take as many latents as they need",
        {"aux": "aux_zipf"},
    ),
    "feature_choice": NamedSAE(
        Plain,
        RULES["feature_choice"],
        "every latent keeps a fixed share of tokens, those it matches best: tokens take what they need, no latent dies",
        {"aux": "aux_zipf"},
    ),
    "multi_topk": NamedSAE(
        MultiTopK, RULES["topk"], "every token keeps its k strongest latents, and could use more: 4 k are trained too"
    ),
    "matryoshka": _any_rule(
        Matryoshka,
        "nested SAEs of growing width in one: the first latents alone reconstruct as well as they can",
        rule="mutual_choice",
    ),
    "transcoder": _any_rule(
        Transcoder, "codes of a module's input predict its output; every token keeps its k strongest latents"
    ),
    "skip_transcoder": _any_rule(
        Transcoder,
        "a transcoder with a dense linear map beside the latents, which need not spend themselves on what is linear",
        skip=True,
    ),
    "crosscoder": _any_rule(
        Crosscoder,
        "one code for several layers or models; every token keeps the k latents that write most to all of them",
        affinity="code_times_decoder_norm",
        subtract_b_dec=False,
    ),
    "mlsae": _any_rule(
        MLSAE,
        "one SAE for all layers: every (token, layer) is a row, standardised alone, and keeps its k strongest latents",
    ),
    "switch": _any_rule(
        Switch, "a router sends each token to one of several small SAEs, of which only that one is computed", aux="none"
    ),
    "relu": NamedSAE(
        ReLU, RULES["threshold"], "every positive latent is kept, and an L1 penalty makes codes small until k are left"
    ),
    "gated": NamedSAE(
        Gated,
        RULES["threshold"],
        "one path decides which latents fire and bears the L1 penalty, another says how strongly",
    ),
    "jumprelu": NamedSAE(
        JumpReLU,
        RULES["learned_threshold"],
        "every latent has a threshold of its own, which is learned: tokens take as many latents as exceed theirs",
        {"aux": "none"},
    ),
    "frozen_decoder": _any_rule(
        Frozen,
        "baseline: decoder directions are random and never trained, every token keeps its k strongest latents",
        frozen="decoder",
    ),
    "soft_frozen_decoder": _any_rule(
        Frozen,
        "baseline: decoder directions stay near a random start, every token keeps its k strongest latents",
        frozen="soft_decoder",
    ),
    "frozen_encoder": _any_rule(
        Frozen,
        "baseline: encoder directions are random and never trained, every token keeps its k strongest latents",
        frozen="encoder",
    ),
    "pca": _any_rule(
        FixedBasis, "baseline: nothing is trained, every token keeps its k largest principal components", basis="pca"
    ),
    "neurons": _any_rule(
        FixedBasis,
        "baseline: nothing is trained, every token keeps its k largest activations as they are",
        basis="neurons",
    ),
}


def named(name: str) -> NamedSAE:
    """The SAE of that name in the table; ValueError with the nearest ones if there is none."""
    return SAES[choices.sae(name, SAES)]


def create(name: str, **settings: Any) -> SAE:
    """A new SAE in train mode, e.g. create("mutual_choice", d_in=576, d_sae=4608, k=32).

    Settings are the fields of the architecture's and the rule's Config, and `allocation` where the rule is a setting.
    Raises ValueError for an unknown name or setting, with the nearest known one, and for values that cannot work.
    """
    return _made(name, settings, to_train=True)


def rebuild(name: str, **settings: Any) -> SAE:
    """`create` for an SAE that exists already, from its `settings()`: the rule may be one that is not for training."""
    return _made(name, settings, to_train=False)


@usual(learning=True)
def _made(name: str, settings: dict[str, Any], to_train: bool) -> SAE:
    settings = {setting: plain_number(value) for setting, value in settings.items()}
    entry, allocation = named(name), settings.get("allocation")
    rule_type = entry.rule_named(allocation, to_train=to_train)
    known = entry.settings(allocation, to_train=to_train)
    for setting in settings:
        if setting not in known:
            under = f" with allocation={known['allocation']!r}" if entry.any_rule else ""
            raise ValueError(f"{name}{under} has no setting {setting!r}; {nearest(setting, known)}")
    if "d_sae" not in settings and (d_sae := entry.architecture.d_sae_for(settings.get("d_in", 0))):
        settings = settings | {"d_sae": d_sae}
    missing = [s for s in ("d_in", "d_sae") if s not in settings]
    if missing:
        raise ValueError(f"create({name!r}) needs {' and '.join(missing)}.")
    values = entry.defaults | {s: default for s, default in known.items() if default is not MISSING} | settings
    for part in (entry.architecture, rule_type):
        check_kinds(part.Config, values)
    config, rule_config = (
        part.Config(**{f.name: values[f.name] for f in fields(part.Config) if f.name in values})
        for part in (entry.architecture, rule_type)
    )
    settle(rule_config, strict=False)
    rule = rule_type(rule_config, config.d_sae)
    sae = entry.architecture(config, rule)
    sae.name = name
    sae.allocation_name = known.get("allocation")
    return sae.train()

"""`apportion train`: its options are those below, of TrainConfig, and of the SAE that --sae names."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from tyro.conf import Fixed, Positional, Suppress, arg

from apportion import choices
from apportion import tracking as trackers
from apportion.answers import DIVERGED
from apportion.cli import options
from apportion.cli.arguments import Copies, Count, Documents, Filter, Model, Text, best_device, say, window_rows
from apportion.settings import meanings


@dataclass(kw_only=True)
class TrainBase:
    """Train a sparse autoencoder on a cache, or directly on a model."""

    source: Positional[str]
    """A cache made by collect (a folder, or a URL such as s3://bucket/acts), a .npy file of rows, or a transformers
    model (then also --hookpoint and --text or --dataset)."""
    out: Path
    """The run folder to create."""
    sae: str = "mutual_choice"
    """Which SAE. Its own options follow below, those of another with --sae NAME --help."""
    training_objective: str = "local"
    """What is minimised: local (reconstruction), e2e or e2e_ds (what the language model does with it; needs a model),
    mutual (several SAEs side by side). Its own options follow below."""
    k: float = 32
    """Active latents per token: the sparsity budget."""
    d_sae: int = 16_384
    """Number of latents; of pca and neurons it is always twice the width of the activations."""
    hookpoint: str | None = None
    """Which hookpoint; needed for a model and for a cache that holds several. For an SAE that takes several: names or
    globs separated by commas; default: all of the cache."""
    window: str = "auto"
    """How many rows of a cache are held in memory and mixed at a time: a number such as 4M, exact for all of them, or
    auto, which is exact unless the cache is larger than memory and its disk slow at random reads."""
    tokens: Count | None = None
    """Rows to train on; default: every training row of the cache once."""
    held_out_share: float = 0.1
    """Share of contexts that is kept for calibration and never trained on."""
    corpus: Annotated[Text, arg(name="")] = field(default_factory=Text)
    filter: Annotated[Filter, arg(name="")] = field(default_factory=Filter)
    documents: Annotated[Documents, arg(name="")] = field(default_factory=Documents)
    context_tokens: int = 256
    """Length of contexts, when training on a model."""
    buffer_tokens: Count = 1 << 17
    """Tokens whose rows are mixed, when training on a model; memory must hold them."""
    loading: Annotated[Model, arg(name="")] = field(default_factory=Model)
    copies: Annotated[Copies, arg(name="")] = field(default_factory=Copies)
    resume: bool = False
    """Go on with the run in --out after an interruption."""
    requeue: bool = False
    """Begin the run in --out, go on with it, or leave it as it is if it is finished: for scripts that are run again."""
    track: str | None = None
    """Show the curves also with wandb, trackio, tensorboard or mlflow; several with commas."""
    seed: int = 0
    """Seed of initial weights, and of the order of the data."""
    data_seed: int | None = None
    """Another seed for the order of the data, so that SAEs that begin differently see the same; default: --seed."""

    def run(self) -> int | None:
        self.check()
        source = self.make_source()
        trainer = self.trainer(source)
        sae = trainer.sae
        try:
            trainer.fit(source, self.out, resume=self.resume or self.requeue, track=self.track or ())
        except KeyboardInterrupt as stopped:
            said = str(stopped)
            say(f"\n{said[:1].upper()}{said[1:]}.")
            raise
        calibration = sae.info["calibration"]
        say(f"{self.out}: {sae.name} on {trainer.tokens:,} tokens of {sae.hookpoint or self.source}")
        say(f"  calibrated on {calibration['tokens']:,} held-out tokens: L0 {calibration['l0']:.2f}")
        if trainer.verdict is not None:
            say(f"  but {'the result is of no use: ' * trainer.verdict.diverged}{trainer.verdict.text}")
        if trainer.verdict is not None and trainer.verdict.diverged:
            return DIVERGED
        say(f"  next: apportion eval {self.out if len(trainer.saes) == 1 else self.out / 'sae-0'}")
        return None

    def check(self) -> None:
        """ValueError for mistakes in the settings, before anything is loaded."""
        from apportion.architectures import create
        from apportion.training import TrainConfig

        trackers.given(self.track or ())
        self._check_out()
        best_device(self.loading.device)
        window_rows(self.window)
        self._objective_config()
        if "d_sae" in (settings := self._settings()):
            create(self.sae, d_in=1, **settings).allocation.check_batch(TrainConfig(**self._train()).batch_tokens)

    def _settings(self) -> dict[str, Any]:
        """Of the SAE, as far as they do not follow from the rows."""
        from apportion.architectures import SAES

        known = SAES[self.sae].settings(getattr(self, "allocation", None))
        settings = {n: getattr(self, n) for n in known if n not in options.NOT_ASKED} | {"seed": self.seed}
        if "k" in known:
            settings["k"] = int(self.k) if float(self.k).is_integer() else self.k
        follows = SAES[self.sae].architecture.d_sae_for(1) is not None
        return settings | ({} if follows else {"d_sae": self.d_sae})

    def _train(self) -> dict[str, Any]:
        from apportion.training import TrainConfig

        return {f.name: getattr(self, f.name) for f in dataclasses.fields(TrainConfig) if hasattr(self, f.name)}

    def trainer(self, source: Any) -> Any:
        """What trains the SAE, or the SAEs, on this source."""
        from apportion.architectures import create
        from apportion.objectives import OBJECTIVES
        from apportion.rows.opening import settings_of
        from apportion.training import TrainConfig, Trainer

        settings, device = self._settings() | settings_of(source), best_device(self.loading.device)
        seeds = range(self.seed, self.seed + getattr(self, "num_saes", 1))
        saes = [create(self.sae, **settings | {"seed": seed}).to(device) for seed in seeds]
        config = TrainConfig(**self._train() | {"total_tokens": self.tokens_of(source), "seed": self.seed})
        if source.num_rows and config.total_tokens and config.total_tokens > source.num_rows:
            _say_epochs(config.total_tokens / source.num_rows)
        return Trainer(saes, config, OBJECTIVES[self.training_objective].objective.of(self._objective_config(), source))

    def tokens_of(self, source: Any) -> int | None:
        """On how many rows of the source it trains; None if that is not known."""
        return self.tokens or source.num_rows

    @property
    def order_seed(self) -> int:
        return self.seed if self.data_seed is None else self.data_seed

    def _check_out(self) -> None:
        from apportion.training.run import RUN, is_finished

        there, again = (self.out / RUN).exists(), self.resume or self.requeue
        if self.resume and self.requeue:
            raise ValueError(
                "--resume is for a run that is there and not finished, --requeue for any. Give one of them."
            )
        if self.resume and not there:
            raise ValueError(f"There is no run to resume in {self.out}. Leave --resume out, or check the folder.")
        if self.resume and is_finished(self.out):
            raise ValueError(f"The run in {self.out} is finished: look at it with apportion eval {self.out}.")
        if there and not again:
            raise ValueError(f"{self.out} already holds a run. Resume it (--resume) or choose another folder.")
        if not 0 < self.held_out_share < 1:
            raise ValueError(f"--held-out-share must lie between 0 and 1, got {self.held_out_share}.")

    @property
    def whole_contexts(self) -> bool:
        from apportion.objectives import OBJECTIVES

        return OBJECTIVES[self.training_objective].objective.whole_contexts

    def _objective_config(self) -> Any:
        """The settings of the objective from the options; ValueError for impossible ones."""
        from apportion.objectives import OBJECTIVES

        entry, num_saes = OBJECTIVES[self.training_objective], getattr(self, "num_saes", 1)
        if num_saes < entry.objective.least_saes:
            raise ValueError(
                f"{self.training_objective} trains SAEs side by side: --num-saes must be at least "
                f"{entry.objective.least_saes}, got {num_saes}."
            )
        batch_tokens = getattr(self, "batch_tokens", self.context_tokens)
        if self.whole_contexts and batch_tokens % self.context_tokens:
            raise ValueError(
                f"{self.training_objective} trains on whole contexts: --batch-tokens must be a multiple of "
                f"--context-tokens ({self.context_tokens}), got {batch_tokens}."
            )
        if entry.config is None:
            return None
        names = [f.name for f in dataclasses.fields(entry.config)]
        return dataclasses.replace(entry.config, **{name: getattr(self, name) for name in names})

    def make_source(self) -> Any:
        """The rows to train on, held ready."""
        from apportion.cli.sources import Sources

        return Sources().of(self)

    def model_dtype_before(self) -> str | None:
        """In which precision the model ran in the run that goes on."""
        from apportion.training.run import RUN, read_run

        return read_run(self.out)["source"].get("dtype") if (self.out / RUN).exists() else None


def train_command(name: str, allocation: str | None = None, objective: str = TrainBase.training_objective) -> type:
    """The train command with the typed options of TrainConfig, of one SAE, its rule where that is a setting, and of
    the training objective."""
    known = options.table()
    entry, own = known["saes"][name], {f.name for f in dataclasses.fields(TrainBase)}
    doc = meanings(TrainBase)["sae"]
    extra: list[Any] = [("sae", Annotated[one_of(known["saes"]), arg(help=doc)], field(default=TrainBase.sae))]
    if not any(part["k"] for part in options.parts(known, name, allocation)):  # then it is no option
        extra.append(("k", Suppress[Fixed[float]], field(default=TrainBase.k)))
    if entry["any_rule"]:
        doc = "Which rule of allocation. Its own options follow below."
        kind = Annotated[one_of(choices.to_train(options.reasons(known))), arg(help=doc)]
        extra.append(("allocation", kind, field(default=allocation or entry["rule"])))
    if (least := known["objectives"][objective]["least_saes"]) > 1:
        doc = "How many SAEs are trained side by side, with seeds from --seed on."
        extra.append(("num_saes", Annotated[int, arg(help=doc)], field(default=least)))
    for one in options.chosen(known, name, allocation, objective):
        if one.name not in own:
            extra.append((one.name, Annotated[one.kind, arg(help=one.help)], field(default=one.default)))
    namespace = {"__doc__": TrainBase.__doc__}
    return dataclasses.make_dataclass("Train", extra, bases=(TrainBase,), kw_only=True, namespace=namespace)


@cache
def _say_epochs(epochs: float) -> None:
    """Once of many runs."""
    logging.getLogger("apportion").warning("--tokens asks for %.1f epochs of the training rows", epochs)


def one_of(names: Iterable[str]) -> Any:
    """The type of an option that takes one of these words, so that --help shows them."""
    return cast(Any, Literal)[tuple(names)]


def chosen_sae(argv: list[str]) -> tuple[str, str | None, str]:
    """The values of --sae, --allocation and --training-objective, which decide what other options there are."""
    name = given_value(argv, "sae") or TrainBase.sae
    allocation = given_value(argv, "allocation")
    objective = given_value(argv, "training-objective") or TrainBase.training_objective
    options.check(options.table(), name, allocation, objective)
    return name, allocation, objective


def given_value(argv: list[str], name: str) -> str | None:
    """What stands after the last --name, or None."""
    words = [(*word.partition("="), following) for word, following in pairwise([*argv, ""])]
    given = [value or following for flag, _, value, following in words if flag == f"--{name}"]
    return given[-1] if given else None

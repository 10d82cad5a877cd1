"""The command line: collect, train, eval, info. Thin: each command checks its input, then calls the library.

    apportion collect MODEL --hookpoint model.layers.8 --text corpus.txt --tokens 10M --out acts/
    apportion train acts/ --sae mutual_choice --k 32 --d-sae 16384 --out runs/x
    apportion eval runs/x --text heldout.txt --json out.json
    apportion info PATH

A mistake is answered with one line and exit code 2, before any long work; Ctrl-C exits with 130.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import signal
import sys
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Union, cast, get_type_hints

import tyro
from tyro.conf import Positional, arg, subcommand

from apportion.architectures import SAES
from apportion.training import TrainConfig

DESCRIPTION = "Sparse autoencoders that spend their sparsity budget where it is needed."
SAE_FLAGS_OWN = {"d_in", "d_sae", "k", "seed", "hookpoint"}
"""SAE settings that the train command asks for itself, or that follow from the activations."""


def parse_count(text: str) -> int:
    """A number of tokens such as 900000, 900k, 10M or 1.5B."""
    factor = {"k": 10**3, "m": 10**6, "b": 10**9}.get(text[-1:].lower(), 1)
    try:
        number = float(text if factor == 1 else text[:-1]) * factor
    except ValueError:
        raise ValueError(f"{text!r} is not a number of tokens; write 900000, 900k, 10M or 1.5B.") from None
    if not 1 <= number < 1e18 or number != int(number):
        raise ValueError(f"{text!r} is not a whole, positive number of tokens.")
    return int(number)


Count = Annotated[
    int,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="COUNT",
        instance_from_str=lambda words: parse_count(words[0]),
        is_instance=lambda value: isinstance(value, int),
        str_from_instance=lambda value: [str(value)],
    ),
]


@dataclass(kw_only=True)
class Text:
    """Where text comes from."""

    text: str | None = None
    """A .txt, .md or .jsonl file, or a folder of them."""
    dataset: str | None = None
    """A datasets id on the Hugging Face Hub, streamed, instead of --text."""
    field: str = "text"
    """Field of a .jsonl line, or column of a dataset, that holds the text."""
    split: str = "train"
    """Split of the dataset."""

    def source(self) -> Any:
        from apportion.activations import TextSource

        if (self.text is None) == (self.dataset is None):
            raise ValueError("Give either --text FILE_OR_FOLDER or --dataset ID.")
        if self.text is not None and not Path(self.text).exists():
            raise ValueError(f"There is no text at {self.text!r}. Give a file or folder, or use --dataset ID.")
        source = TextSource(self.text or self.dataset or "", field=self.field, split=self.split)
        if source.num_bytes() == 0:
            raise ValueError(f"The text {self.text!r} is empty. Give a text with at least one context of tokens.")
        return source


@dataclass(kw_only=True)
class Filter:
    """Which tokens are left out of training, calibration and evaluation."""

    norm_outlier: float = 10.0
    """Leave out rows with a norm above this many times the median; 0 keeps them."""
    keep_first_position: bool = False
    """Keep position 0 of each context (an attention sink in most models)."""
    keep_special_tokens: bool = False
    """Keep BOS, EOS and other special tokens."""

    def token_filter(self) -> Any:
        from apportion.activations import TokenFilter

        return TokenFilter(
            special_tokens=not self.keep_special_tokens,
            first_position=not self.keep_first_position,
            norm_outlier=self.norm_outlier,
        )


@dataclass(kw_only=True)
class Collect:
    """Run a language model over text and keep its activations in a cache on disk."""

    model: Positional[str]
    """A transformers model: a local folder or a Hub id."""
    hookpoint: tuple[str, ...]
    """Where to read: module paths such as model.layers.8, model.layers.8.mlp:in; globs such as model.layers.* work."""
    out: Path
    """The cache folder to create."""
    tokens: Count = 10_000_000
    """How many tokens to collect."""
    corpus: Annotated[Text, arg(name="")] = field(default_factory=Text)
    filter: Annotated[Filter, arg(name="")] = field(default_factory=Filter)
    context_tokens: int = 256
    """Length of the contexts that the text is cut into."""
    batch_contexts: int = 16
    """Contexts per forward pass."""
    bos: Literal["auto", "always", "never"] = "auto"
    """Whether every context begins with the BOS token; auto does what the tokenizer does."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Precision of the cache."""
    model_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision in which the model runs."""

    def run(self) -> None:
        from apportion.activations.collect import collect, load_model
        from apportion.activations.writer import refuse_existing

        source = self.corpus.source()
        refuse_existing(self.out)
        model, tokenizer = load_model(self.model, self.model_dtype)
        manifest = collect(
            model,
            tokenizer,
            self.hookpoint,
            source,
            tokens=self.tokens,
            out=self.out,
            context_tokens=self.context_tokens,
            batch_contexts=self.batch_contexts,
            dtype=self.dtype,
            bos=self.bos,
            token_filter=self.filter.token_filter(),
        )
        say(f"{self.out}: {manifest['rows']:,} tokens at {', '.join(manifest['hookpoints'])}")
        for name, about in manifest["hookpoints"].items():
            say(f"  {name}: {describe_filter(about)}")


@dataclass(kw_only=True)
class TrainBase:
    """Train a sparse autoencoder on a cache, or directly on a model."""

    source: Positional[str]
    """A cache made by collect, or a transformers model (then also --hookpoint and --text or --dataset)."""
    out: Path
    """The run folder to create."""
    sae: str = "mutual_choice"
    """Which SAE; its own options follow below (see --help with another --sae)."""
    k: float = 32
    """Active latents per token: the sparsity budget."""
    d_sae: int = 16_384
    """Number of latents."""
    hookpoint: str | None = None
    """Which hookpoint; needed for a model and for a cache that holds several."""
    tokens: Count | None = None
    """Rows to train on; default: every training row of the cache once."""
    held_out_share: float = 0.1
    """Share of contexts that is kept for calibration and never trained on."""
    corpus: Annotated[Text, arg(name="")] = field(default_factory=Text)
    filter: Annotated[Filter, arg(name="")] = field(default_factory=Filter)
    context_tokens: int = 256
    """Length of contexts, when training on a model."""
    device: str = "auto"
    """cpu, cuda, ...; auto takes a GPU if there is one."""
    resume: bool = False
    """Go on with the run in --out after an interruption."""
    seed: int = 0
    """Seed of initial weights and data order."""

    def run(self) -> None:
        from apportion.architectures import create
        from apportion.training import Trainer

        self._check_out()
        settings = {n: getattr(self, n) for n in SAES[self.sae].settings() if n not in SAE_FLAGS_OWN}
        k = int(self.k) if self.k == int(self.k) else self.k
        settings |= {"d_sae": self.d_sae, "seed": self.seed} | ({"k": k} if "k" in SAES[self.sae].settings() else {})
        train = {f.name: getattr(self, f.name) for f in dataclasses.fields(TrainConfig) if hasattr(self, f.name)}
        device = best_device(self.device)
        # Mistakes in the settings show before anything is loaded.
        create(self.sae, d_in=1, **settings).allocation.check_batch(TrainConfig(**train).batch_tokens)
        source = self._source()
        sae = create(self.sae, d_in=source.d_in, hookpoint=source.hookpoint, **settings)
        config = TrainConfig(**train | {"total_tokens": self.tokens or source.num_rows, "seed": self.seed})
        if source.num_rows and config.total_tokens and config.total_tokens > source.num_rows:
            epochs = config.total_tokens / source.num_rows
            logging.getLogger("apportion").warning("--tokens asks for %.1f epochs of the training rows", epochs)
        trainer = Trainer(sae.to(device), config)
        try:
            trainer.fit(source, self.out, resume=self.resume)
        except KeyboardInterrupt:
            say(f"\nStopped after {trainer.tokens:,} tokens; everything is in {self.out}. Go on with --resume.")
            raise
        calibration = sae.info["calibration"]
        say(f"{self.out}: {sae.name} on {trainer.tokens:,} tokens of {sae.hookpoint}")
        say(f"  calibrated on {calibration['tokens']:,} held-out tokens: L0 {calibration['l0']:.2f}")
        say(f"  next: apportion eval {self.out}")

    def _check_out(self) -> None:
        if self.resume and not (self.out / "run.json").exists():
            raise ValueError(f"There is no run to resume in {self.out}. Leave --resume out, or check the folder.")
        if not self.resume and (self.out / "run.json").exists():
            raise ValueError(f"{self.out} already holds a run. Resume it (--resume) or choose another folder.")
        if not 0 < self.held_out_share < 1:
            raise ValueError(f"--held-out-share must lie between 0 and 1, got {self.held_out_share}.")

    def _source(self) -> Any:
        from apportion.activations import ActivationStore, CacheSource, LiveSource, load_model, read_contexts
        from apportion.activations.hookpoints import expand

        if not Path(self.source).exists() and self.source.count("/") != 1:
            raise ValueError(f"There is no cache or model at {self.source!r}.")
        if (Path(self.source) / "manifest.json").exists():
            if self.corpus != Text() or self.filter != Filter():
                raise ValueError(f"{self.source} is a cache: its text and filter were chosen when it was collected.")
            store = ActivationStore(self.source, self.hookpoint)
            return CacheSource(store, self.held_out_share, self.seed)
        if Path(self.source).is_dir() and not (Path(self.source) / "config.json").exists():
            raise ValueError(f"{self.source} is neither a cache (no manifest.json) nor a model (no config.json).")
        if self.hookpoint is None or self.tokens is None:
            raise ValueError("To train on a model give --hookpoint and --tokens (and --text or --dataset).")
        text = self.corpus.source()
        model, tokenizer = load_model(self.source)
        model.to(best_device(self.device))
        expand(model, self.hookpoint)
        wanted = int(self.tokens / max(1 - self.held_out_share, 1e-9) * 1.05) + self.context_tokens
        contexts = read_contexts(tokenizer, text, tokens=wanted, context_tokens=self.context_tokens)
        return LiveSource(
            model,
            tokenizer,
            self.hookpoint,
            contexts,
            token_filter=self.filter.token_filter(),
            held_out_share=self.held_out_share,
            seed=self.seed,
            text=text.describe(),
        )


def train_command(name: str) -> type:
    """The train command with the typed options of one SAE and of TrainConfig."""
    docs = setting_docs(name)
    own = {f.name for f in dataclasses.fields(TrainBase)}
    entry = SAES[name]
    extra: list[Any] = []
    for config in (TrainConfig, entry.architecture.Config, entry.rule.Config):
        hints = get_type_hints(config)
        for f in dataclasses.fields(config):
            if f.name in own | SAE_FLAGS_OWN | {"total_tokens"}:
                continue
            default = entry.defaults.get(f.name, f.default)
            extra.append((f.name, Annotated[hints[f.name], arg(help=docs[f.name])], field(default=default)))
    namespace = {"__doc__": TrainBase.__doc__}
    return dataclasses.make_dataclass("Train", extra, bases=(TrainBase,), kw_only=True, namespace=namespace)


def setting_docs(name: str) -> dict[str, str]:
    """The documentation string under every setting."""
    from tyro._docstrings import get_field_docstring

    entry = SAES[name]
    docs = {}
    for config in (TrainConfig, entry.architecture.Config, entry.rule.Config):
        for f in dataclasses.fields(config):
            docs[f.name] = get_field_docstring(config, f.name, ()) or ""
    return docs


@dataclass(kw_only=True)
class Eval:
    """Evaluate a trained SAE in eval mode, on a cache or inside the language model."""

    run_folder: Annotated[Positional[Path], arg(name="run")]
    """A run folder or a saved SAE."""
    model: str | None = None
    """The language model for cross-entropy; default: the one the SAE was trained on. Used together with --text."""
    corpus: Annotated[Text, arg(name="")] = field(default_factory=Text)
    acts: Path | None = None
    """A cache to evaluate on, instead of text. Default without text: held-out rows of the training cache."""
    tokens: Count = 100_000
    """How many tokens to evaluate."""
    context_tokens: int | None = None
    """Length of contexts; default: as in training."""
    json: Path | None = None
    """Write the result to this file."""
    plots: Path | None = None
    """Draw density.png, l0.png and difficulty.png into this folder."""
    device: str = "auto"
    """cpu, cuda, ...; auto takes a GPU if there is one."""

    def run(self) -> None:
        from apportion.architectures import load
        from apportion.architectures.files import write_json
        from apportion.evals.plots import check_plots, save_plots
        from apportion.evals.table import print_table

        in_model = self.corpus != Text()
        if self.json is not None and (self.json.is_dir() or not self.json.parent.is_dir()):
            raise ValueError(f"--json {self.json} is not a file in an existing folder.")
        if in_model and self.acts is not None:
            raise ValueError("Give either --acts (a cache) or --text / --dataset (inside the model), not both.")
        if self.model is not None and not in_model:
            raise ValueError("--model is used together with --text or --dataset: on which text shall it run?")
        if self.plots is not None:
            check_plots()
        sae = load(self.run_folder).to(best_device(self.device))
        name = sae.name
        measurements, ce = self._in_model(name, sae) if in_model else (self._on_rows(name, sae), None)
        result = measurements[name].result() | {"hookpoint": sae.hookpoint} | (ce.of(name) if ce else {})
        if self.json is not None:
            write_json(self.json, result)
        if self.plots is not None:
            save_plots(measurements, self.plots)
        print_table({str(self.run_folder): result})

    def _on_rows(self, name: str, sae: Any) -> Any:
        from apportion.activations import ActivationStore
        from apportion.evals import evaluate_rows, held_out_rows

        trained_on = sae.info.get("source", {})
        if self.acts is not None:
            store = ActivationStore(self.acts, sae.hookpoint)
            check_same_model(trained_on, store.describe(), str(self.acts))
            return evaluate_rows({name: sae}, store, max_tokens=self.tokens)
        folder = trained_on.get("folder")
        if folder is None or not Path(folder).exists():
            raise ValueError(
                f"The cache that {self.run_folder} was trained on is not there ({folder}). "
                "Give --acts CACHE, or --text FILE to evaluate inside the model."
            )
        store = ActivationStore(folder, sae.hookpoint)
        return evaluate_rows(
            {name: sae}, store, held_out_rows(store, trained_on["held_out_share"]), max_tokens=self.tokens
        )

    def _in_model(self, name: str, sae: Any) -> Any:
        from apportion.activations import TokenFilter, load_model, read_contexts
        from apportion.activations.collect import check_context_tokens, model_fingerprint
        from apportion.evals import evaluate_model

        trained_on = sae.info.get("source", {})
        model_name = self.model or trained_on.get("model", {}).get("name_or_path")
        if model_name is None or sae.hookpoint is None:
            raise ValueError("This SAE does not say which model and hookpoint it belongs to. Give --model.")
        text = self.corpus.source()
        model, tokenizer = load_model(model_name)
        check_same_model(trained_on, {"model": model_fingerprint(model)}, model_name)
        model.to(best_device(self.device))
        token_filter = TokenFilter.from_dict(trained_on.get("filter", {"norm_outlier": 0.0}))
        context_tokens = self.context_tokens or trained_on.get("context_tokens", 256)
        check_context_tokens(model, context_tokens)
        bos = trained_on.get("bos", "auto")
        contexts = read_contexts(tokenizer, text, tokens=self.tokens, context_tokens=context_tokens, bos=bos)
        return evaluate_model({name: sae}, model, contexts, token_filter, hookpoint=sae.hookpoint)


@dataclass(kw_only=True)
class Info:
    """Say what a folder holds: a cache, a run, or a saved SAE."""

    path: Positional[Path]
    """The folder."""
    verify: bool = False
    """For a cache: read all of it and compare with the checksums in its manifest."""

    def run(self) -> None:
        if (self.path / "manifest.json").exists():
            from apportion.activations.store import ActivationStore, read_manifest

            manifest = read_manifest(self.path)
            if self.verify:
                ActivationStore(self.path, next(iter(manifest["hookpoints"]))).verify()
            say(f"{self.path}: activation cache, {manifest['rows']:,} tokens, {manifest['dtype']}")
            say(f"  model {manifest['model']['name_or_path']}, text {manifest['text']}")
            for name, about in manifest["hookpoints"].items():
                say(f"  {name}: width {about['d_in']}, {describe_filter(about)}")
            say("  all checksums agree" if self.verify else "  checksums not compared (--verify)")
        elif (self.path / "config.json").exists():
            from apportion.architectures import load

            sae = load(self.path)
            about = f"{sae.name}, d_in {sae.d_in}, d_sae {sae.d_sae}, k {sae.k}, {sae.hookpoint or 'no hookpoint'}"
            say(f"{self.path}: {about}")
            say(json.dumps({"settings": sae.settings(), **sae.info}, indent=2))
        elif (self.path / "run.json").exists():
            say(f"{self.path}: a run that has not finished. Go on with apportion train ... --resume")
        else:
            raise ValueError(f"{self.path} holds no cache, run or SAE of apportion (no manifest.json, config.json).")


def check_same_model(trained_on: dict[str, Any], found: dict[str, Any], where: str) -> None:
    """Refuse activations of another model than the SAE was trained on."""
    ours, theirs = trained_on.get("model", {}), found.get("model", {})
    if ours and theirs and ours.get("config_sha256") != theirs.get("config_sha256"):
        raise ValueError(
            f"{where} belongs to another model ({theirs.get('name_or_path')}) than the SAE was trained on "
            f"({ours.get('name_or_path')}). Use the same model."
        )


def describe_filter(about: dict[str, Any]) -> str:
    left_out = ", ".join(f"{count:,} {reason}" for reason, count in about["filtered"].items())
    return f"left out {about['filtered_share']:.2%} ({left_out})"


def best_device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used here ({str(error).splitlines()[0]}). Use cpu.") from None
    return name


def say(text: str) -> None:
    """Results go to stdout; progress and errors to stderr."""
    sys.stdout.write(text + "\n")


def chosen_sae(argv: list[str]) -> str:
    """The value of --sae, which decides what other options there are."""
    given = [word.partition("=")[2] or following for word, following in pairwise([*argv, ""]) if is_flag(word, "sae")]
    name = given[-1] if given else TrainBase.sae
    if name not in SAES:
        raise ValueError(f"There is no SAE named {name!r}. Known are: {', '.join(SAES)}.")
    return name


def is_flag(word: str, name: str) -> bool:
    return word.partition("=")[0] == f"--{name}"


def main(argv: list[str] | None = None) -> int:
    """Entry point of `apportion`; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("apportion").setLevel(logging.INFO)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # being told to end is like Ctrl-C: clean up
    try:
        commands = {"collect": Collect, "train": train_command(chosen_sae(argv)), "eval": Eval, "info": Info}
        union = Union[tuple(Annotated[c, subcommand(name)] for name, c in commands.items())]  # noqa: UP007
        tyro.cli(cast(Any, union), args=argv, prog="apportion", description=DESCRIPTION).run()
    except BrokenPipeError:
        sys.stdout = None  # whoever read our output has gone; nothing may be written at exit
        return 1
    except ImportError as error:
        sys.stderr.write(f"apportion: {error}. Install what this needs: pip install 'apportion[all]'\n")
        return 2
    except (ValueError, OSError) as error:
        sys.stderr.write(f"apportion: {' '.join(str(error).split())}\n")
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

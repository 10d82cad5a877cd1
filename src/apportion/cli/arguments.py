"""What several commands share: kinds of arguments, checks of what was given, and how results are said."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal, InvalidOperation, Overflow
from pathlib import Path
from shlex import quote
from typing import Annotated, Any, Literal

from tyro.conf import UseAppendAction
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from apportion.about import About, Site
from apportion.trust import expanded, shown
from apportion.urls import url_of


def whole_number(text: str) -> int:
    """A whole number as people write it: 900000, 900_000, 900k, 10M, 1.5B, 1e6, 256.0."""
    factor = {"k": 10**3, "m": 10**6, "b": 10**9}.get(text[-1:].lower(), 1)
    try:
        number = Decimal(text if factor == 1 else text[:-1]) * factor
    except InvalidOperation:
        raise ValueError(f"{text!r} is not a number; write 900000, 900k, 10M or 1.5B.") from None
    except Overflow:
        number = Decimal(2**63)
    if number.is_finite() and abs(number) >= 2**63:
        raise ValueError(f"{text!r} does not fit into 64 bits. Use a number below 2**63.")
    if not number.is_finite() or number != int(number):
        raise ValueError(f"{text!r} is not a whole number.")
    return int(number)


def parse_count(text: str) -> int:
    """A number of tokens, of which there is at least one."""
    number = whole_number(text)
    if number < 1:
        raise ValueError(f"{text!r} is not a positive number of tokens.")
    return number


def spelled(read: Callable[[str], Any], name: str, kind: type = int) -> PrimitiveConstructorSpec[Any]:
    """An option that takes one word, read by `read`."""
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=name,
        instance_from_str=lambda words: read(words[0]),
        is_instance=lambda value: isinstance(value, kind) and not isinstance(value, bool),
        str_from_instance=lambda value: [str(value)],
    )


Count = Annotated[int, spelled(parse_count, "COUNT")]
Place = Annotated[str, spelled(lambda word: url_of(word) or str(expanded(word)), "PATH|URL", str)]
"""Where a cache lies."""

SEVERAL = {"collect": ("--hookpoint", "--weights")}
"""Options of commands that take several values behind them."""


def window_rows(word: str) -> int | Literal["auto"] | None:
    """What --window says: so many rows, "auto", or None for exact order."""
    if word in ("auto", "exact"):
        return "auto" if word == "auto" else None
    try:
        return parse_count(word)
    except ValueError:
        raise ValueError(f"--window is a number of rows such as 4M, exact or auto, got {word}.") from None


OPTIONS = ConstructorRegistry()
"""How the options of all commands are read."""


@OPTIONS.primitive_rule
def _whole_numbers(option: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[int] | None:
    """Every option that is a whole number takes 16k and 4M."""
    return spelled(whole_number, "INT") if option.type is int else None


@OPTIONS.primitive_rule
def _paths(option: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Path] | None:
    """Every option that is a path knows ~, also where the shell does not see it (--out=~/runs)."""
    return spelled(expanded, "PATH", Path) if option.type is Path else None


@dataclass(kw_only=True)
class Text:
    """Where text comes from."""

    text: UseAppendAction[tuple[str, ...]] = ()
    """A file with text (.txt, .md, .jsonl, .json, .csv, .tsv, .parquet, also .gz, .bz2, .xz, .zst), a folder of them,
    or a folder made with save_to_disk. Several are mixed: --text one.txt --text other.txt."""
    dataset: UseAppendAction[tuple[str, ...]] = ()
    """A datasets id on the Hugging Face Hub, streamed; instead of --text, or mixed with it."""
    weights: tuple[float, ...] = ()
    """Of a mixture, the share of tokens that each --text, then each --dataset has, as in 0.7 0.3; default: equal."""
    field: str = "text"
    """Field of a row, or column of a dataset, that holds the text, its token ids or the messages of a conversation."""
    split: str = "train"
    """Split of the dataset."""
    dataset_config: str | None = None
    """Configuration of a dataset that has several, such as wikitext-103-raw-v1."""

    @property
    def packages(self) -> tuple[str, ...]:
        """What has to be installed to read it."""
        return ("datasets",) if self.dataset else ()

    def source(self, model: str | None = None) -> Any:
        """The text; without one, the stories that come with the package if it is for the model that does."""
        from apportion.language import Mixture, TextSource

        if model == "embedded" and self == Text():
            from apportion.embedded import stories

            return TextSource(tuple(stories()))
        places = [*self.text, *self.dataset]
        if not places:
            raise ValueError("Give a text: --text FILE_OR_FOLDER or --dataset ID; several are mixed.")
        if self.text and not self.dataset and self.dataset_config is not None:
            raise ValueError("--dataset-config belongs to --dataset: a text on this disk has no configurations.")
        if self.weights and (len(self.weights) != len(places) or len(places) == 1):
            given = " ".join(f"{weight:g}" for weight in self.weights)
            raise ValueError(
                f"--weights {given} are not the weights of {', '.join(places)}: give one number for each of several "
                "texts, first of each --text, then of each --dataset."
            )
        sources = [self._one(place, number < len(self.text)) for number, place in enumerate(places)]
        weights = self.weights or (1.0,) * len(sources)
        source = Mixture(zip(sources, weights, strict=True)) if len(sources) > 1 else sources[0]
        source.check()
        return source

    def _one(self, place: str, on_disk: bool) -> Any:
        """One of the texts."""
        from apportion.language import TextSource

        source = TextSource(place, field=self.field, split=self.split, config=None if on_disk else self.dataset_config)
        if on_disk and not (source.path and source.path.exists()):
            raise ValueError(f"There is no text at {place!r}. Give a file or folder, or use --dataset ID.")
        return source


@dataclass(kw_only=True)
class Documents:
    """How documents lie in contexts."""

    contexts: Literal["packed", "documents"] = "packed"
    """packed: documents end to end, cut into contexts; documents: each in a context of its own (a long one in several),
    filled up with padding, which is left out."""
    attention: Literal["all", "documents"] = "all"
    """Of packed contexts: attention to all tokens before, or to those of the same document only."""
    padding: Literal["right", "left"] = "right"
    """On which side documents are filled up that have contexts of their own."""
    roles: str | None = None
    """Of conversations, whose words to take, such as assistant; several with commas. Default: all tokens."""

    def layout(self) -> Any:
        from apportion.language.document_layout import Layout

        roles = tuple(role.strip() for role in (self.roles or "").split(",") if role.strip())
        return Layout(self.contexts, self.attention, self.padding, roles)


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
        from apportion.rows import TokenFilter

        return TokenFilter(
            special_tokens=not self.keep_special_tokens,
            first_position=not self.keep_first_position,
            norm_outlier=self.norm_outlier,
        )


@dataclass(kw_only=True)
class Model:
    """How a language model is loaded."""

    model_dtype: Literal["float32", "bfloat16", "float16", "auto"] | None = None
    """Precision in which the language model runs; auto: bfloat16 where that is not slower than float32; default:
    float32, or what an SAE was trained with."""
    device: str = "auto"
    """cpu, cuda, ...; auto takes a GPU if there is one."""
    device_map: str | None = None
    """How transformers spreads a large language model over devices (auto, ...), in place of --device; needs the package
    accelerate."""
    attn_implementation: str | None = None
    """Which attention the language model uses: eager, sdpa, ...; default: what transformers takes."""
    auto_class: str | None = None
    """The auto class of transformers to load it with, such as AutoModel; default: that of the checkpoint."""
    trust_remote_code: bool = False
    """Run the code that a checkpoint brings, which could do anything; without this, such a checkpoint is refused."""

    def load(self, name: str, dtype: str | None = None) -> tuple[Any, Any]:
        """The model and its tokenizer; `dtype` is the precision unless an option says otherwise."""
        from apportion.language import load_model

        options = ("device_map", "attn_implementation", "auto_class", "trust_remote_code")
        given: dict[str, Any] = {option: getattr(self, option) for option in options}
        return load_model(name, self.model_dtype or dtype, device=best_device(self.device), **given)

    def load_again(self, name: str, before: str | None) -> tuple[Any, Any]:
        """For work that may go on: auto is what was chosen `before`, if there was a choice."""
        return (replace(self, model_dtype=before) if self.model_dtype == "auto" and before else self).load(name)


@dataclass(kw_only=True)
class Copies:
    """Where copies of what lies at URLs are kept."""

    cache_dir: Path | None = None
    """Folder for copies of the shards of caches at URLs, which processes may share; default: APPORTION_CACHE_DIR, else
    ~/.cache/apportion."""
    cache_gb: float | None = None
    """How many GB they may take; those used longest ago leave. Default: APPORTION_CACHE_GB, else 20, or half of what
    the disk has free where that is less."""

    def choose(self) -> None:
        from apportion.rows.copies import choose

        choose(self.cache_dir, self.cache_gb)


def best_device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used here ({str(error).splitlines()[0]}). Use cpu.") from None
    return name


def check_same_model(ours: Any, theirs: Any, where: str, allowed: bool = False) -> None:
    """Refuse activations of another model than the SAE was trained on; if it is `allowed`, say what that means.

    Both are records of models, or what has one as "model".
    """
    from apportion.same_model import model_difference

    ours, theirs = (one["model"] if isinstance(one, Mapping) else one for one in (ours, theirs))
    difference = model_difference(ours, theirs)
    if difference is None:
        return
    both = f"{where} belongs to another model ({theirs.name_or_path}) than the SAE was trained on "
    both += f"({ours.name_or_path}): {difference}."
    if not allowed:
        raise ValueError(f"{both} Use the same model, or --other-model to see how well the SAE does on this one.")
    logging.getLogger("apportion").warning("%s The figures say how well the SAE does there.", both)


def model_to_follow(name: str, saes: Iterable[str]) -> str:
    """The language model that SAEs ask for, if it is to be loaded on their word; else ValueError with what to give.

    A file can name any model. So it is followed, and said, only of SAEs that were trained here, as run.json beside or
    above them tells; others were downloaded, converted, or handed over. The embedded model is always there.
    """
    for sae in saes if name != "embedded" else ():
        if not _trained_here(sae):
            raise ValueError(
                f"{sae} asks for the language model {name!r}, and was not trained here (it has no run.json): if you "
                f"trust it, give the model yourself: --model {quote(name)}"
            )
    logging.getLogger("apportion").info("The model that was trained on is loaded: %s", name)
    return name


def check_followed(sae: str, source: About) -> None:
    """ValueError if an SAE that was not trained here says that its cache lies at a URL: it could name any."""
    for place in filter(None, (source.folder, *source.folders)):
        if (url := url_of(place)) is not None and not _trained_here(sae):
            raise ValueError(
                f"{sae} says that it was trained on {url}, and was not trained here (it has no run.json): if you trust "
                f"it, give the cache yourself: --acts {quote(url)}"
            )


def _trained_here(sae: str) -> bool:
    """Whether run.json lies beside or above it."""
    folder = expanded(sae)
    return any((place / "run.json").is_file() for place in (folder, folder.parent))


def describe_filter(site: Site) -> str:
    left_out = ", ".join(f"{count:,} {reason}" for reason, count in (site.filtered or {}).items())
    return f"left out {site.filtered_share or 0.0:.2%} ({left_out})"


def say(text: str) -> None:
    """Results go to stdout; progress and errors to stderr."""
    sys.stdout.write(shown(text) + "\n")


def together(words: Sequence[str]) -> list[str]:
    """The words of a command, with all values of an option that takes several behind its first mention: the last would
    count, and the others be forgotten."""
    groups, kept, first = [list[str]()], list[list[str]](), dict[str, list[str]]()
    for word in words:
        if word.startswith("--"):
            groups.append([word])
        else:
            groups[-1].append(word)
    for group in groups:
        flag, equals, value = group[0].partition("=") if group else ("", "", "")
        if (
            flag in SEVERAL.get(words[0] if words else "", ())
            and (before := first.setdefault(flag, group)) is not group
        ):
            before += [value] if equals else group[1:]
            kept.append(group[1:] if equals else [])
        else:
            kept.append(group)
    return [word for group in kept for word in group]


class Harmless(logging.Formatter):
    """Messages as a terminal can be shown them, whatever names from files are in them."""

    def format(self, record: logging.LogRecord) -> str:
        return shown(super().format(record))

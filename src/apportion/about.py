"""Where rows come from, in the words that sources, caches, runs, SAEs, cards and reports share.

    About       which rows: the source, the place in a model, how they were filtered and split, how many there are
    .sites      what each hookpoint has of its own, where a row is made of several
    .language   what only a language model has: the model, its tokenizer, the text and how it was cut; None without one

In JSON an About is one flat object, `language` among the rest, as files of every version hold it. What has its default
is left out. What a file says besides, because another version wrote it, is kept in `more` and written again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass, replace
from functools import cache
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from apportion.fields import check_fields

KEYS = {"class_name": "class", "kind": "source"}
"""Fields that have another name in JSON."""
PASSING = {"passing": True}
"""What says nothing of which rows they are: where they lie, how long it took, counts of a source that runs live."""


AnyRecord = TypeVar("AnyRecord", bound="Record")


@dataclass(frozen=True, kw_only=True)
class Record:
    """A frozen dataclass that reads and writes JSON."""

    more: dict[str, Any] = field(default_factory=dict)
    """What else a file says."""

    @classmethod
    def from_json(cls: type[AnyRecord], values: Mapping[str, Any], where: str = "") -> AnyRecord:
        """ValueError, naming the field, for one of another kind than its type hint."""
        known, where = keys_of(cls), where + "." if where else ""
        given = {key: value for key, value in values.items() if key in known and value is not None}
        needed = {key: kind for key, (f, kind) in known.items() if f.default is MISSING}
        check_fields(given, needed, {key: kind for key, (_, kind) in known.items()}, where[:-1])
        made = {known[key][0].name: _made(known[key][1], value, where + key) for key, value in given.items()}
        return cls(**made, more={key: value for key, value in values.items() if key not in known})

    def to_json(self) -> dict[str, Any]:
        said = ((key, f, getattr(self, f.name)) for key, (f, _) in keys_of(type(self)).items())
        return {key: _plain(value) for key, f, value in said if value != f.default} | self.more


@cache
def keys_of(record: type[Record]) -> dict[str, tuple[Field[Any], Any]]:
    """For each key in JSON the field and its type hint."""
    hints = get_type_hints(record)
    return {KEYS.get(f.name, f.name): (f, hints[f.name]) for f in fields(record) if f.name not in ("more", "language")}


def _made(kind: Any, value: Any, where: str) -> Any:
    """What a field of this kind holds, from its JSON."""
    for part in get_args(kind) if get_origin(kind) is UnionType else (kind,):
        if get_origin(part) is tuple:
            return tuple(_made(get_args(part)[0], item, f"{where}.{i}") for i, item in enumerate(value))
        if is_dataclass(part):
            return part.from_json(value, where)  # pyright: ignore[reportAttributeAccessIssue]
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(map(_plain, value))
    return value.to_json() if isinstance(value, Record) else value


@dataclass(frozen=True, kw_only=True)
class ModelRecord(Record):
    """By what a language model is known again (language/fingerprint.py)."""

    name_or_path: str | None = None
    class_name: str | None = None
    hidden_size: int | None = None
    num_layers: int | None = None
    dtype: str | None = None
    weights_sha256: str | None = None
    probe: tuple[float, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class TokenizerRecord(Record):
    name_or_path: str | None = None
    vocab_size: int | None = None
    special_ids: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class TextRecord(Record):
    where: str | None = None
    """A file, a folder, or the id of a dataset."""
    split: str | None = None
    field: str | None = None
    config: str | None = None
    files: int | None = None
    bytes: int | None = None
    documents: int | None = None
    """How many, of documents in memory."""
    contexts: int | None = None
    """How many, where they were given as token ids."""
    parts: tuple[TextRecord, ...] | None = None
    """Of a mixture, the texts it is made of,"""
    share: float | None = None
    """and of each its share of the tokens."""

    def in_words(self) -> str:
        if self.parts:
            return ", ".join(f"{part.in_words()} ({part.share or 0:.0%})" for part in self.parts)
        if self.where is not None or self == TextRecord():
            return self.where or "none"
        return "in memory" if self.documents is None else f"{self.documents:,} documents in memory"


@dataclass(frozen=True, kw_only=True)
class Language(Record):
    model: ModelRecord = ModelRecord()
    model_dtype: str | None = None
    """In which the model ran."""
    tokenizer: TokenizerRecord = TokenizerRecord()
    text: TextRecord = TextRecord()
    text_skipped: dict[str, int] | None = None
    text_repaired: dict[str, int] | None = None
    """How many documents, by reason."""
    bos: str | None = None
    """What was asked for: auto, always, never."""
    bos_prepended: bool | None = None
    """What was done."""
    context_tokens: int | None = None
    """Length of a context."""
    layout: dict | None = None
    """How documents lie in contexts, if not end to end with attention to all (language/document_layout.py)."""
    contexts: int | None = None
    tokens_sha256: str | None = None
    """Which tokens, in which contexts."""
    tokens_asked: int | None = None
    ended: str | None = None
    """Whether all tokens asked for were collected, or why not (rows/store.py)."""
    text_ended_early: bool | None = None
    seconds: float | None = field(default=None, metadata=PASSING)
    tokens_per_s: float | None = field(default=None, metadata=PASSING)
    hook_name: str | None = None
    """What TransformerLens calls the place, if a file of another library says so."""


AnySite = TypeVar("AnySite", bound="Site")


@dataclass(frozen=True, kw_only=True)
class Site(Record):
    """What a hookpoint has of its own."""

    hookpoint: str | None
    d_in: int | None = None
    filter: dict | None = None
    """Of its rows, fitted: `TokenFilter.from_dict` reads it."""
    median_norm: float | None = None
    median_norm_rows: int | None = None
    mean_norm: float | None = None
    precision_fvu: float | None = None
    """Of rows held in 8 bits: the share of their variance that is lost."""
    filtered: dict[str, int] | None = field(default=None, metadata=PASSING)
    """Rows left out, by reason."""
    filtered_share: float | None = field(default=None, metadata=PASSING)
    language: Language | None = None

    @property
    def lm(self) -> Language:
        """The language part, empty where there is none."""
        return self.language or Language()

    @classmethod
    def from_json(cls: type[AnySite], values: Mapping[str, Any], where: str = "") -> AnySite:  # type: ignore[override]
        site = super().from_json(values, where)
        language = Language.from_json(site.more, where)
        said = replace(language, more={})
        return replace(site, language=said if said.to_json() else None, more=language.more)

    def to_json(self) -> dict[str, Any]:
        return super().to_json() | self.lm.to_json()


@dataclass(frozen=True, kw_only=True)
class About(Site):
    """Of rows of several hookpoints, `hookpoint` joins their names and `d_in` is the width of one."""

    hookpoint: str | None = None
    kind: str | None = None
    """array, stream, cache, live, contexts, ground truth."""
    target_hookpoint: str | None = None
    """Where targets come from."""
    folder: str | None = field(default=None, metadata=PASSING)
    folders: tuple[str, ...] = field(default=(), metadata=PASSING)
    """Of the caches, one for each hookpoint, if there are several."""
    dtype: str | None = None
    rows: int | None = None
    rows_seen: int | None = field(default=None, metadata=PASSING)
    rows_train: int | None = None
    rows_calibrate: int | None = None
    held_out_share: float | None = None
    seed: int | None = None
    content_sha256: str | None = None
    """Which activations."""
    world: dict | None = None
    """The settings of made-up features (synthetic/world.py)."""
    sites: tuple[Site, ...] = ()

    def of_site(self, site: Site, **changes: Any) -> About:
        """With what is said of one hookpoint in place of what was said of its own."""
        own = {f.name: getattr(site, f.name) for f in fields(Site) if f.name not in ("more", "language")}
        return replace(self, **own | changes)

    def at(self, hookpoint: str | None) -> Site:
        """What is said of one of its hookpoints, or of all of it."""
        return next((site for site in self.sites if site.hookpoint == hookpoint), self)


MAY_DIFFER = {f.name for record in (Language, About) for f in fields(record) if f.metadata.get("passing")}
"""What may be otherwise although the rows are the same."""

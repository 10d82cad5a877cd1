"""What is said of rows: typed in memory, one flat object on disk, as every version wrote it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

import apportion as ap
from apportion.about import MAY_DIFFER, About, Language, ModelRecord, Site, TextRecord, TokenizerRecord
from apportion.architectures import SAES
from apportion.interop.hook_names import family_of_model
from apportion.rows.filter import TokenFilter, trained_filter

FILTER = TokenFilter(median_norm=7.5, special_ids=(0, 2))
MODEL = {"name_or_path": "a/model", "class": "LlamaForCausalLM", "hidden_size": 8, "num_layers": 2, "dtype": "float32",
         "weights_sha256": "w", "probe": [0.5, -0.25]}  # fmt: skip
OF_SITE = {"d_in": 8, "filter": FILTER.to_dict(), "median_norm": 7.5, "median_norm_rows": 640, "mean_norm": 7.0,
           "filtered": {"first_position": 3, "special": 0, "norm_outlier": 1}, "filtered_share": 0.01}  # fmt: skip
CACHE = {
    "source": "cache", "folder": "/acts", "format": "apportion-activations", "format_version": 1, "model": MODEL,
    "model_dtype": "float32", "tokenizer": {"name_or_path": "a/model", "vocab_size": 33, "special_ids": [0, 2]},
    "text": {"where": "/a.txt", "files": 1, "bytes": 4096}, "text_skipped": {}, "text_repaired": {"bytes": 2},
    "bos": "auto", "bos_prepended": True, "context_tokens": 64, "contexts": 10, "tokens_asked": 640, "seconds": 1.5,
    "tokens_per_s": 400.0, "ended": "complete", "text_ended_early": False, "dtype": "bfloat16", "rows": 640,
    "tokens_sha256": "t", "content_sha256": "c", "hookpoint": "model.layers.1", **OF_SITE, "rows_train": 560,
    "rows_calibrate": 32, "held_out_share": 0.1, "seed": 3,
}  # fmt: skip
SITES = {
    "source": "cache", "hookpoint": "a,b", "target_hookpoint": "b", "d_in": 8, "filtered_share": 0.02,
    "folders": ["/one", "/two"], "text": {"where": "corpus", "split": "train", "field": "text"}, "tokens_sha256": "t",
    "sites": [{"hookpoint": name, "model": MODEL, "model_dtype": "bfloat16", **OF_SITE} for name in "ab"],
}  # fmt: skip
WRITTEN: dict[str, dict[str, Any]] = {
    "a cache": CACHE,
    "several hookpoints": SITES,
    "a live model": {"source": "live", "model": MODEL, "text": {"contexts": 9}, "hookpoint": "a", "rows_seen": 70},
    "an array": {"source": "array", "d_in": 8, "dtype": "float32", "rows": 9, "rows_train": 8, "rows_calibrate": 1},
    "a stream": {"source": "stream", "d_in": 8, "held_out_share": 0.1},
    "features": {"source": "ground truth", "d_in": 8, "seed": 0, "world": {"d_in": 8, "levels": [0.5, 1.5]}},
    "another library": {"model": {"name_or_path": "gpt2"}, "hook_name": "blocks.3.hook_resid_pre"},
    "a version to come": {"source": "tiles", "model": {"name_or_path": "a", "licence": "MIT"}, "stains": ["H", "E"]},
    "nothing": {},
}
"""As files of earlier versions (and of one to come) have it."""


@pytest.mark.parametrize("kind", WRITTEN)
def test_what_was_written_is_read_and_written_again(kind: str) -> None:
    about = About.from_json(WRITTEN[kind])
    assert about.to_json() == WRITTEN[kind]
    assert About.from_json(json.loads(json.dumps(about.to_json()))) == about
    sae = ap.create("topk", d_in=8, d_sae=16, k=2)
    sae.source = about
    assert sae.info == {"source": WRITTEN[kind]} and sae.source == about


def test_what_is_read_is_typed() -> None:
    about = About.from_json(CACHE)
    assert (about.kind, about.hookpoint, about.rows, about.held_out_share) == ("cache", "model.layers.1", 640, 0.1)
    assert about.lm.model == ModelRecord(
        name_or_path="a/model", class_name="LlamaForCausalLM", hidden_size=8, num_layers=2, dtype="float32",
        weights_sha256="w", probe=(0.5, -0.25),
    )  # fmt: skip
    assert family_of_model(about.lm.model) == "llama"
    assert about.lm.tokenizer == TokenizerRecord(name_or_path="a/model", vocab_size=33, special_ids=(0, 2))
    assert about.lm.text == TextRecord(where="/a.txt", files=1, bytes=4096)
    assert about.more == {"format": "apportion-activations", "format_version": 1} and about.lm.more == {}
    two = About.from_json(SITES)
    assert [(site.hookpoint, site.lm.model_dtype) for site in two.sites] == [("a", "bfloat16"), ("b", "bfloat16")]
    assert two.folders == ("/one", "/two") and two.lm.model == ModelRecord()


def test_only_a_language_model_has_a_language_part() -> None:
    with_one = {kind for kind, said in WRITTEN.items() if About.from_json(said).language is not None}
    assert with_one == {"a cache", "several hookpoints", "a live model", "another library", "a version to come"}
    assert About.from_json({"model": None, "tokens_sha256": None}).language is None, "as older versions said nothing"
    assert About().lm == Language() and About(language=Language()).to_json() == {}


def test_null_says_nothing() -> None:
    nulls = {**CACHE, "tokenizer": None, "target_hookpoint": None, "model": MODEL | {"probe": None, "dtype": None}}
    about = About.from_json(nulls)
    assert about.lm.tokenizer == TokenizerRecord() and about.lm.model.probe is None
    assert not {"tokenizer", "target_hookpoint"} & about.to_json().keys()


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ({"rows": "many"}, r"^info\.source\.rows is 'many', and should be a whole number or null"),
        ({"source": 5}, r"info\.source\.source is 5"),
        ({"model": "gpt2"}, r"info\.source\.model is 'gpt2', and should be an object"),
        ({"model": {"class": 5}}, r"info\.source\.model\.class is 5"),
        ({"model": {"probe": [1.0, "x"]}}, r"info\.source\.model\.probe is"),
        ({"text": {"bytes": 1.5}}, r"info\.source\.text\.bytes is 1\.5"),
        ({"bos": True}, r"info\.source\.bos is True, and should be a text"),
        ({"filter": []}, r"info\.source\.filter is \[\], and should be an object"),
        ({"folders": "acts"}, r"info\.source\.folders is 'acts'"),
        ({"sites": [{"hookpoint": "a"}, {}]}, r"info\.source\.sites\.1\.hookpoint is missing"),
        ({"sites": [{"hookpoint": "a", "model": {"probe": 1}}]}, r"info\.source\.sites\.0\.model\.probe is 1"),
    ],
)
def test_what_cannot_be_so_is_named(said: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        About.from_json(said, "info.source")
    sae = ap.create("topk", d_in=8, d_sae=16, k=2)
    sae.info["source"] = said
    with pytest.raises(ValueError, match=named):
        _ = sae.hookpoint


def test_each_of_several_hookpoints() -> None:
    other = replace(FILTER, norm_outlier=None)
    sites = (Site(hookpoint="a", filter=FILTER.to_dict()), Site(hookpoint="b", filter=other.to_dict()))
    about = About(hookpoint="a,b", sites=sites)
    assert (about.at("b"), about.at("c"), about.at(None)) == (sites[1], about, about)
    assert (trained_filter(about, "a"), trained_filter(about, "b"), trained_filter(about)) == (FILTER, other, None)
    assert trained_filter(replace(about, filter=other.to_dict()), "elsewhere") == other


def test_what_may_be_otherwise_although_the_rows_are_the_same() -> None:
    counts = {"filtered", "filtered_share", "rows_seen", "seconds", "tokens_per_s"}
    assert counts | {"folder", "folders"} == MAY_DIFFER


def test_texts_in_words() -> None:
    said = {"none": {}, "a.txt": {"where": "a.txt"}, "1,200 documents in memory": {"documents": 1200}}
    for words, text in (said | {"in memory": {"contexts": 3}}).items():
        assert TextRecord.from_json(text).in_words() == words


@pytest.mark.parametrize("name", SAES)
def test_the_kind_of_rows_is_one_word(name: str) -> None:
    sae = ap.create(name, d_in=8, d_sae=16, k=2)
    settings = SAES[name].settings()
    taken = {"target_hookpoint": "pair", "num_sites": "sites"}
    kinds = {kind for setting, kind in taken.items() if setting in settings} or {"layers" if name == "mlsae" else "one"}
    assert {sae.row_kind} == kinds and sae.needs_target == (sae.row_kind == "pair")
    assert sae.row_shape == ((2, 8) if sae.row_kind == "sites" else (8,))


def test_where_targets_come_from() -> None:
    sae = ap.create("transcoder", d_in=8, d_sae=16, k=2)
    assert sae.target_hookpoint is None
    sae.source = About(hookpoint="a", target_hookpoint="b")
    assert (sae.hookpoint, sae.target_hookpoint) == ("a", "b")
    told = ap.create("transcoder", d_in=8, d_sae=16, k=2, hookpoint="c", target_hookpoint="d")
    told.source = sae.source
    assert (told.hookpoint, told.target_hookpoint) == ("c", "d")

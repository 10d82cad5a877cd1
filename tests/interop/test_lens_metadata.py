"""BOS, filters and whatever else SAELens's metadata say: from its files, through ours, and back into its files."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_sae_lens import METADATA, settings_of, tensors_of, write
from trained import trained

import apportion as ap
from apportion.about import About, Language, ModelRecord, TokenizerRecord
from apportion.interop.contexts import bos_prepended, outlier_limit
from apportion.rows import TokenFilter
from apportion.rows.filter import trained_filter

FILTER = TokenFilter(special_ids=(0, 2), median_norm=7.5)


def told(sae: ap.SAE, folder: Path) -> dict[str, Any]:
    ap.export(sae, folder, "sae_lens")
    return json.loads((folder / "cfg.json").read_text())["metadata"]


def source(**what: Any) -> ap.SAE:
    sae = trained("relu")
    sae.info["source"] = what
    return sae


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.WARNING, logger="apportion")
    return caplog


class TestBOS:
    @pytest.mark.parametrize("done", [True, False])
    @pytest.mark.parametrize("policy", ["auto", "always", "never"])
    def test_what_was_done_comes_before_what_was_asked_for(self, done, policy, tmp_path):
        sae = source(bos=policy, bos_prepended=done, tokenizer={"name_or_path": "meta-llama/Llama-3.1-8B"})
        assert told(sae, tmp_path / "a")["prepend_bos"] is done
        assert ap.to_sae_bench(sae).cfg.prepend_bos is done

    @pytest.mark.parametrize(
        ("name", "adds"),
        [
            ("HuggingFaceTB/SmolLM2-135M", False),
            ("openai-community/gpt2", False),
            ("EleutherAI/pythia-70m", False),
            ("Qwen/Qwen3-1.7B", False),
            ("embedded", False),
            ("meta-llama/Llama-3.1-8B", True),
            ("google/gemma-2-2b", True),
            ("mistralai/Mistral-7B-v0.1", True),
            ("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", True),
        ],
    )
    def test_of_older_runs_by_the_tokenizer(self, name, adds, said):
        tokenizer = TokenizerRecord(name_or_path=name)
        assert bos_prepended(Language(bos="auto", tokenizer=tokenizer)) is adds
        assert bos_prepended(Language(model=ModelRecord(name_or_path=name))) is adds
        assert bos_prepended(Language(bos="always", tokenizer=tokenizer)) is True
        assert bos_prepended(Language(bos="never", tokenizer=tokenizer)) is False
        assert not said.records

    def test_a_tokenizer_that_is_not_known(self, said):
        assert bos_prepended(Language(bos="auto", tokenizer=TokenizerRecord(name_or_path="/somewhere"))) is False
        assert "'/somewhere'" in said.text and "not known" in said.text

    def test_nothing_is_said_of_rows_without_text(self, said, tmp_path):
        assert told(trained("relu"), tmp_path / "a")["prepend_bos"] is False and not said.records

    @pytest.mark.parametrize("done", [True, False])
    def test_what_a_file_says_is_what_evaluation_does(self, done, tmp_path):
        settings = settings_of("standard", metadata=METADATA | {"prepend_bos": done})
        sae = ap.load(write(tmp_path / "a", settings, tensors_of("standard")))
        about = sae.info["source"]
        assert (about["bos_prepended"], about["bos"]) == (done, "always" if done else "never")
        assert told(sae, tmp_path / "b")["prepend_bos"] is done

    def test_a_file_that_does_not_say(self, tmp_path):
        sae = ap.load(write(tmp_path / "a", settings_of("standard"), tensors_of("standard")))
        assert not {"bos", "bos_prepended"} & sae.info["source"].keys()

    def test_before_version_6_it_was_so_unless_said_otherwise(self, tmp_path):
        flat = {"d_in": 6, "d_sae": 20, "model_name": "gpt2-small", "hook_point": "blocks.3.hook_resid_pre"}
        for more, done in (({}, True), ({"prepend_bos": False}, False)):
            sae = ap.load(write(tmp_path / str(done), flat | more, tensors_of("standard")))
            assert sae.info["source"]["bos_prepended"] is done


class TestFilter:
    def test_what_the_format_has_words_for_travels(self, tmp_path):
        metadata = told(source(filter=FILTER.to_dict()), tmp_path / "a")
        assert (metadata["seqpos_slice"], metadata["exclude_special_tokens"]) == ([1, None], [0, 2])
        assert trained_filter(ap.load(tmp_path / "a").source) == FILTER

    @pytest.mark.parametrize(
        ("changed", "slice_", "special"),
        [
            ({"first_position": False}, [None], [0, 2]),
            ({"special_tokens": False}, [1, None], False),
            ({"special_ids": ()}, [1, None], True),
            ({"first_position": False, "special_tokens": False}, [None], False),
        ],
    )
    def test_what_was_not_filtered_is_not_said_to_be(self, changed, slice_, special, tmp_path):
        metadata = told(source(filter=replace(FILTER, **changed).to_dict()), tmp_path / "a")
        assert (metadata["seqpos_slice"], metadata["exclude_special_tokens"]) == (slice_, special)

    def test_without_a_filter(self, tmp_path, said):
        metadata = told(source(), tmp_path / "a")
        assert (metadata["seqpos_slice"], metadata["exclude_special_tokens"]) == ([None], False)
        assert "token_filter" not in metadata and not said.records

    def test_the_filter_of_the_site_counts(self, tmp_path):
        sites = [
            {"hookpoint": name, "filter": replace(FILTER, special_ids=(i,)).to_dict()} for i, name in enumerate("ab")
        ]
        sae = trained("topk", hookpoint="b")
        sae.info["source"] = {"sites": sites}
        assert told(sae, tmp_path / "a")["exclude_special_tokens"] == [1]

    @pytest.mark.parametrize(
        ("said_there", "first", "special", "ids"),
        [
            ({"seqpos_slice": [1, None]}, True, False, ()),
            ({"seqpos_slice": [1, None, None]}, True, False, ()),
            ({"exclude_special_tokens": [5, 7]}, False, True, (5, 7)),
            ({"exclude_special_tokens": True, "seqpos_slice": [None]}, False, True, ()),
        ],
    )
    def test_theirs_becomes_ours(self, said_there, first, special, ids, tmp_path):
        settings = settings_of("standard", metadata=METADATA | said_there)
        sae = ap.load(write(tmp_path / "a", settings, tensors_of("standard")))
        found = trained_filter(sae.source)
        assert (found.first_position, found.special_tokens, found.special_ids) == (first, special, ids)
        assert found.is_fitted and not found.norm_outlier
        metadata = told(sae, tmp_path / "b")
        for name, value in said_there.items():
            assert metadata[name] == value or (name == "seqpos_slice" and metadata[name] == value[:2])

    @pytest.mark.parametrize("said_there", [{}, {"seqpos_slice": [None]}, {"seqpos_slice": [5, -5]}])
    def test_what_is_no_such_filter(self, said_there, tmp_path):
        settings = settings_of("standard", metadata=METADATA | said_there)
        sae = ap.load(write(tmp_path / "a", settings, tensors_of("standard")))
        assert "filter" not in sae.info["source"]
        assert told(sae, tmp_path / "b")["seqpos_slice"] == said_there.get("seqpos_slice", [None])

    def test_what_cannot_travel_is_said(self, tmp_path, said):
        sae = source(filter=FILTER.to_dict())
        told(sae, tmp_path / "a")
        assert "norm above 75" in said.text and "position 0" not in said.text, "SAELens has a word for positions"
        said.clear()
        ap.export(sae, tmp_path / "b", "gemma_scope")
        assert "norm above 75, position 0 of each context and special tokens" in said.text
        said.clear()
        ap.export(source(filter=replace(FILTER, norm_outlier=None).to_dict()), tmp_path / "c", "sae_lens")
        assert not said.records

    def test_the_limit(self):
        assert outlier_limit(About(filter=FILTER.to_dict()), None) == 75
        for changed in ({"norm_outlier": None}, {"norm_outlier": 0.0}, {"median_norm": None}):
            assert outlier_limit(About(filter=replace(FILTER, **changed).to_dict()), None) is None
        assert outlier_limit(About(), None) is None


THEIRS = {
    "sae_lens_version": "6.1.0",
    "sae_lens_training_version": "5.9.0",
    "model_name": "gpt2-small",
    "model_class_name": "HookedTransformer",
    "hook_name": "blocks.3.hook_resid_pre",
    "hook_head_index": None,
    "context_size": 96,
    "prepend_bos": False,
    "seqpos_slice": [None],
    "dataset_path": "some/corpus",
    "exclude_special_tokens": False,
    "neuronpedia_id": "gpt2-small/3-res-mine",
    "model_from_pretrained_kwargs": {"fold_ln": False},
    "training_architecture": "batchtopk",
    "training_architecture_details": {"k": 3, "nested": {"a": [1]}},
    "training_tokens": 12345,
    "l0": 3.25,
    "of_our_own": {"deep": [1, None, "x"]},
}


def test_all_metadata_survive_both_formats(tmp_path):
    settings = settings_of("jumprelu", metadata=THEIRS)
    sae = ap.load(write(tmp_path / "theirs", settings, tensors_of("jumprelu")))
    sae.save(tmp_path / "ours")
    again = ap.load(tmp_path / "ours")
    again.save(tmp_path / "twice")
    metadata = told(ap.load(tmp_path / "twice"), tmp_path / "back")
    assert {name: metadata.get(name) for name in THEIRS} == THEIRS | {"sae_lens_version": metadata["sae_lens_version"]}
    assert metadata["hf_hook_name"] == "transformer.h.2"
    about = again.info["source"]
    assert (about["context_tokens"], about["text"]["where"]) == (96, "some/corpus")
    cfg = ap.to_sae_bench(again).cfg
    assert (cfg.neuronpedia_id, cfg.dataset_path, cfg.context_size) == ("gpt2-small/3-res-mine", "some/corpus", 96)
    assert cfg.model_from_pretrained_kwargs == {"fold_ln": False}


def test_what_was_said_before_version_6_survives(tmp_path):
    flat = {
        "d_in": 6,
        "d_sae": 20,
        "model_name": "gpt2-small",
        "hook_point": "blocks.3.hook_resid_pre",
        "activation_fn_str": "relu",
        "dataset_path": "some/corpus",
        "neuronpedia_id": "here",
        "l1_coefficient": 8e-5,
    }
    sae = ap.load(write(tmp_path / "a", flat, tensors_of("standard")))
    metadata = told(sae, tmp_path / "b")
    assert (metadata["neuronpedia_id"], metadata["dataset_path"], metadata["l1_coefficient"]) == (
        "here",
        "some/corpus",
        8e-5,
    )
    assert (metadata["hook_name"], metadata["prepend_bos"]) == ("blocks.3.hook_resid_pre", True)
    assert not {"hook_point", "activation_fn_str", "d_in"} & metadata.keys()


def test_training_on_makes_it_another_sae(tmp_path):
    sae = ap.load(write(tmp_path / "a", settings_of("standard", metadata=THEIRS), tensors_of("standard")))
    sae.info |= {"training": {"tokens": 7}, "source": {"text": {"where": "new"}, "bos_prepended": True}}
    metadata = told(sae, tmp_path / "b")
    assert (metadata["neuronpedia_id"], metadata["dataset_path"], metadata["training_tokens"]) == (None, "new", 7)
    assert metadata["prepend_bos"] is True and "of_our_own" not in metadata


def test_another_class_is_named_anew(tmp_path):
    sae = ap.load(write(tmp_path / "a", settings_of("standard", metadata=THEIRS), tensors_of("standard")))
    ap.export(sae, tmp_path / "b", "sae_lens", model_class_name="AutoModelForCausalLM")
    metadata = json.loads((tmp_path / "b" / "cfg.json").read_text())["metadata"]
    assert (metadata["hook_name"], metadata["model_class_name"]) == ("transformer.h.2", "AutoModelForCausalLM")
    assert metadata["neuronpedia_id"] == "gpt2-small/3-res-mine"


def test_another_place_is_named_anew(tmp_path):
    sae = ap.load(write(tmp_path / "a", settings_of("standard", metadata=THEIRS), tensors_of("standard")))
    sae.info["source"]["model"] = {"name_or_path": "EleutherAI/pythia-70m"}
    metadata = told(sae, tmp_path / "b")
    assert metadata["model_name"] == "EleutherAI/pythia-70m" and metadata["neuronpedia_id"] == "gpt2-small/3-res-mine"
    sae = ap.load(tmp_path / "a")
    sae.config = replace(sae.config, hookpoint="transformer.h.7")
    assert told(sae, tmp_path / "c")["hook_name"] == "blocks.7.hook_resid_post"


@pytest.mark.parametrize("format", ["dictionary_learning", "sparsify", "gemma_scope"])
def test_settings_of_the_other_formats_survive(format, tmp_path):
    """Written by us, with words of the library's own added, read, saved in ours, and written again."""
    name = {"dictionary_learning": "gated", "sparsify": "topk", "gemma_scope": "transcoder"}[format]
    sae = trained(name, **({"allocation": "threshold"} if name == "transcoder" else {}))
    ap.export(sae, tmp_path / "a", format)
    file = next((tmp_path / "a").glob("*.json"))
    config = json.loads(file.read_text())
    inner = config["trainer"] if format == "dictionary_learning" else config
    inner |= {"seed": 49, "wandb_name": "mine"}
    if format == "dictionary_learning":  # a place that has no hookpoint here, and is not to be forgotten for that
        inner |= {"lm_name": "a/model", "submodule_name": "attn_out_layer_3", "layer": 3}
    file.write_text(json.dumps(config))
    ap.load(tmp_path / "a").save(tmp_path / "ours")
    ap.export(ap.load(tmp_path / "ours"), tmp_path / "b", format)
    back = json.loads((tmp_path / "b" / file.name).read_text())
    assert {**inner, **(back["trainer"] if format == "dictionary_learning" else back)} == (
        back["trainer"] if format == "dictionary_learning" else back
    )


def test_weights_are_no_less_equal(tmp_path):
    settings = settings_of("gated", metadata=THEIRS)
    sae = ap.load(write(tmp_path / "a", settings, tensors_of("gated")))
    told(sae, tmp_path / "b")
    x = torch.randn(7, 6)
    assert torch.allclose(ap.load(tmp_path / "b")(x), sae(x), atol=1e-5)


def test_words_of_one_library_are_not_told_to_another(tmp_path):
    ap.export(trained("topk"), tmp_path / "a", "sparsify")
    metadata = told(ap.load(tmp_path / "a"), tmp_path / "b")
    assert not {"expansion_factor", "normalize_decoder", "transcode"} & metadata.keys()

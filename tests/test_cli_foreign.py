"""The command line on an SAE of another library: what it is, how well it does, a report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from apportion.cli import main

D_IN, D_SAE = 32, 64
WORDS = "the cat sat on the mat and looked at a dog old house by sea was calm sun warm stones she read book".split()  # noqa: SIM905


@pytest.fixture
def text(tmp_path: Path) -> Path:
    words = [WORDS[i] for i in torch.randint(len(WORDS), (4_000,), generator=torch.Generator().manual_seed(0)).tolist()]
    file = tmp_path / "corpus.txt"
    file.write_text("\n".join(" ".join(words[i : i + 12]) for i in range(0, len(words), 12)))
    return file


@pytest.fixture
def foreign(tmp_path: Path, tiny_model_dir: Path) -> Path:
    """As SAELens saves it, with the model's folder for a name."""
    folder = tmp_path / "llama-res" / "blocks.1"
    folder.mkdir(parents=True)
    W = torch.nn.functional.normalize(torch.randn(D_SAE, D_IN, generator=torch.Generator().manual_seed(0)), dim=1)
    zeros = {"b_enc": torch.zeros(D_SAE), "b_dec": torch.zeros(D_IN)}
    save_file({"W_enc": W.T.contiguous(), "W_dec": W, **zeros}, folder / "sae_weights.safetensors")
    model = tmp_path / "tiny-llama"
    model.symlink_to(tiny_model_dir)
    metadata = {"model_name": str(model), "hook_name": "blocks.1.hook_resid_post", "context_size": 32}
    settings = {"architecture": "topk", "d_in": D_IN, "d_sae": D_SAE, "k": 4, "metadata": metadata}
    (folder / "cfg.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def told(tmp_path: Path) -> list[str]:
    """The model that `foreign` names; it is not loaded on the word of a file that came from elsewhere."""
    return ["--model", str(tmp_path / "tiny-llama")]


def test_info(foreign, capsys):
    assert main(["info", str(foreign)]) == 0
    said = capsys.readouterr().out
    assert "topk, d_in 32, d_sae 64, k 4, model.layers.1" in said and "hook_resid_post" in said


def test_eval_and_report_inside_the_model_that_it_names(foreign, text, told, tmp_path):
    figures, out = tmp_path / "figures.json", tmp_path / "report"
    assert main(["eval", str(foreign), "--text", str(text), "--tokens", "1k", *told, "--json", str(figures)]) == 0
    found = json.loads(figures.read_text())
    assert found["l0"] == 4 and found["fvu"] > 0 and "delta_ce" in found and found["hookpoint"] == "model.layers.1"
    options = [*told, "--text", str(text), "--tokens", "1k", "--ce-tokens", "256", "--out", str(out)]
    assert main(["report", str(foreign), *options]) == 0
    assert json.loads((out / "report.json").read_text())["methods"]["topk"]["l0"] == 4


def test_eval_on_a_cache(foreign, text, tmp_path, tiny_model_dir, capsys):
    acts = tmp_path / "acts"
    collect = ["collect", str(tiny_model_dir), "--hookpoint", "model.layers.1", "--text", str(text)]
    assert main([*collect, "--tokens", "1k", "--context-tokens", "32", "--out", str(acts)]) == 0
    assert main(["eval", str(foreign), "--acts", str(acts)]) == 0
    assert main(["eval", str(foreign)]) == 2
    assert "Give --acts CACHE" in capsys.readouterr().err


def test_what_is_no_sae(tmp_path, text, capsys):
    for command in (["info", str(tmp_path)], ["eval", str(tmp_path)], ["report", str(tmp_path)]):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert "in no format that is known" in error and "sae_lens" in error and error.count("\n") == 1


def test_eval_begins_contexts_as_the_file_says(foreign, text, told, tmp_path):
    """The tokenizer of this model adds BOS by itself; the SAE may have been trained without."""
    settings = json.loads((foreign / "cfg.json").read_text())
    entropies = {}
    for said in (None, True, False):
        metadata = settings["metadata"] | ({} if said is None else {"prepend_bos": said})
        (foreign / "cfg.json").write_text(json.dumps(settings | {"metadata": metadata}))
        figures = tmp_path / f"{said}.json"
        assert main(["eval", str(foreign), "--text", str(text), "--tokens", "512", *told, "--json", str(figures)]) == 0
        entropies[said] = json.loads(figures.read_text())["ce_clean"]
    assert entropies[None] == entropies[True] != entropies[False]


def test_convert_chooses_who_runs_the_model(foreign, tmp_path, capsys):
    out, options = tmp_path / "out", ["--to", "sae_lens", "--model-class-name"]
    assert main(["convert", str(foreign), str(out), *options, "AutoModelForCausalLM"]) == 0
    metadata = json.loads((out / "cfg.json").read_text())["metadata"]
    assert (metadata["hook_name"], metadata["model_class_name"]) == ("model.layers.1", "AutoModelForCausalLM")
    capsys.readouterr()
    assert main(["convert", str(foreign), str(tmp_path / "other"), *options, "HookedMamba"]) == 2
    assert "known are HookedTransformer, AutoModelForCausalLM" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_an_sae_that_says_no_l0(foreign, text, told, tmp_path, capsys):
    """No k is invented, and nothing stumbles over there being none."""
    settings = json.loads((foreign / "cfg.json").read_text()) | {"architecture": "standard"}
    settings.pop("k")
    (foreign / "cfg.json").write_text(json.dumps(settings))
    assert main(["info", str(foreign)]) == 0
    assert "k None" in capsys.readouterr().out
    figures, out = tmp_path / "figures.json", tmp_path / "report"
    assert main(["eval", str(foreign), "--text", str(text), "--tokens", "512", *told, "--json", str(figures)]) == 0
    assert json.loads(figures.read_text())["k"] is None and json.loads(figures.read_text())["l0"] > 0
    options = [*told, "--text", str(text), "--tokens", "1k", "--ce-tokens", "256", "--out", str(out)]
    assert main(["report", str(foreign), *options]) == 0
    assert (out / "report.html").is_file()

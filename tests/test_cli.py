"""The command line as a user meets it: the whole path on a tiny model, and one line with exit code 2 for mistakes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import datasets
import pytest
import torch
from safetensors.torch import load_file, save_file

import apportion as ap
from apportion import SAES, load
from apportion.allocation import RULES, Candidates, Rule, Settled
from apportion.architectures import rule_choices
from apportion.cli import main, parse
from apportion.cli.arguments import parse_count, whole_number
from apportion.group import Group
from apportion.rows.layout import sealed

WORDS = ("the cat sat on the mat and looked at a dog old house by sea was calm sun warm stones she read book").split()  # noqa: SIM905


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = torch.Generator().manual_seed(0)
    words = [WORDS[i] for i in torch.randint(len(WORDS), (12_000,), generator=generator).tolist()]
    file = tmp_path_factory.mktemp("text") / "corpus.txt"
    file.write_text("\n".join(" ".join(words[i : i + 12]) for i in range(0, len(words), 12)))
    return file


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, text: Path) -> Path:
    out = tmp_path_factory.mktemp("cache") / "acts"
    arguments = ["collect", str(tiny_model_dir), "--hookpoint", "model.layers.1", "--text", str(text)]
    assert main([*arguments, "--tokens", "6k", "--context-tokens", "32", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset with one split, as `save_to_disk` writes it."""
    folder = tmp_path_factory.mktemp("saved") / "dataset"
    datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": ["the cat sat"]})).save_to_disk(folder)
    return folder


def train(cache: Path, out: Path, *more: str) -> int:
    options = ["--k", "4", "--d-sae", "64", "--batch-tokens", "256", "--lr", "3e-3", "--out", str(out)]
    return main(["train", str(cache), *options, *more])


@pytest.mark.few(2)
@pytest.mark.parametrize("sae", ["topk", "mutual_choice", "feature_choice"])
def test_from_text_to_an_evaluated_sae(
    sae: str, cache: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert train(cache, run, "--sae", sae) == 0
    assert load(run).hookpoint == "model.layers.1"
    record = json.loads((run / "run.json").read_text())
    assert record["sae"]["name"] == sae
    assert record["train"]["total_tokens"] > 4000
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and steps[-1] == record["train"]["total_tokens"] // 256

    assert main(["eval", str(run), "--json", str(tmp_path / "rows.json")]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert 0 < rows["fvu"] < 1 and abs(rows["l0"] / 4 - 1) < 0.2
    assert "delta_ce" not in rows

    plots = tmp_path / "plots"
    options = ["--text", str(text), "--tokens", "1k", "--json", str(tmp_path / "model.json"), "--plots", str(plots)]
    assert main(["eval", str(run), *options]) == 0
    inside = json.loads((tmp_path / "model.json").read_text())
    assert inside["delta_ce"] == pytest.approx(inside["ce_spliced"] - inside["ce_clean"])
    assert {p.name for p in plots.iterdir()} == {"density.png", "l0.png", "difficulty.png"}
    assert "FVU" in capsys.readouterr().out

    assert main(["info", str(run)]) == 0 and main(["info", str(cache), "--verify"]) == 0
    assert sae in capsys.readouterr().out


def test_the_rule_can_be_an_option(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [
        "--sae",
        "matryoshka",
        "--allocation",
        "feature_choice",
        "--budgets",
        "zipf",
        "--prefix-shares",
        "0.25",
        "1",
    ]
    assert train(cache, tmp_path / "run", *options) == 0
    settings = load(tmp_path / "run").settings()
    assert (settings["allocation"], settings["budgets"], settings["prefix_shares"]) == (
        "feature_choice",
        "zipf",
        (0.25, 1),
    )
    assert main(["info", str(tmp_path / "run")]) == 0
    assert '"allocation": "feature_choice"' in capsys.readouterr().out


def test_help_shows_the_options_of_the_chosen_rule(capsys: pytest.CaptureFixture[str]) -> None:
    shown = {}
    for allocation in ("feature_choice", "topk"):
        with pytest.raises(SystemExit) as done:
            main(["train", "--sae", "matryoshka", "--allocation", allocation, "--help"])
        assert done.value.code == 0
        shown[allocation] = capsys.readouterr().out
    assert all("--prefix-shares" in text and "--allocation" in text for text in shown.values())
    assert "--budgets" in shown["feature_choice"] and "--k-start" not in shown["feature_choice"]
    assert "--k-start" in shown["topk"] and "--budgets" not in shown["topk"]


def test_help_names_every_sae_and_every_rule_to_choose(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["train", "--sae", "matryoshka", "--help"])
    assert done.value.code == 0
    shown = "".join(word.strip("│ ") for word in capsys.readouterr().out.split())
    assert f"--sae{{{','.join(SAES)}}}" in shown
    assert f"--allocation{{{','.join(rule_choices())}}}" in shown


@pytest.mark.parametrize("sae", ["relu", "gated"])
def test_rules_that_are_fixed_have_no_options(sae: str, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--sae", sae, "--help"])
    shown = capsys.readouterr().out
    assert "--coefficient" in shown and "--theta" not in shown and "--per-latent" not in shown
    with pytest.raises(SystemExit) as refused:
        train(cache, cache / "run", "--sae", sae, "--theta", "0.1")
    assert refused.value.code == 2 and "--theta" in capsys.readouterr().err


@dataclass(frozen=True, kw_only=True)
class NoBudgetConfig:
    above: float = 1.0
    """What matches must exceed."""


class NoBudget(Rule):
    """A rule that has no k, and yet is one to choose."""

    Config = NoBudgetConfig
    batch_coupled = False

    def budget(self, tokens: int) -> None:
        return None

    def settle(self, candidates: Candidates, budget: object, group: Group) -> Settled:
        return Settled(candidates.affinity > self.config.above)


def test_k_is_no_option_where_the_rule_has_none(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A budget that nothing would keep to is not taken and dropped."""
    monkeypatch.setitem(RULES, "no_budget", NoBudget)
    chosen = ["--sae", "matryoshka", "--allocation", "no_budget", "--aux", "none"]
    with pytest.raises(SystemExit):
        main(["train", *chosen, "--help"])
    shown = capsys.readouterr().out
    assert "--above" in shown and "--k " not in shown
    with pytest.raises(SystemExit) as refused:
        train(cache, tmp_path / "run", *chosen)
    assert refused.value.code == 2 and "--k" in capsys.readouterr().err
    sizes = ["--d-sae", "64", "--batch-tokens", "512", "--above", "1.5"]
    assert main(["train", str(cache), *chosen, *sizes, "--out", str(tmp_path / "run")]) == 0
    assert load(tmp_path / "run").settings()["above"] == 1.5


@pytest.fixture(scope="module")
def layers(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, text: Path) -> Path:
    """A cache of three layers and of input and output of an MLP."""
    out = tmp_path_factory.mktemp("layers") / "acts"
    arguments = ["collect", str(tiny_model_dir), "--hookpoint", "model.layers.*", *PAIR, "--text", str(text)]
    assert main([*arguments, "--tokens", "4k", "--context-tokens", "32", "--out", str(out)]) == 0
    return out


LAYERS = ["model.layers.0", "model.layers.1", "model.layers.2"]
PAIR = ["model.layers.1.mlp:in", "model.layers.1.mlp"]


def evaluated(run: Path, tmp_path: Path, *more: str) -> dict[str, Any]:
    assert main(["eval", str(run), "--json", str(tmp_path / "out.json"), *more]) == 0
    return json.loads((tmp_path / "out.json").read_text())


@pytest.mark.few(1)
@pytest.mark.parametrize("sae", ["transcoder", "skip_transcoder"])
def test_a_transcoder_from_a_cache_of_two_hookpoints(
    sae: str, layers: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert train(layers, run, "--sae", sae, "--hookpoint", PAIR[0], "--target-hookpoint", PAIR[1]) == 0
    loaded = load(run)
    assert (loaded.hookpoint, loaded.target_hookpoint) == tuple(PAIR)
    rows = evaluated(run, tmp_path)
    assert rows["fvu"] < 1 and rows["l0"] == 4 and rows["hookpoint"] == PAIR[0]
    assert rows["target_hookpoint"] == PAIR[1]
    inside = evaluated(run, tmp_path, "--text", str(text), "--tokens", "1k")
    assert inside["fvu"] < 1 and abs(inside["delta_ce"]) < abs(inside["ce_mean_ablation"] - inside["ce_clean"])
    assert evaluated(run, tmp_path, "--acts", str(layers), "--tokens", "500")["tokens"] < 500
    capsys.readouterr()
    assert main(["report", str(run), "--ce-tokens", "64"]) == 0 and (run / "report.html").exists()


@pytest.mark.parametrize(("given", "names"), [(None, [*LAYERS, *PAIR]), ("model.layers.2,model.layers.0", None)])
def test_a_crosscoder_of_all_or_some_hookpoints_of_a_cache(
    given: str | None, names: list[str] | None, layers: Path, text: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run = tmp_path / "run"
    names = names or (given or "").split(",")
    assert train(layers, run, "--sae", "crosscoder", *(["--hookpoint", given] if given else [])) == 0
    assert load(run).row_shape == (len(names), 32) and load(run).hookpoint == ",".join(names)
    capsys.readouterr()
    rows = evaluated(run, tmp_path)
    assert rows["fvu"] < 1 and len(rows["fvu_sites"]) == len(names)
    assert f"site 1, {names[1]}" in capsys.readouterr().out
    assert main(["eval", str(run), "--text", str(text)]) == 2
    assert "--acts" in capsys.readouterr().err


def test_one_sae_for_all_layers(layers: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert train(layers, run, "--sae", "mlsae", "--hookpoint", "model.layers.*", "--lr", "1e-3") == 0
    assert load(run).hookpoint == ",".join(LAYERS) and load(run).config.input_norm == "token_standardise"
    capsys.readouterr()
    rows = evaluated(run, tmp_path)
    assert LAYERS[2] in capsys.readouterr().out
    assert list(rows["layers"]) == LAYERS and rows["tokens"] == 3 * rows["layers"][LAYERS[0]]["tokens"]
    statistics = rows["layer_statistics"]
    assert 0 < statistics["mass"]["activity"]["rel_latent"] <= 1 and statistics["num_layers"] == 3
    one = evaluated(run, tmp_path, "--hookpoint", LAYERS[1])
    assert one["fvu"] == pytest.approx(rows["layers"][LAYERS[1]]["fvu"], rel=1e-3) and one["hookpoint"] == LAYERS[1]
    inside = evaluated(run, tmp_path, "--hookpoint", "blocks.1.hook_resid_post", "--text", str(text), "--tokens", "1k")
    assert "delta_ce" in inside and inside["hookpoint"] == LAYERS[1]
    capsys.readouterr()
    assert main(["eval", str(run), "--text", str(text)]) == 2
    assert "--hookpoint" in capsys.readouterr().err


def test_work_that_goes_on_keeps_the_precision_that_was_chosen(
    tiny_model_dir: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from apportion.language import precision

    times = {"bfloat16": 1.0, "float32": 2.0}
    monkeypatch.setattr(precision, "seconds", lambda model, *_, **settings: times[precision.dtype_of(model)])
    options = [str(tiny_model_dir), "--hookpoint", "resid_post.1", "--text", str(text), "--model-dtype", "auto"]
    collected = ["collect", *options, "--context-tokens", "32", "--out", str(tmp_path / "acts"), "--append"]
    train = ["train", *options, "--k", "4", "--d-sae", "64", "--batch-tokens", "256", "--tokens", "1k",
             "--context-tokens", "32", "--out", str(tmp_path / "run")]  # fmt: skip
    assert main([*collected, "--tokens", "640"]) == main(train) == 0
    times["bfloat16"] = 3.0
    assert main([*collected, "--tokens", "1280"]) == main([*train, "--requeue"]) == 0
    assert json.loads((tmp_path / "acts" / "manifest.json").read_text())["model_dtype"] == "bfloat16"
    source = json.loads((tmp_path / "run" / "run.json").read_text())["source"]
    assert source["model_dtype"] == source["dtype"] == "bfloat16"


def test_train_on_a_model_without_a_cache(tiny_model_dir: Path, text: Path, tmp_path: Path) -> None:
    options = ["--hookpoint", "model.layers.0.mlp:in", "--text", str(text), "--tokens", "2k", "--context-tokens", "32"]
    assert train(tiny_model_dir, tmp_path / "live", *options) == 0
    assert load(tmp_path / "live").hookpoint == "model.layers.0.mlp:in"


MISTAKES = {
    "unknown hookpoint": (["collect", "{model}", "--hookpoint", "model.layer.1", "--text", "{text}"], "model.layers.1"),
    "no text": (["collect", "{model}", "--hookpoint", "model.layers.1"], "--text"),
    "missing text": (["collect", "{model}", "--hookpoint", "model.layers.1", "--text", "{tmp}/none.txt"], "none.txt"),
    "empty text": (["collect", "{model}", "--hookpoint", "model.layers.1", "--text", "{tmp}/empty.txt"], "empty"),
    "short text": (["collect", "{model}", "--hookpoint", "model.layers.1", "--text", "{tmp}/short.txt"], "one context"),
    "long context": (
        ["collect", "{model}", "--hookpoint", "model.layers.1", "--text", "{text}", "--context-tokens", "65"],
        "at most 64",
    ),
    "unknown model": (["collect", "{tmp}/nowhere", "--hookpoint", "x", "--text", "{text}"], "nowhere"),
    "out is in use": (
        ["collect", "{model}", "--hookpoint", "model.layers.1", "--text", "{text}", "--out", "{cache}"],
        "acts",
    ),
    "weights of one text": (
        ["collect", "{model}", "--hookpoint", "model.layers.1", "--text", "{text}", "--weights", "1"],
        "--weights 1 are not the weights of",
    ),
    "k above d_sae": (["train", "{cache}", "--k", "65", "--d-sae", "64"], "65"),
    "fractional k for topk": (["train", "{cache}", "--sae", "topk", "--k", "4.5", "--d-sae", "64"], "4.5"),
    "k * batch below d_sae": (
        ["train", "{cache}", "--sae", "feature_choice", "--k", "1", "--d-sae", "4096", "--batch-tokens", "64"],
        "4096",
    ),
    "unknown sae": (["train", "{cache}", "--sae", "mutual"], "mutual_choice"),
    "unknown allocation": (["train", "{cache}", "--sae", "matryoshka", "--allocation", "mutual"], "mutual_choice"),
    "a rule without a budget": (
        ["train", "{layers}", "--sae", "transcoder", "--allocation", "threshold", "--k", "32"],
        "nothing would make codes sparse",
    ),
    "a rule that learns elsewhere": (
        ["train", "{cache}", "--sae", "matryoshka", "--allocation=learned_threshold"],
        "only the SAE jumprelu gives",
    ),
    "allocation for an SAE with its own rule": (
        ["train", "{cache}", "--sae", "topk", "--allocation=topk"],
        "matryoshka",
    ),
    "prefixes without latents": (
        ["train", "{cache}", "--sae", "matryoshka", "--k", "4", "--d-sae", "8"],
        "prefix_shares",
    ),
    "no cache": (["train", "{tmp}", "--k", "4", "--d-sae", "64"], "manifest.json"),
    "cache without that hookpoint": (["train", "{cache}", "--hookpoint", "model.layers.0"], "model.layers.1"),
    "resume of nothing": (["train", "{cache}", "--resume"], "no run"),
    "transcoder without a target": (
        ["train", "{layers}", "--sae", "transcoder", "--hookpoint", "model.layers.1.mlp:in"],
        "--target-hookpoint",
    ),
    "transcoder of itself": (
        [
            "train",
            "{layers}",
            "--sae",
            "transcoder",
            "--hookpoint",
            "model.layers.1",
            "--target-hookpoint",
            "model.layers.1",
        ],
        "read and predict",
    ),
    "crosscoder of one hookpoint": (
        ["train", "{layers}", "--sae", "crosscoder", "--hookpoint", "model.layers.1"],
        "two hookpoints",
    ),
    "crosscoder of a cache with one": (["train", "{cache}", "--sae", "crosscoder"], "two hookpoints"),
    "mlsae with an unknown layer": (
        ["train", "{layers}", "--sae", "mlsae", "--hookpoint", "model.layers.0,model.layers.9"],
        "model.layers.9",
    ),
    "several hookpoints on a model": (
        ["train", "{model}", "--sae", "mlsae", "--hookpoint", "model.layers.*", "--text", "{text}", "--tokens", "2k"],
        "apportion collect",
    ),
    "several hookpoints for one": (["train", "{layers}", "--hookpoint", "model.layers.0,model.layers.1"], "choose one"),
    "a split that is not there": (
        ["collect", "{model}", "--hookpoint", "model.layers.1", "--text", "{saved}", "--split", "test"],
        "choose one of train",
    ),
    "out in a place that cannot be": (
        ["collect", "{model}", "--hookpoint", "model.layers.1", "--text", "{text}", "--out", "/proc/acts"],
        "cannot be made",
    ),
    "configuration of a file": (
        ["collect", "{model}", "--hookpoint", "model.layers.1", "--text", "{text}", "--dataset-config", "v2"],
        "--dataset-config",
    ),
    "field that is not there": (
        ["collect", "{model}", "--hookpoint", "model.layers.1", "--text", "{saved}", "--field", "body"],
        "it has: text",
    ),
    "eval of nothing": (["eval", "{tmp}/nothing"], "does not exist. Give a folder, a file, or a repository"),
    "info of nothing": (["info", "{tmp}/nothing"], "nothing"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_get_one_line_and_exit_code_2(
    name: str, tiny_model_dir: Path, cache: Path, layers: Path, text: Path, saved: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").write_text("the cat sat")
    places = {"model": tiny_model_dir, "cache": cache, "layers": layers, "text": text, "saved": saved, "tmp": tmp_path}
    words, expected = MISTAKES[name]
    argv = [word.format(**places) for word in words]
    if argv[0] in ("collect", "train") and "--out" not in argv:
        argv += ["--out", str(tmp_path / "out")]
    if argv[0] == "collect" and "--context-tokens" not in argv:
        argv += ["--context-tokens", "32"]
    before = sorted(p.name for p in tmp_path.iterdir())
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("apportion: ") and error.count("\n") == 1
    assert expected in error
    assert sorted(p.name for p in tmp_path.iterdir()) == before, "nothing may be left behind"


def test_too_little_disk(
    tiny_model_dir: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(total=10**6, used=10**6, free=1000))
    options = ["--hookpoint", "model.layers.1", "--text", str(text), "--context-tokens", "32"]
    assert main(["collect", str(tiny_model_dir), *options, "--out", str(tmp_path / "acts")]) == 2
    assert "needs 4.2 MB but its disk has 1.0 kB" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


MORE_MISTAKES = {
    "infinite tokens": (["--tokens", "inf"], "inf"),
    "unknown device": (["--device", "nowhere"], "nowhere"),
    "text for a cache": (["--text", "x.txt"], "holds rows: their text, contexts and filter were chosen"),
    "contexts for a cache": (["--context-tokens", "32"], "holds rows: their text, contexts and filter"),
    "nothing held out": (["--held-out-share", "0"], "held-out-share"),
    "batch larger than the cache": (["--batch-tokens", "100000"], "100000"),
}


@pytest.mark.parametrize("name", MORE_MISTAKES)
def test_mistakes_in_train(name: str, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options, expected = MORE_MISTAKES[name]
    try:
        code = train(cache, tmp_path / "run", *options)
    except SystemExit as refused_by_the_parser:
        code = refused_by_the_parser.code
    assert code == 2
    assert expected in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_out_is_a_file(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("something")
    assert train(cache, tmp_path / "file") == 2
    assert train(cache, tmp_path / "file" / "below") == 2
    assert capsys.readouterr().err.count("\n") == 2
    assert (tmp_path / "file").read_text() == "something"


def test_eval_says_what_does_not_go_together(
    cache: Path, text: Path, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert train(cache, run, "--tokens", "512") == 0
    for options, expected in (
        (["--acts", str(cache), "--text", str(text)], "not both"),
        (["--model", str(tiny_model_dir)], "--text"),
        (["--json", str(tmp_path)], "--json"),
        (["--text", str(text), "--context-tokens", "100"], "64"),
    ):
        capsys.readouterr()
        assert main(["eval", str(run), *options]) == 2
        assert expected in capsys.readouterr().err
    for name in ("config.json", "finished.json"):
        (run / name).unlink()
    assert main(["eval", str(run)]) == 2
    assert "not finished" in capsys.readouterr().err


def test_a_run_folder_is_not_overwritten(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(cache, tmp_path / "run", "--tokens", "512") == 0
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    assert train(cache, tmp_path / "run", "--tokens", "512") == 2
    assert "--resume" in capsys.readouterr().err
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before


def test_eval_refuses_a_cache_of_another_model(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(cache, tmp_path / "run", "--tokens", "512") == 0
    other = tmp_path / "other"
    subprocess.run(["cp", "-r", str(cache), str(other)], check=True)
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["model"] |= {"weights_sha256": "0" * 64, "probe": None, "name_or_path": "another-model"}
    (other / "manifest.json").write_text(json.dumps(sealed(manifest)))
    assert main(["eval", str(tmp_path / "run"), "--acts", str(other)]) == 2
    assert "another-model" in capsys.readouterr().err


def test_infinite_activations_name_the_token(
    tiny_model_dir: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    subprocess.run(["cp", "-r", str(tiny_model_dir), str(broken)], check=True)
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"].fill_(torch.inf)
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    options = ["--hookpoint", "model.layers.1", "--text", str(text), "--tokens", "1k", "--context-tokens", "32"]
    assert main(["collect", str(broken), *options, "--out", str(tmp_path / "acts")]) == 2
    error = capsys.readouterr().err
    assert "not finite" in error and "token" in error and "position" in error
    assert not (tmp_path / "acts").exists()


@pytest.mark.parametrize(
    "written, number",
    [
        ("900000", 900_000), ("900k", 900_000), ("10M", 10**7), ("1.5B", 1_500_000_000), ("2_000", 2000),
        ("1e6", 10**6), ("256.0", 256), ("1.001M", 1_001_000), ("2.3k", 2300), ("+8k", 8000),
    ],
)  # fmt: skip
def test_counts(written: str, number: int) -> None:
    assert parse_count(written) == whole_number(written) == number


@pytest.mark.parametrize("written", ["many", "-5", "0", "1.5", "10X", "inf", "nan", "", "k", "1.0005k", "1e99", "1e-3"])
def test_what_is_no_token_count(written: str) -> None:
    with pytest.raises(ValueError, match="number"):
        parse_count(written)


def whole_number_options(command: type) -> Iterator[tuple[str, str]]:
    """The options of a command that take one whole number: field and option."""
    for name, kind in get_type_hints(command).items():
        if kind is int or int in get_args(kind):
            yield name, f"--{name.replace('_', '-')}"


COMMANDS = {
    "collect": ["model", "--hookpoint", "h", "--out", "o"],
    "demo": [],
    "eval": ["run"],
    "report": ["run"],
    **{f"train {name}": ["acts", "--out", "o", "--sae", name] for name in SAES},
    "train mutual": ["acts", "--out", "o", "--training-objective", "mutual"],
    "train e2e_ds": ["acts", "--out", "o", "--training-objective", "e2e_ds"],
}


@pytest.mark.few(8)
@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_that_is_a_whole_number_takes_counts(name: str) -> None:
    argv = [name.split()[0], *COMMANDS[name]]
    options = list(whole_number_options(type(parse(argv))))
    assert len(options) >= 2
    if name.startswith("train"):
        expected = {
            "d_sae",
            "tokens",
            "batch_tokens",
            "checkpoint_every_tokens",
            "dead_window_tokens",
            "log_every_steps",
        }
        assert expected <= {field for field, _ in options}
    given = parse([*argv, *(word for _, option in options for word in (option, "1.5M"))])
    assert {field: getattr(given, field) for field, _ in options} == {field: 1_500_000 for field, _ in options}


def test_whole_numbers_need_not_be_positive_unless_they_count_tokens() -> None:
    assert parse(["report", "run", "--ce-tokens", "0"]).ce_tokens == 0
    assert parse(["demo", "--seed", "-3"]).seed == -3
    with pytest.raises(SystemExit):
        parse(["demo", "--tokens", "0"])
    with pytest.raises(SystemExit):
        parse(["demo", "--seed", "1.5"])


def test_the_configuration_of_a_dataset_is_an_option(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []

    def rows(*names: Any, **settings: Any) -> list[dict[str, str]]:
        asked.append((names, settings["split"]))
        return [{"body": " ".join(WORDS)}, {"body": ""}] * 30

    monkeypatch.setattr("datasets.load_dataset", rows)
    words = [
        "collect",
        str(tiny_model_dir),
        "--hookpoint",
        "model.layers.1",
        "--dataset",
        "org/corpus",
        "--field",
        "body",
    ]
    words += ["--dataset-config", "v2", "--split", "test", "--tokens", "200", "--context-tokens", "32"]
    assert main([*words, "--out", str(tmp_path / "acts")]) == 0
    assert asked == [(("org/corpus", "v2"), "test")]
    about = json.loads((tmp_path / "acts" / "manifest.json").read_text())["text"]
    assert about == {"where": "org/corpus", "split": "test", "field": "body", "config": "v2"}


def test_collect_says_what_it_left_out(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    good = json.dumps({"text": " ".join(WORDS)})
    (tmp_path / "a.jsonl").write_text(
        "\n".join([good, "{cut", '{"text": null}', "[", '{"text": "half \\ud83d"}', good])
    )
    words = ["collect", str(tiny_model_dir), "--hookpoint", "model.layers.1", "--text", str(tmp_path / "a.jsonl")]
    assert main([*words, "--context-tokens", "8", "--out", str(tmp_path / "acts")]) == 0
    said = capsys.readouterr().out
    assert "of the text skipped: 2 not JSON, 1 null\n" in said
    assert "of the text repaired: 1 not valid Unicode\n" in said
    assert f"2 not JSON (first: {tmp_path / 'a.jsonl'}:2)" in caplog.text
    manifest = json.loads((tmp_path / "acts" / "manifest.json").read_text())
    assert manifest["text_skipped"] == {"not JSON": 2, "null": 1}
    assert manifest["text_repaired"] == {"not valid Unicode": 1}


def test_ctrl_c_in_collect_says_what_is_kept(tiny_model_dir: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text(text.read_text() * 100)
    out = tmp_path / "acts"
    words = ["collect", str(tiny_model_dir), "--hookpoint", "model.layers.1", "--text", str(tmp_path / "long.txt")]
    words += ["--tokens", "1M", "--context-tokens", "32", "--out", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-m", "apportion", *words], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (out / "model.layers.1").exists():
        time.sleep(0.01)
    time.sleep(0.3)  # a few batches
    process.send_signal(signal.SIGINT)
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors, errors
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["ended"] == "interrupted" and 0 < manifest["rows"] < 10**6
    assert f"Stopped: {manifest['rows']:,} of 1,000,000 tokens are kept in {out}" in said


def test_ctrl_c_before_anything_is_collected(
    tiny_model_dir: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stopped(*args: Any, **settings: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("apportion.language.load_model", stopped)
    words = ["collect", str(tiny_model_dir), "--hookpoint", "model.layers.1", "--text", str(text)]
    assert main([*words, "--out", str(tmp_path / "acts")]) == 130
    assert f"nothing is left at {tmp_path / 'acts'}.\n" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_ctrl_c_saves_and_resume_gives_the_same_result(cache: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "apportion", "train", str(cache), "--k", "4", "--d-sae", "64", "--lr", "3e-3"]
    command += ["--batch-tokens", "64", "--tokens", "16k", "--log-every-steps", "1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    subprocess.run([*command, "--out", str(whole)], check=True, capture_output=True, env=environment)

    process = subprocess.Popen(
        [*command, "--out", str(stopped)], stderr=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    )
    metrics = stopped / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (metrics.exists() and metrics.read_text().count("\n") > 5):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err.decode()
    assert b"--resume" in out and b"Traceback" not in err
    assert len(list(stopped.glob("checkpoint-*"))) == 1

    subprocess.run([*command, "--out", str(stopped), "--resume"], check=True, capture_output=True, env=environment)
    ours, theirs = load_file(whole / "model.safetensors"), load_file(stopped / "model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    logged = [
        [json.loads(line)["loss"] for line in (f / "metrics.jsonl").read_text().splitlines()] for f in (whole, stopped)
    ]
    assert logged[0] == logged[1]


def test_a_script_that_is_run_again_begins_goes_on_or_leaves_it(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, step = tmp_path / "run", ap.Trainer.step
    words = ["train", str(cache), "--k", "4", "--d-sae", "64", "--batch-tokens", "64", "--out", str(out), "--requeue"]

    def stopped(self: ap.Trainer, batch: Any) -> Any:
        if self.steps == 3:
            os.kill(os.getpid(), signal.SIGUSR1)
        return step(self, batch)

    monkeypatch.setattr(ap.Trainer, "step", stopped)
    assert main([*words, "--resume"]) == 2 and "Give one of them" in capsys.readouterr().err
    assert main(words) == 130
    said = capsys.readouterr().out
    assert f"Stopped: step 4, 256 tokens, is on the disk; everything is in {out}. Go on with --resume.\n" in said
    monkeypatch.setattr(ap.Trainer, "step", step)
    assert main(words) == 0
    done = (out / "model.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(ap.Trainer, "step", lambda *_: pytest.fail("it is finished"))
    assert main(words) == 0
    assert (out / "model.safetensors").stat().st_mtime_ns == done and "L0" in capsys.readouterr().out
    assert main([*words[:-1], "--resume"]) == 2
    assert f"is finished: look at it with apportion eval {out}" in capsys.readouterr().err
    assert main([*words, "--lr", "2e-3"]) == 2
    assert "started with train lr = 0.001, now it is 0.002" in capsys.readouterr().err


def test_the_embedded_model_brings_its_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    acts = tmp_path / "acts"
    assert main(["collect", "embedded", "--hookpoint", "model.layers.2", "--tokens", "2k", "--out", str(acts)]) == 0
    manifest = json.loads((acts / "manifest.json").read_text())
    assert manifest["text"]["documents"] > 100 and manifest["rows"] == 2048
    assert main(["collect", str(tmp_path), "--hookpoint", "model.layers.2", "--out", str(tmp_path / "b")]) == 2
    assert "Give a text: --text" in capsys.readouterr().err

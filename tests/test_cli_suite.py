"""`apportion suite`: which places it finds, that each run is that of `apportion train`, and that it goes on."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from tiny_models import make

from apportion.cli import main
from apportion.language.captured import Captured
from apportion.language.layer_sites import SITES, places_in_cache, places_in_model
from apportion.training import Trainer

SMALL = ["--d-sae", "64", "--k", "4", "--batch-tokens", "128", "--screen", "None"]
LIVE = ["--tokens", "1280", "--context-tokens", "32", "--buffer-tokens", "512"]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("the cat sat on the mat and the dog lay by the old house at the sea. " * 120)
    return tmp_path / "text.txt"


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Captured]:
    """What has the passes of the model, of each command."""
    found: list[Captured] = []
    init = Captured.__init__

    def noted(self: Captured, *args: Any) -> None:
        init(self, *args)
        found.append(self)

    monkeypatch.setattr(Captured, "__init__", noted)
    return found


def suite(model: Path | str, text: Path, out: Path, *words: str) -> int:
    given = [str(model), "--text", str(text), "--hookpoints", "model.layers.*", "--out", str(out)]
    return main(["suite", *given, *SMALL, *LIVE, *words])


def files_of(run: Path) -> dict[str, bytes]:
    return {name: (run / name).read_bytes() for name in ("model.safetensors", "config.json", "run.json")}


@pytest.mark.parametrize("sae", ["topk", "mutual_choice"])
def test_each_run_is_that_of_train_and_the_model_runs_once(
    sae: str, tiny_model_dir: Path, text: Path, tmp_path: Path, made: list[Captured]
) -> None:
    assert suite(tiny_model_dir, text, tmp_path / "suite", "--sites", ",".join(SITES), "--sae", sae) == 0
    (captured,) = made
    index = json.loads((tmp_path / "suite" / "sweep.json").read_text())["runs"]
    assert [*index] == [f"layer{layer:02d}-{site}" for layer in range(3) for site in SITES]
    assert all(0 < run["fvu"] < 2 and run["l0"] > 0 for run in index.values())
    assert index["layer02-mlp"]["layer"] == 2 and index["layer02-mlp"]["hookpoint"] == "model.layers.2.mlp"
    assert (tmp_path / "suite" / "suite.png").stat().st_size > 10_000
    block = "model.layers.1"
    words = {
        "residual": [f"--sae={sae}", f"--hookpoint={block}"],
        "attention": [f"--sae={sae}", f"--hookpoint={block}.self_attn"],
        "transcoder": [
            "--sae=transcoder", f"--allocation={sae}", f"--hookpoint={block}.mlp:in", f"--target-hookpoint={block}.mlp",
        ],
    }  # fmt: skip
    for site, own in words.items():
        alone = tmp_path / f"alone-{site}"
        train = ["train", str(tiny_model_dir), "--text", str(text), "--out", str(alone), *SMALL, *LIVE, *own]
        assert main(train) == 0
        assert files_of(alone) == files_of(tmp_path / "suite" / f"layer01-{site}")
    alone_passes = made[1].passes
    assert captured.passes <= 2 * alone_passes, "twelve runs, and about the passes of one"


def test_a_suite_of_a_cache_with_values_to_try(tiny_model_dir: Path, text: Path, tmp_path: Path) -> None:
    acts = tmp_path / "acts"
    places = ["--hookpoint", *(f"model.layers.*{part}" for part in ("", ".mlp:in", ".mlp"))]
    collect = ["collect", str(tiny_model_dir), "--text", str(text), "--tokens", "1500", "--context-tokens", "32"]
    assert main([*collect, "--out", str(acts), *places]) == 0
    words = ["suite", str(acts), "--hookpoints", "model.layers.1,model.layers.2", "--sites", "residual,transcoder"]
    tried = [word.replace("4", "2,4") if word == "4" else word for word in SMALL]
    assert main([*words, "--out", str(tmp_path / "suite"), *tried, "--sae", "topk"]) == 0
    index = json.loads((tmp_path / "suite" / "sweep.json").read_text())["runs"]
    wanted = [f"layer0{n}-{site}-k{k}" for n in (1, 2) for site in ("residual", "transcoder") for k in (2, 4)]
    assert [*index] == wanted and index["layer01-residual-k2"]["variant"] == "k2"
    alone = ["train", str(acts), "--hookpoint", "model.layers.2", "--sae", "topk", "--out", str(tmp_path / "alone")]
    assert main([*alone, *SMALL]) == 0
    assert files_of(tmp_path / "alone") == files_of(tmp_path / "suite" / "layer02-residual-k4")


def test_what_was_stopped_goes_on(
    tiny_model_dir: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    made: list[Captured],
) -> None:
    words = ["--sites", "residual,mlp"]
    assert suite(tiny_model_dir, text, tmp_path / "whole", *words) == 0
    step, calls = Trainer.step, 0

    def stopping(self: Trainer, batch: Any) -> Any:
        nonlocal calls
        if (calls := calls + 1) == 20:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", stopping)
        assert suite(tiny_model_dir, text, tmp_path / "suite", *words) == 130
    assert suite(tiny_model_dir, text, tmp_path / "suite", *words) == 2
    assert "already holds a sweep" in capsys.readouterr().err
    assert suite(tiny_model_dir, text, tmp_path / "suite", *words, "--resume") == 0
    for run in sorted(path.name for path in (tmp_path / "whole").iterdir() if path.is_dir()):
        assert files_of(tmp_path / "whole" / run) == files_of(tmp_path / "suite" / run)
    whole, _, resumed = made[0], made[1], made[-1]
    assert resumed.passes < whole.passes, "one pass for all, again"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--sites", "residual,mpl"], "no site 'mpl'"),
        (["--hookpoints", "model.layer.*"], "no module that matches"),
        (["--hookpoints", "lm_head", "--sites", "mlp"], "is no layer"),
        (["--hookpoint", "model.layers.1"], "of train"),
        (["--sites", "transcoder", "--sae", "jumprelu"], "no transcoder of jumprelu"),
        (["--lr", "-1"], "lr"),
    ],
)
def test_mistakes(
    words: list[str], said: str, tiny_model_dir: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert suite(tiny_model_dir, text, tmp_path / "suite", *words) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "suite").exists()


def test_a_suite_needs_its_layers(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["suite", "embedded", "--out", str(tmp_path / "suite")]) == 2
    assert "needs --hookpoints" in capsys.readouterr().err


PLACES = {
    "llama": ("model.layers.1.self_attn", "model.layers.1.mlp", "model.layers.1.mlp:in"),
    "gemma3": (
        "model.layers.1.post_attention_layernorm", "model.layers.1.post_feedforward_layernorm", "model.layers.1.mlp:in"
    ),
    "gpt2": ("transformer.h.1.attn", "transformer.h.1.mlp", "transformer.h.1.mlp:in"),
    "gpt_neox": ("gpt_neox.layers.1.attention", "gpt_neox.layers.1.mlp", "gpt_neox.layers.1.mlp:in"),
    "opt": ("model.decoder.layers.1.self_attn", "model.decoder.layers.1.fc2", "model.decoder.layers.1.fc1:in"),
    "bloom": ("transformer.h.1.self_attention", "transformer.h.1.mlp", "transformer.h.1.mlp:in"),
    "hybrid": ("model.layers.1.self_attn", "model.layers.1.feed_forward", "model.layers.1.feed_forward:in"),
    "mpt": ("transformer.blocks.1.attn", "transformer.blocks.1.ffn", "transformer.blocks.1.ffn:in"),
}  # fmt: skip


@pytest.mark.parametrize("family", PLACES)
def test_places_of_many_families(family: str) -> None:
    layer = PLACES[family][0].partition(".1.")[0] + ".1"
    model = make(family)
    attention, mlp, mlp_in = PLACES[family]
    found = [(place.hookpoint, place.target) for place in places_in_model(model, layer, SITES)]
    assert found == [(layer, None), (attention, None), (mlp, None), (mlp_in, mlp)]
    assert len(places_in_model(model, layer.replace("1", "*"), ["mlp"])) == 3


def test_places_of_models_and_caches_that_do_not_have_them() -> None:
    with pytest.raises(ValueError, match=r"has no attention in 'backbone.layers.1' \(self_attn, "):
        places_in_model(make("mamba"), "backbone.layers.1", ["attention"])
    names = ["model.layers.1.mlp", "model.layers.2"]
    with pytest.raises(ValueError, match=re.escape("does not have 'model.layers.1'")):
        places_in_cache(names, "model.layers.*", ["residual"])
    with pytest.raises(ValueError, match=re.escape("does not have 'model.layers.1.mlp:in'")):
        places_in_cache(names, "model.layers.1", ["transcoder"])
    with pytest.raises(ValueError, match=re.escape("has nothing at 'model.layers.7'")):
        places_in_cache(names, "model.layers.7", ["mlp"])
    assert [place.hookpoint for place in places_in_cache(names, "model.layers.1", ["mlp"])] == ["model.layers.1.mlp"]

"""Models, tokenizers, datasets and SAEs that bring code, or name what does: nothing of it runs unless one says so."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from trials import trials

import apportion as ap
from apportion.cli import main
from apportion.language import TextSource, load_model
from apportion.language.model import load_tokenizer

CODE = """
from pathlib import Path
Path({marker!r}).write_text("executed")
from transformers import PreTrainedTokenizerFast, LlamaConfig, LlamaForCausalLM
class EvilConfig(LlamaConfig):
    model_type = "evil"
class EvilModel(LlamaForCausalLM):
    config_class = EvilConfig
class EvilTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that is there once code of an attacker ran. Whatever asks on stdin is answered with yes."""
    import transformers.dynamic_module_utils as dynamic

    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "modules")])
    monkeypatch.setattr(sys, "stdin", io.StringIO("yes\n" * 100))
    return tmp_path / "executed"


@pytest.fixture
def model(tiny_model_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def bring_code(model: Path, marker: Path) -> None:
    (model / "evil.py").write_text(CODE.format(marker=str(marker)))


def evil_model(model: Path, marker: Path) -> None:
    bring_code(model, marker)
    classes = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel", "AutoModel": "evil.EvilModel"}
    edit(model / "config.json", model_type="evil", auto_map=classes)


def evil_tokenizer(model: Path, marker: Path) -> None:
    bring_code(model, marker)
    classes = {"AutoTokenizer": ["evil.EvilTokenizer", "evil.EvilTokenizer"]}
    edit(model / "tokenizer_config.json", tokenizer_class="EvilTokenizer", auto_map=classes)


def of_another_repository(model: Path, marker: Path) -> None:
    edit(model / "config.json", model_type="evil", auto_map={"AutoConfig": "owner/evil--evil.EvilConfig"})


def kernels(model: Path, marker: Path) -> None:
    edit(model / "config.json", _attn_implementation="owner/evil-kernels")


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def pickled_weights(model: Path, marker: Path) -> None:
    (model / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Bomb(marker)}, model / "pytorch_model.bin")


def bare_pickle(model: Path, marker: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(marker), 2))


REFUSED = [
    (evil_model, "trust-remote-code"),
    (evil_tokenizer, "trust-remote-code"),
    (of_another_repository, "trust-remote-code"),
    (kernels, "trust-remote-code"),
    (pickled_weights, "no language model could be loaded"),
    (bare_pickle, "no language model could be loaded"),
]


@pytest.mark.fault("remote code")
@pytest.mark.parametrize("attack", trials(REFUSED))
def test_a_model_that_brings_code_is_refused(
    attack: tuple[Callable[[Path, Path], None], str], model: Path, marker: Path
) -> None:
    attack[0](model, marker)
    with pytest.raises(ValueError, match=attack[1]) as raised:
        load_model(model)
    assert "\n" not in str(raised.value) and str(model) in str(raised.value) and not marker.exists()


@pytest.mark.fault("remote code")
@pytest.mark.parametrize("attack", trials([evil_tokenizer]))
def test_so_is_a_tokenizer_alone(attack: Callable[[Path, Path], None], model: Path, marker: Path) -> None:
    attack(model, marker)
    with pytest.raises(ValueError, match="trust-remote-code"):
        load_tokenizer(model)
    assert not marker.exists()


@pytest.mark.parametrize("attack", [evil_model, evil_tokenizer])
def test_the_attacks_are_real(attack: Callable[[Path, Path], None], model: Path, marker: Path) -> None:
    """Whoever trusts it gets it run."""
    attack(model, marker)
    assert load_model(model, trust_remote_code=True)[1] is not None
    assert marker.exists()


def write_sae(folder: Path, model: str) -> Path:
    sae = ap.create("topk", d_in=32, d_sae=64, k=4, seed=0)
    sae.info["source"] = {"model": {"name_or_path": model}, "hookpoint": "model.layers.1", "context_tokens": 8}
    sae.save(folder)
    return folder


COMMANDS = ["eval", "report"]


@pytest.mark.fault("remote code")
@pytest.mark.parametrize("command", trials(COMMANDS))
@pytest.mark.parametrize("name", ["{model}", "owner/evil", "owner/$(touch executed)"])
def test_a_model_is_not_followed_on_the_word_of_a_file(
    command: str, name: str, model: Path, marker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evil_model(model, marker)
    name = name.format(model=model)
    sae, text = write_sae(tmp_path / "sae", name), tmp_path / "text.txt"
    text.write_text("the cat sat on the mat " * 50)
    assert main([command, str(sae), "--text", str(text)]) == 2
    said = capsys.readouterr().err
    assert repr(name) in said and "--model" in said and said.count("\n") == 1
    assert "'owner/$(touch executed)'" in said or "$" not in name
    assert not marker.exists()


@pytest.mark.fault("remote code")
@pytest.mark.parametrize("command", trials(COMMANDS))
def test_nor_does_code_run_of_a_model_that_a_run_names(
    command: str, model: Path, marker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evil_model(model, marker)
    sae, text = write_sae(tmp_path / "sae", str(model)), tmp_path / "text.txt"
    (sae / "run.json").write_text("{}")
    text.write_text("the cat sat on the mat " * 50)
    assert main([command, str(sae), "--text", str(text)]) == 2
    assert "trust-remote-code" in capsys.readouterr().err and not marker.exists()


@pytest.mark.parametrize("there", [True, False])
def test_the_model_of_a_run_is_followed_and_said(
    there: bool, model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sae, text = write_sae(tmp_path / "run" / "sae-0", str(model)), tmp_path / "text.txt"
    text.write_text("the cat sat on the mat " * 50)
    if there:
        (tmp_path / "run" / "run.json").write_text("{}")
    with caplog.at_level("INFO", logger="apportion"):
        assert main(["eval", str(sae), "--text", str(text), "--tokens", "64"]) == (0 if there else 2)
    assert (f"The model that was trained on is loaded: {model}" in caplog.text) == there


@pytest.mark.fault("remote code")
@pytest.mark.parametrize("folder", trials(["owner/evil"]))
def test_a_dataset_that_is_a_program_is_refused(
    folder: str, tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder is read as text, and a name on the Hub is asked for without its code (tests/activations)."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / folder / "evil.py").write_text(CODE.format(marker=str(marker)))
    with pytest.raises(ValueError, match="holds no"):
        list(TextSource(folder).pieces())
    with pytest.raises(ValueError, match="does not exist"):
        list(TextSource("owner/another").pieces())
    assert not marker.exists()


@pytest.mark.slow
@pytest.mark.fault("remote code")
@pytest.mark.parametrize("attack", trials([evil_model]))
def test_yes_on_stdin_is_not_read(
    attack: Callable[[Path, Path], None], model: Path, marker: Path, tmp_path: Path
) -> None:
    attack(model, marker)
    (tmp_path / "text.txt").write_text("the cat sat on the mat " * 50)
    words = [sys.executable, "-m", "apportion", "collect", str(model), "--hookpoint", "model.layers.1"]
    done = subprocess.run(
        [*words, "--text", "text.txt", "--out", "acts"], cwd=tmp_path, input="yes\n" * 1000, capture_output=True,
        text=True, timeout=120, env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
    )  # fmt: skip
    assert done.returncode == 2 and "--trust-remote-code" in done.stderr and done.stderr.count("\n") == 1
    assert not marker.exists() and not (tmp_path / "acts").exists()

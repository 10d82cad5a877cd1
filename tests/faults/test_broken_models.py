"""Damaged folders of language models: transformers raises anything over them, and a command says one sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from commands import assert_one_line, without_privileges
from trials import trials

from apportion.cli import main
from apportion.language import load_model


def edit(name: str, **values):
    """Set entries of a JSON file; None removes one."""

    def damage(folder: Path) -> None:
        content = json.loads((folder / name).read_text()) | values
        (folder / name).write_text(json.dumps({k: v for k, v in content.items() if v is not None}))

    return damage


def put(name: str, content: bytes):
    return lambda folder: (folder / name).write_bytes(content)


def cut(name: str, share: float):
    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(share * len(content))])

    return damage


DEEP = b"[" * 100_000 + b"]" * 100_000
MODELS = {
    "no config": lambda folder: (folder / "config.json").unlink(),
    "config cut": cut("config.json", 0.5),
    "config empty": put("config.json", b""),
    "config of bytes": put("config.json", bytes(range(256))),
    "config a list": put("config.json", b"[1, 2]"),
    "config a number": put("config.json", b"3"),
    "config deep": put("config.json", DEEP),
    "no type": edit("config.json", model_type=None),
    "type unknown": edit("config.json", model_type="no-such-model"),
    "type a number": edit("config.json", model_type=7),
    "heads as text": edit("config.json", num_attention_heads="four"),
    "no heads": edit("config.json", num_attention_heads=0),
    "negative width": edit("config.json", hidden_size=-32),
    "another width": edit("config.json", hidden_size=48),
    "layers as a list": edit("config.json", num_hidden_layers=[3]),
    "activation unknown": edit("config.json", hidden_act="no-such"),
    "dtype unknown": edit("config.json", dtype="float7", torch_dtype="float7"),
    "architectures a number": edit("config.json", architectures=5),
    "vocabulary huge": edit("config.json", vocab_size=10**15),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "weights empty": put("model.safetensors", b""),
    "weights cut": cut("model.safetensors", 0.6),
    "header cut": cut("model.safetensors", 0.001),
    "weights of bytes": put("model.safetensors", bytes(range(256)) * 50),
    "index of nothing": lambda folder: (
        (folder / "model.safetensors").unlink(),
        (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}'),
    ),
    "index broken": lambda folder: (
        (folder / "model.safetensors").unlink(),
        (folder / "model.safetensors.index.json").write_text('{"metadata'),
    ),
    "generation config broken": put("generation_config.json", b"{"),
}
"""What is done to the folder, of which it is said that no model can be loaded from it (or the model is loaded)."""
HARMLESS = {"generation config broken", "dtype unknown", "architectures a number"}


@pytest.fixture
def folder(tiny_model_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))


@pytest.mark.fault("broken model folders")
@pytest.mark.parametrize("name", trials(list(MODELS), 14))
def test_a_damaged_model_is_one_sentence(name: str, folder: Path, tmp_path: Path, capsys) -> None:
    MODELS[name](folder)
    words = ["collect", str(folder), "--hookpoint", "model.layers.1", "--text", str(tmp_path / "a.txt")]
    (tmp_path / "a.txt").write_text("the cat sat on the mat " * 40)
    code = main([*words, "--tokens", "64", "--context-tokens", "16", "--out", str(tmp_path / "acts")])
    said = capsys.readouterr().err
    if name in HARMLESS and code == 0:
        return
    assert code == 2 and (str(folder) in said or "not enough memory" in said)
    assert_one_line(said)
    assert not (tmp_path / "acts").exists()


TOKENIZERS = {
    "tokenizer cut": cut("tokenizer.json", 0.5),
    "tokenizer empty": put("tokenizer.json", b""),
    "tokenizer an object": put("tokenizer.json", b"{}"),
    "tokenizer a number": put("tokenizer.json", b"7"),
    "tokenizer deep": put("tokenizer.json", DEEP),
    "tokenizer of bytes": put("tokenizer.json", bytes(range(256))),
    "its config cut": cut("tokenizer_config.json", 0.3),
    "its config a list": put("tokenizer_config.json", b"[]"),
    "its class unknown": edit("tokenizer_config.json", tokenizer_class="NoSuchTokenizer"),
    "its class a number": edit("tokenizer_config.json", tokenizer_class=3),
}


@pytest.mark.fault("broken model folders")
@pytest.mark.parametrize("name", trials(list(TOKENIZERS), 5))
def test_a_damaged_tokenizer_is_one_sentence(name: str, folder: Path, tmp_path: Path, capsys, caplog) -> None:
    TOKENIZERS[name](folder)
    words = ["collect", str(folder), "--hookpoint", "model.layers.1", "--text", str(tmp_path / "a.txt")]
    (tmp_path / "a.txt").write_text("the cat sat on the mat " * 40)
    code = main([*words, "--tokens", "64", "--context-tokens", "16", "--out", str(tmp_path / "acts")])
    said = capsys.readouterr().err
    assert code in (0, 2)  # some versions do without what is broken
    if code == 2:
        assert_one_line(said, "there is no tokenizer")
        assert "cannot be loaded (" in caplog.text and str(folder) in caplog.text


@pytest.mark.slow
@pytest.mark.fault("broken model folders")
@pytest.mark.parametrize("name", trials(["model.safetensors", "config.json", "tokenizer.json"], 1))
def test_a_file_that_may_not_be_read_is_not_called_damaged(name: str, folder: Path, tmp_path: Path) -> None:
    (folder / name).chmod(0)
    (tmp_path / "a.txt").write_text("the cat sat")
    done = without_privileges(
        f"$A collect {folder} --hookpoint model.layers.1 --text {tmp_path}/a.txt --out {tmp_path}/acts"
    )
    assert done.returncode == 2
    assert_one_line(done.stderr, str(folder / name), "Permission denied", "ask whoever owns it")


@pytest.mark.fault("broken model folders")
@pytest.mark.parametrize("error", trials([KeyError("a"), RecursionError("deep"), TypeError("no"), AssertionError()], 4))
def test_whatever_transformers_raises(error: Exception, folder: Path, monkeypatch) -> None:
    import transformers

    def fails(*args, **kwargs):
        raise error

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", fails)
    with pytest.raises(
        ValueError, match=f"no language model could be loaded from '{folder}'.*{type(error).__name__}|deep"
    ):
        load_model(folder)
    monkeypatch.setattr(
        transformers.AutoConfig, "from_pretrained", lambda *a, **k: (_ for _ in ()).throw(MemoryError())
    )
    with pytest.raises(MemoryError):
        load_model(folder)

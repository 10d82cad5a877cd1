"""Text from files that becomes a path stays in its folder; and a mistyped path never becomes a download."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import train
from test_caches import D_IN, A, write_cache
from trials import trials

import apportion as ap
from apportion.architectures import loading
from apportion.cli import main
from apportion.disk import write_json
from apportion.interop.delphi import write_delphi_cache
from apportion.interop.export import export, writable
from apportion.interop.hub import select
from apportion.interop.publish import push_to_hub
from apportion.language import TextSource, load_model
from apportion.language.model import load_tokenizer
from apportion.rows import ActivationStore, TokenFilter
from apportion.rows.writer import StoreWriter, check_out
from apportion.trust import expanded, refuse_mistyped, within

OUT = [
    *("../..", "..", "../evil", "a/../../evil", "a/b/../../../evil", "/tmp/evil", "/evil", "../sibling/evil"),
    *("./../evil", "nul\0", "link/evil", "link"),
]
FINE = ["model.layers.1", "a/b", "a/../b", ".", "..a", "a..", "~", "~root/x", "model.layers.1:in"]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """An empty folder with something around it, of which nothing may have changed afterwards, and a link out of it."""
    for around in ("sibling", "deep/out"):
        (tmp_path / around).mkdir(parents=True)
    (tmp_path / "sibling" / "file").write_text("as it was")
    (tmp_path / "deep" / "out" / "link").symlink_to(tmp_path / "sibling")
    yield tmp_path / "deep" / "out"
    found = {str(f.relative_to(tmp_path)) for f in tmp_path.rglob("*") if tmp_path / "deep" / "out" not in f.parents}
    assert found == {"sibling", "sibling/file", "deep", "deep/out"}
    assert (tmp_path / "sibling" / "file").read_text() == "as it was" and not Path("/tmp/evil").exists()


def evil_sae(name: str) -> Any:
    sae = ap.create("topk", d_in=D_IN, d_sae=128, k=4, seed=0, hookpoint=name)
    sae.info["source"] = {"hookpoint": name, "model": {"name_or_path": name}, "text": {"where": name}}
    sae.fit_input(torch.randn(64, D_IN, generator=torch.Generator().manual_seed(0)))
    return sae.eval()


@pytest.mark.fault("path traversal")
@pytest.mark.parametrize("name", trials(OUT))
def test_names_that_lead_out(name: str, folder: Path) -> None:
    for there in (folder, folder / "new"):
        if there == folder or "link" not in name:
            with pytest.raises(ValueError, match="leads out"):
                within(there, name)


@pytest.mark.parametrize("name", FINE)
def test_names_that_do_not(name: str, folder: Path) -> None:
    found = within(folder, name)
    assert Path(os.path.normpath(found)).is_relative_to(folder)


@pytest.mark.fault("path traversal")
@pytest.mark.parametrize("name", trials([*OUT, *FINE]))
def test_delphi(name: str, folder: Path) -> None:
    pairs = [(torch.arange(8).reshape(1, 8), torch.randn(1, 8, D_IN))]
    if name in OUT:
        with pytest.raises(ValueError, match="leads out"):
            write_delphi_cache(evil_sae(name), pairs, folder)
    elif name != ".":  # the folder itself, which has a link in it
        assert write_delphi_cache(evil_sae(name), pairs, folder).is_relative_to(folder)


@pytest.mark.fault("path traversal")
@pytest.mark.parametrize("name", trials([*OUT[:-2], "model/layers.1"]))
def test_caches(name: str, folder: Path) -> None:
    def write() -> None:
        settings = {"dtype": "float32", "token_filter": TokenFilter(), "special_ids": ()}
        with StoreWriter(folder / "acts", {name: D_IN}, **settings) as writer:
            rows = torch.arange(8)
            writer.add({name: torch.randn(8, D_IN)}, rows, rows, rows)
            writer.finish({"model": {}, "text": {}, "context_tokens": 8})

    if name in OUT:
        with pytest.raises(ValueError, match="leads out"):
            write()
        assert not (folder / "acts").exists()
    else:
        write()
        assert ActivationStore(folder / "acts").rows == 8


@pytest.mark.fault("path traversal")
@pytest.mark.parametrize("name", trials([OUT[0], OUT[5], "$x/..\\..", "a\nb"]))
@pytest.mark.parametrize("format", writable())
def test_formats(name: str, format: str, folder: Path) -> None:
    """They name files after themselves only."""
    sae = evil_sae(name)
    if format == "gemma_scope":
        sae = ap.to_jumprelu(sae, torch.randn(64, D_IN))
    export(sae, folder / "sae", format)
    assert {f.suffix for f in (folder / "sae").iterdir()} <= {".json", ".safetensors", ".pt", ".npz", ".md"}


@pytest.mark.fault("path traversal")
@pytest.mark.parametrize("read", trials([ap.load, loading.load]))
@pytest.mark.parametrize("name", ["../sae", "../../deep/out/sae", "{folder}/sae", "a/../../out/sae"])
def test_subfolders(read: Callable[..., Any], name: str, folder: Path) -> None:
    evil_sae("x").save(folder / "sae")
    (folder / "a").mkdir()
    with pytest.raises(ValueError, match="leads out"):
        read(folder / "a", name.format(folder=folder))


@pytest.mark.fault("path traversal")
@pytest.mark.parametrize("name", trials(["../evil", "/etc", "a/../../b", "..\\evil"]))
def test_repositories(name: str, folder: Path) -> None:
    """Neither what a server lists nor what is asked of it or put there."""
    listed = [f"{name}/sae_weights.safetensors", "/etc/x.safetensors", "a/../../b.safetensors", "fine/w.safetensors"]
    place, chosen = select("org/name", listed, "fine")
    assert (place, chosen) == ("fine", ["fine/w.safetensors"])
    for call in (lambda: ap.load("org/name", name), lambda: push_to_hub(evil_sae("x"), "org/name", subfolder=name)):
        with pytest.raises(ValueError, match="leads out"):
            call()


@pytest.mark.fault("path traversal")
@pytest.mark.parametrize("command", trials(["eval", "report"]))
def test_evaluations(command: str, folder: Path) -> None:
    write_cache(folder / "acts")
    for name in ("../../sibling/evil", "/tmp/evil"):
        sae = evil_sae(name)
        sae.save(folder / "sae")
        out = ["--out", str(folder / "report")] if command == "report" else ["--plots", str(folder / "plots")]
        assert main([command, str(folder / "sae"), "--acts", str(folder / "acts"), *out]) == 2  # no such hookpoint


def test_a_report_about_what_is_no_folder_here_asks_where_to_go(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evil_sae(A).save(folder / "sae")
    write_cache(folder / "acts")
    assert main(["report", str(folder / "sae" / "config.json"), "--acts", str(folder / "acts")]) == 2
    assert "Give --out" in capsys.readouterr().err


# Mistyped paths


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the folder runs, from which nobody can call anybody."""

    def call(*address: Any, **_: Any) -> None:
        raise AssertionError(f"a mistyped path became a call: {address[1:]}")

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(socket.socket, "connect", call)
    monkeypatch.setattr(socket, "getaddrinfo", call)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    (tmp_path / "runs" / "mutual").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


MISTYPED = [
    *("runs/mutal", "runs/", "runs/mutal/", "./mutal", "./org/name", "../org/name", "/org/name", "/mutal"),
    *("~/mutal", "~no-such-user/mutal", "runs\\mutal", "org\\name", "org/name/"),
    *("mutal.safetensors", "org/sae.safetensors"),
    *("org/corpus.txt", "corpus.jsonl", "org/model.bin", "org/ae.pt", "org/corpus.jsonl.gz", "runs/mutal.JSON"),
]
NAMES = ["org/name", "gpt2", "Qwen/Qwen2.5-0.5B", "org/v1.0", "run/mutal", "mutal", "org.x/name"]


@pytest.mark.fault("mistyped paths")
@pytest.mark.parametrize("name", trials(MISTYPED))
def test_what_can_only_be_a_path(name: str, nowhere: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        refuse_mistyped(name, "a name")


@pytest.mark.parametrize("name", NAMES)
def test_what_can_be_a_name(name: str, nowhere: Path) -> None:
    refuse_mistyped(name, "a name")


CALLS: dict[str, Callable[[str], Any]] = {
    "load": ap.load,
    "load_model": load_model,
    "load_tokenizer": load_tokenizer,
    "text": lambda name: list(TextSource(name).pieces()),
    "path of text": lambda name: list(TextSource(Path(name)).pieces()),
}


@pytest.mark.fault("mistyped paths")
@pytest.mark.parametrize("name", trials([m for m in MISTYPED if m != "runs/"], short=7))
@pytest.mark.parametrize("call", CALLS)
def test_calls(call: str, name: str, nowhere: Path) -> None:
    with pytest.raises(ValueError, match=r"does not exist|give an existing|Write the path in full") as raised:
        CALLS[call](name)
    assert "\n" not in str(raised.value)


COMMANDS: dict[str, list[str]] = {
    "eval": ["eval", "{}"],
    "report": ["report", "{}"],
    "info": ["info", "{}"],
    "convert": ["convert", "{}", "out", "--to", "sparsify"],
    "collect": ["collect", "{}", "--hookpoint", "x", "--text", "text.txt", "--out", "out"],
    "collect text": ["collect", "embedded", "--hookpoint", "model.layers.1", "--text", "{}", "--out", "out"],
    "collect dataset": ["collect", "embedded", "--hookpoint", "model.layers.1", "--dataset", "{}", "--out", "out"],
    "train": ["train", "{}", "--out", "out", "--hookpoint", "x", "--tokens", "99", "--text", "text.txt"],
    "eval in a model": ["eval", "sae", "--text", "text.txt", "--model", "{}"],
}


@pytest.mark.few(15)
@pytest.mark.fault("mistyped paths")
@pytest.mark.parametrize("name", trials([m for m in MISTYPED if m != "runs/" and "no-such" not in m], short=5))
@pytest.mark.parametrize("command", COMMANDS)
def test_commands(command: str, name: str, nowhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("text.txt").write_text("the cat sat on the mat " * 30)
    evil_sae(A).save("sae")
    assert main([word.replace("{}", name) for word in COMMANDS[command]]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert any(words in said for words in ("does not exist", "give an existing", "no text at"))
    assert not Path("out").exists()


@pytest.mark.fault("mistyped paths")
@pytest.mark.parametrize("write", [
    lambda place: write_json(place, {}),
    lambda place: ap.export(ap.create("topk", d_in=8, d_sae=16, k=2).eval(), place, "sae_lens"),
    lambda place: check_out(place),
    lambda place: train(place),
], ids=["file", "export", "cache", "run"])  # fmt: skip
def test_links_in_a_circle_are_answered(write: Callable[[Path], Any], tmp_path: Path) -> None:
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises((ValueError, OSError), match="circle"):
        write(tmp_path / "circle")
    assert [f.name for f in tmp_path.iterdir()] == ["circle"]


@pytest.mark.fault("mistyped paths")
def test_any_name_that_is_text_is_a_name(tmp_path: Path) -> None:
    for name in ("two\nlines", "a b", "\u00fcn\u00ef", "/".join(["deep" * 50] * 8)):
        train(tmp_path / name / "run")
        assert ap.load(expanded(tmp_path / name / "run")).d_in == 8
    with pytest.raises(ValueError, match="no name in UTF-8"):
        train(tmp_path / "a\udcffb")
    assert not (tmp_path / "a\udcffb").exists()

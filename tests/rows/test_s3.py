"""Caches in S3, as a server on this machine has it: pip install s3fs 'moto[server]' runs these tests."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_remote import TEXT, on_disk, without_times
from test_store import OUT, tiny

from apportion import cli
from apportion.language.model import load_model
from apportion.rows import ActivationStore, retries
from apportion.rows import writer as writer_module
from apportion.rows.copies import FOLDER_VARIABLE
from apportion.rows.remote import Remote
from apportion.rows.writer import cache_at

pytest.importorskip("s3fs")
moto_server = pytest.importorskip("moto.server")
URL = "s3://bucket/some/acts"


@pytest.fixture(scope="module")
def lm(tiny_model_dir: Path) -> tuple[Any, Any]:
    return load_model(tiny_model_dir)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    server = moto_server.ThreadedMotoServer("127.0.0.1", port, verbose=False)
    server.start()
    yield f"http://127.0.0.1:{port}"
    server.stop()


@pytest.fixture(autouse=True)
def bucket(server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import s3fs

    said = {"AWS_ENDPOINT_URL": server, "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
    said |= {"AWS_DEFAULT_REGION": "us-east-1", FOLDER_VARIABLE: str(tmp_path / "copies")}
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(writer_module, "SHARD_ROWS", 40)
    monkeypatch.setattr(retries, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(retries, "TRIES", 3)
    s3fs.S3FileSystem.clear_instance_cache()
    fs = s3fs.S3FileSystem()
    if fs.exists("bucket"):
        fs.rm("bucket", recursive=True)
    fs.mkdir("bucket")


def test_there_and_back(lm: tuple[Any, Any], tmp_path: Path) -> None:
    tiny(lm, tmp_path / "acts", text=TEXT)
    tiny(lm, URL, text=TEXT, tokens=200)
    tiny(lm, URL, text=TEXT, append=True)
    remote = Remote(URL)
    names = [*remote.names(), *(f"{OUT}/{name}" for name in remote.names(OUT))]
    there = {name: remote.read(name) for name in names if name not in (OUT, "journal", "claims")}
    assert without_times(there) == without_times(on_disk(tmp_path / "acts"))
    for copy in (tmp_path / "copies").iterdir():
        copy.unlink()
    here, store, rows = ActivationStore(tmp_path / "acts"), ActivationStore(URL), torch.randperm(400)
    assert torch.equal(store.gather(rows), here.gather(rows)) and torch.equal(store.mask, here.mask)
    store.verify()
    assert cli.main(["cache", "verify", URL]) == 0


def test_what_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    for url in (URL, "s3://nobucket/acts"):
        assert cli.main(["cache", "info", url]) == 2
        assert f"'{url}' is no activation cache" in (said := capsys.readouterr().err) and said.count("\n") == 1
    with pytest.raises(ValueError, match=r"s3://nobucket/acts cannot be written .*make its bucket first"):
        cache_at("s3://nobucket/acts")
    assert cache_at(URL) is None and not Remote(URL).names()


def test_no_server(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import s3fs

    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    s3fs.S3FileSystem.clear_instance_cache()
    assert cli.main(["cache", "info", URL]) == 2
    assert "could not be reached" in (said := capsys.readouterr().err) and "Check the connection" in said


def test_no_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import s3fs

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    s3fs.S3FileSystem.clear_instance_cache()
    assert cli.main(["cache", "info", URL]) == 2
    assert "with the credentials here" in (said := capsys.readouterr().err) and said.count("\n") <= 2

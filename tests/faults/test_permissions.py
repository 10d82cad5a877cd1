"""Files get the permissions that the umask gives, whatever the libraries that write them think."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from children import end_of, start
from small_run import train

import apportion as ap
from apportion.disk import write_json, write_tensors
from apportion.language.collect import collect, load_model

pytestmark = pytest.mark.fault("permissions")


def modes(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mode & 0o777 for p in folder.rglob("*")}


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077, 0o002])
def test_the_umask_decides(umask: int, tiny_model_dir: Path, tmp_path: Path) -> None:
    lm: Any = load_model(tiny_model_dir)

    def work() -> None:
        os.umask(umask)
        train(tmp_path / "run")
        sae = ap.create("topk", d_in=8, d_sae=16, k=2).eval()
        for name in ("sae_lens", "dictionary_learning", "sparsify"):
            ap.export(sae, tmp_path / name, name)
        sae.save(tmp_path / "sae")
        collect(*lm, "model.layers.0", ["the cat sat"] * 30, tokens=64, out=tmp_path / "acts", context_tokens=16)
        write_json(tmp_path / "sae" / "a.json", {})
        write_tensors(tmp_path / "sae" / "a.safetensors", {})

    assert end_of(start(work)) == 0
    found = modes(tmp_path)
    assert len(found) > 20 and "acts/model.layers.0/00000.safetensors" in found
    for name, mode in found.items():
        assert mode == (0o777 if (tmp_path / name).is_dir() else 0o666) & ~umask, name


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EPERM])
def test_file_systems_that_know_less(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of network and FUSE file systems some have no fsync of folders, and some no permissions."""
    fsync, refused = os.fsync, []

    def of_files(opened: int) -> None:
        if stat.S_ISDIR(os.fstat(opened).st_mode):
            refused.append(opened)
            raise OSError(number, os.strerror(number))
        fsync(opened)

    def chmod(*args: Any, **settings: Any) -> None:
        refused.append("chmod")
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", of_files)
    monkeypatch.setattr(Path, "chmod", chmod)
    train(tmp_path / "run")
    assert len(refused) > 10 and ap.load(tmp_path / "run").d_in == 8


def test_a_disk_that_fails_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync

    def fails(opened: int) -> None:
        if not stat.S_ISDIR(os.fstat(opened).st_mode):
            return fsync(opened)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="Input/output error"):
        write_json(tmp_path / "a.json", {})

"""A damaged cache is repaired by taking out and making again; several become one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_store import OUT, TEXT, files, said, tiny

from apportion.cli import main
from apportion.language.model import load_model
from apportion.rows import CacheSource
from apportion.rows import writer as writer_module
from apportion.rows.filter import row_norms
from apportion.rows.mend import merge, repair
from apportion.rows.store import ActivationStore


@pytest.fixture(scope="module")
def lm(tiny_model_dir: Path) -> tuple[Any, Any]:
    return load_model(tiny_model_dir)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "SHARD_ROWS", 40)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


DAMAGE: dict[str, tuple[Any, int]] = {
    "a row": (lambda f: flip(f / OUT / "00003.safetensors"), 3),
    "labels": (lambda f: flip(f / "tokens-00000.safetensors"), 0),
    "one missing": (lambda f: (f / OUT / "00012.safetensors").unlink(), 12),
    "a folder": (lambda f: ((f / OUT / "00005.safetensors").unlink(), (f / OUT / "00005.safetensors").mkdir()), 5),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_damaged_is_taken_out_and_made_again(
    damage: str, lm: tuple[Any, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny(lm, tmp_path / "one")
    tiny(lm, tmp_path / "acts")
    do, number = DAMAGE[damage]
    do(tmp_path / "acts")
    assert main(["cache", "verify", str(tmp_path / "acts")]) == 2
    assert main(["cache", "repair", str(tmp_path / "acts")]) == 0
    assert f"{number:05d}.safetensors" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "acts" / "manifest.json").read_text())
    assert manifest["rows"] == 32 * number and manifest["ended"] == "unfinished"
    if damage == "a folder":
        (tmp_path / "acts" / OUT / "00005.safetensors").rmdir()
    if number:
        ActivationStore(tmp_path / "acts").verify()
    tiny(lm, tmp_path / "acts")
    assert files(tmp_path / "acts") == files(tmp_path / "one") and said(tmp_path / "acts") == said(tmp_path / "one")
    before = said(tmp_path / "acts")
    assert repair(tmp_path / "acts") == [] and said(tmp_path / "acts") == before


def test_two_caches_become_one(lm: tuple[Any, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny(lm, tmp_path / "a", tokens=200)
    tiny(lm, tmp_path / "b", tokens=88, text=TEXT[::-1])
    assert main(["cache", "merge", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "ab")]) == 0
    assert "288 tokens" in capsys.readouterr().out
    a, b, ab = (ActivationStore(tmp_path / name) for name in ("a", "b", "ab"))
    ab.verify()
    x = torch.cat([a.gather(torch.arange(200)), b.gather(torch.arange(88))])
    assert torch.equal(ab.gather(torch.arange(288)), x)
    order = torch.randperm(288, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ab.gather(order), x[order])
    assert torch.equal(ab.tokens, torch.cat([a.tokens, b.tokens]))
    assert torch.equal(ab.contexts, torch.cat([a.contexts, b.contexts + 25]))
    norms = row_norms(x)
    assert torch.equal(ab.mask, ab.filter.mask_of(norms, ab.tokens, ab.positions))
    assert ab.filter.median_norm == pytest.approx(ab.filter.fit(norms, ab.tokens, ab.positions).median_norm, rel=0.02)
    assert len(next(CacheSource(ab).batches(16))) == 16
    with pytest.raises(ValueError, match="exists already"):
        tiny(lm, tmp_path / "ab", append=True)


def test_what_does_not_belong_together_is_not_merged(lm: tuple[Any, Any], tmp_path: Path) -> None:
    tiny(lm, tmp_path / "a", tokens=40)
    tiny(lm, tmp_path / "b", tokens=40, dtype="float32")
    tiny(lm, tmp_path / "c", tokens=40, context_tokens=4)
    for other, message in (("b", "another dtype"), ("c", "another context_tokens")):
        with pytest.raises(ValueError, match=message):
            merge([tmp_path / "a", tmp_path / other], tmp_path / "ab")
    with pytest.raises(ValueError, match="two caches or more"):
        merge([tmp_path / "a"], tmp_path / "ab")
    with pytest.raises(ValueError, match="exists already"):
        merge([tmp_path / "a", tmp_path / "a"], tmp_path / "b")
    assert not (tmp_path / "ab").exists()

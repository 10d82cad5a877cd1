"""`apportion convert` and `apportion info` on checkpoints of other libraries, and what a probe finds."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from naive import D_IN, D_SAE
from test_hostile import MADE
from trained import SAES, trained

import apportion as ap
from apportion.cli import main
from apportion.interop.probe import ROWS, difference, probe


def convert(*words: object) -> int:
    return main(["convert", *(str(word) for word in words)])


def differences(text: str) -> list[float]:
    """Of latents and of reconstructions, as they are printed."""
    found = re.search(r"latents ([\d.e+-]+), reconstructions ([\d.e+-]+)", text)
    assert found, text
    return [float(number) for number in found.groups()]


@pytest.mark.parametrize("to", ["apportion", "sae_lens", "dictionary_learning", "gemma_scope"])
def test_there_and_back(to: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained("feature_choice").save(tmp_path / "ours")
    assert convert(tmp_path / "ours", tmp_path / "theirs", "--to", to) == 0
    assert convert(tmp_path / "theirs", tmp_path / "again", "--to", "apportion") == 0
    said = capsys.readouterr().out
    assert f"is now {tmp_path / 'theirs'} ({to})" in said and f"on {ROWS} probe rows" in said
    assert all(max(differences(part)) < 1e-5 for part in said.split("is now")[1:])
    assert (tmp_path / "again" / "model.safetensors").exists()


def test_of_another_library_into_that_of_a_third(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ap.export(trained("topk", affinity="code_times_decoder_norm"), tmp_path / "a", "sparsify")
    assert convert(tmp_path / "a", tmp_path / "b", "--to", "sae_lens", "--format", "sparsify") == 0
    assert "topk, d_in 6, d_sae 20" in (said := capsys.readouterr().out)
    assert max(differences(said)) < 1e-5


@pytest.mark.parametrize(("to", "dtype"), [("sae_lens", torch.float32), ("apportion", torch.bfloat16)])
def test_halves_are_rounded_no_further(
    to: str, dtype: torch.dtype, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Scales of the format are folded in float32, and files of other libraries are written in it."""
    made = MADE["llama_scope"]
    made.write(tmp_path / "a", {name: t.bfloat16() for name, t in made.tensors.items()})
    assert convert(tmp_path / "a", tmp_path / "b", "--to", to) == 0
    assert max(differences(capsys.readouterr().out)) < 1e-5
    found, exact = ap.load(tmp_path / "b"), ap.load(tmp_path / "a", dtype=torch.float32)
    assert found.dtype == dtype
    x = probe(exact)
    assert ((found(x) - exact(x)).norm() / exact(x).norm() < 1e-6) == (to != "apportion")


def test_what_the_files_do_not_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ap.export(trained("topk"), tmp_path / "run" / "a", "dictionary_learning")
    (tmp_path / "run" / "a" / "config.json").unlink()
    words = [tmp_path / "run", tmp_path / "b", "--to", "sparsify", "--subfolder", "a"]
    assert convert(*words) == 2
    assert "dict_class" in capsys.readouterr().err
    assert convert(*words, "--config", '{"dict_class": "AutoEncoderTopK"}') == 0


def test_without_thresholds_only_ours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ap.create("mutual_choice", d_in=D_IN, d_sae=D_SAE, k=3).save(tmp_path / "a")
    assert convert(tmp_path / "a", tmp_path / "b", "--to", "apportion") == 0
    assert max(differences(capsys.readouterr().out)) == 0
    assert convert(tmp_path / "a", tmp_path / "c", "--to", "sae_lens") == 2
    assert "calibrate" in capsys.readouterr().err and not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--to": "saelens"}, "no format 'saelens' to write; there are: apportion, sae_lens"),
        ({"--to": "mlsae"}, "mlsae is read, and not written"),
        ({"--to": "gemma_scope"}, "to_jumprelu"),
        ({"--format": "saelens"}, "no format 'saelens'"),
        ({"--config": "k=3"}, "is not a JSON object"),
        ({"--config": "[3]"}, "is not a JSON object"),
        ({"--subfolder": "../b"}, "leads out of"),
        ({"source": "nowhere/at/all"}, "does not exist"),
        ({"folder": "full"}, "not empty"),
        ({"folder": "full/file"}, "is a file"),
    ],
)
def test_one_line_and_exit_code_2(
    change: dict[str, str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained("topk").save(tmp_path / "a")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    words = {"source": "a", "folder": "b", "--to": "sae_lens"} | change
    places = [tmp_path / words.pop("source"), tmp_path / words.pop("folder")]
    assert convert(*places, *(part for option in words.items() for part in option)) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and message in said.err and not said.out
    assert not (tmp_path / "b").exists() and (tmp_path / "full" / "file").read_text() == "mine"


def test_info_describes_files_of_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sae = trained("mutual_choice", hookpoint="transformer.h.3")
    sae.info["source"] = {"model": {"name_or_path": "openai-community/gpt2"}}
    ap.export(sae, tmp_path / "a", "sae_lens")
    assert main(["info", str(tmp_path / "a")]) == 0
    first, *rest = capsys.readouterr().out.splitlines()
    assert first.endswith("jumprelu, d_in 6, d_sae 20, k 3, transformer.h.3, from sae_lens")
    assert json.loads("\n".join(rest))["format"] == "sae_lens"
    sae.save(tmp_path / "b")
    assert main(["info", str(tmp_path / "b")]) == 0
    assert capsys.readouterr().out.splitlines()[0].endswith("transformer.h.3")


@pytest.mark.parametrize(("name", "settings"), SAES, ids=str)
def test_the_probe_makes_latents_fire(name: str, settings: dict[str, Any]) -> None:
    sae = trained(name, **settings)
    assert torch.equal(probe(sae), probe(sae)) and sae.encode(probe(sae)).nnz >= ROWS


def test_the_probe_speaks_up_until_thresholds_are_passed() -> None:
    sae = trained("jumprelu", input_norm="none")
    sae.allocation.log_threshold.data += 6  # type: ignore[union-attr]
    assert not sae.encode(torch.randn(ROWS, D_IN)).nnz
    assert sae.encode(probe(sae)).nnz >= ROWS


def test_the_probe_gives_up_on_an_sae_that_never_fires() -> None:
    sae = trained("relu")
    with torch.no_grad():
        sae.W_enc.zero_()  # type: ignore[operator]
        sae.b_enc.fill_(-1)  # type: ignore[operator]
    assert probe(sae).shape == (ROWS, D_IN)
    assert difference(sae, sae, "apportion").latents == 0


def test_a_difference_is_found(tmp_path: Path) -> None:
    sae = trained("topk")
    ap.export(sae, tmp_path / "a", "sae_lens")
    other = ap.load(tmp_path / "a")
    with torch.no_grad():
        other.b_dec += 0.01 * sae(probe(sae)).abs().max()  # type: ignore[operator]
    found = difference(sae, other, "sae_lens")
    assert found.reconstructions > 1e-3 and found.latents > 1e-4

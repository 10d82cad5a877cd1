"""The README's Python example runs as written, and its commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import apportion as ap
from apportion.architectures import SAES
from apportion.cli import parse

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_python_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(example, "README.md", "exec"), names)
    sae, x_hat = names["sae"], names["x_hat"]
    assert isinstance(sae, ap.SAE) and not sae.training
    assert isinstance(x_hat, torch.Tensor) and x_hat.shape == (20_000, 64)
    assert (tmp_path / "my-sae" / "model.safetensors").exists()


def setup_commands() -> list[str]:
    section = README.split("## Two commands")[1].split("\n## ")[0]
    return [line.strip() for line in section.splitlines() if line.startswith("    ")]


def test_there_are_two_setup_commands_and_ci_runs_the_second_and_what_it_leaves_out() -> None:
    demo, tests = setup_commands()
    assert demo.endswith(".venv/bin/apportion demo") and tests.endswith(".venv/bin/python -m pytest")
    ci = (Path(__file__).parents[1] / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert ci[-2:] == [tests, ".venv/bin/python -m pytest -m slow"] and f"`{ci[-1]}`" in README
    assert any(line.startswith("export JAXTYPING_DISABLE=0") for line in ci), "annotations are checked in CI"


def test_every_command_line_is_understood() -> None:
    commands = [line for line in README.splitlines() if re.match(r"    (\.venv/bin/)?apportion ", line)]
    assert len(commands) >= 7
    for line in commands:
        parse(line.split("apportion ", 1)[1].split())
    with pytest.raises(SystemExit):
        parse(["demo", "--no-such-option"])


def test_every_sae_is_mentioned() -> None:
    for name in SAES:
        assert f"`{name}`" in README


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", README):
        assert (Path(__file__).parents[1] / target).exists(), target

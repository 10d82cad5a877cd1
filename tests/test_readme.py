"""The README's Python example runs as written, and its commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import apportion as ap
from apportion.architectures import SAES

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


def test_the_test_command_is_what_ci_runs() -> None:
    ci = (Path(__file__).parents[1] / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert ci[-1] == "python -m pytest" and "    python -m pytest\n" in README


def test_every_sae_is_in_the_table() -> None:
    for name in SAES:
        assert f"| `{name}` |" in README


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", README):
        assert (Path(__file__).parents[1] / target).exists(), target

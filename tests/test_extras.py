"""Packages that are not installed: named all at once, with the option that brings them."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

import pytest

import apportion as ap
from apportion import extras
from apportion.cli import main

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]


class Installed:
    """Stands in for what importlib.metadata knows about the package."""

    def __init__(self, origin: str | None) -> None:
        self.origin = origin

    def read_text(self, name: str) -> str | None:
        return self.origin if name == "direct_url.json" else None


@pytest.fixture
def lacking(monkeypatch: pytest.MonkeyPatch):
    """Makes packages look as if they were not installed."""

    def lack(*packages: str) -> None:
        for package in packages:
            monkeypatch.setitem(sys.modules, package, None)

    return lack


def test_every_package_comes_with_the_extra_that_is_named() -> None:
    brought = PROJECT["optional-dependencies"]
    wanted = {line.split(">=")[0]: extra for extra in brought.keys() - {"all", "dev"} for line in brought[extra]}
    wanted["mlflow"] = wanted.pop("mlflow-skinny")  # as it is imported
    assert wanted == extras.EXTRAS


@pytest.mark.parametrize(
    ("origin", "remedy"),
    [
        (None, "pip install 'apportion[lm,plots]' accelerate"),
        ('{"url": "https://example.org/a.whl"}', "pip install 'apportion[lm,plots]' accelerate"),
        (
            '{"url": "file:///home/me/my%20clone", "dir_info": {"editable": true}}',
            "pip install -e '/home/me/my clone[lm,plots]' accelerate",
        ),
    ],
)
def test_all_are_named_at_once_with_the_right_remedy(origin, remedy, lacking, monkeypatch) -> None:
    monkeypatch.setattr(extras, "distribution", lambda name: Installed(origin))
    lacking("jinja2", "transformers", "accelerate")
    with pytest.raises(ValueError) as refused:
        extras.need("This", "jinja2", "torch", "transformers", "accelerate")
    assert str(refused.value) == (
        f"This needs jinja2 and transformers and accelerate, not installed here. Install what this needs: {remedy}"
    )


def test_nothing_is_said_about_what_is_there() -> None:
    extras.need("This", "torch", "safetensors")


@pytest.mark.parametrize(
    ("words", "packages"),
    [
        (["collect", "m", "--hookpoint", "a", "--dataset", "d", "--out", "{tmp}/x"], ["transformers", "datasets"]),
        (["demo", "--out", "{tmp}/x"], ["transformers", "matplotlib", "jinja2"]),
        (["report", "{sae}", "--out", "{tmp}/x"], ["matplotlib", "jinja2"]),
        (["report", "{sae}", "--model", "m", "--text", "{text}"], ["transformers", "matplotlib", "jinja2"]),
        (["eval", "{sae}", "--text", "{text}", "--plots", "{tmp}/x"], ["transformers", "matplotlib"]),
        (["eval", "{sae}", "--acts", "{tmp}", "--plots", "{tmp}/x"], ["matplotlib"]),
        (["train", "embedded", "--hookpoint", "a", "--tokens", "9", "--out", "{tmp}/x"], ["transformers"]),
        (["info", "org/name"], ["huggingface_hub"]),
    ],
)  # fmt: skip
def test_a_command_says_what_it_lacks_before_it_does_anything(words, packages, lacking, tmp_path, capsys) -> None:
    lacking(*extras.EXTRAS)
    ap.create("topk", d_in=4, d_sae=8, k=1).save(tmp_path / "sae")
    (tmp_path / "text.txt").write_text("the cat")
    places = {"tmp": tmp_path, "sae": tmp_path / "sae", "text": tmp_path / "text.txt"}
    assert main([word.format(**places) for word in words]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"needs {' and '.join(packages)}, not installed" in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["sae", "text.txt"]


def test_a_package_that_an_import_missed_is_named_with_its_remedy(monkeypatch, capsys) -> None:
    from apportion.cli.info import Info

    def run(self):
        raise ModuleNotFoundError("No module named 'datasets.arrow'", name="datasets.arrow")

    monkeypatch.setattr(Info, "run", run)
    assert main(["info", "x"]) == 2
    assert "No module named 'datasets.arrow'. Install what this needs: pip install" in (said := capsys.readouterr().err)
    assert "[lm]" in said

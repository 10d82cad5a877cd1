"""Packages that not every command needs: which extra brings them, and how it is installed.

need("A report", "matplotlib", "jinja2")     before any work; ValueError that names all that are missing
"""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from shlex import quote
from urllib.parse import unquote, urlsplit

EXTRAS = {
    **dict.fromkeys(("transformers", "datasets"), "lm"),
    **dict.fromkeys(("matplotlib", "jinja2"), "plots"),
    "huggingface_hub": "hub",
    "s3fs": "s3",
    **{name: name for name in ("wandb", "trackio", "tensorboard", "mlflow")},
    **dict.fromkeys(("sqlalchemy", "alembic"), "mlflow"),
}
"""Which extra in pyproject.toml brings a package."""


def need(what: str, *packages: str) -> None:
    """ValueError if some of the packages are not installed: all of these, and how to get them. Imports none."""
    if missing := [package for package in packages if not _installed(package)]:
        raise ValueError(f"{what} needs {' and '.join(missing)}, not installed here. {install(*missing)}")


def _installed(package: str) -> bool:
    """A folder of that name here (wandb makes one) is no package, though Python could import it."""
    found = find_spec(package)
    return found is not None and found.origin is not None


def install(*packages: str) -> str:
    """The sentence that says how these packages are installed."""
    extras = sorted({EXTRAS[package] for package in packages if package in EXTRAS})
    others = [package for package in packages if package not in EXTRAS]
    words = [*([_ourselves(",".join(extras))] if extras else []), *others]
    return f"Install what this needs: pip install {' '.join(words)}"


def _ourselves(extras: str) -> str:
    """This package with extras, as pip takes it: from the clone if that is what is installed."""
    try:
        origin = json.loads(distribution("apportion").read_text("direct_url.json") or "{}")
    except (PackageNotFoundError, ValueError):
        origin = {}
    if not origin.get("dir_info", {}).get("editable"):
        return f"'apportion[{extras}]'"
    return f"-e {quote(unquote(urlsplit(origin['url']).path) + f'[{extras}]')}"

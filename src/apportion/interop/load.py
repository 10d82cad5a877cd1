"""`ap.load`: an SAE from files, whoever wrote them.

Ours first, then the formats in the order of their table, then, if there is no such path, the Hugging Face Hub.
"""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import Any

import torch

from apportion.architectures import SAE, loading
from apportion.architectures.checks import check_info
from apportion.disk import check_may_open
from apportion.interop.assemble import assemble, is_count
from apportion.interop.formats import FORMATS
from apportion.interop.peek import beside, settings_in
from apportion.interop.reading import read_pt
from apportion.trust import expanded, inside, refuse_mistyped

OURS = "apportion"
REMOTE = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
"""org/name, or the alias of a release."""
SCHEME = re.compile(r"^(\w{2,}):/(?!/)")
"""Of an address that was made a path, which takes two slashes for one."""
ADDRESS = re.compile(r"\w+://(?:huggingface\.co/)?([^/]+/[^/]+)(?:/(?:tree|blob|resolve)/[^/]+)?(?:/(.+?))?/?$")
"""Of a repository or a place in it, as browsers show it."""


def load(
    path_or_repo: str | Path,
    subfolder: str | None = None,
    format: str | None = None,
    config: dict[str, Any] | None = None,
    trust: bool = False,
    dtype: torch.dtype | None = None,
) -> SAE:
    """Read an SAE that apportion or another library saved; it comes in eval mode, in the dtype of the file.

    `path_or_repo` is a folder, a file, a repository of the Hugging Face Hub (org/name) or the alias of a release.
    `format` is the name of a format, where the files do not tell. `config` holds what they do not store, for example
    {"k": 32}. Files that only unpickling can read are refused unless `trust`: that executes what their author wants.
    `dtype` is another one than that of the file (the finest there, if there are several); where a format has scales to
    be folded into the weights, half precision rounds once more, and `dtype=torch.float32` keeps all of them exact.
    Raises ValueError, naming the file and the reason, for anything that is not a complete, consistent SAE.
    """
    if format is not None and format != OURS and format not in FORMATS:
        raise ValueError(f"There is no format {format!r}; known are: {', '.join([OURS, *FORMATS])}.")
    path, listed = _local(path_or_repo, subfolder)
    name = format or _recognise(path)
    if name == OURS:
        if config:
            raise ValueError(f"{path} stores all of its settings; leave out config.")
        sae = loading.load(path if path.is_dir() else path.parent)
        return sae if dtype is None else sae.to(dtype)
    given = listed | dict(config or {})
    try:
        parts = FORMATS[name].read(path, given, trust)
        if parts.k is None and config and "k" in config:
            if not is_count(k := config["k"]):
                raise ValueError(f"k = {k!r} is no number of active latents: give a positive number.")
            parts.k = k
            given.pop("k", None)
        sae = assemble(parts, dtype)
        check_info(sae.info)
    except (LookupError, TypeError, AttributeError, RuntimeError, ArithmeticError, MemoryError, struct.error) as error:
        raise ValueError(f"{path} does not fit the format {name}: {type(error).__name__}: {error}") from error
    except ValueError as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"{path}: {error}") from error
    if unread := [setting for setting in given if setting in (config or {})]:
        raise ValueError(f"config: {', '.join(unread)} mean nothing to {path}, read as {name}.")
    sae.info["format"] = name
    return sae


def _local(path_or_repo: str | Path, subfolder: str | None) -> tuple[Path, dict[str, Any]]:
    """Where the files lie, or are put by a download; and what a list of releases says beyond them."""
    path = expanded(path_or_repo)
    if path.exists():
        return inside(path, subfolder) if subfolder else path, {}
    name = SCHEME.sub(r"\1://", str(path_or_repo))
    if not REMOTE.fullmatch(name):
        raise ValueError(
            f"{name} does not exist. Give a folder, a file, or a repository of the Hub (org/name){_as(name)}."
        )
    refuse_mistyped(name, "a repository of the Hub")
    from apportion.interop.hub import download
    from apportion.interop.releases import listed_settings

    return download(name, subfolder), listed_settings(name)


def _as(address: str) -> str:
    """How to say an address of the Hub here; nothing for what is none."""
    found = ADDRESS.match(address)
    if found is None:
        return ""
    place = f', subfolder="{found[2]}"' if found[2] else ""
    return f', here load("{found[1]}"{place})'


def _recognise(path: Path) -> str:
    """The name of its format."""
    if not path.exists():
        raise ValueError(f"{path} does not exist.")
    ours = path.is_dir() or path.name in ("config.json", "model.safetensors")
    if ours and settings_in(beside(path, "config.json")).get("format") == OURS:
        return OURS
    for name, known in FORMATS.items():
        if known.recognises(path):
            return name
    if (path / "run.json").is_file():
        return OURS  # a run that has not finished, which is said when it is read
    raise _unknown(path)


def _unknown(path: Path) -> ValueError:
    for file in [path] if path.is_file() else sorted([*path.glob("*.pt"), *path.glob("*.pth")]):
        if file.suffix in (".pt", ".pth"):
            read_pt(file)  # says so if it is damaged, or holds more than tensors
    held = sorted(f.name for f in path.iterdir()) if path.is_dir() else []
    for name in held:
        check_may_open(path / name)
    found = f" It holds {', '.join(held[:12])}{' ...' if len(held) > 12 else ''}." if held else ""
    if {"config.json", "model.safetensors", "run.json"} & set(held):
        try:
            loading.load(path)
        except ValueError as error:
            found = f" {error}{found}"
    formats = "; ".join(f"{name} ({known.files})" for name, known in FORMATS.items())
    return ValueError(
        f"{path} is in no format that is known.{found} Looked for: {OURS} (config.json and model.safetensors); "
        f"{formats}. If the SAE lies deeper, give subfolder=...; if it is one of these, say which with format=..."
    )

"""The files of a cache and the fields of its manifest: what they are called, of what kind each is, what is checked.

Everything that is read from a cache goes by its manifest, so it is checked as a whole before anything is made in the
sizes that it names. `manifest_sha256` in it is the digest of all the rest; caches from before there was one lack it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from apportion.about import About, Site
from apportion.disk import plain
from apportion.fields import check_fields
from apportion.rows.filter import TokenFilter
from apportion.trust import within

FORMAT_VERSION = 2
READABLE = (1, 2)
MANIFEST = "manifest.json"
JOURNALS = "journal"
"""At a URL, the folder of the journal: an object for each shard."""
LABELS = ("tokens", "positions", "contexts")
"""What is known of every row."""
DIGEST = "manifest_sha256"
MOST_BYTES = 1 << 26
"""A manifest has some 300 bytes for each file."""
FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPES = {**FLOATS, "int8": torch.int8}

FIELDS: dict[str, Any] = {
    "dtype": str,
    "rows": int,
    "context_tokens": int,
    "model": dict,
    "text": dict,
    "hookpoints": dict[str, dict],
    "shards": list[dict],
}
"""What every cache says; of what kind the rest is follows from `About`."""
OF_VERSION: dict[int, dict[str, Any]] = {1: {"shard_rows": int}, 2: {"shard_contexts": int}}
OF_HOOKPOINT: dict[str, Any] = {"folder": str, "d_in": int, "filter": dict}
OF_FILES = ("shards", "hookpoints", "shard_rows", "shard_contexts", "plan")
"""What a manifest says of its files."""
OF_SHARD: dict[int, dict[str, Any]] = {1: {"rows": int, "sha256": dict[str, str]}}
OF_SHARD[2] = {"shard": int, "contexts": int, **OF_SHARD[1], "sample_sha256": dict[str, str]}
SAMPLED: dict[str, Any] = {"sample_sha256": dict[str, str]}
UNFINISHED = "unfinished"
GOES_ON = (UNFINISHED, "interrupted")
"""How a cache ended that a collection with the same settings goes on with."""
MOST = 1 << 40
"""No count in a manifest is larger."""


def torch_dtype(name: str) -> torch.dtype:
    """A dtype of floating-point numbers."""
    if name not in FLOATS:
        raise ValueError(f"dtype {name!r} is not supported: use one of {', '.join(FLOATS)}")
    return FLOATS[name]


def folder_name(hookpoint: str) -> str:
    """The folder of a hookpoint inside a cache: its name without characters that file systems dislike."""
    return hookpoint.replace(":", "--")


def token_file(number: int) -> str:
    """Where a cache keeps the tokens, positions and contexts of a shard."""
    return f"tokens-{number:05d}.safetensors"


def acts_file(hookpoint: str, number: int) -> str:
    """Where a cache keeps the activations of a shard at a hookpoint."""
    return f"{folder_name(hookpoint)}/{number:05d}.safetensors"


def sealed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest with the digest of all the rest of it."""
    return {**manifest, DIGEST: _digest(manifest)}


def _digest(manifest: Mapping[str, Any]) -> str:
    rest = plain({name: value for name, value in manifest.items() if name != DIGEST})
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def check_manifest(manifest: dict[str, Any], folder: str) -> None:
    """ValueError, naming the field, unless the manifest of the cache in `folder` is whole and fits itself."""
    file = f"{folder}/{MANIFEST}"
    if manifest.get("format_version") not in READABLE:
        raise ValueError(
            f"{file!r} has format version {manifest.get('format_version')!r}, this program reads "
            f"{' and '.join(map(str, READABLE))}: collect the cache again or use a matching version of apportion"
        )
    try:
        _check(manifest, Path(folder))
    except ValueError as error:
        raise ValueError(f"{file}: {error} Take the manifest as it was written, or collect the cache again.") from None


def _check(manifest: dict[str, Any], folder: Path) -> None:
    version = manifest["format_version"]
    check_fields(manifest, FIELDS | OF_VERSION[version], {DIGEST: str, "plan": dict})
    about = About.from_json(manifest)
    sizes = {name: manifest[name] for name in OF_VERSION[version]}
    sizes |= {"rows": about.rows, "context_tokens": about.lm.context_tokens}
    for name, size in (sizes | {"contexts": about.lm.contexts}).items():
        if not (manifest.get("ended") in GOES_ON and name in ("rows", "contexts") and size == 0):
            _check_size(name, 1 if size is None else size)
    if "plan" in manifest:
        check_fields(manifest["plan"], {"filter": dict}, {}, "plan")
        TokenFilter.from_dict(manifest["plan"]["filter"])
    if manifest["dtype"] not in DTYPES:
        raise ValueError(f"dtype is {manifest['dtype']!r}, and not one of {', '.join(DTYPES)}.")
    if not manifest["hookpoints"]:
        raise ValueError("hookpoints is empty.")
    for name, hookpoint in manifest["hookpoints"].items():
        _check_hookpoint(name, hookpoint, folder)
    _check_shards(manifest)
    has_samples = any("sample_sha256" in shard for shard in manifest["shards"])
    if (DIGEST in manifest or has_samples) and manifest.get(DIGEST) != _digest(manifest):
        raise ValueError(f"something was changed since it was written ({DIGEST} is not that of its content).")


def _check_size(name: str, size: int) -> None:
    if not 1 <= size <= MOST:
        raise ValueError(f"{name} = {size} is no possible number.")


def _check_hookpoint(name: str, about: dict[str, Any], folder: Path) -> None:
    where = f"hookpoints.{name}"
    check_fields(about, OF_HOOKPOINT, {}, where)
    Site.from_json({"hookpoint": name, **about}, where)
    _check_size(f"{where}.d_in", about["d_in"])
    if about["folder"] != folder_name(name):
        raise ValueError(f"{where}.folder is {about['folder']!r}, not {folder_name(name)!r}.")
    within(folder, about["folder"])
    if not all(0 <= i < 2**31 for i in TokenFilter.from_dict(about["filter"]).special_ids):
        raise ValueError(f"{where}.filter.special_ids are no ids of tokens.")


def _check_shards(manifest: dict[str, Any]) -> None:
    shards = manifest["shards"]
    for number, shard in enumerate(shards):
        check_shard(shard, manifest, f"shards.{number}", number)
        if manifest["format_version"] == 1:
            most, last = manifest["shard_rows"], number == len(shards) - 1
            if not (1 <= shard["rows"] <= most and (last or shard["rows"] == most)):
                raise ValueError(f"shards.{number}.rows = {shard['rows']} does not fit shard_rows = {most}.")
        elif shard["shard"] != number or not shard["contexts"]:
            raise ValueError(f"shards.{number} is shard {shard['shard']}, with {shard['contexts']} contexts.")
    if (rows := sum(shard["rows"] for shard in shards)) != manifest["rows"]:
        raise ValueError(f"rows = {manifest['rows']}, and the shards have {rows}.")


def check_shard(shard: dict[str, Any], manifest: Mapping[str, Any], where: str, number: int = 0) -> None:
    version = manifest["format_version"]
    check_fields(shard, OF_SHARD[version], SAMPLED, where)
    if version == 2:
        number, most = shard["shard"], manifest["shard_contexts"]
        if not (0 <= number < MOST and 0 <= shard["contexts"] <= most and 0 <= shard["rows"] <= MOST):
            raise ValueError(f"{where} has {shard['contexts']} contexts of {most} and {shard['rows']} rows.")
        if not shard["contexts"]:
            return
    files = [token_file(number), *(acts_file(name, number) for name in manifest["hookpoints"])]
    for field in ("sha256", "sample_sha256"):
        if field in shard and shard[field].keys() != set(files):
            raise ValueError(f"{where}.{field} is not about {', '.join(files)}.")

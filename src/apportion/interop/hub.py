"""An SAE from the Hugging Face Hub.

    list the repository -> what belongs to the one SAE -> fetch that into the cache of the Hub -> its folder there

A repository often holds hundreds of SAEs. Fetched are the weights in the one folder, the settings beside them, and
config.json of the folders above; states of training are left where they are. Without a network the cache is asked.
Which server, which cache and who is logged in are matters of huggingface_hub: HF_ENDPOINT, HF_HOME, HF_TOKEN,
HF_HUB_OFFLINE.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from glob import escape
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Any

from apportion.extras import need
from apportion.interop.releases import RELEASES, closest, place_in
from apportion.trust import inside

WEIGHTS = (".safetensors", ".npz", ".pt", ".pth")
SETTINGS = (".json", ".yaml", ".yml")
ABOVE = ("config.json", "hyperparams.json", "lm_config.json")
"""Settings that some formats keep in a folder above the weights."""
CHECKPOINTS = ("checkpoints/final.safetensors", "checkpoints/final.pt")
"""Weights that lie deeper than their settings (Llama Scope)."""
STATES = re.compile(
    r"(trainer_state|state|optimizer\w*|lr_scheduler\w*|rank_\d+_state|sparsity|activations_store_state|training_args)"
    r"\.(pt|pth|safetensors|json)"
)
"""Files that are left where they are."""
MOST = 8
"""Files of weights that one SAE can have."""
PATIENCE = 10.0
"""Seconds without an answer after which the Hub counts as out of reach."""


def download(repo: str, subfolder: str | None = None, revision: str | None = None) -> Path:
    """The folder or file, in the cache of the Hub, of one SAE; fetched if it is not there yet.

    `repo` is org/name, or a release (releases.py) whose SAE `subfolder` names. Raises ValueError, in one line, for what
    is not there, for what needs a login, and if the Hub is out of reach and the cache has nothing.
    """
    hub = huggingface_hub()
    if repo in RELEASES:
        repo, place = place_in(repo, subfolder)
    elif "/" not in repo:
        raise ValueError(f"{repo!r} is no path, no repository (org/name) and no release, such as {_like(repo)}.")
    else:
        place = "" if subfolder is None else path_in(repo, subfolder)
    reason: Exception | None = None
    try:
        names = _listed(hub, repo, revision)
    except Exception as error:  # transports, and so their errors, differ between versions of huggingface_hub
        names = _cached(hub, repo, revision) if _out_of_reach(error) else None
        if names is None:
            raise explained(error, repo, revision) from None
        reason = error
    try:
        place, files = select(repo, names, place)
    except ValueError as error:
        if reason is None:
            raise
        raise ValueError(f"{explained(reason, repo, revision)} In the cache: {error}") from None
    try:
        folder = hub.snapshot_download(
            repo,
            revision=revision,
            endpoint=endpoint(),
            allow_patterns=[escape(f) for f in files],
            etag_timeout=PATIENCE,
            local_files_only=reason is not None,
        )
    except Exception as error:
        raise explained(error, repo, revision) from None
    return inside(Path(folder), place) if place else Path(folder)


def select(repo: str, names: Iterable[str], place: str) -> tuple[str, list[str]]:
    """Which of the files of a repository belong to the SAE at `place`, a folder or a file, and that place.

    ValueError if there is no SAE, or more than one: the message says where they are.
    """
    files = [PurePosixPath(name) for name in names]
    files = [f for f in files if not f.is_absolute() and ".." not in f.parts and not STATES.fullmatch(f.name)]
    weights = [f for f in files if f.suffix in WEIGHTS]
    if place.endswith("*"):
        found = closest(place, {str(f.parent) for f in weights})
        if found is None:
            raise ValueError(f"{repo} has no {place}.")
        place = found
    at = PurePosixPath(place)
    if at in files:
        chosen, folder = [at], at.parent
    else:
        chosen, folder = [f for f in weights if f.parent == at or f in [at / c for c in CHECKPOINTS]], at
    if not chosen or len(chosen) > MOST:
        raise ValueError(f"{repo}{f'/{place}' if place else ''} {_instead(at, files, weights, chosen)}")
    beside = [f for f in files if f.suffix in SETTINGS and f.parent == folder]
    above = [f for f in files if f.name in ABOVE and f.parent in folder.parents]
    return place, [str(f) for f in dict.fromkeys([*chosen, *beside, *above])]


def _instead(
    at: PurePosixPath, files: Sequence[PurePosixPath], weights: Sequence[PurePosixPath], chosen: Sequence[PurePosixPath]
) -> str:
    """The end of a message: what there is instead of one SAE."""
    if chosen:
        return f"holds {len(chosen)} files of weights. Say which with subfolder=...: {_some(chosen)}."
    deeper = dict.fromkeys(f.parent for f in weights if at in f.parents)
    if deeper:
        return f"holds SAEs in {len(deeper)} folders. Say which with subfolder=...: {_some(deeper)}."
    there = dict.fromkeys(f.parent for f in weights)
    if not any(at in f.parents for f in files):
        return f"does not exist. There are weights in: {_some(there)}." if there else "holds no weights of an SAE."
    return "holds no weights of an SAE (.safetensors, .npz, .pt)."


def _some(paths: Iterable[PurePosixPath]) -> str:
    shown = ["the repository itself" if str(path) == "." else str(path) for path in paths]
    return ", ".join(shown[:8]) + (f", ... ({len(shown)} in all)" if len(shown) > 8 else "")


def _like(name: str) -> str:
    """Releases with a similar name, or a few that show what the names are like."""
    return ", ".join(get_close_matches(name, RELEASES, n=6, cutoff=0.5) or list(RELEASES)[::18])


def path_in(repo: str, subfolder: str) -> str:
    """A path in a repository, without detours. ValueError if it leads out of it."""
    place = PurePosixPath(os.path.normpath(subfolder.replace("\\", "/")))
    if place.is_absolute() or ".." in place.parts:
        raise ValueError(f"{subfolder!r} leads out of {repo}. Give something inside the repository.")
    return "" if str(place) == "." else str(place)


def endpoint() -> str | None:
    """Another server than the Hub, asked for by the environment; read at every call."""
    return os.environ.get("HF_ENDPOINT") or None


def huggingface_hub() -> Any:
    """The package; ValueError if it is not installed."""
    need("The Hub", "huggingface_hub")
    return import_module("huggingface_hub")


def _listed(hub: Any, repo: str, revision: str | None) -> list[str]:
    """All files of a repository, in one request."""
    api = hub.HfApi(endpoint=endpoint())
    return [file.rfilename for file in api.model_info(repo, revision=revision, timeout=PATIENCE).siblings or []]


def _cached(hub: Any, repo: str, revision: str | None) -> list[str] | None:
    """Files of a repository that are in the cache; None if it is not there."""
    try:
        folder = Path(hub.snapshot_download(repo, revision=revision, local_files_only=True, allow_patterns=[]))
    except Exception:
        return None
    return [file.relative_to(folder).as_posix() for file in sorted(folder.rglob("*")) if file.is_file()]


def _out_of_reach(error: Exception) -> bool:
    """True if the Hub gave no answer, or one that it is not well."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    status = getattr(getattr(error, "response", None), "status_code", 0)
    return not isinstance(error, HFValidationError) and (not isinstance(error, HfHubHTTPError) or status >= 500)


def explained(error: Exception, repo: str, revision: str | None = None) -> ValueError:
    """What went wrong, and what to do, in one line."""
    from huggingface_hub import errors

    hub = endpoint() or "https://huggingface.co"
    status = getattr(getattr(error, "response", None), "status_code", None)
    text = " ".join(str(error).split()).split(" For more information")[0][:200]
    if isinstance(error, errors.GatedRepoError):
        return ValueError(
            f"{repo} is gated. Accept its conditions at {hub}/{repo}, and log in: hf auth login, or HF_TOKEN."
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return ValueError(
            f"{hub} has no repository {repo}, or it is private. Check the name; log in for what is private: "
            "hf auth login, or HF_TOKEN."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return ValueError(f"{repo} has no revision {revision!r}. Give a branch, a tag or a commit of it.")
    if isinstance(error, errors.HFValidationError):
        return ValueError(f"{repo!r} is no name of a repository (org/name): {text}")
    if status in (401, 403):
        return ValueError(f"{hub} does not let you do that in {repo} ({status}). Log in: hf auth login, or HF_TOKEN.")
    if isinstance(error, errors.HfHubHTTPError) and not _out_of_reach(error):
        return ValueError(f"{repo}: {hub} answered {status}: {text}")
    return ValueError(
        f"{repo}: {hub} is out of reach, and the files are not in the cache ({type(error).__name__}: {text}). Check "
        "the network, HF_ENDPOINT and HF_HUB_OFFLINE."
    )

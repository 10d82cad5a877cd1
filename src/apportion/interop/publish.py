"""One of our SAEs onto the Hugging Face Hub: config.json, model.safetensors and a model card, in one commit."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from copy import copy, deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from apportion.architectures import SAE
from apportion.disk import all_finite, read_json
from apportion.interop.card import PLOTS, model_card
from apportion.interop.hub import endpoint, explained, huggingface_hub, path_in

IMAGES = (".png", ".svg", ".jpg", ".jpeg", ".webp")


def push_to_hub(
    sae: SAE,
    repo: str,
    private: bool = False,
    *,
    subfolder: str | None = None,
    metrics: Mapping[str, Any] | str | Path | None = None,
    plots: str | Path | Sequence[str | Path] | None = None,
    license: str | None = None,
    notes: str | None = None,
    message: str = "Upload an SAE with apportion",
) -> str:
    """Publish `sae` in the repository org/name, which is made if it is not there; returns its address.

    `metrics` are figures as `apportion eval --json` writes them, or that file; `plots` image files, or a folder of
    them. `license` is yours to choose; without one the card says that none was given. `notes` are Markdown, for the
    beginning of the card. `private` matters when the repository is made. Paths of your machine are left out of
    config.json. Raises ValueError before anything is uploaded if the SAE could not be used: without its thresholds,
    without its input description, or with weights that are not finite.
    """
    hub = huggingface_hub()
    _check_ready(sae)
    if repo.count("/") != 1:
        raise ValueError(f"{repo!r} is no name of a repository. Give org/name, or your own name in place of org.")
    place = "" if subfolder is None else path_in(repo, subfolder)
    figures = read_json(Path(metrics)) if isinstance(metrics, str | Path) else dict(metrics or {})
    images = _images(plots)
    shown = copy(sae)
    shown.info = _without_paths(deepcopy(sae.info))
    with TemporaryDirectory() as made:
        folder = Path(made)
        shown.save(folder)
        for image in images:
            (folder / PLOTS).mkdir(exist_ok=True)
            shutil.copyfile(image, folder / PLOTS / image.name)
        card = model_card(shown, repo, place, figures, [image.name for image in images], license, notes)
        (folder / "README.md").write_text(card, encoding="utf-8")
        api = hub.HfApi(endpoint=endpoint())
        try:
            address = api.create_repo(repo, private=private, exist_ok=True)
            api.upload_folder(repo_id=repo, folder_path=folder, path_in_repo=place, commit_message=message)
        except Exception as error:
            raise explained(error, repo) from None
    return str(address)


def _check_ready(sae: SAE) -> None:
    """ValueError, with the remedy, for an SAE that whoever loads it could not use."""
    if sae.needs_fit:
        raise ValueError(
            "This SAE has no input description yet. Train it, or call sae.fit_input(x), before publishing."
        )
    for name, weights in sae.named_parameters():
        if not all_finite(weights.detach()):
            raise ValueError(f"{name} holds NaN or infinity; such an SAE is not published.")
    with sae.in_eval_mode():
        sae.allocation.in_force()


def _images(plots: str | Path | Sequence[str | Path] | None) -> list[Path]:
    if plots is None:
        return []
    if isinstance(plots, str | Path):
        path = Path(plots)
        files = sorted(f for f in path.iterdir() if f.suffix in IMAGES) if path.is_dir() else [path]
    else:
        files = [Path(plot) for plot in plots]
    for file in files:
        if not file.is_file() or file.suffix not in IMAGES:
            raise ValueError(f"plots: {file} is not an image file ({', '.join(IMAGES)}).")
    if len({file.name for file in files}) < len(files):
        raise ValueError("plots: two of the files have the same name.")
    return files


def _without_paths(value: Any) -> Any:
    """What an SAE says of itself, without the folders of the machine it was trained on."""
    if isinstance(value, dict):
        return {name: _without_paths(v) for name, v in value.items() if name not in ("folder", "folders")}
    if isinstance(value, list | tuple):
        return [_without_paths(v) for v in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value

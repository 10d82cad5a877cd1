"""The model card of an SAE: what it is, what it was trained on and how, how good it is, and how to load it.

Everything is taken from what the SAE says of itself (`info`, settings) and from the figures that are given; what is not
known is left out. Each figure comes with its definition.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from apportion.about import About
from apportion.architectures import SAE, SAES
from apportion.evals.figures import FIGURES, is_number
from apportion.trust import shown

PLOTS = "plots"
"""The folder of the images."""
SAID_ELSEWHERE = {"k", "d_sae", "tokens", "filtered_share", "dead_window_tokens", "predictions"}


def model_card(
    sae: SAE,
    repo: str,
    subfolder: str,
    metrics: Mapping[str, Any],
    plots: Sequence[str],
    license: str | None,
    notes: str | None,
) -> str:
    """Markdown, with the header that the Hub reads."""
    source = sae.source
    title = subfolder or repo.split("/")[-1]
    parts = [
        _header(source, license),
        f"# {title}",
        f"A sparse autoencoder of the kind `{sae.name}`: {SAES[sae.name].summary}. Saved with apportion.",
        notes or "",
        "## The SAE\n\n" + _table({"kind": f"`{sae.name}`", **_about(sae)}),
        "## How to load it\n\n" + _how_to_load(sae, repo, subfolder),
        _section("## Data", _data(source)),
        _section("## Training", _training(sae.info)),
        _metrics(metrics),
        _images(plots),
        f"## Licence\n\n{license}" if license else "## Licence\n\nNone was given: ask the author before you use it.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _header(source: About, license: str | None) -> str:
    fields: dict[str, Any] = {"library_name": "apportion"}
    model = source.lm.model.name_or_path
    if model is not None and model.count("/") == 1:
        fields["base_model"] = model
    if license:
        fields["license"] = license
    lines = [f"{name}: {json.dumps(value)}" for name, value in fields.items()]
    return "\n".join(["---", *lines, "tags:", "- sparse-autoencoder", "- interpretability", "---"])


def _about(sae: SAE) -> dict[str, Any]:
    calibration = sae.info.get("calibration")
    return {
        "model": _code(sae.source.lm.model.name_or_path),
        "hookpoint": _code(sae.hookpoint),
        "target hookpoint": _code(sae.target_hookpoint),
        "width of activations (d_in)": sae.d_in,
        "latents (d_sae)": sae.d_sae,
        "active latents per token (k)": sae.k,
        "rule": _code(sae.allocation_name),
        "input normalisation": sae.input.kind,
        "dtype": str(sae.dtype).removeprefix("torch."),
        "thresholds": calibration
        and f"calibrated on {_count(calibration['tokens'])} tokens, on which L0 is {calibration['l0']:.2f}",
        "read from the format": sae.info.get("format"),
    }


def _how_to_load(sae: SAE, repo: str, subfolder: str) -> str:
    call = f'"{repo}", subfolder="{subfolder}"' if subfolder else f'"{repo}"'
    shape = ", ".join(str(n) for n in sae.row_shape)
    use = "x_hat = sae.decode(latents, x)" if sae.decode_needs_x else "x_hat = sae.decode(latents)"
    return (
        "```python\nimport apportion as ap\n\n"
        f"sae = ap.load({call})\n"
        f"latents = sae.encode(x)  # x: raw activations [..., {shape}]; sparse: values, indices, offsets\n"
        f"{use}\n```\n\n"
        "The files are `config.json` (settings, and what is said here) and `model.safetensors`; nothing is unpickled."
    )


def _data(source: About) -> dict[str, Any]:
    return {
        "text": source.lm.text.in_words() if source.lm.text.parts else source.lm.text.where,
        "tokens in the cache": _count(source.rows),
        "rows to train on": _count(source.rows_train),
        "rows to calibrate": _count(source.rows_calibrate),
        "tokens per context": source.lm.context_tokens,
        "tokens filtered out": None if source.filtered_share is None else f"{source.filtered_share:.2%}",
        "filter": ", ".join(f"{k} = {v}" for k, v in (source.filter or {}).items() if not isinstance(v, list)),
        "dtype of the activations": source.dtype,
    }


def _training(info: Mapping[str, Any]) -> dict[str, Any]:
    settings = info.get("training", {})
    plain = {n: v for n, v in settings.items() if v is not None and n not in ("tokens", "total_tokens")}
    return {"tokens": _count(settings.get("tokens"))} | {f"`{name}`": _shown(value) for name, value in plain.items()}


def _metrics(metrics: Mapping[str, Any]) -> str:
    defined = [f for key, f in FIGURES.items() if key not in SAID_ELSEWHERE and is_number(metrics.get(key))]
    rows = [(figure.title, figure.written(metrics[figure.key]), figure.definition) for figure in defined]
    others = {f"`{n}`": v for n, v in metrics.items() if n not in FIGURES.keys() | SAID_ELSEWHERE and is_number(v)}
    if not rows and not others:
        return ""
    over = [f"{_count(metrics['tokens'])} tokens"] if is_number(metrics.get("tokens")) else []
    over.append(str(metrics.get("mode", "")))
    if is_number(metrics.get("filtered_share")):
        over.append(f"{metrics['filtered_share']:.2%} of tokens filtered out")
    lines = ["## Metrics", ", ".join(part for part in over if part)]
    if rows:
        table = ["| | | |", "| --- | ---: | --- |", *(f"| {' | '.join(_cell(c) for c in row)} |" for row in rows)]
        lines.append("\n".join(table))
    if others:
        lines.append("Given without a definition:\n\n" + _table(others))
    return "\n\n".join(line for line in lines if line)


def _images(plots: Sequence[str]) -> str:
    shown = [f"![{name.rsplit('.', 1)[0]}]({PLOTS}/{name})".replace(" ", "%20") for name in plots]
    return "\n\n".join(["## Plots", *shown]) if shown else ""


def _section(title: str, values: Mapping[str, Any]) -> str:
    table = _table(values)
    return f"{title}\n\n{table}" if table else ""


def _table(values: Mapping[str, Any]) -> str:
    """Two columns; what is not known has no row."""
    rows = [f"| {name} | {_cell(value)} |" for name, value in values.items() if value is not None and value != ""]
    return "\n".join(["| | |", "| --- | --- |", *rows]) if rows else ""


def _cell(value: object) -> str:
    return shown(str(value).replace("\n", " ")).replace("|", "\\|").replace("<", "&lt;")


def _code(value: object) -> str | None:
    """As code, of which a backtick would be the end."""
    return None if value is None else f"`{str(value).replace('`', chr(39))}`"


def _count(value: object) -> str | None:
    return f"{value:,}" if isinstance(value, int) else None


def _shown(value: object) -> str:
    return json.dumps(value) if isinstance(value, dict | list) else str(value)

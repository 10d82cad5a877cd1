"""Short names of the releases that people use most: which repository of the Hub, and where in it.

They are the names that SAELens gave, and so are those of the SAEs within a release, so that scripts and papers that say
("gpt2-small-res-jb", "blocks.8.hook_resid_pre") can be followed. A rule per release turns the second name into a path;
{layer} and the like stand for what differs. Everything else on the Hub is loaded by its repository and folder.

A canonical SAE of Gemma Scope is the one of its layer and width whose mean L0 is the closest to 100: its path ends in
average_l0_*, and the listing of the repository says what that is. (Two are equally close twice: the larger is it once.)
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import product
from typing import Any

CANONICAL_L0 = 100
FIELDS = {"layer": r"\d+", "l0": r"\w+", "width": r"\w+", "trainer": r"\d+"}
"""What the fields of a rule can be."""


@dataclass(frozen=True)
class Release:
    repo: str
    places: dict[str, str]
    """Rules: name of an SAE -> path in the repository."""


CENTRED = {
    "jbloom/GPT2-Small-SAEs-Reformatted",
    "jbloom/GPT2-Small-Feature-Splitting-Experiment-Layer-8",
    "tommmcgrath/gpt2-small-mlp-out-saes",
}
"""Repositories of SAEs of a model with centred writing weights: SAELens's list says so, and the files do not."""


def _same(*rules: str) -> dict[str, str]:
    return {rule: rule for rule in rules}


def _gpt2() -> dict[str, Release]:
    stream = ("blocks.{layer}.hook_resid_pre", "blocks.{layer}.hook_resid_post")
    found = {
        "gpt2-small-res-jb": Release("jbloom/GPT2-Small-SAEs-Reformatted", _same(*stream)),
        "gpt2-small-res-jb-feature-splitting": Release(
            "jbloom/GPT2-Small-Feature-Splitting-Experiment-Layer-8", _same("blocks.{layer}.hook_resid_pre_{width}")
        ),
    }
    for place in ("resid-mid", "resid-post", "attn-out", "mlp-out"):
        for width in ("32k", "128k"):
            path = f"v5_{width}_layer_{{layer}}{'.pt' if (place, width) == ('resid-post', '32k') else ''}"
            hook, repo = f"blocks.{{layer}}.hook_{place.replace('-', '_')}", f"GPT2-Small-OAI-v5-{width}-{place}-SAEs"
            found[f"gpt2-small-{place}-v5-{width}"] = Release(f"jbloom/{repo}", {hook: path})
    return found


def _pythia() -> dict[str, Release]:
    hooks = {"res": "hook_resid_post", "att": "hook_attn_out", "mlp": "hook_mlp_out"}
    found = {}
    for place, hook in hooks.items():
        rules = {f"blocks.{{layer}}.{hook}": f"{{layer}}-{place}-sm"}
        if place == "res":
            rules["blocks.0.hook_resid_pre"] = "e-res-sm"
        found[f"pythia-70m-deduped-{place}-sm"] = Release(f"ctigges/pythia-70m-deduped__{place}-sm_processed", rules)
    hook, path = "blocks.{layer}.hook_resid_post__trainer_{trainer}", "resid_post_layer_{layer}/trainer_{trainer}"
    for sweep in ("standard_ctx128_0712", "topk_ctx128_0730", "gated_ctx128_0730", "panneal_ctx128_0730"):
        name = f"pythia70m_sweep_{sweep}"
        found[f"sae_bench_{name}"] = Release("canrager/lm_sae", {hook: f"{name}/{path}"})
    return found


def _gemma_scope() -> dict[str, Release]:
    found = {}
    models = [f"{size}-pt-{place}" for size in ("2b", "9b") for place in ("res", "mlp", "att")]
    for model in (*models, "9b-it-res", "27b-pt-res"):
        name, folder = f"gemma-scope-{model}", "layer_{layer}/width_{width}"
        embedding = "embedding/width_{width}/average_l0_{l0}"
        found[name] = Release(f"google/{name}", _same(f"{folder}/average_l0_{{l0}}", embedding))
        found[f"{name}-canonical"] = Release(f"google/{name}", {f"{folder}/canonical": f"{folder}/average_l0_*"})
    tie = {"layer_23/width_131k/canonical": "layer_23/width_131k/average_l0_66"}
    attention = found["gemma-scope-9b-pt-att-canonical"]
    found["gemma-scope-9b-pt-att-canonical"] = Release(attention.repo, tie | attention.places)
    name = "gemma-scope-2b-pt-transcoders"
    found[name] = Release(f"google/{name}", _same("layer_{layer}/width_{width}/average_l0_{l0}"))
    return found


def _gemma_scope_2() -> dict[str, Release]:
    places, sae = {"res": "resid_post", "mlp": "mlp_out", "att": "attn_out"}, "layer_{layer}_width_{width}_l0_{l0}"
    found = {}
    for size in ("270m", "1b", "4b", "12b", "27b"):
        for model in (f"gemma-scope-2-{size}-pt", f"gemma-scope-2-{size}-it"):
            for place, folder in places.items():
                found[f"{model}-{place}"] = Release(f"google/{model}", {sae: f"{folder}/{sae}"})
                found[f"{model}-{place}-all"] = Release(f"google/{model}", {sae: f"{folder}_all/{sae}"})
            found[f"{model}-transcoders"] = Release(f"google/{model}", _same(f"transcoder/{sae}"))
            found[f"{model}-transcoders-all"] = Release(f"google/{model}", {sae: f"transcoder_all/{sae}"})
    for name in ("mlp", "mlp-all", "att", "att-all", "transcoders"):
        del found[f"gemma-scope-2-27b-pt-{name}"]  # not known to exist
    return found


def _llama_scope() -> dict[str, Release]:
    found = {}
    for place, factor in product("RAM", (8, 32)):
        name, base = f"{place.lower()}_{factor}x", "Llama3_1-8B-Base-L"
        rules = {f"l{{layer}}{name}": f"{base}{{layer}}{place}-{factor}x"}
        found[f"llama_scope_lx{name}"] = Release(f"fnlp/{base}X{place}-{factor}x", rules)
    mixtures = {
        "800m_slimpajama": "800M-Slimpajama-0-OpenR1-Math-220k",
        "400m_slimpajama_400m_openr1_math": "400M-Slimpajama-400M-OpenR1-Math-220k",
        "800m_openr1_math": "0-Slimpajama-800M-OpenR1-Math-220k",
    }
    rules = {f"l{{layer}}r_{name}": f"{folder}/L{{layer}}R" for name, folder in mixtures.items()}
    found["llama_scope_r1_distill"] = Release("fnlp/Llama-Scope-R1-Distill", rules)
    return found


def _matryoshka() -> dict[str, Release]:
    hook, kind = "blocks.{layer}.hook_resid_post", "batch-topk-matryoshka-saes-w-32k"
    small = f"chanind/gemma-2-2b-{kind}-l0-40"
    return {
        "gemma-2-2b-res-matryoshka-dc": Release(small, {hook: f"standard/{hook}"}),
        "gemma-2-2b-res-snap-matryoshka-dc": Release(small, {hook: f"snap/{hook}"}),
        "gemma-2-9b-res-matryoshka-dc": Release(f"chanind/gemma-2-9b-{kind}-l0-60", _same(hook)),
        "gemma-3-1b-res-matryoshka-dc": Release(f"chanind/gemma-3-1b-{kind}-l0-40", _same(hook)),
    }


RELEASES: dict[str, Release] = {
    **_gpt2(), **_pythia(), **_gemma_scope(), **_gemma_scope_2(), **_llama_scope(), **_matryoshka()
}  # fmt: skip


def place_in(release: str, sae: str | None) -> tuple[str, str]:
    """Repository and path of an SAE of a release. ValueError, with what its names look like, if there is none."""
    known = RELEASES[release]
    for name, path in known.places.items():
        found = re.fullmatch(_pattern(name), sae or "")
        if found:
            return known.repo, path.format(**found.groupdict())
    wrong = "is a release of several SAEs" if sae is None else f"has no SAE that is called {sae!r}"
    raise ValueError(f"{release} {wrong}. Say which with subfolder=...: {' or '.join(known.places)}.")


def listed_settings(release_or_repo: str) -> dict[str, Any]:
    """What SAELens's list says of its SAEs and their files do not, as `config` of their format."""
    repo = RELEASES[release_or_repo].repo if release_or_repo in RELEASES else release_or_repo
    return {"model_from_pretrained_kwargs": {"center_writing_weights": True}} if repo in CENTRED else {}


def _pattern(rule: str) -> str:
    """A regular expression for the names that a rule covers."""
    return re.sub(r"\\\{(\w+)\\\}", lambda field: f"(?P<{field[1]}>{FIELDS[field[1]]})", re.escape(rule))


def closest(path: str, folders: Iterable[str]) -> str | None:
    """Of the folders that fit a path ending in *, the one whose number there is the closest to the canonical L0."""
    fitting = {f: int(f[len(path) - 1 :]) for f in folders if fnmatchcase(f, path) and f[len(path) - 1 :].isdigit()}
    return min(fitting, key=lambda f: (abs(fitting[f] - CANONICAL_L0), -fitting[f]), default=None)

"""What SAELens's family of tools is told of an SAE besides its weights: the model, the place in it, the text.

SAELens's evaluation, SAEDashboard, Neuronpedia and SAEBench load the model and hook it as the metadata say. Hooks have
names of TransformerLens or of modules of transformers, never one beside the other: SAELens skips a hook that the model
does not have, with no more than a line in a log. What a file of SAELens said, and nothing here knows better, is carried
through: Neuronpedia's id, how the model is to be loaded, whatever else its metadata hold.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from importlib.metadata import version
from typing import Any

from apportion.interop.contexts import metadata_of_contexts
from apportion.interop.hook_names import origin
from apportion.interop.parts import Parts
from apportion.interop.writing import carried, dict_of, model_of
from apportion.language.hook_names import from_hookpoint, module_of

logger = logging.getLogger(__name__)

MODEL_CLASSES = ("HookedTransformer", "AutoModelForCausalLM")
RENAMED = {"hook_point": "hook_name", "hook_point_head_index": "hook_head_index", "activation_fn_str": "activation_fn"}
"""Names before version 6, and since."""
STRUCTURE = {
    *("architecture", "d_in", "d_sae", "d_out", "dtype", "device", "apply_b_dec_to_input", "normalize_activations"),
    *("reshape_activations", "k", "rescale_acts_by_decoder_norm", "metadata", "activation_fn"),
    *("activation_fn_kwargs", "finetuning_scaling_factor", "sae_lens_version"),
}
"""What a configuration of SAELens says of the SAE itself."""
PLACE = {"model_name", "model_class_name", "hook_name", "hook_name_out", "hf_hook_name", "hf_hook_name_out"}
"""What it says of where activations come from."""


def lens_name(parts: Parts, hookpoint: str | None) -> str | None:
    """What TransformerLens calls it; where it has no name, the hookpoint itself."""
    if hookpoint is None:  # of another library's file, whose name no module here stands for
        return parts.source.lm.hook_name
    with suppress(ValueError):
        return from_hookpoint(hookpoint, model_of(parts)[1] or "")
    return hookpoint


def lens_metadata(parts: Parts, model_class_name: str | None = None) -> dict[str, Any]:
    """What tools of SAELens' family want to know: the model, the place in it, and how text was cut into contexts.

    What a file of SAELens said and nothing here knows better is carried through.
    """
    exported = dict_of(parts.info.get("exported"))
    metadata = {
        **_where(parts, model_class_name),
        "model_from_pretrained_kwargs": {},
        "hook_head_index": None,
        "context_size": None,
        "seqpos_slice": [None],
        "exclude_special_tokens": False,
        "dataset_path": None,
        "training_tokens": None,
        "training_architecture": exported.get("sae"),
        "training_architecture_details": {} if parts.k is None else {"k": parts.k},
        "neuronpedia_id": None,
    }
    metadata |= _carried_metadata(parts, model_class_name)
    metadata |= metadata_of_contexts(parts.source, parts.hookpoint)
    if (tokens := dict_of(parts.info.get("training")).get("tokens")) is not None:
        metadata["training_tokens"] = tokens
    return metadata | {
        "hookpoint": parts.hookpoint,
        "target_hookpoint": parts.target_hookpoint,
        "apportion_version": version("apportion"),
        "apportion": exported,
    }


def _where(parts: Parts, model_class_name: str | None) -> dict[str, Any]:
    """The model and its hooks: names of TransformerLens, or modules, but never one beside the other.

    Names of TransformerLens fit HookedTransformer, which knows some models, and TransformerBridge, which runs all of
    them. Where there is none for a place, AutoModelForCausalLM is left, with hooks at the output of modules.
    """
    name, family = model_of(parts)
    places = {"hook_name": parts.hookpoint, "hook_name_out": parts.target_hookpoint}
    lens = {key: lens_name(parts, place) for key, place in places.items() if key == "hook_name" or place is not None}
    modules = {key: place and module_of(place, family) for key, place in places.items()}
    in_lens = all(hook is None or hook.startswith("blocks.") for hook in lens.values())
    chosen = model_class_name or ("HookedTransformer" if in_lens else "AutoModelForCausalLM")
    hooks = lens if chosen == "HookedTransformer" else {key: modules[key] for key in lens}
    missing = [str(places[key]) for key in hooks if places[key] and not _is_hook(hooks[key], chosen)]
    if missing and model_class_name is not None:
        raise ValueError(f"{chosen} has no hook for {' and '.join(missing)}, which this SAE is for: leave it out.")
    if missing:
        logger.warning("No tool of SAELens has a hook for %s: it will have to be given activations.", missing[0])
        hooks = lens
    return {
        "model_name": None if name is None else name.removeprefix("openai-community/"),
        "model_class_name": chosen,
        "hook_name": hooks["hook_name"],
        "hook_name_out": hooks.get("hook_name_out"),
        "hf_hook_name": modules["hook_name"],
        "hf_hook_name_out": modules["hook_name_out"],
    }


def _is_hook(name: str | None, model_class_name: str) -> bool:
    return name is not None and name.startswith("blocks.") == (model_class_name == "HookedTransformer")


def _carried_metadata(parts: Parts, model_class_name: str | None) -> dict[str, Any]:
    """Of a file of SAELens all that is neither the shape of the SAE nor, if its place has changed since, its place."""
    original = carried(parts, "sae_lens")
    said = {RENAMED.get(name, name): v for name, v in {**original, **dict_of(original.get("metadata"))}.items()}
    said = {name: value for name, value in said.items() if name not in STRUCTURE}
    place, source = origin(said.get("model_name"), said.get("hook_name"))
    unchanged = place == parts.hookpoint and source.lm.model == parts.source.lm.model
    if model_class_name is not None or not unchanged:
        said = {name: value for name, value in said.items() if name not in PLACE}
    return said

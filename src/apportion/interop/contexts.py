"""How the text behind an SAE was cut into contexts, and which of its tokens counted: SAELens's words, and ours.

    SAELens                        sae.source
    prepend_bos                    language.bos_prepended, what was done; language.bos, which evaluation goes by
    context_size                   language.context_tokens
    dataset_path                   language.text.where
    seqpos_slice [1, None]         filter: first_position
    exclude_special_tokens         filter: special_tokens, special_ids
    token_filter (our own word)    filter, norms included

Other libraries have no word for rows that are left out for their norm. What was done with BOS is not what was asked
for: "auto" does what the tokenizer does. Sources of before `bos_prepended` only say what was asked for.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from apportion.about import About, Language, ModelRecord, TextRecord, TokenizerRecord
from apportion.rows.filter import TokenFilter, trained_filter

logger = logging.getLogger(__name__)

BOS_BY_DEFAULT = {
    r"smollm|gpt2|pythia|gpt-neox|^embedded$": False,
    r"deepseek|distill": True,
    r"qwen": False,
    r"llama|mistral|gemma": True,
}
"""What tokenizers do that have these words in their names; the first that fits."""
FIRST_LEFT_OUT = [1, None]


def with_contexts(source: About, settings: Mapping[str, Any]) -> About:
    """`source`, and what metadata in SAELens's words say besides."""
    language, left_out = source.lm, _filter(settings)
    if isinstance(settings.get("context_size"), int):
        language = replace(language, context_tokens=settings["context_size"])
    if isinstance(done := settings.get("prepend_bos"), bool):
        language = replace(language, bos="always" if done else "never", bos_prepended=done)
    if isinstance(where := settings.get("dataset_path"), str) and where:
        language = replace(language, text=TextRecord(where=where))
    return replace(source, language=language, filter=None if left_out is None else left_out.to_dict())


def _filter(settings: Mapping[str, Any]) -> TokenFilter | None:
    """None unless it is said that tokens were left out."""
    if isinstance(ours := settings.get("token_filter"), dict):
        return TokenFilter.from_dict(ours)
    first = settings.get("seqpos_slice") in (FIRST_LEFT_OUT, [*FIRST_LEFT_OUT, None], [*FIRST_LEFT_OUT, 1])
    special = settings.get("exclude_special_tokens")
    if not first and not special:
        return None
    ids = tuple(special) if isinstance(special, list) else ()
    return TokenFilter(special_tokens=bool(special), first_position=first, norm_outlier=None, special_ids=ids)


def metadata_of_contexts(source: About, hookpoint: str | None) -> dict[str, Any]:
    """In SAELens's words, what is known of a source; without what is not."""
    found = {
        "context_size": source.lm.context_tokens,
        "prepend_bos": bos_prepended(source.lm),
        "dataset_path": source.lm.text.where,
    }
    left_out = trained_filter(source, hookpoint)
    if left_out is not None:
        special = left_out.special_tokens
        found |= {
            "seqpos_slice": FIRST_LEFT_OUT if left_out.first_position else [None],
            "exclude_special_tokens": list(left_out.special_ids) or True if special else False,
            "token_filter": left_out.to_dict(),
        }
    return {name: value for name, value in found.items() if value is not None}


def bos_prepended(language: Language) -> bool:
    """Did contexts begin with BOS? What was done, or else what the policy and the tokenizer let expect."""
    if language.bos_prepended is not None:
        return language.bos_prepended
    if language.bos not in ("auto", None):
        return language.bos != "never"
    name = language.tokenizer.name_or_path or language.model.name_or_path or ""
    for words, adds in BOS_BY_DEFAULT.items():
        if re.search(words, name.lower()):
            return adds
    if language.bos or language.tokenizer != TokenizerRecord() or language.model != ModelRecord():
        logger.warning(
            "Whether contexts began with BOS is not known (tokenizer %r): prepend_bos is written as false.", name
        )
    return False


def outlier_limit(source: About, hookpoint: str | None) -> float | None:
    """The norm above which rows were left out in training; None if there is no such limit."""
    left_out = trained_filter(source, hookpoint)
    if left_out is None or not left_out.norm_outlier or left_out.median_norm is None:
        return None
    return left_out.norm_outlier * left_out.median_norm

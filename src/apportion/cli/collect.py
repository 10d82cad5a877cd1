"""`apportion collect`: activations of a language model, kept in a cache."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from apportion.cli.arguments import Copies, Count, Documents, Filter, Model, Place, Text, describe_filter, say
from apportion.extras import need


@dataclass(kw_only=True)
class Collect:
    """Run a language model over text and keep its activations in a cache on disk."""

    model: Positional[str]
    """A transformers model: a local folder or a Hub id; embedded is the story model that comes with the package."""
    hookpoint: tuple[str, ...]
    """Where to read: module paths such as model.layers.8, model.layers.8.mlp:in, model.layers.8.mlp:out[1]; globs such
    as model.layers.* work, and names of TransformerLens such as blocks.8.attn.hook_z."""
    out: Place
    """The cache to create: a folder, or a URL (s3://bucket/acts) to which shards go as they are made; one whose
    collection was interrupted or killed is gone on with."""
    append: bool = False
    """Go on with a cache that is complete, up to more --tokens of the same text."""
    tokens: Count = 10_000_000
    """How many tokens to collect."""
    corpus: Annotated[Text, arg(name="")] = field(default_factory=Text)
    filter: Annotated[Filter, arg(name="")] = field(default_factory=Filter)
    documents: Annotated[Documents, arg(name="")] = field(default_factory=Documents)
    context_tokens: int = 256
    """Length of the contexts that the text is cut into."""
    batch_contexts: int = 16
    """Contexts per forward pass."""
    bos: Literal["auto", "always", "never"] = "auto"
    """Whether every context begins with the BOS token; auto does what the tokenizer does."""
    dtype: Literal["bfloat16", "float16", "float32", "int8"] = "bfloat16"
    """Precision of the cache; int8 has a scale for each row, and says what it costs."""
    loading: Annotated[Model, arg(name="")] = field(default_factory=Model)
    copies: Annotated[Copies, arg(name="")] = field(default_factory=Copies)

    def run(self) -> None:
        self.copies.choose()
        need("apportion collect", "transformers", *self.corpus.packages)
        try:
            manifest = self._collect()
        except KeyboardInterrupt as stopped:
            said = str(stopped) or f"stopped before anything was collected; nothing is left at {self.out}"
            say(f"\n{said[0].upper()}{said[1:]}.")
            raise
        from apportion.rows.manifest import about_manifest

        about = about_manifest(manifest)
        say(f"{self.out}: {about.rows:,} tokens at {', '.join(manifest['hookpoints'])}")
        for site in about.sites:
            say(f"  {site.hookpoint}: {describe_filter(site)}")
        for what, counts in (("skipped", about.lm.text_skipped), ("repaired", about.lm.text_repaired)):
            if counts:
                say(f"  of the text {what}: {', '.join(f'{n:,} {reason}' for reason, n in counts.items())}")

    def _collect(self) -> dict[str, Any]:
        from apportion.language.collect import collect
        from apportion.rows.writer import cache_at

        source = self.corpus.source(self.model)
        found = cache_at(self.out, self.append) or {}
        model, tokenizer = self.loading.load_again(self.model, found.get("model_dtype"))
        options = ("tokens", "out", "context_tokens", "batch_contexts", "dtype", "bos", "append")
        given = {name: getattr(self, name) for name in options}
        more: dict[str, Any] = {"token_filter": self.filter.token_filter(), "layout": self.documents.layout()}
        return collect(model, tokenizer, self.hookpoint, source, **given, **more)

"""The language model and the text that come with the package, so that the demo needs no download.

    model, tokenizer = load_model("embedded")
    collect(model, tokenizer, "model.layers.2", stories(), tokens=1_000_000, out="acts")

model/          a small Llama that writes simple English stories, in the layout of transformers; README.md is its card
stories.txt.xz  stories that this model wrote

Both were made by commands of this package: recipes/embedded_model.py trains the model, recipes/embedded_corpus.py lets
it write the stories, recipes/embedded_card.py measures it and writes the card.
"""

from __future__ import annotations

import lzma
from pathlib import Path

MODEL = Path(__file__).parent / "model"
"""The folder that load_model("embedded") reads."""
STORIES = Path(__file__).parent / "stories.txt.xz"


def stories() -> list[str]:
    """The stories, in the order they were written. As separate documents: the model knows no blank lines, only END."""
    return lzma.decompress(present(STORIES).read_bytes()).decode("utf-8").strip().split("\n\n")


def present(path: Path) -> Path:
    """The path itself; ValueError if this installation lacks it."""
    if not path.exists():
        raise ValueError(
            f"{path} is missing: install apportion again, or make the embedded model and its stories with "
            "python -m apportion.recipes.embedded_model and python -m apportion.recipes.embedded_corpus"
        )
    return path

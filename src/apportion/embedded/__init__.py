"""The language model and the text that come with the package, so that the demo needs no download.

    model, tokenizer = load_model("embedded")
    collect(model, tokenizer, "model.layers.2", stories(), tokens=1_000_000, out="acts")

model/          a small Llama that writes simple English stories, in the layout of transformers; README.md is its card
stories.txt.xz  stories that this model wrote

Both were made by commands of this package: tools/embedded_model.py trains the model, tools/embedded_corpus.py lets
it write the stories, tools/embedded_card.py measures it and writes the card.
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
            "python tools/embedded_model.py and python tools/embedded_corpus.py"
        )
    return path

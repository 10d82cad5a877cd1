"""One page of documentation for every named SAE, and an index, made from docstrings.

    python tools/sae_pages.py --out docs/saes

A page has the summary of the table, the docstring of the architecture's file (paper, equation), that of the rule's, and
every setting with its default and the docstring under it. Two kinds of paragraph in these docstrings become sections:

    When to use it: ...              Cost: ...              for every SAE of the file; the architecture's goes first
    When to use `name`: ...          Cost of `name`: ...    for this one, where a file serves several

A test compares the committed pages with what comes out here.
"""

from __future__ import annotations

import inspect
import logging
import re
import sys
from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from pathlib import Path

import apportion
from apportion.architectures import SAES, NamedSAE, rule_choices, rule_name
from apportion.disk import write_text
from apportion.recipes.command import main
from apportion.recipes.experiment import markdown
from apportion.settings import meanings

logger = logging.getLogger("apportion.sae_pages")

SECTIONS = {"When to use it": r"When to use (it|`(\w+)`): ", "Cost": r"Cost( of `(\w+)`)?: "}
PACKAGE = Path(apportion.__file__).parent


def pages() -> dict[str, str]:
    """Content of every file of the folder."""
    lines = [[f"[`{name}`]({name}.md)", plain(entry.summary)] for name, entry in SAES.items()]
    index = f"# The SAEs\n\n{GENERATED}\n{markdown(['name', ''], lines)}"
    return {"README.md": index, **{f"{name}.md": page(name, entry) for name, entry in SAES.items()}}


GENERATED = "Made from docstrings by `python tools/sae_pages.py`; change those, not this.\n"


def page(name: str, entry: NamedSAE) -> str:
    of_architecture, of_rule = Described.module_of(entry.architecture), Described.module_of(entry.rule)
    text = f"# `{name}`\n\n{plain(entry.summary[0].upper() + entry.summary[1:])}.\n\n{usage(name, entry)}"
    for title in SECTIONS:
        if found := of_architecture.section(title, name) or of_rule.section(title, name):
            text += f"\n## {title}\n\n{plain(found)}\n"
    text += f"\n## The architecture\n\n{of_architecture.body}\n"
    default = f", unless `allocation` says another: {', '.join(rule_choices())}" if entry.any_rule else ""
    text += f"\n## The rule of allocation\n\n`{rule_name(entry.rule)}`{default}.\n\n{of_rule.body}\n"
    text += f"\n## Settings\n\n{settings_table(entry)}"
    return f"{text}\nCode: {of_architecture.link}, {of_rule.link}. {GENERATED}"


def usage(name: str, entry: NamedSAE) -> str:
    """How it is made, in Python and on the command line."""
    d_in = 576
    follows = entry.architecture.d_sae_for(d_in)
    d_sae, options = ("", "") if follows else (", d_sae=4608", " --d-sae 4608")
    if entry.architecture.row_kind == "pair":
        options += " --hookpoint model.layers.8.mlp:in --target-hookpoint model.layers.8.mlp"
    return (
        f'    sae = ap.create("{name}", d_in={d_in}{d_sae}, k=32)\n'
        f"    apportion train acts/ --sae {name} --k 32{options} --out runs/{name}\n"
    )


def settings_table(entry: NamedSAE) -> str:
    """Name, default and meaning of every setting."""
    meaning = {"allocation": "The rule of allocation; its own settings follow below."}
    for config in (entry.architecture.Config, entry.rule.Config):
        meaning |= meanings(config)
    lines = []
    for setting, default in entry.settings().items():
        shown = "" if default is MISSING else f"`{default:g}`" if isinstance(default, float) else f"`{default}`"
        lines.append([f"`{setting}`", shown, plain(meaning.get(setting, "")).replace("|", "\\|")])
    return markdown(["setting", "default", ""], lines)


@dataclass(frozen=True)
class Described:
    """The docstring of a file, taken apart."""

    file: Path
    body: str
    """Without the paragraphs that are sections; in markdown."""
    sections: Mapping[tuple[str, str | None], str]
    """(title, name of an SAE or None) -> text."""

    @staticmethod
    def module_of(kind: type) -> Described:
        file = Path(inspect.getfile(kind))
        file = file.relative_to(PACKAGE) if file.is_relative_to(PACKAGE) else file
        doc = inspect.cleandoc(sys.modules[kind.__module__].__doc__ or "")
        rest, sections = [], {}
        for paragraph in doc.split("\n\n"):
            for title, pattern in SECTIONS.items():
                if found := re.match(pattern, paragraph):
                    text = paragraph[found.end() :]
                    sections[title, found.group(2)] = text[0].upper() + text[1:]
                    break
            else:
                rest.append(paragraph)
        return Described(file, "\n\n".join(as_markdown(paragraph) for paragraph in rest), sections)

    def section(self, title: str, name: str) -> str | None:
        return self.sections.get((title, name)) or self.sections.get((title, None))

    @property
    def link(self) -> str:
        """To its place in the repository; the name alone if it lies elsewhere."""
        return f"`{self.file.name}`" if self.file.is_absolute() else f"[{self.file}](../../src/apportion/{self.file})"


def as_markdown(paragraph: str) -> str:
    """Indented paragraphs stay as they are; a text that runs into indented lines is parted from them."""
    blocks: list[list[str]] = []
    for line in paragraph.split("\n"):
        if not blocks or line.startswith("    ") != blocks[-1][-1].startswith("    "):
            blocks.append([])
        blocks[-1].append(line)
    return "\n\n".join("\n".join(block) if block[0].startswith("    ") else plain("\n".join(block)) for block in blocks)


def plain(text: str) -> str:
    """Text without accidental markup, and with links to papers."""
    parts = re.split(r"(`[^`]*`)", text)
    parts[::2] = [re.sub(r"([<~\\])", r"\\\1", part) for part in parts[::2]]
    return re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", "".join(parts))


def write(out: Path) -> None:
    """Write all pages. Those of SAEs that are no more are named: whoever wrote them may remove them."""
    out.mkdir(parents=True, exist_ok=True)
    made = pages()
    if old := sorted(str(file) for file in set(out.glob("*.md")) - {out / name for name in made}):
        logger.warning("no page of any SAE: %s", ", ".join(old))
    for name, text in made.items():
        write_text(out / name, text)


@dataclass(frozen=True, kw_only=True)
class Pages:
    """Write the documentation pages of all SAEs."""

    out: Path = Path("docs/saes")
    """The folder."""

    def run(self) -> None:
        write(self.out)


if __name__ == "__main__":
    sys.exit(main(Pages, "sae_pages", __doc__, prog="python tools/sae_pages.py"))

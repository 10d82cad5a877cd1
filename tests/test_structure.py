"""The shape of the package: import order, what an import costs, and that the tables reach every file."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import apportion
from apportion.allocation import RULES, Rule
from apportion.architectures import SAE, SAES, rule_choices

PACKAGE = Path(apportion.__file__).parent

ORDER = [
    {"latents", "metrics", "losses", "disk", "durable", "interrupt", "locks", "processes", "settings", "torch_state"}
    | {
        "about",
        "answers",
        "blocks",
        "choices",
        "devices",
        "extras",
        "fields",
        "group",
        "matching",
        "memory",
        "progress",
        "ranking",
        "same_model",
        "trust",
        "urls",
    },
    {"allocation"},
    {"kernels"},
    {"architectures", "embedded"},
    {"rows"},
    {"language", "synthetic"},
    {"activations"},
    {"tracking"},
    {"training"},
    {"objectives", "parallel"},
    {"viewing"},
    {"evals"},
    {"explorer", "moe", "interop"},
    {"testing"},
    {"recipes"},
    {"cli"},
    {"__main__"},
]
"""Rooms may import rooms of earlier groups (docs: the design, section 2), and the first group also from itself."""

PUBLIC = "apportion"
"""`import apportion` brings in everything up to training, so only later groups may write it."""

HELPERS = {
    "allocation": {"annealing", "base", "zipf", "reference"},
    "architectures": {
        "affine",
        "auxiliary",
        "base",
        "calibrate",
        "checks",
        "convert",
        "counting",
        "files",
        "inputs",
        "loading",
    }
    | {"sparsity", "start", "table"},
}
"""Files of these rooms that are no rule and no architecture."""


def group_of(room: str) -> int:
    if room == PUBLIC:
        return group_of("training")
    return next(i for i, rooms in enumerate(ORDER) if room in rooms)


def imported_rooms(source: str, file: str = "x.py") -> set[str]:
    """Rooms of apportion that a module imports anywhere: at the top, in functions, under TYPE_CHECKING."""
    rooms = {room for group in ORDER for room in group}
    found = set()
    for node in ast.walk(ast.parse(source, file)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: imports are absolute here"
            names = [node.module or ""]
            if node.module == "apportion":
                names = [f"apportion.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            first, *rest = name.split(".")
            if first == "apportion":
                found.add(rest[0] if rest and rest[0] in rooms else PUBLIC)
    return found


def violations(room: str, source: str, file: str = "x.py") -> list[str]:
    here = group_of(room)
    allowed_within = ORDER[0] if room in ORDER[0] else {room}
    return [
        f"{file}: {room} imports {other}"
        for other in sorted(imported_rooms(source, file))
        if group_of(other) >= here and other not in allowed_within
    ]


MODULES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_import_order(path):
    room = room_of(path)
    assert any(room in group for group in ORDER), f"{room} has no place in the import order"
    assert not violations(room, path.read_text(encoding="utf-8"), str(path.relative_to(PACKAGE)))


ROWS_ALONE = ["rows", "synthetic", "training", "architectures", "evals.rows", "evals.measure", "evals.table"]


@pytest.mark.parametrize("module", ROWS_ALONE)
def test_rows_need_no_language_model(module):
    """What works on rows of numbers brings in nothing of `language`, not even by what it imports."""
    room, _, file = module.partition(".")
    paths = [PACKAGE / room / f"{file}.py"] if file else sorted((PACKAGE / room).rglob("*.py"))
    assert not reached(paths) & set(PACKAGE.glob("language/*.py"))


def reached(paths: list[Path]) -> set[Path]:
    """These files and all that they import, and so on; a room's __init__ counts where it is imported itself."""
    found, todo = set(), list(paths)
    while todo:
        path = todo.pop()
        if path in found:
            continue
        found.add(path)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "apportion":
                todo += [file for name in node.names if (file := file_of(f"{node.module}.{name.name}"))]
    return found


def file_of(name: str) -> Path | None:
    """The file in which a dotted name is found; None for what lies in `apportion` itself, which imports lazily."""
    parts = name.split(".")[1:]
    for end in range(len(parts), 0, -1):
        place = PACKAGE.joinpath(*parts[:end])
        if (file := place.with_suffix(".py")).exists() or (file := place / "__init__.py").exists():
            return file
    return None


def imports_of(path: Path) -> list[Path]:
    """The files that a file imports, also within functions; what is for type checkers alone does not count."""
    found = []
    todo: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "apportion":
            found += [file for name in node.names if (file := file_of(f"{node.module}.{name.name}"))]
        todo += ast.iter_child_nodes(node)
    return found


def test_no_circle_between_files():
    """Not even by imports that wait until a function is called: whatever a file needs can be read before it."""
    needs = {path: set(imports_of(path)) for path in MODULES}
    while ready := [path for path, others in needs.items() if not others & needs.keys()]:
        for path in ready:
            del needs[path]
    assert not needs, [str(path.relative_to(PACKAGE)) for path in needs]


def test_the_check_finds_what_is_reached():
    assert PACKAGE / "language" / "model.py" in reached([PACKAGE / "evals" / "language_model.py"])
    assert PACKAGE / "language" / "text.py" in reached([PACKAGE / "language" / "collect.py"])


def test_the_check_itself_finds_violations():
    bad = {
        "import apportion.training": "training",
        "import apportion as ap": "apportion",
        "from apportion import create": "apportion",
        "from apportion.language import intervene": "language",
        "from apportion.kernels.select import choose": "kernels",
        "def f():\n    from apportion.kernels import choose": "kernels",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from apportion.training import Trainer": "training",
    }
    for source, room in bad.items():
        assert violations("allocation", source) == [f"x.py: allocation imports {room}"]
    for fine in ("from apportion.latents import Latents", "from apportion.allocation.base import Rule", "import torch"):
        assert not violations("allocation", fine)
    assert not violations("metrics", "from apportion.latents import Latents")
    assert not violations("cli", "import apportion as ap")
    assert violations("evals", "from apportion.explorer import page"), "rooms of one group stay apart"


def loaded_by(code: str) -> set[str]:
    """What is imported once `code` has run."""
    code += "\nimport sys; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


HEAVY = {
    "transformers", "tokenizers", "datasets", "pandas", "pyarrow", "matplotlib", "jinja2", "scipy", "sklearn",
    "tyro", "huggingface_hub", "requests", "transformer_lens", "anndata", "triton", "pytest", "rich",
    "wandb", "trackio", "tensorboard", "mlflow",
}  # fmt: skip


def test_import_loads_nothing_heavy():
    """Not even torch, before it is used."""
    assert not loaded_by("import apportion") & (HEAVY | {"torch", "numpy", "safetensors"})
    loaded = loaded_by("import apportion; apportion.Trainer")
    assert {"torch", "safetensors"} <= loaded
    assert not loaded & HEAVY


@pytest.mark.parametrize("name", apportion.__dir__())
def test_public_names_are_where_they_are_said_to_be(name):
    found = getattr(apportion, name)
    assert found is getattr(importlib.import_module(apportion.LATER[name]), name, sys.modules[apportion.LATER[name]])


def test_rooms_are_names_too():
    assert apportion.rows is importlib.import_module("apportion.rows")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = apportion.nothing


SAID_AT_ONCE = (
    ["--help"], ["train", "--help"], ["train", "--sae", "gated", "--help"], ["collect"], ["train", "acts", "--out"],
    ["train", "acts", "--out", "x", "--lr", "fast"], ["train", "--sae", "topkk"], ["eval", "--nothing"], ["nothing"],
    ["train", "--sae", "topk", "--allocation", "topk"], ["train", "--training-objective", "nothing"],
    ["train", "--sae", "matryoshka", "--allocation", "threshold"],
)  # fmt: skip


@pytest.mark.parametrize("words", SAID_AT_ONCE, ids=" ".join)
def test_help_and_mistakes_do_not_wait_for_torch(words):
    code = f"from apportion.cli import main\ntry:\n    main({words})\nexcept SystemExit:\n    pass"
    assert not loaded_by(code) & {"torch", "numpy", "jaxtyping"}


@pytest.mark.parametrize(
    ("room", "reached"),
    [("allocation", set(RULES.values())), ("architectures", {entry.architecture for entry in SAES.values()})],
)
def test_the_tables_reach_every_file(room, reached):
    files = {p.stem for p in (PACKAGE / room).glob("*.py")} - {"__init__"}
    in_table = {cls.__module__.rsplit(".", 1)[1] for cls in reached}
    assert not files - HELPERS[room] - in_table, "a file without a line in the table"
    assert not HELPERS[room] - files, "a helper that is gone"
    assert not HELPERS[room] & in_table, "no helper"
    assert all(getattr(cls, "__final__", False) for cls in reached), "what is in the table is final"


@pytest.mark.parametrize(("room", "kind"), [("allocation", Rule), ("architectures", SAE)])
def test_helpers_hold_nothing_that_belongs_in_a_table(room, kind):
    for stem in HELPERS[room]:
        classes = vars(importlib.import_module(f"apportion.{room}.{stem}")).values()
        own = [c for c in classes if isinstance(c, type) and c.__module__ == f"apportion.{room}.{stem}"]
        assert not [c for c in own if issubclass(c, kind) and getattr(c, "__final__", False)], stem


def test_every_sae_uses_a_rule_of_the_table():
    assert {entry.rule for entry in SAES.values()} <= set(RULES.values())


def test_settings_of_architecture_and_rule_do_not_collide():
    from dataclasses import fields

    for name, entry in SAES.items():
        for rule in [entry.rule, *([RULES[n] for n in rule_choices()] if entry.any_rule else [])]:
            both = [f.name for f in (*fields(entry.architecture.Config), *fields(rule.Config))]
            assert len(both) == len(set(both)), name
        assert set(entry.defaults) <= set(entry.settings()), name
        assert entry.rule in [RULES[n] for n in rule_choices()] or not entry.any_rule, name


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_every_file_says_what_it_is_for(path):
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


def test_type_checkers_are_told_that_there_are_types():
    """py.typed lies in the package, in what a wheel is made of."""
    assert (PACKAGE / "py.typed").read_bytes() == b""
    build = tomllib.loads((PACKAGE.parents[1] / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    assert build == {"targets": {"wheel": {"packages": ["src/apportion"]}}}, "nothing is left out of the wheel"
    ignored = subprocess.run(["git", "check-ignore", "-q", PACKAGE / "py.typed"], cwd=PACKAGE, check=False)
    assert ignored.returncode != 0, "hatchling leaves out what git ignores"

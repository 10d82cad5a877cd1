"""How much code there is: lines without blanks, comments and docstrings, and how long functions and files are.

    python tools/size.py                 src/ and tools/ of this checkout
    python tools/size.py PATH ...        of other files and folders

A line counts if a token of code lies on it. Functions and files are measured from their first line to their last, with
everything between, as a reader meets them.
"""

from __future__ import annotations

import argparse
import ast
import io
import tokenize
from pathlib import Path
from statistics import median

NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def code_lines(source: str) -> int:
    """Lines with code on them; strings that stand alone (docstrings, those of attributes too) are none."""
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    alone = (n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))
    for node in alone:
        if isinstance(node.value.value, str):
            lines -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def functions(source: str) -> list[tuple[int, str]]:
    """Length and name of every function."""
    nodes = (n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
    return [((node.end_lineno or node.lineno) - node.lineno + 1, node.name) for node in nodes]


def python_files(paths: list[Path]) -> list[Path]:
    return sorted(file for path in paths for file in ([path] if path.is_file() else path.rglob("*.py")))


def main() -> None:
    here = Path(__file__).resolve().parents[1]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="*", type=Path, default=[here / "src", here / "tools"])
    files = {file: file.read_text(encoding="utf-8") for file in python_files(parser.parse_args().paths)}
    found = [(length, f"{name} in {file}") for file, source in files.items() for length, name in functions(source)]
    lengths = {file: len(source.splitlines()) for file, source in files.items()}
    longest = max(lengths, key=lambda file: lengths[file])
    print(f"code        {sum(map(code_lines, files.values())):6,} lines in {len(files)} files")
    print(f"functions   {len(found):6,}, median {median(length for length, _ in found):g} lines")
    print(f"            longest {max(found)[0]}: {max(found)[1]}")
    print(f"files       median {median(lengths.values()):g} lines, longest {lengths[longest]}: {longest}")


if __name__ == "__main__":
    main()

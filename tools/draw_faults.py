"""Single, plausible faults, drawn at random among lines of Python: what a tired author might have written instead.

    faults(text, lines)      every fault there is on these lines of a file
    draw(files, n, seed)     n lines at random, on each one of its faults; the same for the same seed and files

A fault is (line, name, start, end, new): the characters [start, end) of the file are replaced by `new`. The places come
from the syntax tree, so that every fault is valid Python and another program. Left alone: annotations, docstrings,
imports, messages, assertions (which are about our own invariants) and f-strings.
"""

from __future__ import annotations

import ast
import random
from collections.abc import Iterator
from copy import deepcopy
from typing import Any, NamedTuple

COMPARISONS: dict[type, type] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
ARITHMETIC: dict[type, type] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mod,
    ast.Mod: ast.FloorDiv, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip
SWAPPED = {
    "min": "max", "max": "min", "any": "all", "all": "any", "amin": "amax", "amax": "amin", "floor": "ceil",
    "ceil": "floor", "startswith": "endswith", "cumsum": "cumprod", "argmax": "argmin", "argmin": "argmax",
}  # fmt: skip
DROPPED = {
    "clone", "detach", "float", "double", "contiguous", "copy", "resolve", "expanduser", "strip", "lower", "eval",
    "clamp", "clamp_min", "sort", "abs", "sorted", "flatten", "nan_to_num", "removeprefix", "removesuffix",
}  # fmt: skip
"""Methods without which the value is still of use."""


class Fault(NamedTuple):
    line: int
    name: str
    start: int
    end: int
    new: str


def faults(text: str, lines: set[int]) -> list[Fault]:
    """Every fault on these lines (counted from 1), in the order of the file."""
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))

    def at(line: int, column: int) -> int:
        begin = starts[line - 1]
        return begin + len(text[begin : starts[line]].encode()[:column].decode())

    tree, found = ast.parse(text), []
    for node in _within(tree):
        for place, name, new in _instead(node):
            begin, end = at(place.lineno, place.col_offset), at(place.end_lineno, place.end_col_offset)
            fault = Fault(place.lineno, name, begin, end, new)
            if place.lineno in lines and _differs(tree, put_in(text, fault)):
                found.append(fault)
    return sorted(set(found))


def put_in(text: str, fault: Fault) -> str:
    return text[: fault.start] + fault.new + text[fault.end :]


def draw(files: dict[str, tuple[str, set[int]]], n: int, seed: int) -> list[tuple[str, Fault]]:
    """`files`: text and lines to draw from of each path. Lines without a possible fault are passed over."""
    generator = random.Random(seed)
    places = [(path, line) for path, (_, lines) in sorted(files.items()) for line in sorted(lines)]
    generator.shuffle(places)
    drawn: list[tuple[str, Fault]] = []
    for path, line in places:
        if len(drawn) == n:
            break
        possible = faults(files[path][0], {line})
        names = sorted({fault.name for fault in possible})
        if names:
            name = generator.choice(names)
            drawn.append((path, generator.choice([fault for fault in possible if fault.name == name])))
    return drawn


def _differs(tree: ast.AST, text: str) -> bool:
    try:
        return ast.dump(ast.parse(text)) != ast.dump(tree)
    except SyntaxError:
        return False


def _within(node: ast.AST) -> Iterator[ast.AST]:
    """Statements, expressions and their parts that are computed with."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "msg", "bases"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(child, ast.Import | ast.ImportFrom | ast.Assert):
                continue
            if isinstance(child, ast.JoinedStr) or (isinstance(child, ast.Expr) and _is_text(child.value)):
                continue
            yield child
            if not isinstance(child, ast.Raise) and not _is_message(child):
                yield from _within(child)


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _is_message(node: ast.AST) -> bool:
    """warnings.warn(...), logger.info(...)."""
    called = node.value.func if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) else None
    return isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name) and (
        called.value.id in ("warnings", "logger")
    )  # fmt: skip


def _instead(node: Any) -> Iterator[tuple[Any, str, str]]:
    """The place, the name and the new source of each fault of one node."""
    for test in [*getattr(node, "ifs", []), *([node.test] if hasattr(node, "test") else [])]:
        if getattr(test, "id", "") != "TYPE_CHECKING":
            yield test, "condition negated", f"(not {_source(test)})"
    match node:
        case ast.Compare(ops=ops):
            for i, op in enumerate(ops):
                yield node, "comparison", _made(node, ops=[*ops[:i], COMPARISONS[type(op)](), *ops[i + 1 :]])
        case ast.BoolOp(op=op, values=values):
            yield node, "and/or", _made(node, op=ast.Or() if isinstance(op, ast.And) else ast.And())
            yield node, "last part dropped", _source(values[0]) if len(values) == 2 else _made(node, values=values[:-1])
        case ast.BinOp(op=op, right=right) if type(op) in ARITHMETIC and not _is_text(right):
            yield node, "arithmetic", _made(node, op=ARITHMETIC[type(op)]())
        case ast.UnaryOp(operand=operand):
            yield node, "sign or negation dropped", _source(operand)
        case ast.Constant(value=bool() as value):
            yield node, "constant", str(not value)
        case ast.Constant(value=int() as value) if value < 100:
            yield node, "off by one", str(value + 1)
            yield node, "off by one", str(abs(value - 1))
        case ast.Constant(value=int() | float() as value):
            yield node, "constant", str(10 * value or 1.0)
        case ast.Call():
            for name, new in _other_calls(node):
                yield node, name, new
        case ast.Expr() | ast.Raise() | ast.AugAssign() | ast.Continue() | ast.Break() | ast.Delete():
            yield node, "statement dropped", "pass"
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            yield node, "statement dropped", "pass"


def _other_calls(call: ast.Call) -> Iterator[tuple[str, str]]:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name in SWAPPED:
        func = _copy(call.func, **{"attr" if isinstance(call.func, ast.Attribute) else "id": SWAPPED[name]})
        yield "the opposite", _made(call, func=func)
    if name in DROPPED:
        inner = call.func.value if isinstance(call.func, ast.Attribute) else call.args[0] if call.args else None
        if inner is not None:
            yield f"{name} dropped", _source(inner)
    plain = len(call.args) >= 2 and not any(isinstance(argument, ast.Starred) for argument in call.args[:2])
    if plain and name not in ("isinstance", "getattr", "hasattr"):
        yield "arguments swapped", _made(call, args=[call.args[1], call.args[0], *call.args[2:]])
    if name in ("get", "getattr", "pop", "next") and len(call.args) >= 2:
        yield "default dropped", _made(call, args=call.args[:-1])
    for i, keyword in enumerate(call.keywords):
        if keyword.arg:
            yield "argument dropped", _made(call, keywords=call.keywords[:i] + call.keywords[i + 1 :])


def _copy(node: ast.AST, **fields: object) -> ast.AST:
    changed = deepcopy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed


def _made(node: ast.AST, **fields: object) -> str:
    return _source(_copy(node, **fields))


def _source(node: ast.AST) -> str:
    text = ast.unparse(node)
    return text if isinstance(node, ast.Name | ast.Call | ast.Attribute | ast.Constant) else f"({text})"

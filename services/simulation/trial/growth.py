"""Whether what a strategy keeps grows with every request: its ``mesh.state``, and what its modules hold.

Counts entries, twice, and what was served between. A bound may lie far off, so a source that forgets anything
anywhere is not told of: this finds those that never do. Knows no mesh.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Mapping
from typing import Any

from microserve.services.simulation.trial.mistake import Found
from microserve.services.simulation.trial.source_names import Names

MAX_DEPTH = 6
CHARS_AN_ENTRY = 64
LEAST_A_REQUEST = 0.5
"""Entries more for each request: less than that does not go by requests."""
FORGETS = (
    *("pop", "popitem", "popleft", "clear", "discard", "remove", "cache_clear", "subtract"),
    *("heappop", "heappushpop", "heapreplace"),
)
GROWS = ("append", "appendleft", "add", "extend", "setdefault", "update", "insert")


def num_entries(roots: Collection[object]) -> int:
    """In all containers that can be reached from them, texts included."""
    seen: set[int] = set()

    def count(value: object, depth: int) -> int:
        if depth > MAX_DEPTH or id(value) in seen:
            return 0
        if isinstance(value, str | bytes | bytearray):
            return len(value) // CHARS_AN_ENTRY
        if isinstance(value, Mapping):
            seen.add(id(value))
            return len(value) + sum(count(each, depth + 1) for each in [*value.values()])
        if isinstance(value, list | tuple | set | frozenset) or type(value).__name__ == "deque":
            held: Any = value
            seen.add(id(value))
            return len(held) + sum(count(each, depth + 1) for each in [*held])
        info = getattr(value, "cache_info", None)
        return int(info().currsize) if callable(info) else 0

    return sum(count(root, 0) for root in roots)


def held_by(module: Mapping[str, Any]) -> list[object]:
    """What a module's own names hold."""
    return [value for name, value in module.items() if not name.startswith("__")]


def told_growth(num_more: int, num_requests: int, sources: Mapping[str, str]) -> list[Found]:
    """``num_more`` entries were there after so many more requests."""
    if num_more < LEAST_A_REQUEST * num_requests or num_requests == 0:
        return []
    trees = {file: Names(ast.parse(source)) for file, source in sources.items()}
    if any(_forgets(names, node) for names in trees.values() for node in ast.walk(names.tree)):
        return []
    file, line = next(
        ((file, at) for file, names in trees.items() if (at := _line_of_growth(names))),
        (next(iter(trees)), 0),
    )
    told = (
        f"what is kept here grows with every request ({num_more} entries more after {num_requests}), nothing"
    )
    return [Found("memory", file, line, f"{told} is ever forgotten: bound it, as by `deque(maxlen=...)`")]


def _forgets(names: Names, node: ast.AST) -> bool:
    match node:
        case ast.Delete():
            return True
        case ast.Call(func=ast.Attribute(attr=name) | ast.Name(id=name)):
            return name in FORGETS
        case ast.keyword(arg="maxlen" | "maxsize", value=bound):
            return not (isinstance(bound, ast.Constant) and bound.value is None)
        case ast.Subscript(slice=ast.Slice(lower=ast.UnaryOp(op=ast.USub()), upper=None)):
            return True  # the newest are kept
        case ast.Compare():  # of how many there are with how many there may be
            called = [each for each in ast.walk(node) if isinstance(each, ast.Call) and each.args]
            lasting = _lasting(names)
            return any(ast.unparse(each.func) == "len" and _lasts(each.args[0], lasting) for each in called)
        case ast.Assign(targets=[ast.Subscript(slice=ast.Slice())]):
            return True
        case ast.BinOp(left=left, op=ast.Mod(), right=right):
            return not _is_turn_or_text(names, node, left, right)  # a ring
    return False


def _is_turn_or_text(names: Names, node: ast.AST, left: ast.expr, right: ast.expr) -> bool:
    """``%`` that bounds nothing: whose turn it is, ``engines[n % len(engines)]``, or a text."""
    above = names.parents.get(node)
    is_read = isinstance(above, ast.Subscript) and isinstance(above.ctx, ast.Load)
    is_length = isinstance(right, ast.Call) and ast.unparse(right.func) == "len"
    is_text = isinstance(left, ast.JoinedStr) or (
        isinstance(left, ast.Constant) and isinstance(left.value, str)
    )
    return is_read or is_length or is_text


def _line_of_growth(names: Names) -> int:
    """Of the first statement that adds to what outlives a request; 0: none is seen."""
    lasting = _lasting(names)
    for node in ast.walk(names.tree):
        grown: ast.expr | None = None
        match node:
            case ast.Call(func=ast.Attribute(value=owner, attr=name)) if name in GROWS:
                grown = owner
            case ast.Assign(targets=[ast.Subscript(value=owner)]) | ast.AugAssign(target=owner):
                grown = owner
        if grown is None or names.function(node) is None:
            continue
        if _lasts(grown, lasting):
            return int(getattr(node, "lineno", 0))
    return 0


def _lasting(names: Names) -> set[str]:
    """Names of what outlives a request."""
    return {
        target.id
        for node in ast.walk(names.tree)
        if isinstance(node, ast.Assign)
        and (names.function(node) is None or ".state" in ast.unparse(node.value))
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def _lasts(value: ast.expr, lasting: set[str]) -> bool:
    is_named = any(isinstance(each, ast.Name) and each.id in lasting for each in ast.walk(value))
    return is_named or ".state" in ast.unparse(value)

"""What the names in a source stand for, as far as its imports and assignments say; and what surrounds a node.

Reads, runs nothing. Knows no rule.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda


class Names:
    """Of one file."""

    def __init__(self, tree: ast.Module) -> None:
        self.tree = tree
        self.parents: dict[ast.AST, ast.AST] = {}
        self.imported: dict[str, str] = {}
        """By name in the file: what it was imported as, dotted; relative ones begin with a dot."""
        for node in ast.walk(tree):
            for child in ast.iter_child_nodes(node):
                self.parents[child] = node
            if isinstance(node, ast.Import):
                for each in node.names:
                    top = each.name.partition(".")[0]
                    self.imported[each.asname or top] = each.name if each.asname else top
            elif isinstance(node, ast.ImportFrom):
                module = "." * node.level + (node.module or "")
                for each in node.names:
                    self.imported[each.asname or each.name] = f"{module}.{each.name}"

    def dotted(self, node: ast.AST) -> str:
        """``time.sleep`` for whatever name that has here; empty for what is no imported name."""
        if isinstance(node, ast.Name):
            return self.imported.get(node.id, "")
        if isinstance(node, ast.Attribute):
            owner = self.dotted(node.value)
            return f"{owner}.{node.attr}" if owner else ""
        return ""

    def above(self, node: ast.AST) -> Iterator[ast.AST]:
        """What it stands in, from the inside."""
        while (above := self.parents.get(node)) is not None:
            yield above
            node = above

    def function(self, node: ast.AST) -> Function | None:
        """The innermost one that it stands in."""
        return next((each for each in self.above(node) if isinstance(each, Function)), None)


def within(node: ast.AST) -> Iterator[ast.AST]:
    """What stands in it and runs when it does: not the bodies of functions that are only defined there."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, Function | ast.ClassDef):
            yield child
            yield from within(child)


def waits(node: ast.AST) -> bool:
    """It gives way to others somewhere, or may."""
    waiting = ast.Await | ast.Yield | ast.YieldFrom | ast.AsyncFor | ast.AsyncWith
    return isinstance(node, waiting) or any(isinstance(each, waiting) for each in within(node))


def text(value: ast.AST | None) -> str | None:
    """A constant text."""
    return value.value if isinstance(value, ast.Constant) and isinstance(value.value, str) else None

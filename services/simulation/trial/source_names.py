"""What the names in a source stand for, as far as its imports and assignments say; and what surrounds a node.

Reads, runs nothing. Knows no rule.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator

THREADS = ("to_thread", "run_in_executor", "submit", "Thread")
"""What is handed to these runs beside the router."""
ROUTERS = ("mesh", "request", "engine", "grant")
"""Names that no source gives its own objects."""

Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda


class Names:
    """Of one file."""

    def __init__(self, tree: ast.Module) -> None:
        self.tree = tree
        self.defined = Defined()
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

    def in_a_thread(self, node: ast.AST) -> bool:
        """What is named, or what a ``lambda`` does, is handed to a thread; a call among the arguments is made
        before that."""
        is_handed = isinstance(node, ast.Name | ast.Attribute)
        below = node
        for above in self.above(node):
            if isinstance(above, Function):
                is_handed = True
            elif isinstance(above, ast.Call):
                if below is above.func:
                    is_handed = False
                elif is_handed and ast.unparse(above.func).rpartition(".")[2] in THREADS:
                    return True
            below = above
        return False

    def above(self, node: ast.AST) -> Iterator[ast.AST]:
        """What it stands in, from the inside."""
        while (above := self.parents.get(node)) is not None:
            yield above
            node = above

    def function(self, node: ast.AST) -> Function | None:
        """The innermost one that it stands in."""
        return next((each for each in self.above(node) if isinstance(each, Function)), None)


class Defined:
    """What all files of a source define, and which of its functions routers run."""

    def __init__(self, files: Iterable[Names] = ()) -> None:
        self.plain: set[str] = set()
        """Functions and methods that are no coroutines."""
        self.coroutines: set[str] = set()
        """Functions of which a call does nothing before it is awaited, and that are nothing else anywhere."""
        self.members: set[str] = set()
        """Attributes that the source gives its own objects and modules."""
        self._run: set[str] = set()
        self._uses: dict[str, set[str]] = {}
        """By function: what it names."""
        files = list(files)
        for names in files:
            for node in ast.walk(names.tree):
                self._define(names, node)
        self.coroutines -= self.plain
        for names in files:
            for node in ast.walk(names.tree):
                self._use(names, node)
        reached = [*self._run]
        while reached:
            more = self._uses.get(reached.pop(), set()) - self._run
            self._run |= more
            reached += more

    def runs(self, function: Function) -> bool:
        """Routers may run it: it is not only called when the source is loaded, or in threads."""
        if not isinstance(function, ast.FunctionDef) or function.decorator_list:
            return True
        return function.name.startswith("__") or function.name in self._run

    def _define(self, names: Names, node: ast.AST) -> None:
        match node:
            case ast.FunctionDef(name=name):
                self.plain.add(name)
                self.members.add(name)
            case ast.AsyncFunctionDef(name=name):
                is_generator = any(isinstance(each, ast.Yield) for each in within(node))
                (self.plain if is_generator or node.decorator_list else self.coroutines).add(name)
                self.members.add(name)
            case ast.Attribute(attr=name, ctx=ast.Store()):
                self.members.add(name)
            case ast.Name(id=name, ctx=ast.Store()) if names.function(node) is None:
                self.members.add(name)

    def _use(self, names: Names, node: ast.AST) -> None:
        """A name of a function stands there, for it to be called now or later."""
        if not isinstance(node, ast.Name | ast.Attribute) or names.in_a_thread(node):
            return
        used = node.id if isinstance(node, ast.Name) else node.attr
        above = names.parents.get(node)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ROUTERS:
            return
        around = names.function(node)
        while isinstance(around, ast.Lambda):
            around = names.function(around)
        if around is None:
            if not (isinstance(above, ast.Call) and above.func is node):
                self._run.add(used)
        elif isinstance(around, ast.FunctionDef) and not (
            around.decorator_list or around.name.startswith("__")
        ):
            self._uses.setdefault(around.name, set()).add(used)
        else:
            self._run.add(used)


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

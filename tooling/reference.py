"""The generated parts of docs/authoring.md: the list of mistakes, and every name that an author meets.

    python tooling/reference.py           print whether the page is as the code says; exit code 1 if it is not
    python tooling/reference.py --write   make it so

What is said of a name is its docstring. A public name without one is an error, unless :data:`ROUTERS_OWN`
says that authors do not meet it. Reads sources as text: it needs nothing installed but this checkout.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/authoring.md"
AUTHORING = "services/router/authoring"
CHAPTERS: dict[str, list[tuple[str, tuple[str, ...]]]] = {
    "A strategy, and what it is given": [
        (f"{AUTHORING}/definition.py", ("strategy",)),
        ("services/router/request/request.py", ("Request",)),
        ("protocol/messages/request/sampling.py", ("SamplingParams",)),
        ("services/router/request/outcome.py", ("Outcome",)),
    ],
    "The mesh": [
        (f"{AUTHORING}/view.py", ("MeshView",)),
        (f"{AUTHORING}/mesh.py", ("Mesh", "Scorer")),
        (f"{AUTHORING}/plan.py", ("PlanMesh",)),
        ("services/router/engines/load.py", ("Load",)),
        (
            f"{AUTHORING}/scoring.py",
            ("load", "sequences", "prefix_match", "labelled", "link_to", "link_from"),
        ),
        (f"{AUTHORING}/splitting.py", ("alone_s", "cheapest_split", "Split")),
        (f"{AUTHORING}/offloading.py", ("offload", "Offload", "Way", "follow_links", "forget_request")),
    ],
    "Engines, and what they do": [
        (f"{AUTHORING}/view.py", ("EngineFacts",)),
        (f"{AUTHORING}/action/engine.py", ("Engine",)),
        (f"{AUTHORING}/action/grant.py", ("GrantHandle", "Sending")),
        (f"{AUTHORING}/action/generating.py", ("Generating", "Chunks")),
        (f"{AUTHORING}/action/race.py", ("Entrant",)),
        ("services/links/stream.py", ("Tokens",)),
        ("protocol/messages/engine_info.py", ("EngineInfo",)),
        ("protocol/messages/engine_load.py", ("EngineLoad",)),
        ("protocol/messages/engine.py", ("Finished",)),
        ("protocol/messages/numerics.py", ("Numerics",)),
    ],
    "Errors": [
        ("protocol/errors.py", ("QueueFull", "InvalidRequest", "CapacityError", "NoEngines", "PeerError"))
    ],
    "Tests": [
        ("testing/run.py", ("in_memory",)),
        ("testing/mesh.py", ("Engine", "MeshInMemory")),
        ("testing/answer.py", ("Answer", "Plan", "Send", "Picked")),
        ("testing/fixtures.py", ("make_mesh",)),
    ],
}
ROUTERS_OWN = {
    "Request": {"from_frame", "begun", "continued", "token_frame"},
    "Mesh": {"departing"},
    "GrantHandle": {"sendings", "is_used", "take_lane", "check_open", "interval", "sampler", "check_free",
                    "check_covered", "check_splits", "has_first", "numerics", "grant"},
    "Sending": {"start", "listen", "name", "numerics"},
    "Generating": {"depends_on", "is_of", "watch", "leave", "give_up", "pass_on", "offset", "is_answered"},
    "EngineInfo": {"incarnation", "address", "events_address", "replay_address", "layout_hash", "heap",
                   "wire_version", "curve_key", "geometry", "heaps", "all_heaps", "exchanges_kv",
                   "events_open", "events_key", "only_publishes"},
    "EngineLoad": {"progress", "is_busy"},
}  # fmt: skip
"""Public, and not for authors."""
SCORERS = "services/router/authoring/scoring.py"


class Undocumented(Exception):
    """A name that authors meet has no docstring."""


def page(text: str) -> str:
    """The page with its generated parts as the code says."""
    for name, made in (("mistakes", mistakes()), ("reference", reference())):
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        text = re.sub(f"{begin}.*?{end}", lambda _: f"{begin}{made}{end}", text, flags=re.DOTALL)  # noqa: B023
    return text


def mistakes() -> str:
    tree = _tree("services/simulation/trial/mistake.py")
    [table] = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "MISTAKES"
    ]
    rows = "".join(
        f"| `{name}` | {what} | {mend} |\n" for name, (what, mend) in ast.literal_eval(table).items()
    )
    return f"| mistake | is | is mended by |\n|---|---|---|\n{rows}"


def reference() -> str:
    parts: list[str] = []
    missing: list[str] = []
    for chapter, files in CHAPTERS.items():
        parts.append(f"### {chapter}\n")
        for file, names in files:
            tree = _tree(file)
            for name in names:
                shown = f"scorer.{name}" if file == SCORERS else name
                parts += _entry(shown, _named(tree, name), missing)
    if missing:
        raise Undocumented(f"no docstring: {', '.join(missing)}")
    return "\n".join(parts)


def _tree(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text(encoding="utf-8"))


def _named(tree: ast.Module, name: str) -> tuple[ast.stmt, str]:
    """The definition, the last one of overloads, and what is said of it."""
    found: list[tuple[ast.stmt, str]] = []
    for node, after in _with_next(tree.body):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if node.name == name:
                found.append((node, ast.get_docstring(node) or ""))
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            found.append((node, _said(after)))
    return found[-1]


def _entry(name: str, named: tuple[ast.stmt, str], missing: list[str]) -> Iterator[str]:
    node, said = named
    if not said:
        missing.append(name)
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        yield f"#### `{_signature(name, node, has_self=False)}`\n\n{_prose(said)}\n"
    elif isinstance(node, ast.ClassDef):
        bases = [
            ast.unparse(base) for base in node.bases if not ast.unparse(base).endswith(("Struct", "Tuple"))
        ]
        above = f" (as `{bases[0]}`, and more)" if bases and bases[0] != "Exception" else ""
        yield f"#### `{name}`{above}\n\n{_prose(said)}\n"
        members = [*_members(node, missing)]
        if members:
            yield "\n".join(members) + "\n"
    else:
        yield f"#### `{name}`\n\n{_prose(said)}\n"


def _members(node: ast.ClassDef, missing: list[str]) -> Iterator[str]:
    hidden = ROUTERS_OWN.get(node.name, set())
    body = [*node.body]
    for each in node.body:  # what the constructor sets and says something of
        if isinstance(each, ast.FunctionDef) and each.name == "__init__":
            body += each.body
    for each, after in _with_next(body):
        told = _member(each, after)
        if told is None or told[0].startswith("_") or told[0] in hidden:
            continue
        name, shown, said = told
        is_set_here = (
            isinstance(each, ast.Assign | ast.AnnAssign) and "self." in ast.unparse(each).split("=")[0]
        )
        if not said and is_set_here:
            continue  # the constructor's own affair
        if not said and not isinstance(each, ast.AnnAssign):  # a field's name and type may say enough
            missing.append(f"{node.name}.{name}")
        yield f"- `{shown}`: {_line(said)}" if said else f"- `{shown}`"


def _member(node: ast.stmt, after: ast.stmt | None) -> tuple[str, str, str] | None:
    """Its name, how it is shown, and what is said of it."""
    match node:
        case ast.FunctionDef() | ast.AsyncFunctionDef():
            said = ast.get_docstring(node) or ""
            if any(ast.unparse(each) == "property" for each in node.decorator_list):
                kind = f": {ast.unparse(node.returns)}" if node.returns else ""
                return node.name, f"{node.name}{kind}", said
            return node.name, _signature(node.name, node, has_self=True), said
        case ast.AnnAssign(target=ast.Name(id=name)):
            value = f" = {ast.unparse(node.value)}" if node.value and _is_plain(node.value) else ""
            return name, f"{name}: {ast.unparse(node.annotation)}{value}", _said(after)
        case ast.Assign(targets=[ast.Attribute(value=ast.Name(id="self"), attr=name)]):
            return name, name, _said(after)
    return None


def _is_plain(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant | ast.Tuple | ast.List) and "field" not in ast.unparse(value)


def _with_next(body: list[ast.stmt]) -> Iterator[tuple[ast.stmt, ast.stmt | None]]:
    yield from zip(body, [*body[1:], None], strict=True)


def _said(after: ast.stmt | None) -> str:
    """The text that stands below an assignment."""
    match after:
        case ast.Expr(value=ast.Constant(value=str(said))):
            return said
    return ""


def _signature(name: str, node: ast.FunctionDef | ast.AsyncFunctionDef, *, has_self: bool) -> str:
    arguments = ast.unparse(node.args)
    if has_self:
        arguments = arguments.partition(", ")[2] if ", " in arguments else ""
    waits = "await " if isinstance(node, ast.AsyncFunctionDef) else ""
    returns = (
        f" -> {ast.unparse(node.returns)}" if node.returns and ast.unparse(node.returns) != "None" else ""
    )
    return f"{waits}{name}({arguments}){returns}"


def _prose(said: str) -> str:
    return "\n\n".join(_line(part) for part in re.split(r"\n\s*\n", said))


def _line(said: str) -> str:
    """In one line, in Markdown."""
    plain = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", " ".join(said.split()))
    return re.sub(r"``([^`]+)``", r"`\1`", plain).replace("|", "\\|" if "`" not in plain else "|")


def main(arguments: list[str]) -> int:
    text = PAGE.read_text(encoding="utf-8")
    made = page(text)
    if "--write" in arguments:
        PAGE.write_text(made, encoding="utf-8")
    elif made != text:
        print("docs/authoring.md is not as the code says: python tooling/reference.py --write")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""What can be seen of a source without running it: mistakes that are ones wherever they stand.

Each rule is a generator of (mistake, node, sentence) over one file. They refuse a publication, so they tell
only of what is certain; whatever depends on how things go is left to the dry run.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Mapping

from microserve.services.simulation.trial.mistake import Found
from microserve.services.simulation.trial.source_names import (
    ROUTERS,
    Defined,
    Function,
    Names,
    text,
    waits,
    within,
)

DOOR = "microserve.services.router.authoring"
OPEN = (DOOR, "microserve.services.router.strategies", "microserve.testing")
"""What a source may import of ours."""
AWAITED = ("prep_recv", "commit", "release", "hold", "race")
"""Coroutines of engines and meshes; with an argument, or ``lock.release()`` would be one."""
CLOCKS = {
    *(f"time.{name}{ns}" for name in ("time", "monotonic", "perf_counter") for ns in ("", "_ns")),
    *("time.process_time", "time.thread_time", "time.localtime", "time.gmtime"),
    *("datetime.datetime.now", "datetime.datetime.utcnow", "datetime.datetime.today", "datetime.date.today"),
}
DICE = ("random.", "secrets.", "os.urandom", "uuid.uuid1", "uuid.uuid4", "numpy.random.")
BLOCKING = (
    *("time.sleep", "os.system", "os.popen", "os.wait", "subprocess.", "socket.", "select.", "requests."),
    *("urllib.request.", "http.client.", "urllib3.", "sqlite3.", "asyncio.run", "httpx.get", "httpx.post"),
)
BLOCKING_NAMES = ("open", "input")
ENDING = ("sys.exit", "os._exit", "os.abort", "os.kill", "signal.")
CANCELLED = ("asyncio.CancelledError", "asyncio.exceptions.CancelledError")
TUPLE_NAMES = ("_replace", "_asdict", "_fields", "_make")

Seen = tuple[str, ast.AST, str]


def read(files: Mapping[str, str]) -> list[Found]:
    """All that the files show, by file and line; nothing of one that cannot be parsed (loading says so)."""
    found: list[Found] = []
    parsed = {file: names for file, source in files.items() if (names := _names(source)) is not None}
    defined = Defined(parsed.values())
    for file, names in parsed.items():
        names.defined = defined
        seen = [each for rule in RULES for each in rule(names)]
        found += [Found(mistake, file, getattr(node, "lineno", 0), told) for mistake, node, told in seen]
    return sorted(set(found), key=lambda each: (each.file, each.line, each.mistake))


def labels_in(files: Mapping[str, str], parameters: Mapping[str, object]) -> dict[str, tuple[str, int]]:
    """Labels that the source names where it picks, by itself or by a parameter, with file and line; not those
    that it gives itself."""
    asked: dict[str, tuple[str, int]] = {}
    given: set[str] = set()
    for file, source in files.items():
        names = _names(source)
        if names is None:
            continue
        defaults = {**_defaults(names.tree), **parameters}
        for node in ast.walk(names.tree):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute | ast.Name):
                continue
            called = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
            if called in ("pick", "engines", "labelled") and node.args:
                for each in ast.walk(node.args[0]):
                    label = text(each) or (defaults.get(each.id) if isinstance(each, ast.Name) else None)
                    if isinstance(label, str) and label:
                        asked.setdefault(label, (file, node.lineno))
            elif called == "label":
                given |= {label for each in ast.walk(node) if (label := text(each))}
    return {label: place for label, place in asked.items() if label not in given}


def _names(source: str) -> Names | None:
    try:
        return Names(ast.parse(source))
    except (SyntaxError, ValueError, RecursionError):
        return None


def _defaults(tree: ast.Module) -> dict[str, str]:
    """Texts that parameters have by default."""
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.AsyncFunctionDef):
            for argument, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True):
                if (label := text(default)) is not None:
                    found[argument.arg] = label
    return found


# --- the rules -------------------------------------------------------------------------------------


def forgotten_awaits(names: Names) -> Iterator[Seen]:
    for node in ast.walk(names.tree):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        is_ours = name in AWAITED and bool(node.args) and name not in names.defined.plain
        if is_ours or names.dotted(node.func) == "asyncio.sleep" or _is_own_coroutine(names, node.func):
            called = ast.unparse(node.func)
            if _is_dropped(names, node):
                yield "forgotten-await", node, f"nobody awaits `{called}(...)`: write `await {called}(...)`"


def _is_own_coroutine(names: Names, called: ast.expr) -> bool:
    """One of the source's own, by itself, of its object or of its own module."""
    match called:
        case ast.Name(id=name):
            is_own = names.imported.get(name, ".").startswith(".")
        case ast.Attribute(value=ast.Name(id=owner), attr=name):
            is_own = owner in ("self", "cls") or names.imported.get(owner, "").startswith(".")
        case _:
            return False
    return is_own and name in names.defined.coroutines


def _is_dropped(names: Names, call: ast.expr) -> bool:
    """What the call returns is used as if it were the result, or by nobody."""
    above = names.parents.get(call)
    match above:
        case ast.Expr() | ast.Attribute() | ast.Yield() | ast.Compare() | ast.UnaryOp():
            return True
        case ast.If() | ast.While():
            return above.test is call
        case ast.IfExp():
            return above.test is call or _is_dropped(names, above)
        case ast.BoolOp():
            return above.values[-1] is not call or _is_dropped(names, above)
        case ast.Subscript():
            return above.value is call
        case ast.AsyncFor():
            return above.iter is call
        case ast.Assign(targets=[ast.Name(id=name)]) | ast.NamedExpr(target=ast.Name(id=name)):
            function = names.function(call)
            return function is not None and not _is_awaited(function, name)
        case ast.keyword():
            called = names.parents.get(above)
            return isinstance(called, ast.Call) and ast.unparse(called.func).endswith(".start_generate")
        case _:
            return False


def _is_awaited(function: ast.AST, name: str) -> bool:
    """The name is awaited, handed on by itself, or put into a collection."""
    for node in ast.walk(function):
        inside: list[ast.AST] = [*node.args] if isinstance(node, ast.Call) else []
        if isinstance(node, ast.Await):
            inside = [*ast.walk(node.value)]
        elif isinstance(node, ast.List | ast.Tuple | ast.Set):
            inside = [*node.elts]
        elif isinstance(node, ast.Return) and node.value is not None:
            inside = [node.value]
        wants = isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2]
        if wants in ("remote_send", *AWAITED):  # a grant, and no coroutine
            continue
        if any(isinstance(each, ast.Name) and each.id == name for each in inside):
            return True
    return False


def calls(names: Names) -> Iterator[Seen]:
    """Of clocks, lots, what blocks, and what would end the router; within functions."""
    for node in ast.walk(names.tree):
        function = names.function(node)
        if not isinstance(node, ast.Call) or function is None or names.in_a_thread(node):
            continue
        name = names.dotted(node.func)
        own = node.func.id if isinstance(node.func, ast.Name) and not name else ""
        if name in CLOCKS:
            yield "other-clock", node, f"`{name}()` is a clock that no simulation can repeat: use `mesh.now`"
        elif name.startswith(ENDING) or own in ("exit", "quit"):
            told = f"`{name or own}(...)` would end the router: raise `QueueFull(...)` to refuse a request"
            yield "raises", node, told
        elif name.startswith(DICE) and not (name.endswith(".Random") and node.args):
            told = f"`{name}(...)` draws lots that no seed repeats: use `mesh.rng`"
            yield "other-clock", node, told
        elif not _is_run(names, function):
            continue
        elif name == "time.sleep":
            told = "`time.sleep` stops the whole router: `await asyncio.sleep(...)` instead"
            yield "blocking-call", node, told
        elif name.startswith(BLOCKING) or own in BLOCKING_NAMES:
            told = (
                f"`{name or own}(...)` stops the whole router while it waits: do it when the source is loaded"
            )
            told += ", or by `await asyncio.to_thread(...)` in the plan, and keep what comes in `mesh.state`"
            yield "blocking-call", node, told


def _is_run(names: Names, function: Function) -> bool:
    """By a router, and not only when the source is loaded or in a thread."""
    around = [function, *(each for each in names.above(function) if isinstance(each, Function))]
    return all(names.defined.runs(each) for each in around)


def endless_loops(names: Names) -> Iterator[Seen]:
    for node in ast.walk(names.tree):
        if not isinstance(node, ast.While) or not _is_always_true(node.test):
            continue
        inside = [*within(node)]
        if _is_left_by_an_error(names, node):
            continue
        if not waits(node) and not any(isinstance(e, ast.Break | ast.Return | ast.Raise) for e in inside):
            told = "this loop never ends and never waits, so the router would stand still: `await` something"
            yield "endless-loop", node, f"{told} in it, or end it by `break`"


def _is_left_by_an_error(names: Names, loop: ast.While) -> bool:
    """As ``while True: heappop(heap)`` is, where ``IndexError`` is caught around it."""
    below: ast.AST = loop
    for above in names.above(loop):
        if isinstance(above, Function):
            return False
        if isinstance(above, ast.Try) and above.handlers and below in above.body:
            return True
        below = above
    return False


def _is_always_true(test: ast.expr) -> bool:
    return isinstance(test, ast.Constant) and bool(test.value)


def swallowed_cancellations(names: Names) -> Iterator[Seen]:
    for node in ast.walk(names.tree):
        if isinstance(node, ast.Try) and any(map(waits, node.body)):
            for handler in node.handlers:
                caught = _catches_cancellation(names, handler.type)
                raises = any(isinstance(each, ast.Raise) for each in within(handler))
                if caught and not raises and not _is_own_task(names, node, node.body):
                    yield "swallowed-cancellation", handler, _swallowed(caught)
        elif (
            isinstance(node, ast.With)
            and any(map(waits, node.body))
            and not _is_own_task(names, node, node.body)
        ):
            for item in node.items:
                call = item.context_expr
                if isinstance(call, ast.Call) and names.dotted(call.func) == "contextlib.suppress":
                    for each in call.args:
                        if caught := _catches_cancellation(names, each):
                            yield "swallowed-cancellation", node, _swallowed(caught)


def _swallowed(caught: str) -> str:
    return (
        f"{caught} also catches that the client has left or the time is up: "
        "catch `Exception`, or `raise` at the end of the handler"
    )


def _catches_cancellation(names: Names, kind: ast.expr | None) -> str:
    """How that is written; empty: it does not."""
    if kind is None:
        return "`except:`"
    for each in kind.elts if isinstance(kind, ast.Tuple) else [kind]:
        is_base = isinstance(each, ast.Name) and each.id in ("BaseException", "GeneratorExit")
        if is_base or names.dotted(each) in CANCELLED:
            return f"`{ast.unparse(each)}`"
    return ""


def _is_own_task(names: Names, node: ast.AST, body: list[ast.stmt]) -> bool:
    """``task.cancel()``, and then it is waited for: the cancellation is the author's own."""
    match body:
        case [ast.Expr(value=ast.Await(value=ast.Name() | ast.Attribute() as task))]:
            around = names.function(node) or names.tree
            return any(
                isinstance(each, ast.Call) and ast.unparse(each.func) == f"{ast.unparse(task)}.cancel"
                for each in ast.walk(around)
            )
    return False


def beside_the_door(names: Names) -> Iterator[Seen]:
    for node in ast.walk(names.tree):
        modules: list[str] = []
        if isinstance(node, ast.Import):
            modules = [each.name for each in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            modules = [node.module or ""]
            if modules == ["microserve.services.router"]:
                modules = [f"{modules[0]}.{each.name}" for each in node.names]
        for module in modules:
            is_ours = module == "microserve" or module.startswith("microserve.")
            if is_ours and module not in OPEN and not module.startswith(OPEN[1] + "."):
                told = f"`{module}` is the router's own and may change: import from `{DOOR}`"
                yield "not-the-door", node, told
        if isinstance(node, ast.Attribute) and _is_private(names, node):
            told = f"`{ast.unparse(node)}` is a private name and may change: docs/authoring.md has the others"
            yield "not-the-door", node, told


def _is_private(names: Names, node: ast.Attribute) -> bool:
    is_hidden = node.attr.startswith("_") and not node.attr.endswith("__") and node.attr not in TUPLE_NAMES
    owner = node.value.id if isinstance(node.value, ast.Name) else ""
    if not is_hidden or owner in ("self", "cls") or names.imported.get(owner, "").startswith("."):
        return False
    return owner in ROUTERS or node.attr not in names.defined.members


RULES: tuple[Callable[[Names], Iterator[Seen]], ...] = (
    forgotten_awaits,
    calls,
    endless_loops,
    swallowed_cancellations,
    beside_the_door,
)

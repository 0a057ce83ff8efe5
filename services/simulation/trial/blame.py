"""What a router told of a strategy that went wrong, as a mistake with its line and what mends it.

Owns how the router's words become an author's. Runs nothing; knows texts, places and the source.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from microserve.protocol.strategy_source import TOP
from microserve.services.simulation.trial.mistake import Found


class Told(NamedTuple):
    """One thing that went wrong."""

    text: str
    """``ErrorType: what it said``, or what the router said."""
    place: str = ""
    """``FILE:LINE`` as tracebacks have it; empty: not known."""
    phase: str = ""
    """While what: of the dry run, in words."""


class _Rule(NamedTuple):
    said: str
    mistake: str
    mend: str
    word: str = ""
    """Without a place, the line is the first that has this."""


INTERVAL = (
    "intervals are half-open, sends meet from the grant's match to its end, and `begin` of the generation "
    "is that end"
)
HANDLE = (
    "engines, grants and meshes are of one request: keep `engine.id`, and take the engine from "
    "`mesh.engines()` each time"
)
GRANT = "a grant is used once, at the engine that gave it: `await engine.prep_recv(...)` gives another"
RULES = (
    _Rule(
        "a request generates once|races with itself|a race has|entrant of a race",
        "two-generations",
        "`yield await mesh.race(request, first, second)` lets two run, `engine.abort(request)` ends one",
        "start_generate",
    ),
    _Rule("was used already|grant is one of|one open grant|'after' sends", "grant-twice", GRANT),
    _Rule(
        "forgotten grant",
        "grant-forgotten",
        "give it to `start_generate(..., grant=grant)`, or back by `await engine.release(request, grant)`",
        "prep_recv",
    ),
    _Rule("this mesh serves request|request .* has ended", "kept-handle", HANDLE),
    _Rule(
        "InvalidInterval|no send covers|at most .* sends|no sender samples", "gap", INTERVAL, "remote_send"
    ),
    _Rule("generation of another request", "kept-handle", HANDLE),
    _Rule(
        "yielded token|ended before its stream|generation at token|that had ended|no engine gave",
        "tokens",
        "`yield` every chunk of the generation as it came, to the last; or the generation itself",
        "yield",
    ),
    _Rule(
        "'coroutine' object|got coroutine|received an object of type coroutine|coroutine .* never awaited",
        "forgotten-await",
        "`await` what `prep_recv`, `commit`, `release`, `hold` and `race` return",
    ),
    _Rule(
        "yielded .*, not Tokens|can't be used in 'await' expression",
        "wrong-yield",
        "`yield` what `start_generate` returns (without `await`), or its chunks",
        "yield",
    ),
    _Rule(
        "waited for no engine|somebody spins",
        "waits-for-nothing",
        "bound the wait by `asyncio.timeout`, wait by `mesh.hold(...)`, or let a plan do what takes long",
        "sleep(0",
    ),
    _Rule(
        "MB of memory|MemoryError", "memory", "work on a part at a time, and keep only what is needed again"
    ),
    _Rule(
        "held the router|for too long",
        "endless-loop",
        "do less at a time, `await asyncio.sleep(0)` in between, or let a plan prepare it",
    ),
    _Rule(
        "would end the router|wanted to end the router",
        "raises",
        "raise `QueueFull(...)` to refuse a request",
    ),
    _Rule(
        "no engine with the label",
        "nobodys-label",
        "name one that engines have, or catch `NoEngines` and serve elsewhere",
        "strict",
    ),
    _Rule("stops the whole router", "blocking-call", ""),
    _Rule(
        "run on when they are cancelled",
        "swallowed-cancellation",
        "catch `Exception` in them, or `raise` what else comes",
        "create_task",
    ),
    _Rule("no simulation can repeat", "other-clock", ""),
    _Rule(
        "SyntaxError|IndentationError|ImportError|ModuleNotFoundError|relative import",
        "unloadable",
        "routers have the standard library, MicroServe and what is installed beside it",
    ),
    _Rule(
        "must be an 'async def'|must take|needs a type|default of|annotations cannot|has no strategy"
        "|on_end must|plan must|is no parameter of|'s .* is no parameter",
        "shape",
        "`@strategy async def name(mesh, request, *, parameter: type = default)` with `yield`",
        "@strategy",
    ),
)


def blame(told: Told, sources: Mapping[str, str], file_of: Callable[[str], str | None]) -> Found:
    """``file_of`` gives the name in ``sources`` of a file in a traceback; None: not of this source."""
    file, line = _place(told.place, file_of)
    shown = sources.get(file, "").splitlines()[line - 1 : line] if line else []
    rule = next((each for each in RULES if re.search(each.said, told.text)), None) or _by_line(
        told.text, shown
    )
    if not line and rule.word:
        file, line = _first(rule.word, sources)
    said = re.sub(r": $", "", told.text)
    said = re.sub(r"^(StrategyError|StrategyHung|ConfigError|NotSoHere): ", "", said)
    said = f"{said}, {told.phase}" if told.phase else said
    return Found(rule.mistake, file, line, f"{said}: {rule.mend}" if rule.mend else said)


def file_of(place: str) -> str | None:
    """The name in a package of a published source's file, as tracebacks call it."""
    if not place.startswith("<strategy "):
        return None
    return place.rstrip(">").partition("/")[2] or TOP


def _by_line(said: str, shown: list[str]) -> _Rule:
    """Python's own errors: the line says what the author meant."""
    code = shown[0] if shown else ""
    if "not iterable" in said and "Generating" in said:
        return _Rule("", "wrong-yield", "`async for`, or `yield` the generation itself")
    if said.startswith("ZeroDivisionError"):
        return _Rule("", "raises", "rates and loads are 0 as long as nothing has been measured")
    if said.startswith("KeyError") and ".state[" in code:
        return _Rule("", "raises", "`mesh.state` is empty at first: `mesh.state.setdefault(...)`")
    if said.startswith("KeyError") and "attributes" in code:
        mend = "a client need not send that: `request.attributes.get(...)`, and a way for who has none"
        return _Rule("", "absent-attribute", mend)
    if re.match(r"IndexError|StopIteration|KeyError: ['\"]engine|ValueError: .*(unpack|empty)", said):
        mend = (
            "engines come and go, and a mesh may have one: `mesh.pick(...)`, or a loop over `mesh.engines()`"
        )
        return _Rule("", "absent-engine", mend)
    return _Rule("", "raises", "catch what may fail where it fails, or serve without it")


def _place(place: str, file_of: Callable[[str], str | None]) -> tuple[str, int]:
    file, _, line = place.rpartition(":")
    found = file_of(file) if file else None
    return (found, int(line)) if found is not None and line.isdecimal() else ("", 0)


def _first(word: str, sources: Mapping[str, str]) -> tuple[str, int]:
    for file, source in sources.items():
        for number, line in enumerate(source.splitlines(), start=1):
            if word in line and not line.lstrip().startswith(("#", '"', "import", "from")):
                return file, number
    return "", 0

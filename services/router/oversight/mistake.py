"""What a strategy raises, as something that has no code of the strategy's in it.

An exception is an object like any other: whoever prints it runs its ``__str__``, and those of all that it
holds, of what it was raised from, of its group. So this is done while the strategy is still timed, and only
what cannot run anything leaves the span. Knows no clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from microserve.protocol.errors import StrategyError
from microserve.services.router.oversight.cut import Kind, kind

MAX_TEXT_CHARS = 1000
MAX_PLAIN_CHARS = 1 << 16
"""No error of ours has so much to say; lines and answers are made of it."""
MAX_CHAIN = 64
"""Exceptions behind one another; nobody reads more, and a chain can be a circle."""
_PLAIN = (str, int, float, bool, bytes, type(None))
_MODULES = ("builtins.", "asyncio.", "microserve.")
"""Of exceptions that are nobody's own; published sources have other names (cut.py)."""


def harmless(error: BaseException) -> BaseException:
    """The error itself if nothing of it can run code of others; else a :class:`StrategyError` that tells of
    it and has its traceback. Runs that code: call it where it is timed.

    What it was raised from decides nothing: a cancellation, or the loss of an engine, that comes to a
    strategy while it handles an error of its own is still what it is, and goes on without that error."""
    if all(map(_is_plain, _chain(error))):
        return error
    if all(map(_is_plain, _members(error))):
        for member in _members(error):
            if member is not None:
                member.__cause__ = member.__context__ = None
        return error
    text = f"{type(error).__name__}: {error}"
    mistake = StrategyError(text[:MAX_TEXT_CHARS]).with_traceback(error.__traceback__)
    mistake.__suppress_context__ = True
    return mistake


def place_of(error: BaseException | None) -> str:
    """``FILE:LINE`` of the strategy's code that raised it, or waited where it came; empty if none did."""
    for _ in range(MAX_CHAIN):
        if error is None:
            break
        trace, found = error.__traceback__, error.at if isinstance(error, StrategyError) else ""
        while trace is not None:
            if kind(trace.tb_frame) is Kind.THEIRS:
                found = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
            trace = trace.tb_next
        if found:
            return found
        members = error.exceptions if isinstance(error, BaseExceptionGroup) else ()
        error = members[0] if members else error.__cause__ or error.__context__
    return ""


def _members(error: BaseException) -> list[BaseException | None]:
    """It and, of a group, all in it; with a None if that is too much."""
    return list(_chain(error, is_whole=False))


def _chain(error: BaseException, *, is_whole: bool = True) -> Iterator[BaseException | None]:
    """It and all that is printed with it (``is_whole``: also what it was raised from); ends with None if
    that is too much."""
    waiting: list[BaseException | None] = [error]
    seen: set[int] = set()
    while waiting:
        each = waiting.pop()
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        if len(seen) > MAX_CHAIN:
            yield None
            return
        yield each
        if is_whole:
            waiting += [each.__cause__, each.__context__]
        if isinstance(each, BaseExceptionGroup):
            waiting += each.exceptions


def _is_plain(error: BaseException | None) -> bool:
    if error is None or not f"{type(error).__module__}.".startswith(_MODULES):
        return False
    if isinstance(error, BaseExceptionGroup):
        return _are_plain([error.message])
    return _are_plain(error.args) and _are_plain(vars(error).values())


def _are_plain(values: Iterable[object]) -> bool:
    for value in values:
        if type(value) in (tuple, list):
            if not all(type(each) in _PLAIN for each in value):  # type: ignore[attr-defined]
                return False
        elif type(value) not in _PLAIN or (type(value) is str and len(value) > MAX_PLAIN_CHARS):
            return False
    return True

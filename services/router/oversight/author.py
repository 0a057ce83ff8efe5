"""Whose code runs: the version of a strategy that a task belongs to, and the tasks that it has started.

A task that code of a strategy starts inherits its author by its context, as everything does that is scheduled
there: what hangs is known by that, and what is left behind is cancelled with the run that has left it.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Coroutine
from enum import Enum
from functools import partial
from typing import Any, Protocol, cast

CANCEL_S = 1.0
"""A task that was cancelled for so long and runs on never ends."""
LOOKS = 10
"""In that time. Where the router itself did not run no task could end: it has as many turns of the loop."""


class Verdict(Enum):
    """Of a version, by what it has done in this router."""

    FREE = "it may run"
    CONDEMNED = "it has hung: what waits is ended, with a short time for its cleanup"
    ABANDONED = "its cleanup has hung too: what waits is never resumed"


class Author:
    """One run of a version: for a request, for a shadow's decision, of a plan."""

    def __init__(
        self,
        strategy: str,
        version: int,
        verdict: Callable[[], Verdict] = lambda: Verdict.FREE,
        on_stray: Callable[[str], None] = lambda reason: None,
        condemn: Callable[[str], None] = lambda reason: None,
    ) -> None:
        """``verdict``: of the version, now. ``condemn``: it was broken off, and why. ``on_stray`` hears what
        it did outside of the run itself, in a task or a callback, and had to be broken off for."""
        self.strategy = strategy
        self.version = version
        self.verdict = verdict
        self.on_stray = on_stray
        self.condemn = condemn
        self.tasks: set[asyncio.Task[Any]] = set()
        """Started by it, and not done."""

    def end(self) -> None:
        """The run is over: so are its tasks."""
        for task in list(self.tasks):
            task.cancel()
        self._look(LOOKS)

    def _look(self, num_left: int) -> None:
        if not self.tasks:
            return
        if num_left:
            loop = asyncio.get_running_loop()
            loop.call_later(CANCEL_S / LOOKS, self._look, num_left - 1, context=nobodys())
        else:
            self.on_stray(f"it left {len(self.tasks)} tasks behind that run on when they are cancelled")


AUTHOR: contextvars.ContextVar[Author | None] = contextvars.ContextVar("author", default=None)


def nobodys() -> contextvars.Context:
    """A context of the router's own, for what outlives the run that starts it."""
    context = contextvars.copy_context()
    context.run(AUTHOR.set, None)
    return context


class _Loop(Protocol):
    def set_task_factory(self, factory: Any) -> None: ...


def keep_tasks(loop: asyncio.AbstractEventLoop) -> None:
    """Let every task of a strategy be in its author's book."""
    cast(_Loop, loop).set_task_factory(_make_task)


def _make_task(
    loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, Any], **options: Any
) -> asyncio.Task[Any]:
    task: asyncio.Task[Any] = asyncio.Task(coroutine, loop=loop, **options)
    context = options.get("context")
    author = AUTHOR.get() if context is None else context.get(AUTHOR)
    if author is not None:
        author.tasks.add(task)
        task.add_done_callback(partial(_ended, author))
    return task


def _ended(author: Author, task: asyncio.Task[Any]) -> None:
    author.tasks.discard(task)
    error = cast(Any, task)._exception  # to ask for it would say that somebody has seen it
    if isinstance(error, SystemExit | KeyboardInterrupt):
        author.on_stray(f"a task of it wanted to end the router: {type(error).__name__}")
